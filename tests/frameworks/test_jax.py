"""JAX arrays on the CPU: the same numbers as NumPy's, no copies, nothing visible mutated.

What JAX traces is tested in test_jax_transforms.
"""

from __future__ import annotations

import numpy as np
import pytest
from samples import DTYPES, sample

import cuflash
from cuflash import array, dtypes, frameworks
from cuflash.errors import ArgumentError

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_numpy_without_a_copy(backend, addresses, rng, dtype):
    s = sample(rng, dtype)
    expected = cuflash.attention(**s.arrays, causal=True, aux=("lse", "max_logit"))
    arrays = {name: jnp.asarray(x) for name, x in s.arrays.items()}
    result = cuflash.attention(**arrays, causal=True, aux=("lse", "max_logit"))
    for name, x in arrays.items():
        assert addresses[name] == x.unsafe_buffer_pointer(), f"{name} was copied"
    for got, want in zip(result[:3], expected[:3], strict=True):
        assert isinstance(got, jax.Array) and got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), want)
    if backend == "emulator":
        assert addresses["out"] == result.out.unsafe_buffer_pointer(), "the result was copied"


def test_results_are_adopted_without_a_copy():
    view = frameworks.jax.empty((3, 5), dtypes.bfloat16, array.HOST)
    view.as_numpy()[...] = 1
    assert frameworks.jax.wrap(view).unsafe_buffer_pointer() == view.ptr


def test_inputs_keep_their_values(backend):
    q = jnp.arange(2 * 4 * 2 * 64, dtype=jnp.float32).reshape(2, 4, 2, 64) % 7
    before = np.array(q)
    cuflash.attention(q, q, q)
    np.testing.assert_array_equal(np.asarray(q), before)


def test_an_array_still_being_computed(backend):
    q = jnp.ones((1, 300, 2, 64), jnp.float16)
    busy = jnp.linalg.matrix_power(jnp.eye(400) * 0.999, 40)[0, 0]  # dispatched, not done
    q = q * busy.astype(q.dtype) * 0 + q
    out = cuflash.attention(q, q, q)
    np.testing.assert_array_equal(np.asarray(out), np.ones(q.shape))


def test_arrays_that_are_not_row_major(backend):
    """Transposing through DLPack leaves JAX with a layout of its own."""
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 64)).astype(np.float16)
    q = jax.dlpack.from_dlpack(np.swapaxes(x, 1, 2))
    np.testing.assert_array_equal(
        np.asarray(cuflash.attention(q, q, q)), cuflash.attention(*[np.ascontiguousarray(np.swapaxes(x, 1, 2))] * 3)
    )


def test_immutable_out_is_refused():
    q = jnp.ones((1, 2, 2, 8))
    with pytest.raises(ArgumentError, match="immutable"):
        cuflash.attention(q, q, q, out=jnp.zeros_like(q))


def test_stop_gradient_makes_it_a_constant():
    x = jnp.ones((1, 2, 2, 8))

    def loss(x):
        y = jax.lax.stop_gradient(x)
        return (x * cuflash.attention(y, y, y)).sum()

    np.testing.assert_allclose(np.asarray(jax.grad(loss)(x)), 1)
