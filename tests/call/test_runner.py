"""Warm calls: a runner does what the full way does, and takes no call that the full way would treat otherwise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from needs import needs_nvrtc
from recorded import recording

import cuflash
from benchmarks import nowhere
from cuflash import api
from cuflash.call import runner
from cuflash.call.arguments import Arguments
from cuflash.errors import ArgumentError, CuflashError

DENSE = (2, 70, 4, 64)
PACKED = (140, 4, 64)


def i32(*values):
    return np.array(values, np.int32)


@pytest.fixture
def recorder():
    runner.forget()
    with recording("sm_80") as recorder:
        yield recorder
    runner.forget()


def on_device(recorder, keywords):
    make = recorder.arrays["cupy stand-in"]
    return {name: make(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}


def three(recorder, shape, dtype=np.float16):
    make = recorder.arrays["cupy stand-in"]
    return [make(np.ones(shape, dtype)) for _ in range(4)]


def launched(recorder, q, k, v, **keywords):
    """What goes to the driver, or the error."""
    before = len(recorder.launches)
    try:
        cuflash.attention(q, k, v, **keywords)
    except CuflashError as error:
        return str(error)
    return [(x.kernel.spec, x.grid, x.params, x.stream) for x in recorder.launches[before:]]


# One change of every keyword: a packed call's are arrays of its lengths.
CHANGES = {
    "cu_seqlens_q": (PACKED, {"cu_seqlens_q": i32(0, 3, 140), "cu_seqlens_k": i32(0, 70, 140)}),
    "cu_seqlens_k": (PACKED, {"cu_seqlens_q": i32(0, 70, 140), "cu_seqlens_k": i32(0, 3, 140)}),
    "max_seqlen_q": (PACKED, {"cu_seqlens_q": i32(0, 140), "cu_seqlens_k": i32(0, 140), "max_seqlen_q": 3}),
    "max_seqlen_k": (PACKED, {"cu_seqlens_q": i32(0, 140), "cu_seqlens_k": i32(0, 140), "max_seqlen_k": 3}),
    "seqused_q": (DENSE, {"seqused_q": i32(3, 70)}),
    "seqused_k": (DENSE, {"seqused_k": i32(3, 70)}),
    "page_table": (DENSE, {"page_table": i32(0, 1, 1, 0).reshape(2, 2), "seqused_k": i32(100, 3)}),
    "scale": (DENSE, {"scale": 0.5}),
    "causal": (DENSE, {"causal": True}),
    "window_size": (DENSE, {"window_size": (3, 5)}),
    "softcap": (DENSE, {"softcap": 2.0}),
    "alibi_slopes": (DENSE, {"alibi_slopes": np.ones(4, np.float32)}),
    "sink": (DENSE, {"sink": np.ones(4, np.float32)}),
    "score_mod": (DENSE, {"score_mod": lambda s, b, h, i, j: s * 2}),
    "mask_mod": (DENSE, {"mask_mod": lambda b, h, i, j: i >= j}),
    "block_mask": (DENSE, {"block_mask": "no mask"}),
    "dropout_p": (DENSE, {"dropout_p": 0.5, "seed": 1}),
    "seed": (DENSE, {"dropout_p": 0.5, "seed": 2}),
    "offset": (DENSE, {"dropout_p": 0.5, "seed": 1, "offset": 3}),
    "deterministic": (DENSE, {"deterministic": True}),
    "split_size": (DENSE, {"split_size": 65}),
    "kernel_options": (DENSE, {"kernel_options": {"persistent": "no"}}),
    "aux": (DENSE, {"aux": ("none such",)}),
}


@needs_nvrtc
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_keyword_is_seen_by_warm_calls(recorder, name):
    shape, changed = CHANGES[name]
    q, k, v, out = three(recorder, shape)
    base = {n: x for n, x in changed.items() if n in ("cu_seqlens_q", "cu_seqlens_k") and shape is PACKED}
    base, changed = on_device(recorder, base), on_device(recorder, changed)
    alone = launched(recorder, q, k, v, out=out, **changed)
    runner.forget()
    for _ in range(2):
        launched(recorder, q, k, v, out=out, **base)
    assert runner.RUNNERS
    for _ in range(2):
        assert launched(recorder, q, k, v, out=out, **changed) == alone


def test_every_keyword_is_changed():
    assert {*CHANGES, "out"} == set(Arguments._fields)


@needs_nvrtc
def test_what_equals_a_right_value_is_refused_as_ever(recorder):
    q, k, v, out = three(recorder, DENSE)
    lengths = on_device(recorder, {"seqused_k": i32(3, 70)})
    warm = {"causal": True, "softcap": 1.0, "scale": 2.0, "out": out, **lengths}
    for _ in range(2):
        launched(recorder, q, k, v, **warm)
    for wrong in (
        {"causal": 1}, {"softcap": np.array(1.0)}, {"max_seqlen_q": 2.5}, {"deterministic": "no"}, {"split_size": True},
        {"dropout_p": 1.5}, {"aux": "lse"}, {"scale": "2"}, {"window_size": [0]}, {"kernel_options": []}, {"out": q},
        {"seqused_k": recorder.arrays["cupy stand-in"](np.array([3, 70]))}, {"sink": q}, {"k": v.shape},
    ):  # fmt: skip
        arrays = {"q": q, "k": k, "v": v, **warm, **wrong}
        with pytest.raises(ArgumentError):
            cuflash.attention(**arrays)


@needs_nvrtc
@pytest.mark.parametrize(("shape", "keywords"), [
    (DENSE, {"causal": True}), (DENSE, {"window_size": (9, 0), "softcap": 2.0, "sink": np.ones(4, np.float32)}),
    (DENSE, {"split_size": 64}), (DENSE, {"aux": ("lse", "max_logit")}),
    (PACKED, {"cu_seqlens_q": i32(0, 70, 140), "cu_seqlens_k": i32(0, 70, 140), "max_seqlen_q": 70}),
], ids=["dense", "window", "split", "aux", "packed"])  # fmt: skip
def test_a_warm_call_binds_nothing_and_computes_the_same(recorder, monkeypatch, shape, keywords):
    arrays = [
        recorder.arrays["cupy stand-in"](x.astype(np.float16))
        for x in np.random.default_rng(3).normal(size=(3, *shape))
    ]
    keywords = on_device(recorder, keywords)
    first = cuflash.attention(*arrays, **keywords)
    launches = len(recorder.launches)
    recorder.replay(launches)
    monkeypatch.setattr(api, "bind", None)
    second = cuflash.attention(*arrays, **keywords)
    assert len(recorder.launches) == 2 * launches
    recorder.replay(launches)
    assert type(first) is type(second)
    for one, other in zip(*[[x] if not isinstance(x, tuple) else x[:3] for x in (first, second)], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(recorder.host(one), recorder.host(other))


@needs_nvrtc
def test_a_result_that_shares_memory_is_refused_warm_too(recorder):
    q, k, v, out = three(recorder, DENSE)
    for target, right in ((out, True), (q, False), (out, True), (v, False)):
        if right:
            assert cuflash.attention(q, k, v, out=target) is target
        else:
            with pytest.raises(ArgumentError, match="out shares memory with"):
                cuflash.attention(q, k, v, out=target)
    assert len(recorder.launches) == 2


@needs_nvrtc
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_another_alignment_is_seen_by_warm_calls(recorder, name):
    arrays = dict(zip(("q", "k", "v", "out"), three(recorder, DENSE), strict=True))
    moved = arrays | {name: nowhere.CupyArray(arrays[name].data.ptr + 4, np.empty(DENSE, np.float16))}
    alone = launched(recorder, **moved)
    runner.forget()
    for given in (arrays, arrays, moved, moved):
        found = launched(recorder, **given)
    assert found == alone and found[0][0] != launched(recorder, **arrays)[0][0]


@needs_nvrtc
def test_settings_and_tables_are_heeded_by_runners(recorder, monkeypatch):
    q, k, v, out = three(recorder, DENSE)
    monkeypatch.setattr(runner, "PREPARED_LIMIT", 4)
    for i in range(20):
        cuflash.attention(q, k, v, out=out, scale=float(i))
        assert len(runner.RUNNERS) <= 4
    monkeypatch.setattr(cuflash.config, "backend", "emulator")
    with pytest.raises(ArgumentError, match="backend='emulator' runs on the host"):
        cuflash.attention(q, k, v, out=out, scale=19.0)


@needs_nvrtc
def test_threads_share_runners(recorder):
    calls = [(*three(recorder, DENSE), i % 2 == 0) for i in range(32)]
    for q, k, v, out, causal in calls[:2]:
        cuflash.attention(q, k, v, causal=causal, out=out)
    expected = {out.data.ptr: launched(recorder, q, k, v, causal=causal, out=out)[0] for q, k, v, out, causal in calls}
    before = len(recorder.launches)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda c: cuflash.attention(*c[:3], causal=c[4], out=c[3]), calls * 4))
    found = [(x.kernel.spec, x.grid, x.params, x.stream) for x in recorder.launches[before:]]
    assert len(found) == 128 and sorted(x[2] for x in found) == sorted(x[2] for x in [*expected.values()] * 4)


# Plans ----------------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_plan_launches_what_attention_does(recorder, monkeypatch):
    q, k, v, out = three(recorder, DENSE)
    planned = cuflash.plan(q, k, v, causal=True, scale=0.5)
    assert not recorder.launches
    assert planned.run(q, k, v, out) is out
    monkeypatch.setattr(runner, "keep", None)  # from here on nothing is bound
    planned.run(q, k, v, out)
    runner.forget()
    monkeypatch.undo()
    cuflash.attention(q, k, v, causal=True, scale=0.5, out=out)
    assert len({x.params for x in recorder.launches}) == 1 and len(recorder.launches) == 3


@needs_nvrtc
def test_a_plan_refuses_what_looks_otherwise(recorder):
    q, k, v, out = three(recorder, DENSE)
    other, _, _, single = three(recorder, (2, 71, 4, 64))
    planned = cuflash.plan(q, k, v)
    planned.run(q, k, v, out)
    cuflash.attention(other, k, v, out=single)  # for which there is a runner, too
    for wrong in ((other, k, v, out), (q, k, v, single), (q, other, v, out), (other, k, v, single)):
        with pytest.raises(ArgumentError, match=r"\.shape=\(2, 71, 4, 64\) must be \(2, 70, 4, 64\), as when the plan"):
            planned.run(*wrong)
    with pytest.raises(ArgumentError, match=r"out\.dtype=float32 must be float16"):
        planned.run(q, k, v, three(recorder, DENSE, np.float32)[3])
    with pytest.raises(ArgumentError, match="shares memory"):
        planned.run(q, k, v, q)
    assert len(recorder.launches) == 2


@needs_nvrtc
def test_a_plan_heeds_settings_alignment_and_lengths_that_change(recorder, monkeypatch):
    q, k, v, out = three(recorder, DENSE)
    used = on_device(recorder, {"seqused_k": i32(3, 70)})
    planned = cuflash.plan(q, k, v, **used)
    for _ in range(3):
        planned.run(q, k, v, out)
    assert len({x.params for x in recorder.launches}) == 1
    moved = nowhere.CupyArray(k.data.ptr + 4, np.empty(DENSE, np.float16))
    alone = launched(recorder, q, moved, v, out=out, **used)
    for given in (moved, k, moved):
        planned.run(q, given, v, out)
    last, before = recorder.launches[-1], recorder.launches[-2]
    assert (last.kernel.spec, last.params) == alone[0][::2] != (before.kernel.spec, before.params)
    with pytest.raises(ArgumentError, match=r"k is a NumPy array"):
        planned.run(q, np.ones(DENSE, np.float16), v, out)
    monkeypatch.setattr(cuflash.config, "backend", "emulator")
    with pytest.raises(ArgumentError, match="backend='emulator' runs on the host"):
        planned.run(q, moved, v, out)


def test_plans_of_host_arrays_mods_and_lengths(rng):
    q, k, v = rng.standard_normal((3, 2, 9, 2, 8)).astype(np.float32)
    used, factor = i32(4, 9), 2.0
    planned = cuflash.plan(q, k, v, seqused_k=used, score_mod=lambda s, b, h, i, j: s * factor)
    out = np.empty_like(q)
    for used[0], factor in ((4, 2.0), (9, 3.0)):
        planned.run(q, k, v, out)
        expected = cuflash.attention(q, k, v, seqused_k=used, scale=factor * 8**-0.5)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="plan: run"):
        cuflash.plan(q, k, v, out=out)
    with pytest.raises(ArgumentError, match=r"q\.strides"):
        planned.run(np.empty((2, 9, 4, 8), np.float32)[:, :, ::2], k, v, out)


def test_a_plan_is_refused_where_a_framework_looks_on():
    torch = pytest.importorskip("torch")
    q = torch.ones(1, 4, 2, 8)
    planned = cuflash.plan(q, q, q)
    assert torch.equal(planned.run(q, q, q, torch.empty_like(q)), q)
    with pytest.raises(cuflash.errors.UnsupportedError, match="a plan has no gradient"):
        planned.run(q.requires_grad_(), q, q, torch.empty(1, 4, 2, 8))


@pytest.mark.gpu
def test_warm_calls_and_plans_on_a_gpu(rng):
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.asarray(x) for x in rng.standard_normal((3, *PACKED)).astype(np.float16))
    starts = cupy.asarray(i32(0, 70, 140))
    keywords = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 70, "causal": True}
    runner.forget()
    first = cupy.asnumpy(cuflash.attention(q, k, v, **keywords))
    assert len(runner.RUNNERS) == 1
    planned, out = cuflash.plan(q, k, v, **keywords), cupy.empty_like(q)
    with ThreadPoolExecutor(2) as pool:
        warm = pool.map(lambda _: cupy.asnumpy(cuflash.attention(q, k, v, **keywords)), range(4))
        for found in (*warm, *(cupy.asnumpy(planned.run(q, k, v, out)) for _ in range(3))):
            np.testing.assert_array_equal(found, first)
    starts[1] = 3  # lengths are read anew
    warm, planned_too = cuflash.attention(q, k, v, **keywords), planned.run(q, k, v, out)
    runner.forget()
    expected = cupy.asnumpy(cuflash.attention(q, k, v, **keywords))
    for found in (warm, planned_too):
        np.testing.assert_array_equal(cupy.asnumpy(found), expected)
    assert (expected != first).any()
