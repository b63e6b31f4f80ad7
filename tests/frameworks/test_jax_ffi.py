"""The handler that XLA calls, called by hand: what it answers, and what it would launch on a GPU.

Frames are made by `xla_frames`. What a real XLA does with
the handler on the CPU is tested in test_jax_call.
"""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest
from needs import needs_nvrtc
from recorded import recording
from xla_frames import ERROR, STREAM, Xla

import cuflash
from cuflash import dtypes, frameworks
from cuflash.autograd import jax_ffi
from cuflash.errors import UnsupportedError

pytest.importorskip("jax")

from cuflash.autograd import jax_call  # it imports JAX


def description(aux: tuple[str, ...], operation: str, inputs: dict[str, np.ndarray]) -> jax_ffi.Description:
    """What is traced for a causal call where there is a GPU."""
    keywords = {
        "max_seqlen_q": None, "max_seqlen_k": None, "scale": None, "window_size": (-1, 0), "softcap": 0.0,
        "dropout_p": 0.0, "deterministic": False, "split_size": None, "aux": aux, "backend": "auto", "arch": "sm_80",
    }  # fmt: skip
    specs = tuple(jax_ffi.Spec(name, x.shape, dtypes.BY_NUMPY[x.dtype]) for name, x in inputs.items())
    static = jax_call.Static(**keywords)
    return jax_call._described(operation, static, specs, ("cuda", 0))


def test_says_what_it_is():
    metadata = jax_ffi._Metadata()
    extension = jax_ffi._MetadataExtension(metadata=ctypes.pointer(metadata))
    extension.base.type = 1
    xla = Xla(jax_ffi.Description("attention", {}, (), ()), [], [])
    xla.frame.extension = ctypes.cast(ctypes.pointer(extension), ctypes.POINTER(jax_ffi._Extension))
    assert xla.call("CUDA") is None
    assert (metadata.api_version.major, metadata.api_version.minor, metadata.traits) == (7, 11, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 4])
def test_works_in_no_stage_but_execution(stage):
    xla = Xla(jax_ffi.Description("none such", {}, (), ()), [], [])
    xla.frame.stage = stage
    assert xla.call("cpu") is None and not xla.errors


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UnsupportedError("use that"), 12, "cuflash: UnsupportedError: use that"),
        (ZeroDivisionError("by 0"), 13, "cuflash: ZeroDivisionError: by 0\nTraceback"),
        (KeyboardInterrupt(), 13, "cuflash: KeyboardInterrupt"),
    ],
)
def test_no_exception_passes_into_c(monkeypatch, raised, code, text):
    def operation(description, device):
        raise raised

    monkeypatch.setitem(jax_ffi.operations, "breaks", operation)
    xla = Xla(jax_ffi.Description("breaks", {"code": code, "text": text}, (), ()), [], [])
    assert xla.call("cpu") == ERROR
    ((message, given),) = xla.errors
    assert message.startswith(text) and given == code


UPWARDS = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())  # C's FE_UPWARD


@pytest.mark.skipif(UPWARDS is None, reason="a machine whose rounding modes the test does not know")
def test_the_mode_of_floats_is_pythons_and_then_xlas_again(monkeypatch):
    c = ctypes.CDLL(None)
    seen = []
    monkeypatch.setitem(jax_ffi.operations, "looks", lambda *_: lambda views, stream: seen.append(c.fegetround()))
    c.fesetround(UPWARDS)
    try:
        Xla(jax_ffi.Description("looks", {}, (), ()), [], []).call("cpu")
        seen.append(c.fegetround())
    finally:
        c.fesetround(0)
    assert seen == [0, UPWARDS]


@needs_nvrtc
def test_on_a_gpu_it_launches_on_xlas_stream_and_xlas_memory(monkeypatch, rng):
    monkeypatch.setattr(frameworks.cupy, "current_device", lambda: 0)
    q, k, v = rng.standard_normal((3, 2, 40, 2, 64)).astype(np.float16)
    expected = cuflash.attention(q, k, v, causal=True, aux=("lse",))
    with recording() as recorder:
        what = description(("lse",), "attention", {"q": q, "k": k, "v": v})
        results = [recorder.empty(spec.shape, spec.dtype) for spec in what.results]
        addresses = [[recorder.address(x) for x in arrays] for arrays in ((q, k, v), results)]
        xla = Xla(what, *addresses)
        assert xla.call("CUDA") is None, xla.errors
        (launch,) = recorder.launches
        assert launch.stream == STREAM
        recorder.replay()
    np.testing.assert_allclose(results[0].astype(float), expected.out.astype(float), atol=2e-3)
    np.testing.assert_allclose(results[1], expected.lse, atol=1e-3)


@needs_nvrtc
def test_on_a_gpu_the_backward_gets_its_workspace_from_xla(monkeypatch, rng):
    monkeypatch.setattr(frameworks.cupy, "current_device", lambda: 0)
    q, k, v, out, dout = rng.standard_normal((5, 2, 40, 2, 64)).astype(np.float16)
    lse = np.zeros((2, 2, 40), np.float32)
    inputs = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    with recording() as recorder:
        what = description((), "attention_backward", inputs)
        assert {"dq", "dk", "dv"} < {spec.name for spec in what.results}
        results = [recorder.empty(spec.shape, spec.dtype) for spec in what.results]
        xla = Xla(what, *([recorder.address(x) for x in arrays] for arrays in (inputs.values(), results)))
        assert xla.call("CUDA") is None, xla.errors
        assert len(recorder.launches) > 1
        assert {launch.stream for launch in recorder.launches} == {STREAM}
        # The same program traced where no GPU is has no workspace, which is said before anything is launched.
        few = what._replace(results=what.results[:3])
        recorder.launches.clear()
        xla = Xla(few, *([recorder.address(x) for x in arrays] for arrays in (inputs.values(), results[:3])))
        assert xla.call("CUDA") == ERROR and "traced where no GPU is" in xla.errors[0][0]
        assert not recorder.launches
