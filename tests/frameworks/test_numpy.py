"""NumPy arrays on both host backends: right numbers, their own memory, any strides."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compare import check_forward
from samples import DTYPES, sample

import cuflash
from cuflash import array, dtypes, frameworks


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_with_every_array_argument(backend, addresses, rng, dtype):
    s = sample(rng, dtype)
    result = cuflash.attention(**s.arrays, causal=True, aux=("max_logit", "lse"))
    check_forward(s.q, s.k, s.v, result.out, result.lse, result.max_logit, **s.lengths, **s.heads, causal=True)
    assert type(result.out) is np.ndarray and result.out.dtype == s.q.dtype and result.out.flags.c_contiguous
    assert result.dropout_mask is None
    for name, x in s.arrays.items():
        assert addresses[name] == x.ctypes.data, f"{name} was copied"


def test_out_is_written_in_place_and_returned(backend, addresses, rng):
    s = sample(rng, "bfloat16")
    guard = np.full((12, 6, 64), 7, s.q.dtype)
    out = guard[:, 1:5]
    result = cuflash.attention(**s.arrays, out=out)
    assert result is out
    assert (guard[:, 0] == 7).all() and (guard[:, 5] == 7).all(), "written beside out"
    np.testing.assert_array_equal(out, cuflash.attention(**s.arrays))


def test_strided_views_are_read_in_place(backend, addresses, rng):
    qkv = rng.standard_normal((2, 9, 3, 4, 64)).astype(np.float16)
    q, k, v = (qkv[:, :, i] for i in range(3))
    result = cuflash.attention(q, k, v, causal=True)
    assert [addresses[n] for n in "qkv"] == [x.ctypes.data for x in (q, k, v)]
    dense = cuflash.attention(*(np.ascontiguousarray(x) for x in (q, k, v)), causal=True)
    np.testing.assert_array_equal(result, dense)


def test_read_only_and_expanded_inputs_are_fine(backend, rng):
    q = rng.standard_normal((3, 4, 2, 64)).astype(np.float16)
    k = np.broadcast_to(q[:1], q.shape)  # batch stride 0
    assert not k.flags.writeable
    np.testing.assert_array_equal(cuflash.attention(q, k, k), cuflash.attention(q, k.copy(), k.copy()))


def test_lengths_as_lists(backend, rng):
    s = sample(rng, "float16")
    lists = {name: x.tolist() for name, x in s.lengths.items()}
    np.testing.assert_array_equal(
        cuflash.attention(s.q, s.k, s.v, **lists), cuflash.attention(s.q, s.k, s.v, **s.lengths)
    )


@pytest.mark.parametrize(
    "shape_q, shape_k", [((0, 3, 2, 64),) * 2, ((2, 0, 2, 64),) * 2, ((2, 3, 2, 64), (2, 0, 2, 64))]
)
def test_empty_arrays(backend, shape_q, shape_k):
    q, k = np.ones(shape_q, np.float16), np.ones(shape_k, np.float16)
    result = cuflash.attention(q, k, k, aux=("lse",))
    assert result.out.shape == shape_q and not result.out.any()
    assert (result.lse == -np.inf).all()


def test_float64_on_the_reference_only(rng):
    x = rng.standard_normal((1, 5, 2, 8))
    assert cuflash.attention(x, x, x).dtype == np.float64
    assert cuflash.attention(x, x, x, aux=("lse",)).lse.dtype == np.float32


def test_mods_on_the_reference(rng):
    x = rng.standard_normal((1, 6, 2, 32)).astype(np.float32)
    masked = cuflash.attention(x, x, x, mask_mod=lambda b, h, q, k: k <= q)
    np.testing.assert_allclose(masked, cuflash.attention(x, x, x, causal=True), rtol=1e-5)
    halved = cuflash.attention(x, x, x, score_mod=lambda s, b, h, q, k: s * 0.5)
    np.testing.assert_allclose(halved, cuflash.attention(x, x, x, scale=0.5 * 32**-0.5), rtol=1e-5)


def test_subclasses_are_arrays_and_masked_arrays_are_refused():
    x = np.ones((1, 2, 1, 8), np.float32)
    view = x.view(type("Mine", (np.ndarray,), {}))
    assert cuflash.attention(view, view, view).shape == x.shape
    with pytest.raises(cuflash.errors.ArgumentError, match=r"^q: a masked array's mask would be lost"):
        cuflash.attention(np.ma.masked_array(x), x, x)


# --- TensorView ---------------------------------------------------------------------------------------------------


def test_views_of_numpy():
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    view = array.of_numpy(x[:, ::-1])
    assert view.strides == (12, -4, 1) and view.ptr == x.ctypes.data + 2 * 4 * 4
    assert view.extent == (2 * 4 * 4, (12 + 3 + 1) * 4)
    assert array.of_numpy(x[:1]).strides == (0, 4, 1)
    assert array.of_numpy(np.empty((3, 0, 5))).strides == (5, 5, 1)
    assert array.of_numpy(np.empty((3, 0, 5))).extent == (0, 0)
    assert array.of_numpy(np.float32(3)[None]).strides == (1,)
    half = array.of_numpy(np.zeros((4, 4), ml_dtypes.bfloat16))
    assert half.dtype is dtypes.bfloat16 and half.as_numpy().dtype == ml_dtypes.bfloat16


def test_a_view_reads_the_same_memory_without_its_array():
    x = np.arange(12, dtype=np.uint16).reshape(3, 4).view(ml_dtypes.bfloat16)[:, 1:]
    view = array.of_numpy(x)
    alias = array.TensorView(view.ptr, view.shape, view.strides, view.dtype, view.device, True, owner=x).as_numpy()
    assert np.shares_memory(alias, x)
    rebuilt = array.TensorView(view.ptr, view.shape, view.strides, view.dtype, view.device, True, owner=[x]).as_numpy()
    assert rebuilt.ctypes.data == x.ctypes.data and not rebuilt.flags.writeable
    np.testing.assert_array_equal(rebuilt.view(np.uint16), x.view(np.uint16))


@pytest.mark.parametrize(
    "a, b, overlap",
    [
        (np.s_[:, 0], np.s_[:, 1], False),  # interleaved: each reaches over the other
        (np.s_[:, 0], np.s_[:, :], True),
        (np.s_[:2], np.s_[2:], False),
        (np.s_[:3], np.s_[2:], True),
        (np.s_[:0], np.s_[:], False),
    ],
)
def test_overlap_is_exact(a, b, overlap):
    x = np.zeros((4, 3, 2, 8), np.float16)
    assert array.of_numpy(x[a]).overlaps(array.of_numpy(x[b])) is overlap


def test_host_memory_is_aligned_for_every_consumer():
    for shape in ((1,), (3, 5), (7, 1, 9)):
        assert frameworks.numpy.empty(shape, dtypes.bfloat16, array.HOST).ptr % 64 == 0
