"""Any producer of the DLPack protocol, and arrays that travel from framework to framework without a copy."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from samples import sample

import cuflash
from cuflash import array, dtypes
from cuflash.errors import ArgumentError, UnsupportedError


class Producer:
    """An array of some other library: nothing but the protocol."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        assert stream is None, "host memory has no stream"
        return self._x.__dlpack__(max_version=max_version)


class OldProducer(Producer):
    """One of the protocol's first edition, which knows of no version."""

    def __dlpack__(self, *, stream=None):
        return self._x.__dlpack__()


@pytest.mark.parametrize("producer", [Producer, OldProducer])
def test_a_producer_is_borrowed_and_answered_with_numpy(backend, addresses, rng, producer):
    s = sample(rng, "float16")
    result = cuflash.attention(**{name: producer(x) for name, x in s.arrays.items()}, aux=("lse",))
    assert type(result.out) is np.ndarray
    expected = cuflash.attention(**s.arrays, aux=("lse",))
    np.testing.assert_array_equal(result.out, expected.out)
    np.testing.assert_array_equal(result.lse, expected.lse)
    cuflash.attention(**{name: producer(x) for name, x in s.arrays.items()})
    for name, x in s.arrays.items():
        assert addresses[name] == x.ctypes.data, f"{name} was copied"


def test_out_of_a_producer_is_written(backend):
    x = np.ones((1, 3, 2, 64), np.float16)
    memory = np.zeros_like(x)
    out = Producer(memory)
    assert cuflash.attention(Producer(x), Producer(x), Producer(x), out=out) is out
    np.testing.assert_array_equal(memory, 1)


def test_read_only_memory_is_read_and_never_written():
    x = np.ones((1, 3, 2, 64), np.float16)
    locked = np.zeros_like(x)
    locked.flags.writeable = False
    view = array.from_dlpack(Producer(locked))
    assert view.readonly
    with pytest.raises(ArgumentError, match="out is read-only"):
        cuflash.attention(Producer(x), Producer(locked), Producer(x), out=Producer(locked))
    cuflash.attention(Producer(locked), Producer(locked), Producer(locked))


def test_the_capsule_is_borrowed_and_its_memory_given_back():
    class Counted(np.ndarray):
        pass

    x = np.arange(6, dtype=np.int64).view(Counted)
    alive = weakref.ref(x)
    view = array.from_dlpack(Producer(x))
    del x
    gc.collect()
    assert alive() is not None, "the view must keep its memory"
    np.testing.assert_array_equal(view.as_numpy(), np.arange(6))
    alias = view.as_numpy()
    del view
    gc.collect()
    assert alive() is not None, "an array made of the view must keep its memory"
    del alias
    gc.collect()
    assert alive() is None, "the producer never got its memory back"


def test_strides_offsets_and_dtypes():
    base = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    x = base[1:, ::2, 1:]
    view = array.from_dlpack(x)
    assert (view.shape, view.strides, view.dtype) == (x.shape, (20, 10, 1), dtypes.int16)
    assert view.ptr == x.ctypes.data
    np.testing.assert_array_equal(view.as_numpy(), x)
    for dtype in dtypes.ALL:
        if dtype is not dtypes.bfloat16:  # NumPy does not export it
            assert array.from_dlpack(np.zeros(3, dtype.numpy)).dtype is dtype


def test_a_used_capsule_and_unknown_dtypes_are_refused():
    with pytest.raises(ArgumentError, match="capsule"):
        array.from_capsule(object())
    with pytest.raises(ArgumentError, match="dtype"):
        array.from_dlpack(np.zeros(3, np.complex64))


def test_a_device_that_is_no_nvidia_gpu_is_refused():
    class Elsewhere(Producer):
        def __dlpack_device__(self):
            return (8, 0)  # Metal

    x = np.ones((1, 2, 2, 8), np.float32)
    with pytest.raises(UnsupportedError, match="DLPack type 8"):
        cuflash.attention(Elsewhere(x), Elsewhere(x), Elsewhere(x))


def test_bfloat16_of_a_producer():
    torch = pytest.importorskip("torch")

    class Wrapped:
        def __init__(self, x):
            self.x = x

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

        def __dlpack__(self, **keywords):
            return self.x.__dlpack__(**{k: v for k, v in keywords.items() if v is not None})

    x = torch.randn(1, 5, 2, 64).bfloat16()
    result = cuflash.attention(Wrapped(x), Wrapped(x), Wrapped(x))
    assert result.dtype == dtypes.bfloat16.numpy
    np.testing.assert_array_equal(result.astype(np.float32), cuflash.attention(x, x, x).float().numpy())


def test_around_the_frameworks_and_back(addresses, rng):
    """NumPy -> PyTorch -> cuflash -> JAX -> cuflash -> NumPy: the memory stays, only the owners change."""
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    with cuflash_backend("emulator"):
        x = array.empty_host((1, 6, 2, 64), dtypes.float16)
        x[...] = rng.standard_normal(x.shape)
        t = torch.from_dlpack(x)
        assert t.data_ptr() == x.ctypes.data
        first = cuflash.attention(t, t, t, causal=True)
        assert addresses["q"] == x.ctypes.data and addresses["out"] == first.data_ptr()

        j = jax.dlpack.from_dlpack(first)
        assert j.unsafe_buffer_pointer() == first.data_ptr()
        second = cuflash.attention(j, j, j, causal=True)
        assert addresses["q"] == first.data_ptr() and addresses["out"] == second.unsafe_buffer_pointer()

        back = np.from_dlpack(second)
        assert back.ctypes.data == addresses["out"]
        once = cuflash.attention(x, x, x, causal=True)
        np.testing.assert_array_equal(back, cuflash.attention(once, once, once, causal=True))
        again = torch.from_dlpack(second)
        assert again.data_ptr() == back.ctypes.data


def cuflash_backend(name: str):
    from backends import using

    return using(name)
