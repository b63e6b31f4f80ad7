"""Context parallelism on four CPU devices of JAX: the work of test_ranks_jax.py, in a process of its own."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import cuflash

P = PartitionSpec
MESH = Mesh(np.array(jax.devices()), ("cp",))
RANKS, ROWS, DOCUMENTS = 4, 400, 8


def prefix(b, h, q_idx, kv_idx, q_len):
    return (kv_idx <= q_idx) | (kv_idx < q_len // 4)


MASKS = {
    "causal": {"causal": True},
    "window": {"window_size": (40, 9)},
    "prefix": {"mask_mod": prefix},
    "full": {},
    "biased": {"causal": True},
}


class Problem:
    """A jitted function of local arrays with gradients, and the same in one process."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.mask = name, MASKS[name]
        self.rng = np.random.default_rng(seed)
        self.step = None

    def drawn(self):
        lengths = [int(x) for x in self.rng.choice([0, 1, 37, 64, 97, 200], size=self.rng.integers(1, 6))]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        plan = cuflash.distributed.plan(
            starts, "cp", ranks=RANKS, chunk=32, pad_rows=ROWS, max_documents=DOCUMENTS, **self.mask
        )
        total = int(starts[-1])
        arrays = [self.rng.standard_normal((total, h, 16)).astype(np.float32) for h in (4, 2, 2, 4)]
        return plan, starts, arrays, jnp.asarray(self.rng.standard_normal((4, 9)).astype(np.float32)) / 4

    def keywords(self, table):
        if self.name != "biased":
            return self.mask | {"deterministic": True}

        def biased(score, b, h, q_idx, kv_idx):
            return score + table[h, (kv_idx - q_idx).clip(-4, 4) + 4]

        return self.mask | {"deterministic": True, "score_mod": biased}

    def over_devices(self, plan, arrays, table):
        if self.step is None:
            specs = ((P("cp"),) * 3, plan.specs, P())

            def local(qkv, arrays, table):
                return cuflash.distributed.attention(*qkv, arrays, **self.keywords(table))

            @jax.jit
            def step(qkv, weights, arrays, table):
                def loss(qkv, table):
                    out = jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P("cp"), check_vma=False)(
                        qkv, arrays, table
                    )
                    return (out * weights).sum(), out

                return jax.value_and_grad(loss, (0, 1), has_aux=True)(qkv, table)

            self.step = step
        *qkv, weights = (plan.shard(jnp.asarray(x)) for x in arrays)
        (_, out), (grads, dtable) = self.step(tuple(qkv), weights, plan.arrays, table)
        return [np.asarray(plan.unshard(x)) for x in (out, *grads)] + [np.asarray(dtable)]

    def alone(self, starts, arrays, table):
        *qkv, weights = map(jnp.asarray, arrays)
        whole = jnp.asarray(starts)

        def loss(qkv, table):
            out = cuflash.attention(*qkv, cu_seqlens_q=whole, cu_seqlens_k=whole, **self.keywords(table))
            return (out * weights).sum(), out

        (_, out), (grads, dtable) = jax.value_and_grad(loss, (0, 1), has_aux=True)(tuple(qkv), table)
        return [np.asarray(x) for x in (out, *grads, dtable)]


def check(name: str, sets: int) -> None:
    problem = Problem(name, seed=len(name))
    for i in range(sets):
        plan, starts, arrays, table = problem.drawn()
        found = problem.over_devices(plan, arrays, table)
        if i % 7 == 0:  # the others ask whether anything compiles
            for what, x, right in zip(("out", "dq", "dk", "dv", "dtable"), found, problem.alone(starts, arrays, table),
                                      strict=True):  # fmt: skip
                np.testing.assert_allclose(x, right, atol=2e-5, rtol=1e-5, err_msg=f"{name} {starts} {what}")
        assert np.isfinite(found[0]).all()
    assert problem.step._cache_size() == 1, "other lengths compile nothing"


def main() -> None:
    warnings.simplefilter("error")
    for name in MASKS:
        check(name, 20)
    plan = cuflash.distributed.plan([0, 5], "cp", ranks=RANKS, pad_rows=8)
    x = jnp.arange(10.0).reshape(5, 2)
    shared = plan.shard(x)
    assert shared.shape == (RANKS * 8, 2) and (plan.unshard(shared) == x).all()
    for call, message in (
        (lambda: cuflash.distributed.attention(x, x, x, plan), "pass plan.arrays through shard_map"),
        (lambda: plan.shard(x[1:]), "must begin with 5"),
        (lambda: cuflash.distributed.plan([0, 50], "cp", ranks=1, pad_rows=8).arrays, "must be at least 50"),
        (lambda: cuflash.distributed.plan([0, 1, 2], "cp", ranks=1, max_documents=1).arrays, "must be at least 2"),
    ):
        try:
            call()
        except cuflash.errors.ArgumentError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    print("passed")


main()
