"""Attention forward with dropout: generated cases, the mask itself, and what it must not depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Emulator, using
from cases import Case, Entry, draw_one
from compare import check_forward
from machine_code import checked
from needs import needs_nvrtc
from recorded import recording

import cuflash
from cuflash import arch, dtypes, philox
from cuflash.call import prepare
from cuflash.errors import CompileError, UnsupportedError
from cuflash.jit import module
from cuflash.ops import dropout_mask, forward

# Every head-dim class, every dtype, every load width; 192 and 256 in float32 have tiles of 16 keys, half a Philox call.
PALETTE = (
    Entry("bfloat16", 32, 32, 16),
    Entry("float16", 64, 64, 16),
    Entry("bfloat16", 96, 96, 4),
    Entry("float16", 128, 128, 16),
    Entry("bfloat16", 192, 128, 16),
    Entry("float16", 256, 256, 2),
    Entry("float32", 64, 64, 16),
    Entry("float32", 128, 32, 4),
    Entry("float32", 192, 192, 16),
)
CASES_EACH = 6
COST = 60_000  # matrix instructions a case, at most


def drawn(entry: Entry, seed: int) -> list[Case]:
    rng = np.random.default_rng([seed, PALETTE.index(entry)])
    cases = []
    for i in range(CASES_EACH):
        case = draw_one(entry, rng, features=int(rng.integers(0, 5)), cost=COST)
        dropout = (float(rng.choice([0.01, 0.17, 0.5, 0.9])), int(rng.integers(2**63)), int(rng.integers(2**40)))
        cases.append(dataclasses.replace(case, dropout=dropout, packed=case.packed or i % 3 > 0))
    return cases


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", PALETTE, ids=lambda e: f"{e.dtype}-{e.dim_class}-{e.dim_v_class}-{e.load_bytes}")
def test_generated_cases(backend, entry, seed):
    for case in drawn(entry, seed):
        inputs = case.inputs()
        try:
            results = backend.run(inputs)
            check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords)
        except Exception as error:
            error.add_note(f"case: {case!r}")
            raise


def weights_kept(q: np.ndarray, k: np.ndarray, width: int, **keywords: Any) -> np.ndarray:
    """The mask the kernel applies, bool [batch, heads_q, q_len, k_len], seen through values that are unit vectors."""
    batch, k_len, heads_kv, _ = k.shape
    parts = []
    for first in range(0, k_len, width):
        v = np.zeros((k_len, width), q.dtype)
        here = np.arange(first, min(first + width, k_len))
        v[here, here - first] = 1
        out = cuflash.attention(q, k, np.broadcast_to(v[:, None], (batch, k_len, heads_kv, width)).copy(), **keywords)
        parts.append(out.astype(np.float32)[..., : len(here)] != 0)
    return np.concatenate(parts, axis=-1).swapaxes(1, 2)


@pytest.mark.parametrize("name", ["sm_80", "sm_86"])
@pytest.mark.parametrize("entry", PALETTE, ids=lambda e: f"{e.dtype}-{e.dim_class}-{e.dim_v_class}-{e.load_bytes}")
def test_the_kernels_mask_is_the_definition(entry, name, rng):
    """Bit for bit, whatever the tile."""
    dtype, d = dtypes.BY_NAME[entry.dtype].numpy, entry.dim_class
    q, k = (rng.standard_normal((2, n, h, d)).astype(dtype) for n, h in ((41, 4), (75, 2)))
    with using("emulator", name):
        found = weights_kept(q, k, entry.dim_v_class, dropout_p=0.4, seed=2**63 + 11, offset=3)
    np.testing.assert_array_equal(found, philox.dropout_mask(found.shape, [41] * 2, [75] * 2, 2**63 + 11, 3, 0.4))


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_dropout_mask_of_every_layout(backend, rng):
    """Dense, packed and shortened: position in the sequence and index in the batch are all that counts."""
    lengths_q, lengths_k = (40, 0, 17), (65, 7, 33)
    dense = {
        n: rng.standard_normal((3, max(m), 2, 32)).astype(np.float16) for n, m in (("q", lengths_q), ("k", lengths_k))
    }
    used = {"seqused_q": np.array(lengths_q, np.int32), "seqused_k": np.array(lengths_k, np.int32)}
    packed = {
        n: np.concatenate([dense[n][b, :length] for b, length in enumerate(m)])
        for n, m in (("q", lengths_q), ("k", lengths_k))
    }
    starts = {f"cu_seqlens_{n}": np.cumsum([0, *m], dtype=np.int32) for n, m in (("q", lengths_q), ("k", lengths_k))}
    random = {"dropout_p": 0.3, "seed": 5, "offset": 6, "aux": ("dropout_mask",)}
    with using("auto" if backend == "reference" else backend):
        by_used = cuflash.attention(dense["q"], dense["k"], dense["k"], **used, **random)
        by_starts = cuflash.attention(packed["q"], packed["k"], packed["k"], **starts, **random)
        hinted = cuflash.attention(
            packed["q"], packed["k"], packed["k"], **starts, **random, max_seqlen_q=50, max_seqlen_k=66
        )
        whole = cuflash.attention(dense["q"], dense["k"], dense["k"], **random)
        none = cuflash.attention(dense["q"], dense["k"], dense["k"], aux=("dropout_mask",))
    assert by_used.dropout_mask.dtype == bool and by_used.dropout_mask.shape == (3, 2, 40, 65)
    np.testing.assert_array_equal(by_used.dropout_mask, by_starts.dropout_mask)
    np.testing.assert_array_equal(hinted.dropout_mask[:, :, :40, :65], by_starts.dropout_mask)
    assert hinted.dropout_mask.shape == (3, 2, 50, 66) and not hinted.dropout_mask[:, :, 40:].any()
    expected = philox.dropout_mask((3, 2, 40, 65), [40] * 3, [65] * 3, 5, 6, 0.3)
    np.testing.assert_array_equal(whole.dropout_mask, expected)
    for b, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        np.testing.assert_array_equal(by_starts.dropout_mask[b, :, :m, :n], expected[b, :, :m, :n])
        assert by_starts.dropout_mask[b].sum() == expected[b, :, :m, :n].sum(), "False behind the sequence"
    assert none.dropout_mask.all()


def test_same_bits_packed_dense_and_under_any_schedule(seed):
    case = Case("float16", (70, 70), (90, 90), 2, 1, 64, 64, causal=True, dropout=(0.2, 9, 1), seed=seed)
    inputs = case.inputs()
    out, _, _ = Emulator().run(inputs)
    dense = [x[: 2 * n].reshape(2, n, *x.shape[1:]) for x, n in ((inputs.q, 70), (inputs.k, 90), (inputs.v, 90))]
    keywords = {n: x for n, x in inputs.keywords.items() if not n.startswith("cu_seqlens")}
    with using("emulator"):
        again = cuflash.attention(*dense, aux=("lse",), **keywords)
        alone = cuflash.attention(*(x[:1] for x in dense), **keywords)
        plain = cuflash.attention(*dense, aux=("lse",), **keywords | {"dropout_p": 0.0})
    assert again.out.tobytes() == out[:140].tobytes() and alone[0].tobytes() == out[:70].tobytes()
    assert again.lse.tobytes() == plain.lse.tobytes(), "lse is of all weights"
    for i in range(6):
        with cuflash.emulator.schedule(seed=seed + i, landing="early" if i % 2 else "late"):
            other = case.inputs()
            assert Emulator().run(other)[0].tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
def test_seeds_in_arrays_are_the_numbers_they_hold(dtype, shape, rng):
    x = rng.standard_normal((1, 20, 2, 32)).astype(np.float16)
    for value in (3, -2 if np.dtype(dtype).kind == "i" else 2**31 + 5):
        array = np.full(shape, value, dtype)
        with using("emulator"):
            by_array = cuflash.attention(x, x, x, dropout_p=0.5, seed=array, offset=np.full(shape, 7, dtype))
            by_value = cuflash.attention(x, x, x, dropout_p=0.5, seed=value, offset=7)
            other = cuflash.attention(x, x, x, dropout_p=0.5, seed=value, offset=8)
        by_reference = cuflash.attention(x, x, x, dropout_p=0.5, seed=array, offset=np.full(shape, 7, dtype))
        assert by_array.tobytes() == by_value.tobytes() != other.tobytes()
        np.testing.assert_allclose(by_array.astype(np.float32), by_reference.astype(np.float32), atol=4e-3)


def test_rates_that_keep_everything_and_nothing(rng):
    x = rng.standard_normal((1, 20, 1, 32)).astype(np.float32)
    with using("emulator"):
        plain = cuflash.attention(x, x, x)
        every = cuflash.attention(x, x, x, dropout_p=1 / 1024, seed=1)
        nothing = cuflash.attention(x, x, x, dropout_p=1023 / 1024, seed=1)
    np.testing.assert_allclose(every, plain / (1 - 1 / 1024), rtol=1e-6)
    assert not nothing.any()


def test_explain_states_the_effective_rate():
    x = np.zeros((1, 4, 1, 32), np.float16)
    with using("emulator"):
        text = str(cuflash.explain(x, x, x, dropout_p=0.17, seed=1))
        assert "212 of 256 weights are kept" in text and "0.171875" in text and "kDropout=true" in text
        assert "dropout" not in str(cuflash.explain(x, x, x)).lower().replace("kdropout=false", "")


def test_a_mask_that_does_not_compile_leaves_out_as_it_was(monkeypatch, rng):
    """Its kernel is compiled before the first one runs."""
    load, x = module.load, rng.standard_normal((1, 9, 2, 32)).astype(np.float16)

    def refuse_the_mask(spec: Any, *rest: Any) -> Any:
        if spec is dropout_mask.SPEC:
            raise CompileError("does not compile")
        return load(spec, *rest)

    monkeypatch.setattr(module, "load", refuse_the_mask)
    monkeypatch.setattr(prepare, "_compiled", set())
    out = np.full_like(x, 7.0)
    with using("emulator"), pytest.raises(CompileError):
        cuflash.attention(x, x, x, dropout_p=0.3, seed=5, out=out, aux=("dropout_mask",))
    assert (out == 7.0).all()


def test_a_mask_of_too_many_rows_is_refused_before_anything_is_written(monkeypatch, rng):
    monkeypatch.setattr(dropout_mask, "GRID_LIMITS", (8, 8, 8))
    x = rng.standard_normal((1, 9, 2, 32)).astype(np.float16)
    out = np.full_like(x, 7.0)
    with using("emulator"), pytest.raises(UnsupportedError, match=r"1 x 9 rows has more than 8: split the batch"):
        cuflash.attention(x, x, x, dropout_p=0.3, seed=5, out=out, aux=("dropout_mask",))
    assert (out == 7.0).all()


@needs_nvrtc
def test_seeds_offsets_and_rates_never_recompile(monkeypatch, rng):
    """Recorded launches: one kernel, and no seed from a device array among the bytes."""
    with recording("sm_90a") as recorder:
        make = recorder.arrays["cupy stand-in"]
        q = make(rng.standard_normal((2, 30, 2, 64)).astype(np.float16))
        seeds = make(np.array([1], np.int64))
        cuflash.attention(q, q, q, dropout_p=0.1, seed=0)
        monkeypatch.setattr(cuflash.config, "on_compile", "error")
        for i in range(50):
            cuflash.attention(q, q, q, dropout_p=float(rng.uniform(0.01, 0.9)), seed=int(rng.integers(2**63)), offset=i)
        out = make(np.zeros((2, 30, 2, 64), np.float16))
        cuflash.attention(q, q, q, dropout_p=0.1, seed=seeds, offset=seeds, out=out)
        assert {launch.kernel.spec for launch in recorder.launches} == {recorder.launches[0].kernel.spec}
        assert len({launch.params for launch in recorder.launches}) == 52
        before = recorder.launches[-1].params
        recorder.host(seeds)[...] = 2
        cuflash.attention(q, q, q, dropout_p=0.1, seed=seeds, offset=seeds, out=out)
        assert recorder.launches[-1].params == before


@needs_nvrtc
@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
def test_the_mask_kernel_compiles(name):
    checked(dropout_mask.SPEC, name)


def test_dropout_is_part_of_the_variant_and_its_rate_is_not():
    target = arch.named("sm_80")
    with_dropout = forward.choose_variant(dtypes.float16, 64, 64, 16, target, dropout=True)
    assert with_dropout != forward.choose_variant(dtypes.float16, 64, 64, 16, target)
    assert with_dropout.members()["kDropout"] is True
