"""cuflash inside other libraries: a module each, which imports the library only where it is used.

flash_attn     `install()`, then code that imports `flash_attn` runs
torch          `register()`, then `activate_flash_attention_impl("cuflash")`: PyTorch's own SDPA and varlen_attn
transformers   `register()`, then `attn_implementation="cuflash"`
vllm           installed beside vLLM, `--attention-backend CUFLASH`
"""

from . import flash_attn as flash_attn
from . import torch as torch
from . import transformers as transformers
from . import vllm as vllm

__all__ = ["flash_attn", "torch", "transformers", "vllm"]
