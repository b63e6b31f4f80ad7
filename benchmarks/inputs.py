"""The arrays of a problem: normal draws, in as many copies as it takes to outgrow the cache; and their views in PyTorch
and JAX, of the same memory where these allow it."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from cuflash.dtypes import BY_NAME

from .cases import Problem, slopes, table
from .timing import Clock

_ROTATED_BYTES = 512 << 20  # several times any L2


class Inputs:
    """`copies` of q, k, v (and dout), all different, and `shared`: cu_seqlens, seqused, page_table."""

    def __init__(self, problem: Problem, clock: Clock, gradients: bool) -> None:
        self.problem, self.clock, self.gradients = problem, clock, gradients
        size = 2 * problem.q_bytes + problem.kv_bytes
        count = min(16, max(2, -(-_ROTATED_BYTES // size))) if clock.gpu else 2
        self.copies = [self._draw(seed) for seed in range(count)]
        self.shared = {name: clock.xp.asarray(x) for name, x in self._lengths().items()}

    def _draw(self, seed: int) -> dict[str, Any]:
        p = self.problem
        random = self.clock.xp.random.default_rng(seed)
        shapes = {"q": p.q_shape, "k": p.k_shape, "v": p.k_shape, **({"dout": p.q_shape} if self.gradients else {})}
        return {name: draw(self.clock.xp, random, shape, p.dtype) for name, shape in shapes.items()}

    def _lengths(self) -> dict[str, np.ndarray]:
        p = self.problem
        if p.layout == "packed":
            return {f"cu_seqlens_{x}": starts(lens) for x, lens in (("q", p.q_lens), ("k", p.k_lens))}
        if p.layout == "cache":
            return {"seqused": np.array(p.k_lens, np.int32)}
        if p.layout == "pages":
            return {"seqused": np.array(p.k_lens, np.int32), "page_table": page_table(p)}
        return {}

    def array(self, values: np.ndarray) -> Any:
        return self.clock.xp.asarray(values)

    @functools.cached_property
    def slopes(self) -> Any:
        return self.array(slopes(self.problem.heads))

    @functools.cached_property
    def table(self) -> Any:
        return self.array(table(self.problem.heads))

    @functools.cached_property
    def torch(self) -> list[dict[str, Any]]:
        return [{name: to_torch(x) for name, x in copy.items()} for copy in self.copies]

    @functools.cached_property
    def torch_shared(self) -> dict[str, Any]:
        return {name: to_torch(x) for name, x in self.shared.items()}

    @functools.cached_property
    def jax(self) -> list[dict[str, Any]]:
        return [{name: to_jax(x) for name, x in copy.items()} for copy in self.copies]


def floats(xp: Any, x: Any) -> Any:
    """`x` in float32; bfloat16 by its bits, for which CuPy needs no kernel that knows it."""
    if x.dtype == BY_NAME["bfloat16"].numpy:
        x = x.view("uint16")
    if x.dtype == np.uint16:
        return (x.astype("uint32") << 16).view("float32")
    return x.astype("float32")


def bits(x: Any) -> Any:
    """The same memory under a type that every kernel of CuPy knows: bfloat16 as uint16."""
    return x.view("uint16") if x.dtype == BY_NAME["bfloat16"].numpy else x


def starts(lens: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *lens]).astype(np.int32)


def page_table(problem: Problem) -> np.ndarray:
    """int32 [batch, most pages of one]: pages lie anywhere; behind a sequence's own the table repeats page 0."""
    pages = problem.pages
    order = np.random.default_rng(6).permutation(sum(pages)).astype(np.int32)
    result = np.zeros((len(pages), max(pages)), np.int32)
    for row, first, count in zip(result, np.cumsum([0, *pages]), pages, strict=False):
        row[:count] = order[first : first + count]
    return result


def draw(xp: Any, random: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal draws; bfloat16 is rounded by its bits."""
    x = random.standard_normal(shape, dtype=xp.float32)
    if dtype != "bfloat16":
        return x.astype(dtype)
    return ((x.view(xp.uint32) + 0x8000) >> 16).astype(xp.uint16).view(BY_NAME["bfloat16"].numpy)


def to_torch(x: Any) -> Any:
    """The same memory as a PyTorch tensor; bfloat16 travels as int16, which every DLPack knows."""
    import torch

    if x.dtype == BY_NAME["bfloat16"].numpy:
        return torch.from_dlpack(x.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(x)


def from_torch(x: Any, clock: Clock) -> Any:
    """A float32 array of the clock's framework."""
    return clock.xp.from_dlpack(x.detach().float().contiguous())


def import_jax() -> Any:
    """JAX, told not to take three quarters of the GPU's memory for itself."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax


def to_jax(x: Any) -> Any:
    jax = import_jax()
    if x.dtype == BY_NAME["bfloat16"].numpy:
        bits = jax.dlpack.from_dlpack(x.view("uint16"))
        return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16)
    return jax.dlpack.from_dlpack(x)


def from_jax(x: Any, clock: Clock) -> Any:
    return clock.xp.from_dlpack(x.astype("float32"))
