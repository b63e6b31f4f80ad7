"""Attention forward on every backend: generated cases, the edges, and the promises about bits."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from backends import BACKENDS, Emulator, using
from cases import Case, chunks, draw
from compare import check_forward

import cuflash

CASES = 320
CHUNK = 8
COST = 8_000_000  # matrix instructions


def check(case: Case, backend, **hints) -> tuple[np.ndarray, ...]:
    """Run a case and hold it to the rule."""
    inputs = case.inputs()
    if case.max_seqlen_q is not None:
        hints.setdefault("max_seqlen_q", case.max_seqlen_q)
    try:
        results = backend.run(inputs, **hints)
        check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords)
    except Exception as error:
        error.add_note(f"case: {case!r}")
        raise
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", chunks(CASES, CHUNK))
def test_generated_case(backend, chunk, seed):
    for case in draw(CASES, seed, cost=COST)[chunk * CHUNK : (chunk + 1) * CHUNK]:
        check(case, backend)


def test_generated_cases_cover_what_they_should(seed):
    cases = draw(CASES, seed, cost=COST)
    assert len(cases) >= 300
    assert {c.dtype for c in cases} == {"float16", "bfloat16", "float32"}
    assert {c.heads_q // c.heads_kv for c in cases} == {1, 4, 8}
    assert {c.entry.dim_class for c in cases} == {32, 64, 96, 128, 192, 256}
    assert any(c.head_dim % 2 for c in cases) and any(c.head_dim != c.head_dim_v for c in cases)
    assert sum(len(c.features) >= 3 for c in cases) >= len(cases) / 3
    assert len({c.entry for c in cases}) <= 40


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", ["sm_86", "sm_90a"])
@pytest.mark.parametrize("dtype, d", [("bfloat16", 128), ("float16", 256), ("float32", 256)])
def test_tiles_of_other_chips(backend, arch, dtype, d):
    """99 KB of shared memory mean other tiles; 227 KB the same as 163."""
    check(Case(dtype, (70, 0, 33), (70, 5, 130), 2, 1, d, d, causal=True), backend, arch=arch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        Case("float16", (), (), 2, 1, 32, 32),
        Case("float16", (0,), (0,), 2, 1, 32, 32),
        Case("float16", (0, 0, 0), (0, 7, 0), 2, 1, 32, 32),
        Case("float16", (5,), (0,), 2, 1, 32, 32, sink="float32"),
        Case("float16", (5, 3), (0, 0), 2, 1, 32, 32, packed=False),
        Case("float16", (0, 0), (9, 9), 2, 1, 32, 32, packed=False),
        Case("float16", (), (), 2, 1, 32, 32, packed=False),
        Case("float16", (1,), (1,), 1, 1, 1, 1),
        Case("float16", (40,), (3,), 2, 2, 32, 32, causal=True),  # most rows see nothing
        Case("float16", (40, 9), (3, 9), 2, 2, 32, 32, causal=True, sink="element"),
        Case("float16", (9, 9), (9, 9), 2, 2, 32, 32, seqused_q=(0, 4), seqused_k=(9, 0)),
        Case("float16", (130,), (130,), 1, 1, 32, 32, window_size=(0, 0)),
    ],
    ids=repr,
)
def test_edge(backend, case):
    if not case.packed and len(set(case.lengths_q)) > 1:
        case = dataclasses.replace(case, lengths_q=(case.lengths_q[0],) * case.batch)
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hint", [None, 1, 150, 1500])
def test_hints_lose_no_row(backend, hint):
    case = Case("float16", (150, 0, 3, 129), (150, 0, 3, 200), 2, 1, 32, 32, causal=True, max_seqlen_q=hint)
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_sequences_than_a_grid_is_deep(backend):
    """70,000 sequences, two of them not empty: one at each end."""
    lengths = np.zeros(70_000, np.int64)
    lengths[0], lengths[-1] = 3, 5
    case = Case("float16", tuple(lengths.tolist()), tuple(lengths.tolist()), 1, 1, 32, 32)
    # The reference walks sequences in Python: the two that matter are compared by hand.
    inputs = case.inputs()
    out, lse, _ = backend.run(inputs)
    ends = Case("float16", (3, 5), (3, 5), 1, 1, 32, 32).inputs()
    for name in "qkv":
        getattr(ends, name)[:8] = getattr(inputs, name)[:8]
    check_forward(ends.q, ends.k, ends.v, out, lse, **ends.keywords)


def numbers(lengths_q, lengths_k, heads, heads_kv, d, dtype, seed):
    """q, k and v of each sequence, apart."""
    rng = np.random.default_rng(seed)
    make = lambda n, h: rng.standard_normal((n, h, d)).astype(dtype)  # noqa: E731
    return [(make(m, heads), make(n, heads_kv), make(n, heads_kv)) for m, n in zip(lengths_q, lengths_k, strict=True)]


FEATURES = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (40, -1), "softcap": 20.0},
    {"scale": -0.2},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_same_bits_alone_packed_and_dense(dtype, features, seed):
    """A sequence's result does not depend on what else is in the batch, on the layout, or on hints."""
    d, lengths = 64, (70, 1, 0, 129, 70)
    sequences = numbers(lengths, (70, 33, 4, 129, 70), 2, 1, d, dtype, seed)
    aux = ("lse", "max_logit")
    with using("emulator"):
        alone = [cuflash.attention(*(x[None] for x in s), aux=aux, **features) for s in sequences]
        q, k, v = (np.concatenate(parts) for parts in zip(*sequences, strict=True))
        starts = lambda i: np.cumsum([0] + [len(s[i]) for s in sequences], dtype=np.int32)  # noqa: E731
        for hint in (None, 129):
            packed = cuflash.attention(
                q, k, v, cu_seqlens_q=starts(0), cu_seqlens_k=starts(1), max_seqlen_q=hint, aux=aux, **features
            )
            for i, one in enumerate(alone):
                rows = slice(starts(0)[i], starts(0)[i + 1])
                for a, b in ((packed.out[rows], one.out[0]), (packed.lse[:, rows], one.lse[0])):
                    assert a.tobytes() == b.tobytes(), f"sequence {i}, hint {hint}"
        twice = cuflash.attention(
            *(np.stack([a, b]) for a, b in zip(sequences[0], sequences[4], strict=True)), **features
        )
        assert twice[0].tobytes() == alone[0].out[0].tobytes()
        assert twice[1].tobytes() == alone[4].out[0].tobytes()


@pytest.mark.parametrize("dtype, d", [(np.float16, 64), (ml_dtypes.bfloat16, 128), (np.float32, 32)])
def test_same_bits_under_any_schedule(dtype, d, seed):
    """Twenty orders of blocks, warps and lanes; copies landing late and early: one result, and no report."""
    case = Case(np.dtype(dtype).name, (70, 0, 131), (90, 3, 131), 2, 1, d, d, causal=True, window_size=(60, 0))
    results = set()
    for i in range(20):
        inputs = case.inputs()
        with cuflash.emulator.schedule(seed=seed + i, landing="early" if i % 4 == 3 else "late"):
            out, lse, max_logit = Emulator().run(inputs)
        results.add(out.tobytes() + lse.tobytes() + max_logit.tobytes())
    assert len(results) == 1


def test_offsets_past_two_to_the_31_elements():
    """Rows and heads a long way apart, in an untouched mapping far larger than what is used."""
    rows, heads, d = 40, 2, 32
    row_stride = 2**26 + 2**14  # elements: row 39 begins past 2^31
    base = np.zeros(rows * row_stride, np.float16)  # the system maps pages when they are touched: 5 GB, a few KB used
    far = np.lib.stride_tricks.as_strided(base, (rows, heads, d), (row_stride * 2, row_stride, 2))
    assert (rows - 1) * row_stride > 2**31
    rng = np.random.default_rng(0)
    near = rng.standard_normal((rows, heads, d)).astype(np.float16)
    far[...] = near
    starts = np.array([0, 3, rows], np.int32)
    with using("emulator"):
        expected = cuflash.attention(near, near, near, cu_seqlens_q=starts, cu_seqlens_k=starts)
        for place in range(3):  # as q, as k, as v; and as out
            arrays = [far if i == place else near for i in range(3)]
            got = cuflash.attention(*arrays, cu_seqlens_q=starts, cu_seqlens_k=starts)
            assert got.tobytes() == expected.tobytes()
        cuflash.attention(near, near, near, cu_seqlens_q=starts, cu_seqlens_k=starts, out=far)
        assert np.array_equal(far, expected)


def test_negative_and_zero_scales_follow_the_definition(seed):
    for scale in (0.0, -1.0, 1e-38, -1e-38):
        check(Case("float32", (33,), (65,), 1, 1, 32, 32, scale=scale, causal=True, seed=seed), Emulator())


def test_a_nan_the_sequence_owns_is_not_hidden():
    case = Case("float16", (20, 20), (20, 20), 1, 1, 32, 32)
    inputs = case.inputs()
    inputs.k[25, 0, 3] = np.nan
    with using("emulator"):
        out = cuflash.attention(inputs.q, inputs.k, inputs.v, **inputs.keywords)
    assert np.isfinite(out[:20].astype(np.float32)).all()
    assert np.isnan(out[20:40].astype(np.float32)).all()
    assert (out[40:].astype(np.float32) == 0).all()
