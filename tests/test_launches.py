"""What goes to the driver: recorded launches over the features of `attention`, replayed on the emulator.

tests/frameworks/test_cupy.py does the same for each kind of array; here one kind, and all that decides on a launch.
"""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from compare import check_backward, check_forward
from needs import needs_nvrtc
from recorded import STREAM, recording

import cuflash
from cuflash import arch, dtypes
from cuflash.call import bind
from cuflash.call.prepare import widest_load
from cuflash.jit import layout
from cuflash.ops import forward

pytestmark = needs_nvrtc  # it compiles the kernels whose launches are recorded
KIND = "cupy stand-in"


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def starts(*lengths: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


SLOPES = np.linspace(0.1, 0.9, 8, dtype=np.float32).reshape(2, 4)
SINK = np.linspace(-1, 1, 4)

# name -> (shape of q, shape of k and v, keywords)
CASES = {
    "dense": ((2, 70, 4, 64), (2, 90, 2, 64), {}),
    "dense, everything": (
        (2, 70, 4, 64),
        (2, 90, 1, 64),
        {
            "causal": True,
            "window_size": (40, 10),
            "softcap": 3.0,
            "alibi_slopes": SLOPES,
            "sink": SINK.astype(np.float16),
            "seqused_q": i32(70, 12),
            "seqused_k": i32(0, 80),
            "scale": 0.3,
        },
    ),
    "dense, dropout of capped scores": (
        (2, 70, 4, 64),
        (2, 90, 2, 64),
        {"causal": True, "softcap": 2.0, "alibi_slopes": SLOPES, "dropout_p": 0.3, "seed": 2**40 + 7, "offset": 3},
    ),
    "packed, similar lengths": (
        (150, 4, 64),
        (150, 4, 64),
        {"cu_seqlens_q": starts(70, 80), "cu_seqlens_k": starts(80, 70), "max_seqlen_q": 80, "window_size": (None, 5)},
    ),
    "packed, ragged": (
        (203, 4, 64),
        (203, 2, 64),
        {
            "cu_seqlens_q": starts(1, 0, 190, 0, 2),
            "cu_seqlens_k": starts(0, 5, 190, 3, 5),
            "causal": True,
            "alibi_slopes": SLOPES[0],
            "sink": SINK.astype(np.float32),
            "seqused_k": i32(0, 5, 100, 3, 5),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_bytes_give_the_right_answer(name, rng):
    shape_q, shape_k, keywords = CASES[name]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in (shape_q, shape_k, shape_k))
    with recording("sm_80") as recorder:
        device = {n: recorder.arrays[KIND](x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
        arrays = [recorder.arrays[KIND](x) for x in (q, k, v)]
        result = cuflash.attention(*arrays, **device, aux=("lse", "max_logit"))
        recorder.replay()
        out, lse, max_logit = (recorder.host(x) for x in result[:3])
    keywords = {n: x for n, x in keywords.items() if n != "max_seqlen_q"}
    check_forward(q, k, v, out, lse, max_logit, **keywords)


def test_lengths_known_to_the_host_choose_the_grid_as_a_hint_would():
    q = np.zeros((700, 2, 64), np.float16)
    even = starts(*[70] * 10)
    with recording() as recorder:
        array, cu = recorder.arrays[KIND](q), recorder.arrays[KIND](even)
        for lengths, hint in ((cu, None), (cu, 70), (even, None), (even.tolist(), None), (even, 700)):
            cuflash.attention(array, array, array, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=hint)
        unknown, hinted, known, listed, overruled = (launch.grid for launch in recorder.launches)
    assert hinted == known == listed == (1, 2, 11)
    assert unknown != hinted and overruled == unknown, "a hint that is given is taken, good or bad"


def test_bytes_do_not_depend_on_what_device_arrays_hold(rng):
    """So a captured graph replays right when new lengths are written into the same arrays."""
    q = rng.standard_normal((64, 2, 64)).astype(np.float16)
    lengths = starts(30, 34)
    with recording() as recorder:
        array, cu, out = (recorder.arrays[KIND](x) for x in (q, lengths, np.zeros_like(q)))
        recorder.capturing = True
        for _ in range(2):
            cuflash.attention(array, array, array, cu_seqlens_q=cu, cu_seqlens_k=cu, out=out, causal=True)
            lengths[1] = 5
        first, second = recorder.launches
        assert (first.params, first.grid) == (second.params, second.grid)
        recorder.replay()
        check_forward(q, q, q, recorder.host(out), cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=True)


@pytest.mark.parametrize("offset, load_bytes", [(0, 16), (16, 16), (8, 4), (4, 4), (2, 2), (6, 2)])
def test_loads_are_as_wide_as_the_addresses_allow(offset, load_bytes, rng):
    memory = np.zeros(4 * 64 * 2 + 64, np.float16)
    with recording("sm_80") as recorder:
        base = recorder.arrays[KIND](memory)
        k = recorder.arrays[KIND](np.zeros((1, 4, 2, 64), np.float16))
        q = recorder._cupy_like(np.zeros((1, 4, 2, 64), np.float16))
        q.data.ptr = base.data.ptr + offset
        cuflash.attention(q, k, k)
        assert recorder.launches[0].kernel.spec.variant.load_bytes == load_bytes


@pytest.mark.parametrize(
    "dtype, itemsize, strides, head_dim, expected",
    [
        ("float16", 2, (8, 64, 1), 64, 16),
        ("float16", 2, (8, 20, 1), 64, 4),
        ("float16", 2, (0, 7, 1), 64, 2),
        ("float32", 4, (0, 7, 1), 64, 4),
        ("float32", 4, (4, 8, 1), 64, 16),
        ("bfloat16", 2, (66, 2, 1), 64, 4),
        ("float16", 2, (8, 64, 1), 20, 4),  # a row ends inside of 16 bytes, though each begins at a multiple
        ("float16", 2, (8, 64, 1), 9, 2),
        ("float32", 4, (4, 64, 1), 21, 4),
    ],
)
def test_load_width_of_strides_and_rows(dtype, itemsize, strides, head_dim, expected):
    assert dtypes.BY_NAME[dtype].itemsize == itemsize
    assert widest_load(0, itemsize, [(64, 64, 1), strides], [64, head_dim]) == expected


def test_params_name_every_stride_and_number(rng):
    shape = (2, 5, 3, 4, 64)
    qkv = np.zeros(shape, np.float16)
    with recording() as recorder:
        whole = recorder.arrays[KIND](qkv)
        parts = []
        for i in range(3):
            part = recorder._cupy_like(qkv[:, :, i])
            part.data.ptr = whole.data.ptr + i * 4 * 64 * 2
            parts.append(part)
        cuflash.attention(*parts, window_size=(3, 1), scale=-0.5)
        fields = layout.load(recorder.launches[0].kernel.spec.params).unpack(recorder.launches[0].params)
    assert [fields[n] - fields["q"] for n in "qkv"] == [0, 512, 1024]
    strides = ("batch", 5 * 3 * 4 * 64), ("row", 3 * 4 * 64), ("head", 64)
    for name in "qkv":
        for axis, elements in strides:
            assert fields[f"{name}_stride_{axis}"] in (elements, elements * 2), (
                "in elements or bytes, as the struct says"
            )
    assert (fields["batch"], fields["q_len"], fields["k_len"], fields["head_group"]) == (2, 5, 5, 1)
    assert (fields["window_left"], fields["window_right"]) == (3, 1)


def test_numbers_lengths_and_heads_never_compile(rng):
    """Five hundred calls of four kinds: a kernel for each Variant among them."""
    kinds = [("float16", 64, 16), ("float16", 40, 16), ("bfloat16", 64, 16), ("float16", 33, 2)]
    compiled = []
    with recording() as recorder:
        before = cuflash.config.on_compile
        cuflash.config.on_compile = compiled.append
        try:
            for i in range(500):
                dtype, d, _ = kinds[i % len(kinds)]
                heads_kv, group, batch = (int(x) for x in rng.integers(1, 5, 3))
                lengths = rng.integers(0, 300, batch)
                total = int(lengths.sum())
                q = recorder._cupy_like(np.empty((total, heads_kv * group, d), dtypes.BY_NAME[dtype].numpy))
                k = recorder._cupy_like(np.empty((total, heads_kv, d), dtypes.BY_NAME[dtype].numpy))
                cu = recorder._cupy_like(starts(*lengths))
                cuflash.attention(
                    q, k, k,
                    cu_seqlens_q=cu, cu_seqlens_k=cu,
                    causal=bool(rng.integers(2)),
                    scale=float(rng.normal()),
                    softcap=float(rng.uniform(0, 30)) * int(rng.integers(2)),
                    window_size=(int(rng.integers(-1, 300)), int(rng.integers(-1, 300))),
                    max_seqlen_q=None if rng.integers(2) else int(rng.integers(0, 1000)),
                )  # fmt: skip
        finally:
            cuflash.config.on_compile = before
        used = {launch.kernel.spec for launch in recorder.launches}
    assert used == {
        forward.kernel_spec(
            forward.choose_sm90_variant(dtypes.BY_NAME[dtype], d, d)
            if load_bytes == 16
            else forward.choose_variant(dtypes.BY_NAME[dtype], d, d, load_bytes, arch.named("sm_90a"))
        )
        for dtype, d, load_bytes in kinds
    }
    assert len(used) == 3 and len(compiled) <= 3, "40 and 64 are one class of head dims"


def test_warm_calls_may_be_forbidden_to_compile(rng):
    with recording() as recorder:
        q = recorder.arrays[KIND](np.zeros((1, 9, 2, 64), np.float16))
        cuflash.attention(q, q, q)
        before = cuflash.config.on_compile
        cuflash.config.on_compile = "error"
        try:
            cuflash.attention(q, q, q, scale=2.0, causal=True, softcap=1.0)
        finally:
            cuflash.config.on_compile = before
        assert len(recorder.launches) == 2


def test_the_table_of_prepared_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(bind, "PREPARED_LIMIT", 8)
    x = np.ones((1, 2, 1, 8), np.float32)
    for i in range(30):
        cuflash.attention(x, x, x, scale=float(i))
        assert len(bind.PREPARED) <= 8


def test_settings_are_heeded_by_warm_calls():
    x = np.ones((1, 2, 1, 64), np.float16)
    explained = []
    for backend in ("auto", "emulator", "reference"):
        before, cuflash.config.backend = cuflash.config.backend, backend
        try:
            explained.append(cuflash.explain(x, x, x).backend)
        finally:
            cuflash.config.backend = before
    assert explained == ["reference", "emulator", "reference"]


def test_nothing_is_launched_for_nothing():
    with recording() as recorder:
        for shape in ((0, 4, 2, 64), (3, 0, 2, 64)):
            q = recorder.arrays[KIND](np.zeros(shape, np.float16))
            assert cuflash.attention(q, q, q).shape == shape
        assert not recorder.launches


def test_arrays_of_a_call_are_not_kept():
    x = np.ones((1, 2, 1, 64), np.float16)

    class Watched(np.ndarray):
        pass

    gone = []
    array = x.view(Watched)
    import weakref

    weakref.finalize(array, gone.append, True)
    cuflash.attention(array, array, array)
    del array
    gc.collect()
    assert gone


def test_device_memory_is_out_of_reach_in_these_tests():
    """The stand-in addresses are real mappings that nobody may read: /proc says so without trying."""
    with recording() as recorder:
        address = recorder.address(np.ones(10))
        try:
            maps = open("/proc/self/maps").read()
        except OSError:
            pytest.skip("no /proc")
        for line in maps.splitlines():
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                assert line.split()[1].startswith("---"), line
                return
        assert ctypes.sizeof(ctypes.c_void_p) == 8
        pytest.fail("the mapping is gone")


# Gradients. ----------------------------------------------------------------------------------------------------------


def device_call(recorder, dout, q, k, v, dlse, keywords):
    """out and lse by a replayed forward launch, then the recorded launches of the backward -> the device's grads."""
    device = {n: recorder.arrays[KIND](x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    arrays = [recorder.arrays[KIND](x) for x in (q, k, v)]
    out, lse, *_ = cuflash.attention(*arrays, **device, aux=("lse",))
    recorder.replay()
    recorder.launches.clear()
    dout, dlse = (recorder.arrays[KIND](x) for x in (dout, dlse))
    return cuflash.attention_backward(dout, *arrays, out, lse, dlse=dlse, captured_grads=True, **device)


@pytest.mark.parametrize("name", CASES)
def test_recorded_bytes_give_the_right_gradients(name, rng):
    shape_q, shape_k, keywords = CASES[name]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in (shape_q, shape_k, shape_k))
    dout = rng.standard_normal(shape_q).astype(np.float16)
    dlse = rng.standard_normal((*shape_q[:-3], shape_q[-2], shape_q[-3])).astype(np.float32)
    with recording("sm_80") as recorder:
        grads = device_call(recorder, dout, q, k, v, dlse, keywords)
        names = [launch.kernel.spec.source for launch in recorder.launches]
        sums = ["backward_sum.cu"] if "sink" in keywords or "alibi_slopes" in keywords else []
        of_dq = "backward_sm80.cu" if "alibi_slopes" in keywords else "backward_cast.cu"
        assert names == ["backward_delta.cu", "backward_sm80.cu", of_dq, *sums]
        assert {launch.stream for launch in recorder.launches} == {STREAM}
        recorder.replay(len(names))
        found = [None if x is None else recorder.host(x) for x in (*grads[:4], *grads.dcaptured)]
    for name, grad in zip(("sink", "alibi_slopes"), found[3:], strict=False):
        assert grad is None or (grad.dtype, grad.shape) == (keywords[name].dtype, keywords[name].shape)
    keywords = {n: x for n, x in keywords.items() if n != "max_seqlen_q"}
    check_backward(dout, q, k, v, *found, dlse=dlse, **keywords)


def test_the_backward_under_capture_depends_on_no_value(rng):
    """Twice the same bytes, workspace from the framework, whatever the lengths in the device's arrays are."""
    q = rng.standard_normal((64, 2, 64)).astype(np.float16)
    lengths, lse = starts(30, 34), np.zeros((2, 64), np.float32)
    with recording("sm_80") as recorder:
        x, cu = recorder.arrays[KIND](q), recorder.arrays[KIND](lengths)
        targets = {name: recorder.arrays[KIND](np.zeros_like(q)) for name in ("dq", "dk", "dv")}
        row = recorder.arrays[KIND](lse)
        recorder.capturing = True
        for _ in range(2):
            cuflash.attention_backward(x, x, x, x, x, row, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, **targets)
            lengths[1] = 5
        first, second = recorder.launches[:3], recorder.launches[3:]
        scratch = {"lse_base2", "delta", "dq_accum"}  # allocated anew by each call
        for a, b in zip(first, second, strict=True):
            one, other = (layout.load("BackwardParams").unpack(launch.params) for launch in (a, b))
            assert {n: x for n, x in one.items() if n not in scratch} == {
                n: x for n, x in other.items() if n not in scratch
            }
            assert a.grid == b.grid and all(one[name] in recorder.behind for name in scratch)


def test_lengths_known_to_the_host_choose_both_grids_of_the_backward():
    q, k = np.zeros((700, 2, 64), np.float16), np.zeros((1400, 2, 64), np.float16)
    cu_q, cu_k = starts(*[70] * 10), starts(*[140] * 10)
    lse = np.zeros((2, 700), np.float32)
    grids = []
    with recording() as recorder:
        x, y, row, cq, ck = (recorder.arrays[KIND](array) for array in (q, k, lse, cu_q, cu_k))
        for lengths, hints in (((cq, ck), {}), ((cq, ck), {"max_seqlen_q": 70, "max_seqlen_k": 140}),
                               ((cu_q, cu_k), {})):  # fmt: skip
            recorder.launches.clear()
            hints |= {"cu_seqlens_q": lengths[0], "cu_seqlens_k": lengths[1]}
            cuflash.attention_backward(x, x, y, y, x, row, deterministic=True, **hints)
            grids.append([launch.grid for launch in recorder.launches[1:3]])
    unknown, hinted, known = grids
    assert hinted == known == [(2, 2, 11), (1, 2, 11)]
    assert all(a != b for a, b in zip(unknown, hinted, strict=True))


def test_gradients_of_nothing_are_written():
    """No queries: dk and dv are zeros, which a launch must write; no keys: dq. No batch: nothing to write."""
    for q_len, k_len, launches in ((0, 5, 1), (5, 0, 2), (0, 0, 0)):
        q, k = np.zeros((2, q_len, 2, 64), np.float16), np.zeros((2, k_len, 2, 64), np.float16)
        with recording("sm_80") as recorder:
            x, y = recorder.arrays[KIND](q), recorder.arrays[KIND](k)
            row = recorder.arrays[KIND](np.zeros((2, 2, q_len), np.float32))
            grads = cuflash.attention_backward(x, x, y, y, x, row)
            assert len(recorder.launches) == launches
            recorder.replay(len(recorder.launches))
            for name, grad in zip(("dq", "dk", "dv"), grads, strict=False):
                assert not recorder.host(grad).any(), name
