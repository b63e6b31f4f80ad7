"""Attention over gloo ranks beside one process: the same bits where they are promised, faults said on every rank."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytest.importorskip("torch")

import draws
from ranks import on_ranks, values

import cuflash
from cuflash.errors import ArgumentError, DistributedError

NAMES = ("out", "lse", "dq", "dk", "dv")
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def near(found: np.ndarray, alone: np.ndarray, exact: np.ndarray, rounding: float) -> bool:
    """Whether a result is as near to float64's as that of one process: within twice its error, and a rounding."""
    error, theirs = np.abs(found - exact).max(initial=0), np.abs(alone - exact).max(initial=0)
    return bool(error <= 2 * theirs + 4 * rounding * max(np.abs(exact).max(initial=0), 1.0))


def exactly(problem: draws.Problem) -> list[np.ndarray]:
    """One process in float64, by the reference."""
    inputs = draws.Inputs(problem)
    import torch

    for name in ("q", "k", "v", "dout", "sink", "table"):
        x = getattr(inputs, name)
        if x is not None:
            wide = x.detach().to(torch.float32 if name in ("sink",) else torch.float64)
            setattr(inputs, name, wide.requires_grad_() if name != "dout" else wide)
    before = cuflash.config.backend
    cuflash.config.backend = "reference"
    try:
        return draws.whole(inputs)
    finally:
        cuflash.config.backend = before


def compare(
    problems: list[draws.Problem], ranks: int, backend: str, arch: str, bitwise: bool, repeats: int = 1
) -> None:
    by_rank = values(on_ranks(ranks, draws.both, problems, repeats, backend=backend, arch=arch))
    for at, problem in enumerate(problems):
        exact = exactly(problem)
        for rank, found in enumerate(by_rank):
            runs, alone = found[at]
            for run in runs:
                assert all(map(np.array_equal, run, runs[0])), f"{problem}, rank {rank}: two runs differ"
            for name, x, one, right in zip(NAMES, runs[0], alone, exact, strict=False):
                where = f"{name}, rank {rank} of {ranks}: {problem}"
                if bitwise and name in ("out", "lse", "dq"):
                    assert np.array_equal(x, one), where
                finite = np.isfinite(right)
                assert (np.isfinite(x) == finite).all(), where
                x, one, right = (np.where(finite, y, 0) for y in (x, one, right))
                rounding = 2.0**-23 if name == "lse" else ROUNDING[problem.dtype]
                assert near(x, one, right, rounding), where
            for x, right in zip(runs[0][5:], exact[5:], strict=True):  # of sink and table
                scale = max(np.abs(right).max(initial=0), 1.0)
                assert np.abs(x - right).max(initial=0) <= 40 * ROUNDING[problem.dtype] * scale, problem


@pytest.mark.ranks
def test_two_ranks_on_the_reference():
    """A drawn problem of each mask, run twice."""
    compare(draws.draw(6, seed=1), 2, "reference", "sm_80", bitwise=False, repeats=2)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [3, 4])
def test_on_the_reference(ranks, seed):
    compare(draws.draw(6, seed + ranks), ranks, "reference", "sm_80", bitwise=False)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_the_emulator(ranks, seed):
    compare(draws.draw(8, seed + ranks), ranks, "emulator", "sm_80", bitwise=True, repeats=2 if ranks == 3 else 1)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, dtype", [(2, "float16"), (3, "bfloat16")])
def test_on_hopper(ranks, dtype, seed):
    """The forward of sm_90a, in 16 bits."""
    drawn = draws.draw(3, seed + ranks, dtype, masks=("causal", "window", "prefix"))
    compare(drawn, ranks, "emulator", "sm_90a", bitwise=True)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("backend, arch, dtype", [
    ("reference", "sm_80", "float32"),
    ("emulator", "sm_80", "float32"),
    ("emulator", "sm_90a", "float16"),
])  # fmt: skip
def test_many(ranks, backend, arch, dtype, seed):
    drawn = draws.draw(36, seed + 100 * ranks, dtype)
    compare(drawn, ranks, backend, arch, bitwise=backend == "emulator")


# Faults ---------------------------------------------------------------------------------------------------------------


def other_lengths() -> None:
    import torch
    import torch.distributed as dist

    starts = [0, 64, 100] if dist.get_rank() != 1 else [0, 63, 100]
    plan = cuflash.distributed.plan(starts, causal=True, balance="contiguous")
    x = torch.zeros(plan.rows[plan.rank], 2, 16)
    cuflash.distributed.attention(x, x, x, plan, causal=True)


def other_rows() -> None:
    import torch
    import torch.distributed as dist

    plan = cuflash.distributed.plan([0, 64, 100], causal=True)
    x = torch.zeros(plan.rows[plan.rank] + (dist.get_rank() == 2), 2, 16)
    cuflash.distributed.attention(x, x, x, plan, causal=True)


def other_heads() -> None:
    import torch
    import torch.distributed as dist

    plan = cuflash.distributed.plan([0, 64, 100], causal=True)
    x = torch.zeros(plan.rows[plan.rank], 2 + 2 * (dist.get_rank() == 0), 16)
    cuflash.distributed.attention(x, x, x, plan, causal=True)


def changed_later() -> None:
    """Right at the first call, and wrong at the second: config.check looks at each."""
    import torch
    import torch.distributed as dist

    cuflash.config.check = True
    plan = cuflash.distributed.plan([0, 64, 100], causal=True)
    x = torch.zeros(plan.rows[plan.rank], 2, 16)
    cuflash.distributed.attention(x, x, x, plan, causal=True)
    x = x[: len(x) - (dist.get_rank() == 1)]
    cuflash.distributed.attention(x, x, x, plan, causal=True)


@pytest.mark.ranks
@pytest.mark.parametrize("fault, message", [
    (other_lengths, r"plan of ranks \[1\] differs from that of the others"),
    (other_rows, r"ranks \[2\] passed q, k or v with rows that are not those of their plan"),
    (other_heads, r"heads of q of ranks \[0\] differs"),
    (changed_later, r"ranks \[1\] passed q, k or v with rows"),
])  # fmt: skip
def test_every_rank_raises(fault, message):
    for found in on_ranks(3, fault, backend="reference"):
        assert isinstance(found, ArgumentError), found
        with pytest.raises(ArgumentError, match=message):
            raise found


def missing() -> str:
    import torch
    import torch.distributed as dist

    plan = cuflash.distributed.plan([0, 64, 100], causal=True)
    if dist.get_rank() == 1:
        import time

        time.sleep(6)
        return "slept"
    x = torch.zeros(plan.rows[plan.rank], 2, 16)
    cuflash.distributed.attention(x, x, x, plan, causal=True)
    return "came back"


@pytest.mark.ranks
def test_a_rank_that_does_not_come(monkeypatch):
    monkeypatch.setenv("CUFLASH_TEST_TIMEOUT", "2")
    found, slept = on_ranks(2, missing, backend="reference")
    assert slept == "slept" and isinstance(found, DistributedError)
    assert "rank 0 of 2: comparing plans failed" in str(found) and "same calls with the same plan" in str(found)


# What is summed, and where --------------------------------------------------------------------------------------------


def counted_tiles() -> tuple[int, int]:
    """(matrix instructions of this rank, of one process)."""
    import torch

    from cuflash import emulator

    starts = [0, 300, 1324]
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.standard_normal((1324, 1, 64), dtype=np.float32)).half()
    plan = cuflash.distributed.plan(starts, causal=True, chunk=128)
    whole = torch.tensor(starts, dtype=torch.int32)
    with emulator.counting() as alone:
        cuflash.attention(q, q, q, cu_seqlens_q=whole, cu_seqlens_k=whole, causal=True)
    local = plan.shard(q)
    with emulator.counting() as own:
        cuflash.distributed.attention(local, local, local, plan, causal=True)
    return own.total_matrix_instructions, alone.total_matrix_instructions


@pytest.mark.ranks
def test_ranks_share_the_tiles_of_one_process():
    found = values(on_ranks(2, counted_tiles, backend="emulator"))
    alone = found[0][1]
    assert sum(own for own, _ in found) <= 1.15 * alone and max(own for own, _ in found) <= 1.1 * alone / 2


def unshard_and_back() -> tuple[np.ndarray, np.ndarray]:
    import torch

    plan = cuflash.distributed.plan([0, 5, 5, 40], chunk=8, causal=True)
    x = torch.arange(40.0)[:, None] * torch.ones(3)
    local = plan.shard(x).requires_grad_()
    back = plan.unshard(local)
    (grad,) = torch.autograd.grad((back * x).sum(), local)
    return (back - x).detach().abs().max().numpy(), (grad - 2 * plan.shard(x)).abs().max().numpy()


@pytest.mark.ranks
def test_unshard_undoes_shard_and_its_gradient_is_summed():
    for back, grad in values(on_ranks(2, unshard_and_back, backend="reference")):
        assert back == grad == 0


def trained(ranks_share: bool) -> list[float]:
    """Losses of 20 steps of a small GPT on packed documents, by SGD."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    lengths, width, heads, vocabulary = [50, 3, 120, 0, 83], 32, 4, 19
    starts = [0, *np.cumsum(lengths).tolist()]
    tokens = torch.randint(vocabulary, (starts[-1],))
    targets = (tokens * 7 + 3) % vocabulary
    plan = cuflash.distributed.plan(starts, causal=True, chunk=32) if ranks_share else None
    rows = torch.from_numpy(plan.index) if plan is not None else torch.arange(starts[-1])
    whole = torch.tensor(starts, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    embed, place = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(128, width)
    layers = [(torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)) for _ in range(2)]
    parameters = [p for m in (embed, place, *(m for pair in layers for m in pair)) for p in m.parameters()]
    with torch.no_grad():
        embed.weight *= 0.3
        place.weight *= 0.3
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    losses = []
    for _ in range(20):
        x = embed(tokens[rows]) + place(positions[rows])
        for project, out in layers:
            q, k, v = project(x).view(len(rows), 3, heads, -1).unbind(1)
            if plan is not None:
                y = cuflash.distributed.attention(q, k, v, plan, causal=True, deterministic=True)
            else:
                y = cuflash.attention(q, k, v, cu_seqlens_q=whole, cu_seqlens_k=whole, causal=True, deterministic=True)
            x = x + out(torch.tanh(y.reshape(len(rows), width)))
        logits = x @ embed.weight.T
        loss = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum") / starts[-1]
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        if plan is not None:
            dist.all_reduce(total)
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        optimizer.step()
        losses.append(float(total))
    return losses


@pytest.mark.ranks
def test_a_small_gpt_learns_as_on_one_rank():
    os.environ.pop("CUFLASH_BACKEND", None)
    alone = trained(False)
    runs = [values(on_ranks(4, trained, True, backend="reference")) for _ in range(2)]
    assert runs[0] == runs[1], "bitwise between two runs"
    assert all(losses == runs[0][0] for losses in runs[0])
    np.testing.assert_allclose(runs[0][0], alone, rtol=1e-5)
    assert alone[-1] < 0.7 * alone[0]
