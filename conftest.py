"""What is not collected: modules and notebooks that import a framework, where it is missing, and scripts that tests
start."""

from importlib.util import find_spec

_MODULES = {
    "torch": ("torch", "torch_derivatives", "torch_operators", "torch_uncompiled", "torch_vmap"),
    "jax": ("jax", "jax_cache", "jax_call", "jax_sharding"),
}
_ON_TORCH = ("bert_padding", "interface", "mha", "rotary", "tensors")
collect_ignore = [
    f"cuflash/autograd/{module}.py"
    for name, modules in _MODULES.items()
    if find_spec(name) is None
    for module in modules
]
if find_spec("torch") is None:
    collect_ignore += [f"cuflash/integrations/flash_attn/{name}.py" for name in _ON_TORCH]
    collect_ignore += ["notebooks/05_training.ipynb", "notebooks/06_inference.ipynb"]
if find_spec("vllm") is None:
    collect_ignore.append("cuflash/integrations/vllm/backend.py")
# These need four devices: each runs in a process of its own.
collect_ignore += ["tests/frameworks/jax_devices.py", "tests/distributed/jax_devices.py"]
collect_ignore_glob = ["notebooks/*.py"]  # the notebooks once more, which looking for doctests would run
