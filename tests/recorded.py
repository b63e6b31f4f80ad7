"""The CUDA path without a GPU: launches are recorded, and their very bytes then run on the emulator.

    with recording() as recorder:
        q = recorder.arrays["torch"](host_q)         # a CUDA tensor whose memory nobody may touch
        out = cuflash.attention(q, ...)
        recorder.replay()                            # the recorded bytes, pointers exchanged for host memory
        result = recorder.host(out)

Device memory is a mapping without access rights: whatever on the host looked into it would crash. `arrays` holds one
way to make a device array a framework: real CuPy arrays where CuPy is installed, and always stand-ins, which have what
an adapter reads and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import nowhere
from cuflash import array, dtypes, frameworks
from cuflash.array import TensorView
from cuflash.jit import layout, module
from cuflash.ops import append, backward, decode, forward

_WRITTEN = {
    "ForwardParams": forward._WRITTEN,
    "ForwardSm90Params": forward._WRITTEN,
    "BackwardParams": backward._WRITTEN,
    "CapturedGradientParams": ("sums", "out"),
    "AppendParams": append.WRITTEN,
    "DecodeParams": decode.WRITTEN,
}

STREAM = nowhere.STREAM


@dataclass(frozen=True)
class Launch:
    """What would have gone to the driver."""

    kernel: module.CudaKernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    smem_bytes: int
    stream: int | None


@dataclass
class Recorder:
    """Launches, in order; and the host arrays that stand behind device addresses."""

    launches: list[Launch] = field(default_factory=list)
    behind: dict[int, tuple[mmap.mmap, np.ndarray]] = field(default_factory=dict)
    uploads: list[np.ndarray] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)  # streams that DLPack producers were asked to make wait
    retained: list[list[TensorView]] = field(default_factory=list)
    capturing: bool = False

    @property
    def arrays(self) -> dict[str, Callable[[np.ndarray], Any]]:
        made: dict[str, Callable[[np.ndarray], Any]] = {"cupy stand-in": self._cupy_like, "dlpack": self._producer}
        if importlib.util.find_spec("cupy"):
            made["cupy"] = self._cupy
        if importlib.util.find_spec("torch"):
            made["torch"] = self._torch
        return made

    def address(self, host: np.ndarray) -> int:
        """A device address for the contents of a host array."""
        region = mmap.mmap(-1, max(host.nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
        address = np.frombuffer(region, np.uint8).ctypes.data
        self.behind[address] = (region, host)
        return address

    def host(self, x: Any) -> np.ndarray:
        """The host array behind a device array."""
        framework = frameworks.of(x)
        return self.behind[framework.view(x).ptr][1]

    def empty(self, shape: tuple[int, ...], dtype: dtypes.DType) -> np.ndarray:
        """Host memory for a result, full of what an uninitialised one may hold."""
        x = array.empty_host(shape, dtype)
        x.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN
        return x

    def replay(self, latest: int = 1) -> None:
        """Run the latest launches on the emulator: the same bytes, but each address exchanged for the host's."""
        for launch in self.launches[-latest:]:
            params = layout.parse(launch.kernel.text, launch.kernel.spec.params)
            fields = params.unpack(launch.params)
            buffers = []
            for name in [f.name for f in params.fields if f.ctype == "TensorMap"]:
                fields[name], host = self._moved(fields[name])
                buffers += [module.Buffer(name, host.ctypes.data, host.nbytes, True)] if host is not None else []
            for name in [f.name for f in params.fields if f.is_pointer and fields[f.name]]:
                host = self.behind[fields[name]][1]
                fields[name] = host.ctypes.data
                buffers.append(module.Buffer(name, host.ctypes.data, host.nbytes, name in _WRITTEN[params.name]))
            if "captured" in fields:  # words of which some are addresses
                words = np.frombuffer(fields["captured"], np.uint64).copy()
                for i, word in enumerate(words.tolist()):
                    if word in self.behind:
                        host = self.behind[word][1]
                        words[i] = host.ctypes.data
                        buffers.append(module.Buffer(f"word {i}", host.ctypes.data, host.nbytes, True))
                fields["captured"] = words.tobytes()
            kernel = module.load(launch.kernel.spec, launch.kernel.arch, "emulator")
            kernel.launch(launch.grid, params.pack(**fields), buffers=buffers)

    def _moved(self, encoded: bytes) -> tuple[bytes, np.ndarray | None]:
        """A map in the emulator's form, of the host array that stands behind its address; none for one of zeros."""
        (address,) = struct.unpack_from("<Q", encoded, 8)
        for begin, (_, host) in self.behind.items():
            if begin <= address < begin + host.nbytes:
                there = struct.pack("<Q", host.ctypes.data + address - begin)
                return encoded[:8] + there + encoded[16:], host
        assert not any(encoded), "a tensor map of memory nobody has"
        return encoded, None

    # Device arrays of each kind, for the contents of a contiguous host array.

    def _cupy(self, host: np.ndarray) -> Any:
        return nowhere.cupy_array(self.address(host), host)

    def _cupy_like(self, host: np.ndarray) -> Any:
        return nowhere.CupyArray(self.address(host), host)

    def _torch(self, host: np.ndarray) -> Any:
        return nowhere.torch_tensor(self.address(host), host)

    def _producer(self, host: np.ndarray) -> Any:
        return Producer(self, self.address(host), host)


class Producer:
    """A device array of another library: the DLPack protocol, in its first edition, and nothing else."""

    def __init__(self, recorder: Recorder, address: int, host: np.ndarray) -> None:
        self.recorder, self.address, self.host = recorder, address, host

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, stream: int) -> Any:
        self.recorder.waits.append(stream)
        host, dtype = self.host, dtypes.BY_NUMPY[self.host.dtype]
        # DLManagedTensor begins with its DLTensor; its deleter stays null, as the memory is the recorder's.
        self.tensor = tensor = array._DLTensor(
            data=self.address,
            device_type=2,
            ndim=host.ndim,
            dtype_code=dtype.dlpack[0],
            dtype_bits=dtype.dlpack[1],
            dtype_lanes=1,
            shape=(ctypes.c_int64 * host.ndim)(*host.shape),
            strides=(ctypes.c_int64 * host.ndim)(*(s // host.itemsize for s in host.strides)),
        )
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(tensor), b"dltensor", None)


@contextlib.contextmanager
def recording(name: str = "sm_90a") -> Iterator[Recorder]:
    """No driver, no CuPy and no GPU needed: what would ask one of them is replaced while this lasts."""
    recorder = Recorder()

    def launch_cuda(kernel: Any, grid: Any, block: Any, params: bytes, smem_bytes: int, stream: int | None) -> None:
        recorder.launches.append(Launch(kernel, grid, block, params, smem_bytes, stream))

    def view(adapter: Any, host: np.ndarray) -> TensorView:
        if adapter is frameworks.torch:
            return adapter.view(recorder._torch(host))
        return frameworks.cupy.view(recorder._cupy_like(host))

    def empty(adapter: Any, shape: tuple[int, ...], dtype: dtypes.DType) -> TensorView:
        return view(adapter, recorder.empty(shape, dtype))

    def upload(adapter: Any, values: np.ndarray) -> TensorView:
        recorder.uploads.append(values)
        return view(adapter, values.copy())

    def retain(views: Any, device: Any) -> None:
        recorder.retained.append(list(views))

    with (
        nowhere.no_gpu(name, launch=launch_cuda, empty=empty, upload=upload, capturing=lambda: recorder.capturing),
        mock.patch.object(frameworks.dlpack, "retain", retain),
    ):
        yield recorder


KINDS = ["cupy stand-in", "dlpack", *(name for name in ("cupy", "torch") if importlib.util.find_spec(name))]
