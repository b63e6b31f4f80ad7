"""A module that imports a framework by being imported is collected only where that framework is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["cuflash/frameworks/torch_autograd.py"]
