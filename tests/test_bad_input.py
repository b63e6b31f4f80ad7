"""Every wrong argument: the error names the value, the rule and the remedy; nothing is launched, nothing written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import arch, reference
from cuflash.errors import ArgumentError, CompileError, UnsupportedError
from cuflash.jit import module


def x(*shape: int, dtype=np.float16) -> np.ndarray:
    return np.ones(shape, dtype)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


DENSE = {"q": x(2, 6, 4, 16), "k": x(2, 9, 2, 16), "v": x(2, 9, 2, 16)}
PACKED = {
    "q": x(6, 4, 16), "k": x(9, 2, 16), "v": x(9, 2, 16), "cu_seqlens_q": i32(0, 2, 6), "cu_seqlens_k": i32(0, 3, 9),
}  # fmt: skip


def dense(**changes) -> dict:
    return {**DENSE, **changes}


def packed(**changes) -> dict:
    return {name: value for name, value in {**PACKED, **changes}.items() if value is not None}


# what -> (arguments, what its message must say: value, rule and remedy, in this order)
WRONG = {
    # kinds of argument
    "a list for q": (dense(q=[[1.0]]), r"q is a list: pass a NumPy, CuPy, PyTorch or JAX array"),
    "a scalar for v": (dense(v=np.float16(1)), r"v: a float16 is not an array: wrap it in np\.asarray"),
    "None for k": (dense(k=None), r"k is a NoneType"),
    "an array for scale": (dense(scale=np.ones(3)), r"scale is a ndarray and must be a Python number.*float\(scale\)"),
    "a string for scale": (dense(scale="1"), r"scale is a str and must be a Python number"),
    "scale not finite": (dense(scale=float("nan")), r"scale=nan must be finite.*pass None for 1 / sqrt\(head_dim\)"),
    "scale past float32": (dense(scale=1e39), r"scale=1e\+39 must be finite, and at most 3\.403e\+38"),
    "a deterministic of text": (dense(deterministic="no"), r"deterministic is a str and must be True or False"),
    "kernel options a number": (dense(kernel_options=1.5), r"kernel_options is a float and must be a dict, or None"),
    "aux of numbers": (dense(aux=np.arange(2)), r"aux names np\.int64\(0\): it must be one of lse"),
    "scale past every float": (dense(scale=10**400), r"scale=inf must be finite"),
    "causal a string": (dense(causal="no"), r"causal is a str and must be True or False: pass bool\(causal\)"),
    "causal an array": (dense(causal=np.array([True, False])), r"causal is a ndarray and must be True or False"),
    "softcap an array": (dense(softcap=np.ones(2)), r"softcap is a ndarray and must be a Python number"),
    "softcap negative": (dense(softcap=-1.0), r"softcap=-1\.0 must be positive, or 0"),
    "softcap infinite": (dense(softcap=float("inf")), r"softcap=inf must be finite"),
    "max_seqlen a text": (packed(max_seqlen_q="4"), r"max_seqlen_q is a str and must be an int or None: pass int\("),
    "max_seqlen an array": (packed(max_seqlen_q=i32(4, 2)), r"max_seqlen_q is an array of shape \(2,\).*int\(max_"),
    "max_seqlen no integer": (packed(max_seqlen_k=np.array(4.0)), r"max_seqlen_k is an array.*float64, and must be"),
    "max_seqlen negative": (packed(max_seqlen_k=-4), r"max_seqlen_k=-4 must not be negative"),
    "aux a string": (dense(aux="lse"), r"aux='lse' must be a tuple of names: pass aux=\('lse',\)"),
    "aux None": (dense(aux=None), r"aux=None must be a tuple of names: pass \(\) for none"),
    "aux unknown": (dense(aux=("probs",)), r"aux names 'probs': it must be one of lse, max_logit"),
    # shapes
    "q of 2 dimensions": (
        dense(q=x(6, 64)),
        r"q\.shape=\(6, 64\) must have 4.*q\.reshape\(1, 6, heads, 64 // heads\), if .* one head, q\.reshape\(1, 6, 1,",
    ),
    "packed q of 2 dimensions": (packed(q=x(6, 64)), r"must have 3.*as cu_seq.*q\.reshape\(6, heads, 64 // heads\)"),
    "q, k, v in one": (dense(q=x(2, 6, 3, 4, 16)), r"must have 4 dim.*flash_attn_qkvpacked_func.*q\.reshape"),
    "a scalar array for q": (dense(q=np.array(1, np.float16)), r"q\.shape=\(\) must have 4 dim.*q\.reshape"),
    "q of 3 dimensions": (dense(q=x(6, 4, 16)), r"q\.shape=\(6, 4, 16\) must have 4 dim.*q\[None\].*cu_seqlens_q"),
    "k of 5 dimensions": (dense(k=x(2, 9, 1, 2, 16)), r"k\.shape=\(2, 9, 1, 2, 16\) must have 4 dimensions.*reshape"),
    "packed q of 4 dimensions": (
        packed(q=x(1, 6, 4, 16)),
        r"q\.shape=\(1, 6, 4, 16\) must have 3 dimensions.*q\.reshape\(-1, heads, head_dim\)",
    ),
    "batches differ": (dense(k=x(3, 9, 2, 16)), r"k\.shape\[0\]=3 must equal q\.shape\[0\]=2, the batch: expand"),
    "lengths of k and v differ": (dense(v=x(2, 8, 2, 16)), r"v\.shape\[1\]=8 must equal k\.shape\[1\]=9: each key has"),
    "packed k and v differ": (packed(v=x(8, 2, 16)), r"v\.shape\[0\]=8 must equal k\.shape\[0\]=9"),
    "heads of k and v differ": (dense(v=x(2, 9, 4, 16)), r"v\.shape\[2\]=4 must equal k\.shape\[2\]=2"),
    "heads do not divide": (
        dense(k=x(2, 9, 3, 16), v=x(2, 9, 3, 16)),
        r"k\.shape\[2\]=3 must divide q\.shape\[2\]=4: each key head serves a whole group of query heads; repeat",
    ),
    "split size": (dense(split_size=0), r"split_size=0 must be a positive int or None: pass a multiple of 64"),
    "no heads": (dense(k=x(2, 9, 0, 16), v=x(2, 9, 0, 16)), r"k\.shape\[2\]=0 must be at least 1"),
    "head dims of q and k differ": (dense(k=x(2, 9, 2, 8)), r"k\.shape\[3\]=8 must equal q\.shape\[3\]=16"),
    "head dim 0": (dense(q=x(2, 6, 4, 0), k=x(2, 9, 2, 0)), r"q\.shape\[3\]=0: the head dim must be at least 1"),
    "heads and length swapped, groups": (
        {"q": x(2, 8, 100, 16), "k": x(2, 2, 70, 16), "v": x(2, 2, 70, 16)},
        r"k\.shape\[2\]=70 must divide.*heads and length look swapped.*\[batch, len, heads, head_dim\].*swapaxes",
    ),
    "heads and length swapped, as many heads": (
        {"q": x(2, 8, 512, 16), "k": x(2, 8, 512, 16), "v": x(2, 8, 512, 16)},
        r"512 key heads over 8 keys; heads and length look swapped.*q\.swapaxes\(1, 2\)",
    ),
    # dtypes
    "integers": (dense(q=x(2, 6, 4, 16, dtype=np.int8)), r"q\.dtype=int8 must be float16, bfloat16 or float32.*quant"),
    "token ids": (dense(q=x(2, 6, 4, 16, dtype=np.int64)), r"q\.dtype=int64 must be float16.*not positions, token ids"),
    "complex": (dense(q=x(2, 6, 4, 16, dtype=np.complex64)), r"q: dtype complex64: attention is of real numbers; pass"),
    "Python objects": (dense(k=x(2, 9, 2, 16, dtype=object)), r"k: dtype object: elements must be numbers"),
    "out of no dimension": (dense(out=np.array(3, np.float16)), r"out\.shape=\(\) must be \(2, 6, 4, 16\)"),
    "dtypes differ": (
        dense(k=x(2, 9, 2, 16, dtype=np.float32)),
        r"k\.dtype=float32 must equal q\.dtype=float16: pass k\.astype\(np\.float16\)",
    ),
    "dtypes differ, bfloat16": (
        dense(q=x(2, 6, 4, 16, dtype=ml_dtypes.bfloat16)),
        r"k\.dtype=float16 must equal q\.dtype=bfloat16: pass k\.astype\(ml_dtypes\.bfloat16\)",
    ),
    # strides
    "last dimension strided": (
        dense(q=x(2, 6, 4, 32)[..., ::2]),
        r"q\.strides=\(768, 128, 32, 2\).*must end in 1.*np\.ascontiguousarray\(q\)",
    ),
    "last dimension not last": (dense(k=x(2, 16, 2, 9).swapaxes(1, 3)), r"k\.strides=.*must end in 1"),
    "rows backwards": (
        dense(v=x(2, 9, 2, 16)[:, ::-1]),
        r"v\.strides=\(288, -32, 16, 1\).*must not be negative: pass np\.ascontiguousarray\(v\)",
    ),
    "memory off the item size": (
        dense(q=np.ndarray((2, 6, 4, 16), np.float16, np.zeros(9000, np.uint8), offset=3)),
        r"q: address 0x\w+ is no multiple of the item size, 2: pass a copy",
    ),
    "cu_seqlens off the item size": (
        packed(cu_seqlens_q=np.ndarray((3,), np.int32, np.zeros(16, np.uint8), offset=2)),
        r"cu_seqlens_q: address 0x\w+ is no multiple of the item size, 4: pass a copy",
    ),
    "strides off the item size": (
        dense(q=np.ndarray((2, 6, 4, 16), np.float16, np.zeros(9000, np.uint8), strides=(3001, 400, 40, 2))),
        r"q: strides of \(3001, 400, 40, 2\) bytes are not multiples of the item size",
    ),
    # cu_seqlens
    "cu_seqlens of one side": (packed(cu_seqlens_k=None), r"cu_seqlens_q is given and cu_seqlens_k is not.*same arr"),
    "packed queries, dense keys": (
        packed(k=DENSE["k"], v=DENSE["v"], cu_seqlens_k=None, seqused_k=i32(3, 9)),
        r"cu_seqlens_k is not.*k and v of shape.*k\.reshape\(-1, 2, 16\), and v likewise, with "
        r"cu_seqlens_k=np\.arange\(3, dtype=np\.int32\) \* 9, beside which seqused_k",
    ),
    "dense queries, packed keys": (
        packed(q=DENSE["q"], cu_seqlens_q=None),
        r"cu_seqlens_q is not.*q\.reshape\(-1, 4, 16\), with cu_seqlens_q=np\.arange\(3, dtype=np\.int32\) \* 6",
    ),
    "cu_seqlens int64": (
        packed(cu_seqlens_q=np.cumsum([0, 2, 4])),
        r"cu_seqlens_q\.dtype=int64 must be int32: pass cu_seqlens_q\.astype\(np\.int32\)",
    ),
    "cu_seqlens float": (packed(cu_seqlens_k=x(3)), r"cu_seqlens_k\.dtype=float16 must be int32"),
    "cu_seqlens of NaN": (packed(cu_seqlens_q=np.array([0, np.nan, 6])), r"cu_seqlens_q\.dtype=float64 must be int32"),
    "cu_seqlens of floats": (packed(cu_seqlens_k=[0, 1.5, 9]), r"cu_seqlens_k\[1\]=1\.5 must be an int of 32 bits"),
    "cu_seqlens past 32 bits": (packed(cu_seqlens_k=[0, 3, 2**31]), r"cu_seqlens_k\[2\]=2147483648 must be an int"),
    "cu_seqlens of 2 dimensions": (packed(cu_seqlens_q=i32(0, 2, 6)[None]), r"cu_seqlens_q\.shape=\(1, 3\) must have"),
    "cu_seqlens strided": (packed(cu_seqlens_q=i32(0, 9, 2, 9, 6)[::2]), r"cu_seqlens_q\.strides=\(2,\) must be"),
    "cu_seqlens empty": (packed(cu_seqlens_q=[], cu_seqlens_k=[]), r"cu_seqlens_q\.shape=\(0,\) must be \(batch"),
    "cu_seqlens of two batches": (
        packed(cu_seqlens_k=i32(0, 9)),
        r"cu_seqlens_k\.shape=\(2,\) must equal cu_seqlens_q\.shape=\(3,\)",
    ),
    "cu_seqlens from 1": (packed(cu_seqlens_q=i32(1, 2, 6)), r"cu_seqlens_q\[0\]=1 must be 0"),
    "cu_seqlens falling": (
        packed(cu_seqlens_k=[0, 9, 3]),
        r"cu_seqlens_k\[2\]=3 must not be below cu_seqlens_k\[1\]=9.*running totals.*packing\.cu_seqlens_from",
    ),
    "cu_seqlens negative": (packed(cu_seqlens_q=i32(0, -2, 6)), r"cu_seqlens_q\[1\]=-2 must not be below"),
    "cu_seqlens past the array": (
        packed(cu_seqlens_q=(0, 2, 7)),
        r"cu_seqlens_q\[-1\]=7 must not exceed 6, the rows of q: the last sequence would end past the array",
    ),
    # seqused
    "seqused int64": (dense(seqused_k=np.array([1, 2])), r"seqused_k\.dtype=int64 must be int32.*astype"),
    "seqused of another batch": (dense(seqused_q=i32(1)), r"seqused_q\.shape=\(1,\) must be \(2,\)"),
    "seqused too long": (dense(seqused_k=i32(9, 10)), r"seqused_k\[1\]=10 must be from 0 to 9, the length of"),
    "seqused past its sequence": (packed(seqused_k=i32(4, 1)), r"seqused_k\[0\]=4 must be from 0 to 3"),
    "seqused negative": (packed(seqused_q=[0, -1]), r"seqused_q\[1\]=-1 must be from 0 to 4"),
    # windows
    "window negative": (dense(window_size=(-2, 0)), r"window_size=\(-2, 0\): -2 must be -1 \(or None: unlimited\)"),
    "window one number": (dense(window_size=128), r"window_size=128 must be a pair \(left, right\).*\(n - 1, 0\)"),
    "window of floats": (dense(window_size=(1.5, 0)), r"window_size=\(1\.5, 0\) must hold two ints"),
    # numbers for each head
    "slopes float16": (dense(alibi_slopes=x(4)), r"alibi_slopes\.dtype=float16 must be float32.*astype\(np\.float32\)"),
    "slopes for the key heads": (
        dense(alibi_slopes=x(2, dtype=np.float32)),
        r"alibi_slopes\.shape=\(2,\) must be \(4,\) or \(2, 4\)",
    ),
    "slopes expanded": (
        dense(alibi_slopes=np.broadcast_to(np.float32(1), (2, 4))),
        r"alibi_slopes\.strides=\(0, 0\).*contiguous",
    ),
    "sink float64": (dense(sink=x(4, dtype=np.float64)), r"sink\.dtype=float64 must be float32 or q's float16"),
    "sink for every row": (dense(sink=x(6, 4)), r"sink\.shape=\(6, 4\) must be \(4,\): one number a query head"),
    # out
    "out of another shape": (dense(out=x(2, 6, 4, 8)), r"out\.shape=\(2, 6, 4, 8\) must be \(2, 6, 4, 16\)"),
    "out of another dtype": (dense(out=x(2, 6, 4, 16, dtype=np.float32)), r"out\.dtype=float32 must equal q\.dtype"),
    "out expanded": (
        dense(out=np.lib.stride_tricks.as_strided(x(6, 4, 16), (2, 6, 4, 16), (0, 128, 32, 2))),
        r"out\.strides=\(0, 64, 16, 1\): an expanded array",
    ),
    "out strided in a row": (dense(out=x(2, 6, 4, 32)[..., ::2]), r"out\.strides=.*must end in 1"),
    # dropout
    "dropout_p an array": (dense(dropout_p=np.ones(2)), r"dropout_p is a ndarray and must be a Python number"),
    "dropout_p of 1": (dense(dropout_p=1), r"dropout_p=1\.0 must be from 0 up to, not including, 1"),
    "dropout_p below 0": (dense(dropout_p=-0.1, seed=1), r"dropout_p=-0\.1 must be from 0 up to"),
    "dropout_p not a number": (dense(dropout_p="a", seed=1), r"dropout_p is a str and must be a Python number"),
    "no seed": (dense(dropout_p=0.1), r"seed is None, and dropout needs one: pass an int"),
    "a float seed": (dense(dropout_p=0.1, seed=1.5), r"seed=1\.5 must be an int.*pass int\(seed\)"),
    "no offset": (dense(dropout_p=0.1, seed=1, offset=None), r"offset=None must be an int"),
    "a seed of floats": (
        dense(dropout_p=0.1, seed=x(1, dtype=np.float32)),
        r"seed\.dtype=float32 must be int64.*seed\.astype\(np\.int64\)",
    ),
    "two seeds": (dense(dropout_p=0.1, seed=i32(1, 2)), r"seed\.shape=\(2,\) must be \(1,\)"),
    "a short offset": (
        dense(dropout_p=0.1, seed=1, offset=i32(1).astype(np.int16)),
        r"offset\.dtype=int16 must be int64, or another integer of 32 or 64 bits",
    ),
    "out is q": (dense(out=DENSE["q"]), r"out shares memory with q, which is still read while out is written"),
}  # fmt: skip

UNSUPPORTED = {
    "head dim 512": (
        {"q": x(1, 2, 1, 512), "k": x(1, 2, 1, 512), "v": x(1, 2, 1, 512)},
        r"q\.shape\[3\]=512: head dims go from 1 to 256.*scaled_dot_product_attention",
    ),
    "head dim of v 257": (dense(v=x(2, 9, 2, 257)), r"v\.shape\[3\]=257: head dims go from 1 to 256"),
    "kernel options": (dense(kernel_options={"BLOCK_M": 64}), r"kernel_options=\{'BLOCK_M': 64\}.*leave it None"),
    "kernel options of arrays": (dense(kernel_options={"cluster": np.arange(2)}), r"kernel_options=.*leave it None"),
}


@pytest.fixture(params=["reference", "emulator"])
def backend(request):
    with using("auto" if request.param == "reference" else request.param):
        yield request.param


@pytest.fixture
def nothing_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a refused call went on")

    monkeypatch.setattr(reference, "attention", fail)
    monkeypatch.setattr(reference, "attention_backward", fail)
    monkeypatch.setattr(module, "load", fail)


def refused(arguments: dict, match: str, error: type[Exception], call=cuflash.attention) -> None:
    before = {name: v.copy() for name, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype.kind != "V"}
    with pytest.raises(error, match=match) as caught:
        call(**arguments)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for name, values in before.items():
        np.testing.assert_array_equal(arguments[name], values, err_msg=f"{name} was written")
    with pytest.raises(error, match=match):  # a second time: nothing of a refused call may be remembered
        call(**arguments)
    if call is cuflash.attention:
        with pytest.raises(error, match=match):
            cuflash.explain(**arguments)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(backend, nothing_runs, what):
    refused(*WRONG[what], ArgumentError)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_requests_no_kernel_serves(backend, nothing_runs, what):
    refused(*UNSUPPORTED[what], UnsupportedError)


def test_read_only_out(backend, nothing_runs):
    out = x(2, 6, 4, 16)
    out.flags.writeable = False
    refused(dense(out=out), "out is read-only: pass a writable array", ArgumentError)


def test_overlap_is_looked_for_every_time(backend):
    """The second call has the metadata of the first, which was fine."""
    memory = x(4, 6, 4, 16)
    k = x(2, 9, 2, 16)
    cuflash.attention(memory[:2], k, k, out=memory[2:])
    with pytest.raises(ArgumentError, match="out shares memory with q"):
        cuflash.attention(memory[:2], k, k, out=memory[:2])


def test_float64_off_the_reference(nothing_runs):
    arguments = {name: array.astype(np.float64) for name, array in DENSE.items()}
    with using("emulator"):
        refused(
            arguments, r"q\.dtype=float64 runs on the NumPy reference alone.*q\.astype\(np\.float32\)", UnsupportedError
        )


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
def test_mods_are_functions(backend, nothing_runs, name):
    refused(dense(**{name: 3}), rf"{name}=3 must be a function", ArgumentError)
    refused(dense(block_mask=object()), "block_mask is a object: pass what cuflash.create_block_mask", ArgumentError)


def test_host_arrays_when_only_a_gpu_will_do(nothing_runs):
    with using("cuda"):
        refused(DENSE, r"q is in host memory and config\.backend='cuda'.*cupy\.asarray\(q\)", ArgumentError)


def test_device_arrays_when_only_the_host_will_do(nothing_runs):
    from recorded import recording

    with recording() as recorder, using("emulator"):
        arrays = {name: recorder.arrays["cupy stand-in"](v) for name, v in DENSE.items()}
        with pytest.raises(ArgumentError, match=r"q is on cuda:0 and config\.backend='emulator' runs on the host"):
            cuflash.attention(**arrays)
        assert not recorder.launches


@pytest.mark.parametrize("name", ["k", "v", "alibi_slopes", "sink", "out"])
def test_mixed_frameworks(nothing_runs, name):
    torch = pytest.importorskip("torch")
    arrays = dense(alibi_slopes=x(4, dtype=np.float32), sink=x(4), out=x(2, 6, 4, 16))
    arrays[name] = torch.from_numpy(arrays[name])
    with pytest.raises(ArgumentError, match=rf"{name} is a PyTorch array and q a NumPy array.*from_dlpack"):
        cuflash.attention(**arrays)


def test_mixed_devices(nothing_runs):
    pytest.importorskip("torch")
    import torch
    from recorded import recording

    with recording() as recorder:
        q, k = (recorder.arrays["torch"](DENSE[name]) for name in "qk")
        with pytest.raises(ArgumentError, match=r"v is on cpu and q on cuda:0: all arrays must be on one device"):
            cuflash.attention(q, k, torch.from_numpy(DENSE["v"]))
        starts = torch.tensor([0, 6], dtype=torch.int32)
        flat_q, flat_k = (recorder.arrays["torch"](PACKED[name]) for name in "qk")
        with pytest.raises(ArgumentError, match=r"cu_seqlens_q is on cpu and q on cuda:0"):
            cuflash.attention(flat_q, flat_k, flat_k, cu_seqlens_q=starts, cu_seqlens_k=starts)
        assert not recorder.launches and not recorder.uploads


def test_what_is_remembered_of_plain_lengths_lets_no_tensor_pass():
    torch = pytest.importorskip("torch")
    from recorded import recording

    starts = i32(0, 6)
    with recording() as recorder:
        q, k = (recorder.arrays["torch"](x(6, 4, 16)) for _ in "qk")
        cuflash.attention(q, k, k, cu_seqlens_q=starts, cu_seqlens_k=starts)
        tensor = torch.from_numpy(starts)
        with pytest.raises(ArgumentError, match=r"cu_seqlens_q is on cpu and q on cuda:0"):
            cuflash.attention(q, k, k, cu_seqlens_q=tensor, cu_seqlens_k=tensor)
        assert len(recorder.launches) == 1


@pytest.mark.parametrize(
    "framework, cast",
    [("torch", r"cu_seqlens_q\.to\(torch\.int32\)"), ("jax", r"cu_seqlens_q\.astype\(jnp\.int32\)")],
)
def test_casts_are_spelled_as_the_framework_does(nothing_runs, framework, cast):
    pytest.importorskip(framework)
    import importlib

    if framework == "jax":
        jax = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        convert = jax.numpy.asarray
    else:
        convert = importlib.import_module("torch").from_numpy
    try:
        arrays = {name: convert(v) for name, v in packed(cu_seqlens_q=np.cumsum([0, 2, 4])).items()}
    finally:
        if framework == "jax":
            jax.config.update("jax_enable_x64", False)
    with pytest.raises(ArgumentError, match=rf"cu_seqlens_q\.dtype=int64 must be int32: pass {cast}"):
        cuflash.attention(**arrays)


def test_architectures_too_old():
    with pytest.raises(UnsupportedError, match=r"'sm_75'.*8\.0.*host arrays"):
        cuflash.config.arch = "sm_75"
    with pytest.raises(UnsupportedError, match=r"'sm_75'"):
        arch.of_capability(7, 5)


def test_missing_compilers(monkeypatch):
    from cuflash.jit import cache, hostcxx, nvrtc

    def missing(*_, **__):
        raise CompileError("no compiler: install one")

    out = np.full((2, 6, 4, 16), np.nan, np.float16)
    with using("emulator"), monkeypatch.context() as patch:
        patch.setattr(hostcxx, "compile", missing)
        patch.setattr(module, "_kernels", {})
        with pytest.raises(CompileError, match="install one"):
            cuflash.attention(**dense(out=out))
    assert np.isnan(out).all()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile", missing)
        patch.setattr(module, "_kernels", {})
        patch.setattr(cache, "fetch", lambda kind, key, suffix, make: make())
        with pytest.raises(CompileError, match="install one"):
            cuflash.warmup(dtype="float16", head_dim=16, arch="sm_80")


# attention_backward. -------------------------------------------------------------------------------------------------


def backward(**changes) -> dict:
    """A right call, dense or, with cu_seqlens, packed; changed."""
    rows = (6,) if "cu_seqlens_q" in changes else (2, 6)
    given = {"dout": x(*rows, 4, 16), "out": x(*rows, 4, 16), "lse": x(*rows[:-1], 4, 6, dtype=np.float32)}
    return {**DENSE, **given, **changes}


def of_both(table: dict) -> list[str]:
    """The rows of a table that are not about what the forward alone has; a missing seed it may draw, for one."""
    return [what for what, (arguments, _) in table.items() if not {"aux", "out"} & {*arguments} and what != "no seed"]


@pytest.mark.parametrize("what", of_both(WRONG))
def test_what_the_forward_refuses_the_backward_refuses(backend, nothing_runs, what):
    arguments, match = WRONG[what]
    refused(backward(**arguments), match, ArgumentError, cuflash.attention_backward)


@pytest.mark.parametrize("what", of_both(UNSUPPORTED))
def test_what_the_forward_does_not_serve_the_backward_does_not(backend, nothing_runs, what):
    arguments, match = UNSUPPORTED[what]
    refused(backward(**arguments), match, UnsupportedError, cuflash.attention_backward)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


MEMORY = x(2, 9, 2, 16)
WRONG_BACKWARD = {
    "no lse": (backward(lse=None), r"lse is None: gradients need it: take it from attention\(.*aux=\(\"lse\",\)\)"),
    "no out": (backward(out=None), r"out is None: pass what attention returned"),
    "no dout": (backward(dout=None), r"dout is None: pass the gradient of the loss for out.*zeros_like"),
    "a list for dout": (backward(dout=[1.0]), r"dout is a list: pass a NumPy, CuPy, PyTorch or JAX array"),
    "dout of another shape": (
        backward(dout=x(2, 6, 4, 8)),
        r"dout\.shape=\(2, 6, 4, 8\) must be \(2, 6, 4, 16\): out's, for which it is the gradient",
    ),
    "dout of another dtype": (
        backward(dout=x(2, 6, 4, 16, dtype=np.float32)),
        r"dout\.dtype=float32 must be float16: out's.*pass dout\.astype\(np\.float16\)",
    ),
    "dout strided in a row": (
        backward(dout=x(2, 6, 4, 32)[..., ::2]),
        r"dout\.strides=.*must end in 1.*pass np\.ascontiguousarray\(dout\)",
    ),
    "dout expanded from a number": (
        backward(dout=np.broadcast_to(np.float16(1), (2, 6, 4, 16))),
        r"dout\.strides=\(0, 0, 0, 0\).*must end in 1.*pass np\.ascontiguousarray\(dout\)",
    ),
    "out of q's shape, not of v's head dim": (
        backward(v=x(2, 9, 2, 8)),
        r"out\.shape=\(2, 6, 4, 16\) must be \(2, 6, 4, 8\): the result of attention with these q, k, v",
    ),
    "out of another dtype": (backward(out=x(2, 6, 4, 16, dtype=np.float32)), r"out\.dtype=float32 must be float16"),
    "lse by rows": (
        backward(lse=x(2, 6, 4, dtype=np.float32)),
        r"lse\.shape=\(2, 6, 4\) must be \(2, 4, 6\): what attention\(\.\.\., aux=\(\"lse\",\)\) returned, natural",
    ),
    "lse of dense arrays for packed ones": (
        backward(**packed(), lse=x(1, 4, 6, dtype=np.float32)),
        r"lse\.shape=\(1, 4, 6\) must be \(4, 6\)",
    ),
    "lse float16": (backward(lse=x(2, 4, 6)), r"lse\.dtype=float16 must be float32.*pass lse\.astype\(np\.float32\)"),
    "lse transposed": (
        backward(lse=x(2, 6, 4, dtype=np.float32).swapaxes(1, 2)),
        r"lse\.strides=\(24, 1, 4\).*must be a contiguous array's: pass np\.ascontiguousarray\(lse\)",
    ),
    "dlse of another shape": (
        backward(dlse=x(2, 4, 9, dtype=np.float32)),
        r"dlse\.shape=\(2, 4, 9\) must be \(2, 4, 6\): lse's, for which it is the gradient",
    ),
    "dlse float64": (backward(dlse=x(2, 4, 6, dtype=np.float64)), r"dlse\.dtype=float64 must be float32"),
    "dropout without its seed": (
        backward(dropout_p=0.5),
        r"seed is None: pass the seed and offset that attention had",
    ),
    # where to write
    "dq of k's shape": (backward(dq=x(2, 9, 2, 16)), r"dq\.shape=\(2, 9, 2, 16\) must be \(2, 6, 4, 16\): that of q"),
    "dv float32": (backward(dv=x(2, 9, 2, 16, dtype=np.float32)), r"dv\.dtype=float32 must equal q\.dtype=float16"),
    "dk read-only": (backward(dk=read_only(x(2, 9, 2, 16))), r"dk is read-only: pass a writable array"),
    "dk expanded": (
        backward(dk=np.lib.stride_tricks.as_strided(x(9, 2, 16), (2, 9, 2, 16), (0, 64, 32, 2))),
        r"dk\.strides=\(0, 32, 16, 1\): an expanded array",
    ),
    "dq strided in a row": (backward(dq=x(2, 6, 4, 32)[..., ::2]), r"dq\.strides=.*must end in 1.*allocate it"),
    "dq is q": (backward(dq=DENSE["q"]), r"dq shares memory with q, which is still read while dq is written"),
    "dk is dv": (backward(dk=MEMORY, dv=MEMORY), r"dk shares memory with dv, which is written too: pass other"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_BACKWARD)
def test_wrong_arguments_of_the_backward(backend, nothing_runs, what):
    refused(*WRONG_BACKWARD[what], ArgumentError, cuflash.attention_backward)


def test_overlap_of_gradients_is_looked_for_every_time(backend):
    good, k = backward(), x(2, 9, 2, 16)
    cuflash.attention_backward(**good, dk=x(2, 9, 2, 16))
    with pytest.raises(ArgumentError, match="dk shares memory with k"):
        cuflash.attention_backward(**{**good, "k": k}, dk=k)


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse", "dq"])
def test_mixed_frameworks_of_the_backward(nothing_runs, name):
    torch = pytest.importorskip("torch")
    arrays = backward(dlse=x(2, 4, 6, dtype=np.float32), dq=x(2, 6, 4, 16))
    arrays[name] = torch.from_numpy(arrays[name])
    with pytest.raises(ArgumentError, match=rf"{name} is a PyTorch array and q a NumPy array.*from_dlpack"):
        cuflash.attention_backward(**arrays)
