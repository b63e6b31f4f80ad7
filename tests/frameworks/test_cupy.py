"""Device arrays of CuPy, of PyTorch and of DLPack producers, by recorded launches; what the machine must have."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from compare import check_forward
from needs import needs_nvrtc
from recorded import KINDS, STREAM, recording
from samples import DTYPES, sample

import cuflash
from cuflash import frameworks
from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.frameworks import cupy as cupy_adapter
from cuflash.frameworks.cupy import Machine
from cuflash.jit import layout

pytestmark = needs_nvrtc  # it compiles the kernels whose launches are recorded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_bytes_compute_the_right_answer(kind, dtype, rng):
    s = sample(rng, dtype)
    with recording() as recorder:
        device = {name: recorder.arrays[kind](x) for name, x in s.arrays.items()}
        result = cuflash.attention(**device, causal=True, aux=("lse", "max_logit"))
        (launch,) = recorder.launches
        recorder.replay()
        out, lse, max_logit = (recorder.host(x) for x in result[:3])
    check_forward(s.q, s.k, s.v, out, lse, max_logit, **s.lengths, **s.heads, causal=True)
    assert launch.stream == STREAM
    assert launch.block == (launch.kernel.spec.threads, 1, 1)
    assert launch.smem_bytes == launch.kernel.spec.smem_bytes
    assert launch.kernel.arch.name == "sm_90a" and launch.kernel.device == 0
    assert frameworks.of(result.out) is (frameworks.cupy if kind == "dlpack" else frameworks.of(device["q"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_params_hold_the_arrays_own_addresses(kind, rng):
    s = sample(rng, "float16")
    out = np.zeros_like(s.q)
    with recording() as recorder:
        make = recorder.arrays[kind]
        device = {name: make(x) for name, x in {**s.arrays, "out": out}.items()}
        assert cuflash.attention(**device) is device["out"]
        (launch,) = recorder.launches
        fields = layout.load(launch.kernel.spec.params).unpack(launch.params)
        for name in device:
            assert recorder.behind[fields[name]][1] is (out if name == "out" else s.arrays[name]), name
    assert fields["lse"] == fields["max_logit"] == fields["seqused_q"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_the_host_are_checked_copied_once_and_kept_out_of_graphs(kind, rng):
    s = sample(rng, "float16")
    lists = {name: x.tolist() for name, x in s.lengths.items()}
    with recording() as recorder:
        q, k, v = (recorder.arrays[kind](x) for x in (s.q, s.k, s.v))
        result = cuflash.attention(q, k, v, **lists)
        assert [x.tolist() for x in recorder.uploads] == list(lists.values())
        recorder.replay()
        check_forward(s.q, s.k, s.v, recorder.host(result), **s.lengths)
        with_hint = recorder.launches[-1].grid

        device = {name: recorder.arrays[kind](x) for name, x in s.lengths.items()}
        cuflash.attention(q, k, v, **device, max_seqlen_q=7)
        assert recorder.launches[-1].grid == with_hint, "values known to the host are as good as a hint"

        with pytest.raises(ArgumentError, match=r"cu_seqlens_q\[2\]=3 must not be below cu_seqlens_q\[1\]=5"):
            cuflash.attention(q, k, v, cu_seqlens_q=[0, 5, 3, 12], cu_seqlens_k=lists["cu_seqlens_k"])
        recorder.capturing = True
        with pytest.raises(ArgumentError, match="cannot enter a CUDA graph"):
            cuflash.attention(q, k, v, **lists)
        cuflash.attention(q, k, v, **device)
        assert len(recorder.launches) == 3 and len(recorder.uploads) == 3


def test_a_producer_is_told_the_stream_and_kept_until_the_work_is_done(rng):
    s = sample(rng, "bfloat16")
    with recording() as recorder:
        q, k, v = (recorder.arrays["dlpack"](x) for x in (s.q, s.k, s.v))
        cuflash.attention(q, k, v, cu_seqlens_q=[0, 12], cu_seqlens_k=[0, 20])
        assert recorder.waits == [STREAM] * 3
        (retained,) = recorder.retained
        assert {q.address, k.address, v.address} <= {view.ptr for view in retained}


def test_the_default_stream_has_another_name_in_dlpack(rng, monkeypatch):
    s = sample(rng, "bfloat16")
    with recording() as recorder, monkeypatch.context() as patch:
        patch.setattr(frameworks.dlpack, "stream", lambda device: 0)
        q, k, v = (recorder.arrays["dlpack"](x) for x in (s.q, s.k, s.v))
        cuflash.attention(q, k, v, cu_seqlens_q=[0, 12], cu_seqlens_k=[0, 20])
        assert recorder.waits == [1] * 3 and recorder.launches[0].stream == 0


def test_checking_mode_reads_lengths_back(rng, monkeypatch):
    s = sample(rng, "float16")
    wrong = np.array([0, 5, 40, 12], np.int32)
    monkeypatch.setattr(cuflash.config, "check", True)
    with recording() as recorder:
        monkeypatch.setattr(frameworks.cupy, "download", lambda view, stream: recorder.behind[view.ptr][1])
        make = recorder.arrays["cupy stand-in"]
        arrays = {name: make(x) for name, x in s.arrays.items()}
        cuflash.attention(**arrays)
        with pytest.raises(ArgumentError, match=r"cu_seqlens_q\[3\]=12 must not be below"):
            cuflash.attention(**arrays | {"cu_seqlens_q": make(wrong)})
        with pytest.raises(ArgumentError, match=r"seqused_k\[1\]=2 must be from 0 to 1"):
            cuflash.attention(**arrays | {"seqused_k": make(np.array([1, 2, 3], np.int32))})
        assert len(recorder.launches) == 1


def test_explain_shows_what_is_launched(rng):
    s = sample(rng, "float16")
    with recording("sm_80") as recorder:
        arrays = {name: recorder.arrays["cupy stand-in"](x) for name, x in s.arrays.items()}
        explanation = cuflash.explain(**arrays, causal=True)
        assert not recorder.launches
        cuflash.attention(**arrays, causal=True)
        (launch,) = recorder.launches
    assert explanation.backend == "cuda" and explanation.kernel == "forward_sm80" and not explanation.fallback
    assert explanation.grid == launch.grid and explanation.shared_bytes == launch.smem_bytes
    assert explanation.source == launch.kernel.text


# --- the machine --------------------------------------------------------------------------------------------------

arch_of = frameworks.cupy.arch_of  # the real one, which `recording` replaces
GOOD = Machine(capability=(9, 0), driver=(13, 0), cupy=(13, 0), nvrtc=(13, 4))


def test_a_machine_that_fits():
    assert cupy_adapter.check(GOOD, "13.0").name == "sm_90a"
    newer = Machine(capability=(8, 6), driver=(13, 1), cupy=(12, 9), nvrtc=(12, 9))
    assert cupy_adapter.check(newer, "12.4").name == "sm_86"


# what is wrong -> (facts of the machine, CUDA version of PyTorch, what the message must say)
UNFIT = {
    "T4": ({"capability": (7, 5)}, None, r"sm_75.*compute capability 8\.0.*host arrays"),
    "old driver": (
        {"driver": (12, 8)},
        None,
        r"driver serves CUDA 12\.8, older than NVRTC's CUDA 13\.4.*cuflash\[cuda12\]",
    ),
    "torch and CuPy differ": (
        {},
        "12.6",
        r"PyTorch is built for CUDA 12\.6 and CuPy for CUDA 13\.0.*uninstall cupy-cuda13x.*\[cuda12\]",
    ),
}


@pytest.mark.parametrize(
    "kind, what", [(kind, what) for what in UNFIT for kind in KINDS if kind == "torch" or UNFIT[what][1] is None]
)
def test_a_machine_that_does_not_fit(kind, what, rng, monkeypatch):
    changed, cuda_version, match = UNFIT[what]
    s = sample(rng, "float16")
    with recording() as recorder, monkeypatch.context() as patch:
        q, k, v = (recorder.arrays[kind](x) for x in (s.q, s.k, s.v))
        patch.setattr(frameworks.cupy, "machine", lambda device: Machine(**{**vars(GOOD), **changed}))
        patch.setattr(frameworks.cupy, "arch_of", arch_of)
        if kind == "torch":
            patch.setattr(frameworks.torch, "cuda_version", lambda: cuda_version)
        with pytest.raises(UnsupportedError, match=match):
            cuflash.attention(q, k, v, cu_seqlens_q=[0, 12], cu_seqlens_k=[0, 20])
        assert not recorder.launches and not recorder.uploads


@pytest.mark.parametrize("cuda, extra", [("12.6", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_a_device_array_without_cupy_says_what_to_install(cuda, extra, rng, monkeypatch):
    s = sample(rng, "float16")
    kind = "torch" if "torch" in KINDS else "cupy stand-in"
    arch_of.cache_clear()
    with recording() as recorder, monkeypatch.context() as patch:
        q, k, v = (recorder.arrays[kind](x) for x in (s.q, s.k, s.v))
        patch.setattr(frameworks.cupy, "arch_of", arch_of)
        patch.setitem(sys.modules, "cupy", None)
        if kind == "torch":
            patch.setattr(sys.modules["torch"].version, "cuda", cuda)
        else:
            patch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda)))
        with pytest.raises(UnsupportedError, match=rf"CuPy.*pip install 'cuflash\[{extra}\]'"):
            cuflash.attention(q, k, v, cu_seqlens_q=[0, 12], cu_seqlens_k=[0, 20])
        assert not recorder.launches and not recorder.uploads


def test_pytorch_for_amd_gpus_is_refused(rng, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(UnsupportedError, match="ROCm"):
        frameworks.torch.cuda_version()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, rng):
    import cupy

    s = sample(rng, dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        device = {name: cupy.asarray(x) for name, x in s.arrays.items()}
        result = cuflash.attention(**device, causal=True, aux=("lse", "max_logit"))
        out, lse, max_logit = (x.get() for x in result[:3])
    assert type(result.out) is cupy.ndarray
    check_forward(s.q, s.k, s.v, out, lse, max_logit, **s.lengths, **s.heads, causal=True)
