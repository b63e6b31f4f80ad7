"""cuflash inside other libraries: a module each, which imports the library only where it is used.

transformers   `register()`, then `attn_implementation="cuflash"`
"""

from . import transformers as transformers

__all__ = ["transformers"]
