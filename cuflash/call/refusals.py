"""What no kernel does, and what to use instead: one text each, for the call that asks for it and for `supports`."""

from __future__ import annotations

PAGES_WITHOUT_GRADIENTS = (
    "keys in pages have no gradients: gather the pages of each sequence, k[page_table].reshape(batch, -1, heads, d), "
    "and pass seqused_k to attention and attention_backward"
)

# What no kernel here does, and what to use instead: said by `attention` and by `supports`.
UNSUPPORTED = {
    "kernel_options": "tiles and stages follow from the problem and the device; there is {'kernel': 'sm_80'}, and "
    "'persistent' and 'pack_heads', True or False, 'cluster', 1 or 2, and 'order', 'long' or 'position', to choose: "
    "leave it None",
}

# What no operation of a framework does: where a call is differentiated, traced or vectorised.
UNSUPPORTED_OPERATION = {
    "page_table": (
        "JAX has keys in pages in host memory and outside of its transformations alone: gather the pages of each "
        "sequence, k[page_table].reshape(batch, -1, heads, d), and pass seqused_k"
    ),
    "dropout_mask": (
        "it is no result to differentiate: call attention once more without gradients, in PyTorch under "
        "torch.no_grad(), with the same seed and offset"
    ),
    "out": (
        "a result that autograd, torch.func or a compiler follows is always a new array: leave out= away, or call "
        "outside of them, in PyTorch under torch.no_grad(), in JAX "
        "outside of jit and grad"
    ),
    "kernel_options": (
        "what autograd, torch.func or a compiler follows runs the kernel that is best: leave it None, or call outside "
        "of them"
    ),
}
