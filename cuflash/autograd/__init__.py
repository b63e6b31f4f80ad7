"""What PyTorch and JAX see of a call, where they look on: to differentiate, vectorise, trace or compile it.

Their adapters in `frameworks/` say whether they do. The operations here end in `call/`, on arrays that the framework
has finished with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..frameworks import Framework
from ..frameworks import torch as torch_adapter


def operations(framework: Framework) -> Any:
    """The module with `attention` and `attention_to_cache` of a framework that looks on; it imports the framework.

    `attention` takes (q, k, v, arguments, bound): normalised `Arguments`, and the mods among them as a `tracer.Bound`,
    or None. It gives (out, lse, max_logit), of which what `arguments.aux` does not name may be anything.

    `attention_to_cache` takes (arrays, indices, options, length, bound): arrays and index arrays by name;
    `CacheOptions`; the number of keys where `cache_seqlens` is one; mods, as above. It gives out, lse where it is
    wanted, and the new caches where they are not written in place. It has no gradient: `UnsupportedError` once one is
    computed.
    """
    if framework is torch_adapter:
        from . import torch

        return torch
    from . import jax

    return jax


def outside_of_graphs() -> Callable[..., Any]:
    """A function that calls another, with the arguments that follow it, outside of the graph of torch.compile."""
    from .torch_uncompiled import uncompiled

    return uncompiled
