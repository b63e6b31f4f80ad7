"""A module that imports a framework by being imported is collected only where that framework is installed."""

from importlib.util import find_spec

_MODULES = {"torch": "torch_autograd", "jax": "jax_transforms"}
collect_ignore = [f"cuflash/frameworks/{module}.py" for name, module in _MODULES.items() if find_spec(name) is None]
