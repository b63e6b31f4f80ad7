"""Our kernels on the workbench, each with the call that runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import arch as arches
from .. import frameworks
from ..call.mods import bind_mods
from ..errors import ArgumentError
from ..settings import config
from . import jobs, worker
from .given import SECONDS, Array, to_host
from .kernel import Kernel

_ARRAYS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "alibi_slopes", "sink", "seed", "offset",
    "dout", "dlse",
)  # fmt: skip


def load(name: str, q: Array, k: Array, v: Array, *, arch: str | None = None, **keywords: Any) -> Kernel:
    """One of our kernels, and the call that runs it: `attention(q, k, v, **keywords)`, or, for a kernel of the
    backward, `attention_backward`, with `dout` among the keywords.

    name      "forward_sm80", "forward_sm90", "decode_sm80" (with split_size), "combine", "backward_sm80" ...: a file of
              kernels_cu without its ".cu"
    q, k, v   of NumPy, CuPy, PyTorch or JAX, small: the emulator does a few million multiplications a second
    arch      whose shared memory decides on tiles, e.g. "sm_90a"; None: sm_90a for names that end so, else config.arch
    keywords  of `attention`; `captured_grads` and `dlse` too for the backward. No out=

    The arrays are copied now. Arrays on a GPU run there, others on the emulator; `Kernel.on` says otherwise.
    Raises `ArgumentError` if the call does not run that kernel, and whatever the call raises.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 1, 32)).astype(np.float16)
    >>> kernel = load("forward_sm80", x, x, x, causal=True)
    >>> bool(kernel.check())
    True
    >>> kernel.counters().matrix_instructions
    Counter({'mma_m16n8k16_f16': 256})
    """
    if keywords.pop("out", None) is not None:
        raise ArgumentError("out= is not taken: run() returns what a kernel wrote")
    framework = frameworks.of(q)
    given = {n: keywords.pop(n) for n in _ARRAYS if hasattr(keywords.get(n), "shape")}
    mods = [keywords.pop(n, None) for n in ("score_mod", "mask_mod", "block_mask")]
    bound = None
    if any(mod is not None for mod in mods):
        bound = bind_mods(q, k, *mods)
        bound = bound._replace(arrays=tuple(to_host(x, "captured") for x in bound.arrays))
    arrays = {n: to_host(x, n) for n, x in {"q": q, "k": k, "v": v, **given}.items()}
    like = framework.view(q)
    on_gpu = like.device[0] == "cuda"
    target = arch or ("sm_90a" if name.endswith("sm90") else config.arch)
    if on_gpu and arch is None:
        target = frameworks.cupy.arch_of(like.device[1]).name
    if name == "forward_sm80":
        keywords["kernel_options"] = {**(keywords.get("kernel_options") or {}), "kernel": "sm_80"}
    backend = "cuda" if on_gpu else "emulator"
    problem = jobs.OurProblem(name, arrays, keywords, bound, arches.named(target).name, backend)
    backward = name.startswith(("backward", "captured_gradient"))
    if backward != ("dout" in arrays):
        needs = "the backward: pass dout=, in the shape of the result" if backward else "the forward: leave out dout="
        raise ArgumentError(f"{name} is a kernel of {needs}")
    if backward:
        forward = {n: x for n, x in arrays.items() if n not in ("dout", "dlse")}
        results = worker.call(jobs.forward_of, problem, forward, seconds=SECONDS)
        problem = dataclasses.replace(problem, arrays={**arrays, **results})
    found = tuple(worker.call(jobs.specs, problem, seconds=SECONDS))
    return Kernel(name, problem, found, like=like, framework=framework)
