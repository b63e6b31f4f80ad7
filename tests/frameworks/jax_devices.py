"""Attention spread over four CPU devices: the work of `test_jax_transforms.test_several_devices`.

Every case is checked against the same call on one device, and for what it may cost: no array is ever gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cuflash

P = PartitionSpec
GRID = np.array(jax.devices()).reshape(2, 2)
MESH = jax.sharding.Mesh(GRID, ("x", "y"))
rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))


def attention(q, k, v, sink, slopes):
    return cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes, causal=True, aux=("lse",))[:2]


def loss(*arrays):
    out, lse = attention(*arrays)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


GRAD = jax.grad(loss, range(5))


def arrays(heads_kv):
    return (
        draw(4, 10, 4, 16), draw(4, 12, heads_kv, 16), draw(4, 12, heads_kv, 8), draw(4), jnp.abs(draw(4)),
    )  # fmt: skip


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=2e-5)


def put(mesh, given, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(given, specs, strict=True)]


def check_partitioned():
    for heads_kv, q, k, head in (
        (4, P("x"), P("x"), P()),
        (2, P("x", None, "y"), P("x", None, "y"), P("y")),
        (2, P("x", None, "y"), P(), P()),  # what is whole is cut where q is
        (1, P("x", None, "y"), P("x"), P("y")),  # one key head: its gradient is summed over the query heads'
    ):
        given = arrays(heads_kv)
        want, grads = attention(*given), GRAD(*given)
        given = put(MESH, given, (q, k, k, head, head))
        for f, expected in ((attention, want), (GRAD, grads)):
            compiled = jax.jit(f).lower(*given).compile()
            assert "all-gather" not in compiled.as_text(), (heads_kv, q, k)
            got = compiled(*given)
            assert got[0].sharding.is_equivalent_to(NamedSharding(MESH, q), 4), got[0].sharding
            assert_same(got, expected)


def check_rows_are_never_cut():
    given = arrays(2)
    cut = put(MESH, given, (P(None, "x"), P(None, "y"), P(None, "y"), P(), P()))
    assert_same(attention(*cut), attention(*given))
    uneven = put(MESH, given, (P(None, None, ("x", "y")), *(P(),) * 4))  # 2 key heads do not go into 4 devices
    assert_same(jax.jit(GRAD)(*uneven), GRAD(*given))


def check_packed():
    given = [x.reshape(-1, *x.shape[2:]) for x in arrays(2)[:3]]
    starts = {"cu_seqlens_q": jnp.array([0, 7, 40], jnp.int32), "cu_seqlens_k": jnp.array([0, 12, 48], jnp.int32)}

    def call(q, k, v):
        return cuflash.attention(q, k, v, **starts)

    got = jax.jit(call)(*put(MESH, given, (P(None, "y"),) * 3))
    assert got.sharding.is_equivalent_to(NamedSharding(MESH, P(None, "y")), 3)
    assert_same([got], [call(*given)])


def check_dropout():
    """The mask knows the sequence and the head, so it is that of one device."""
    given = arrays(2)[:3]

    def call(q, k, v):
        return cuflash.attention(q, k, v, dropout_p=0.5, seed=3)

    assert_same([jax.jit(call)(*put(MESH, given, (P("x", None, "y"),) * 3))], [call(*given)])


def check_mods():
    """What mods read of sequence and head is the whole call's: what they read is not cut."""
    q, k, v, _, slopes = arrays(2)
    table, places = draw(4, 32), jnp.asarray(rng.integers(0, 3, (4, 12)))

    def of_all(q, k, v, slopes, table):
        def score_mod(s, b, h, i, j):
            return s + table[0, i - j + 16]

        return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=lambda b, h, i, j: i >= j, alibi_slopes=slopes)

    def of_each(q, k, v, slopes, table):
        def score_mod(s, b, h, i, j):
            return s * slopes[h] + table[h, i - j + 16]

        return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=lambda b, h, i, j: places[b, i] >= places[b, j])

    given = q, k, v, slopes, table
    cut = put(MESH, given, (P("x", None, "y"), P("x"), P("x"), P(), P()))
    for f in (of_all, of_each):
        total = jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), range(5))
        for call in (f, total):
            compiled = jax.jit(call).lower(*cut).compile()
            assert ("all-gather" in compiled.as_text()) == (f is of_each)
            assert_same(jax.tree.leaves(compiled(*cut)), jax.tree.leaves(call(*given)))


def check_shard_map():
    given = arrays(2)
    specs = (*(P("x", None, "y"),) * 3, P("y"), P("y"))
    want, grads = attention(*given), GRAD(*given)
    for check in (True, False):
        for mesh_axes in ({"x", "y"}, {"x"}):
            cut = [P(*(a if a in mesh_axes else None for a in spec)) for spec in specs]
            outs = (cut[0], P("x", "y" if "y" in mesh_axes else None))
            mapping = {"mesh": MESH, "axis_names": mesh_axes, "check_vma": check}
            split = jax.jit(jax.shard_map(attention, in_specs=tuple(cut), out_specs=outs, **mapping))
            assert_same(split(*given), want)

            def total(*a, split=split):
                out, lse = split(*a)
                return jnp.sin(out).sum() + jnp.cos(lse).sum()

            assert_same(jax.jit(jax.grad(total, range(5)))(*given), grads)
        inside = jax.shard_map(
            jax.grad(loss, (0, 1, 2)), mesh=MESH, in_specs=specs, out_specs=specs[:3], check_vma=check
        )
        assert_same(jax.jit(inside)(*given), grads[:3])


def check_explicit_mesh():
    mesh = jax.sharding.Mesh(GRID, ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    given = arrays(2)
    want, grads = attention(*given), GRAD(*given)
    with jax.set_mesh(mesh):
        cut = put(mesh, given, (P("x", None, "y"), P("x"), P(), P(), P("y")))
        got = jax.jit(attention)(*cut)
        assert jax.typeof(got[0]).sharding.spec == P("x", None, "y", None)
        assert_same(got, want)
        assert_same(jax.jit(GRAD)(*cut), grads)


def check_cache():
    """A cache cut by sequences, and by heads; every device appends to its own part."""
    q, k, caches = draw(4, 1, 4, 16), draw(4, 1, 2, 16), [draw(4, 9, 2, 16) for _ in "kv"]
    lengths = jnp.array([0, 3, 8, 5], jnp.int32)

    def step(q, k_cache, v_cache, k, lengths):
        return cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, k, 2 * k, cache_seqlens=lengths, causal=True)

    want = step(q, *caches, k, lengths)
    for cut, of_lengths in ((P("x"), P("x")), (P(None, None, "y"), P())):
        spread = jax.shard_map(step, mesh=MESH, in_specs=(cut,) * 4 + (of_lengths,), out_specs=(cut,) * 3)
        assert_same(jax.jit(spread)(q, *caches, k, lengths), want)


def check_emulator():
    """Devices run side by side, each on a thread of XLA's."""
    given = [x.astype(jnp.float16) for x in arrays(2)[:3]]
    cuflash.config.backend = "emulator"
    want = cuflash.attention(*given, causal=True)
    cut = put(MESH, given, (P("x", None, "y"),) * 3)
    np.testing.assert_array_equal(jax.jit(lambda *a: cuflash.attention(*a, causal=True))(*cut), want)
    cuflash.config.backend = "auto"


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
    print("passed")
