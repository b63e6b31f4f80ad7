"""Code that imports `flash_attn`, on cuflash: `install()` puts that package's modules in place.

    import cuflash

    cuflash.integrations.flash_attn.install()

    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input

Served, with the names and signatures of flash-attn 2.8: the functions of `flash_attn` and
`flash_attn.flash_attn_interface`, the forward and backward passes that other attention code builds on
(`_flash_attn_forward`, ...) included; `flash_attn.bert_padding`; `flash_attn.layers.rotary` and
`flash_attn.ops.triton.rotary`, RoPE in PyTorch's own operations; of `flash_attn.modules.mha`, `get_alibi_slopes`,
`FlashSelfAttention` and `FlashCrossAttention`. Every other name raises ImportError, as it does where flash-attn is not
installed.
"""

from .installer import install, uninstall

__all__ = ["install", "uninstall"]
