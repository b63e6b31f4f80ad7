"""cuflash inside other libraries: a module each, which imports the library only where it is used.

flash_attn     `install()`, then code that imports `flash_attn` runs
transformers   `register()`, then `attn_implementation="cuflash"`
"""

from . import flash_attn as flash_attn
from . import transformers as transformers

__all__ = ["flash_attn", "transformers"]
