"""Rows that are no whole number of 16 bytes, in arrays where each begins at a multiple of 16: what lies behind their
ends is NaN, and neither reaches a result nor is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backends import using

import cuflash

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def behind(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Numbers in the first columns of an array of 32 columns that is NaN behind them."""
    whole = np.full((*shape[:-1], 32), np.nan, dtype)
    whole[..., : shape[-1]] = rng.standard_normal(shape).astype(dtype)
    return whole[..., : shape[-1]]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "dtype, d, d_v", [(np.float16, 20, 20), (np.float16, 20, 24), (np.float32, 6, 5), (bfloat16, 8, 9)]
)
def test_nothing_behind_a_row_is_touched(rng, arch, dtype, d, d_v):
    q, k, v, dout = (
        behind(rng, (1, n, 1, x), dtype) for n, x in ((40, d), (70, d), (70, d_v), (40, d_v))
    )  # fmt: skip
    expected = cuflash.attention(q, k, v, aux=("lse",))
    gradients = cuflash.attention_backward(dout, q, k, v, expected.out, expected.lse)
    out, dq, dk, dv = (behind(rng, x.shape, dtype) for x in (dout, q, k, v))
    with using("emulator", arch):
        lse = cuflash.attention(q, k, v, out=out, aux=("lse",)).lse
        cuflash.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    np.testing.assert_allclose(lse, expected.lse, atol=1e-4)
    for x, y in zip((out, dq, dk, dv), (expected.out, *gradients[:3]), strict=True):
        np.testing.assert_allclose(x.astype(float), y.astype(float), atol=0.06 if dtype is bfloat16 else 4e-3)
        assert np.isnan(x.base[..., x.shape[-1] :].astype(float)).all()


@pytest.mark.parametrize("pages", [False, True])
def test_nothing_behind_a_row_of_a_cache_is_touched(rng, pages):
    dims, used = (20, 24), np.array([50], np.int32)
    q, k, v = (behind(rng, (1, 1, *x), np.float16) for x in ((2, dims[0]), (1, dims[0]), (1, dims[1])))
    caches = [behind(rng, (4, 16, 1, d) if pages else (1, 64, 1, d), np.float16) for d in dims]
    keywords = {"block_table": np.array([[2, 0, 3, 1]], np.int32)} if pages else {}
    found = []
    for backend in ("auto", "emulator"):
        own = [x.base.copy() for x in caches]
        with using(backend):
            out = cuflash.flash_attn_with_kvcache(
                q, *(x[..., :d] for x, d in zip(own, dims, strict=True)), k, v, cache_seqlens=used, causal=True,
                num_splits=2, **keywords,
            )  # fmt: skip
        found.append((out, *own))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x.astype(float), y.astype(float), atol=2e-3)
