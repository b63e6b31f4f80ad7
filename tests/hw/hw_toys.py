"""Toy kernels for the tests of the hardware wrappers: the body of a kernel in, NumPy arrays in and out.

    toy = Toy(folder, "hw::store_global(out<u32>() + hw::thread_idx(), hw::ballot(true));")
    out = toy.run("emulator", a=..., out=np.zeros(32, np.uint32))

The body sees a<T>(), b<T>(), out<T>() (pointers), n and m (integers), lane and thread. With `sm90=True` its warps may
meet at mbarriers, and it sees p.maps[0] .. p.maps[3], tensor maps: run(..., maps=[("a", 0, ...), ...]).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cuflash import arch
from cuflash.jit import layout, module, tensor_map

BACKENDS = ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)]

SM90 = """\
#include <hw/barrier.cuh>
#include <hw/tma.cuh>
#include <hw/wgmma.cuh>
#include <tile/descriptor.cuh>
"""

HEAD = """\
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/warp.cuh>

struct ToyParams {
  const void* a;
  const void* b;
  void* out;
  i32 n;
  i32 m;
MAPS};

struct Toy {
  ToyParams p;
  template <class T> HW_DEVICE const T* a() const { return static_cast<const T*>(p.a); }
  template <class T> HW_DEVICE const T* b() const { return static_cast<const T*>(p.b); }
  template <class T> HW_DEVICE T* out() const { return static_cast<T*>(p.out); }
  HW_DEVICE void run(const ToyParams& p) const {
    const i32 thread = hw::thread_idx(), lane = hw::lane_idx(), n = p.n, m = p.m;
    (void)thread, (void)lane, (void)n, (void)m;
    const u32 smem = hw::smem_base();
    (void)smem;
"""

TAIL = """
  }
};

KERNEL cuflash_toy(HW_GRID_CONSTANT ToyParams params) { Toy{params}.run(params); }
"""


class Toy:
    """A kernel of one block of `threads`, or more, with `smem_bytes` of shared memory."""

    def __init__(
        self,
        folder: Path,
        body: str,
        *,
        threads: int = 32,
        smem_bytes: int = 0,
        includes: tuple[str, ...] = (),
        sm90: bool = False,
        cluster: int = 1,
    ) -> None:
        head = (SM90 if sm90 else "") + HEAD.replace("MAPS", "  TensorMap maps[4];\n" if sm90 else "")
        # Launch bounds are what register_dealloc and register_alloc start from.
        bounds = 384 if sm90 else 1024
        tail = TAIL.replace(
            "KERNEL", f"HW_CLUSTER_KERNEL({bounds}, {cluster})" if cluster > 1 else f"HW_KERNEL({bounds})"
        )
        self.text = "".join(f"#include <{name}>\n" for name in includes) + head + body + tail
        self.sm90 = sm90
        self.file = folder / "toy.cu"
        self.file.write_text(self.text)
        self.spec = module.KernelSpec(str(self.file), "cuflash_toy", "ToyParams", None, threads, smem_bytes)

    def line(self, mark: str) -> str:
        """Where the one line stands that has the comment `// <mark>`, as reports name it."""
        found = [i for i, line in enumerate(self.text.splitlines(), 1) if line.endswith(f"// {mark}")]
        assert len(found) == 1, f"{mark}: {found}"
        return f"toy.cu:{found[0]}"

    def run(
        self,
        backend: str,
        *,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        out: np.ndarray | None = None,
        n: int = 0,
        m: int = 0,
        grid: tuple[int, int, int] = (1, 1, 1),
        maps: Sequence[tuple] = (),
    ) -> np.ndarray:
        """Runs it; `a` and `b` are read, `out` is written and returned. A map: array's name, bytes into it, and what
        `tensor_map.encode` takes after the address."""
        arrays = {"a": a, "b": b, "out": out if out is not None else np.zeros(1, np.uint32)}
        if backend == "cuda":
            return self._run_cuda(arrays, n, m, grid, maps)
        kernel = module.load(self.spec, arch.named("sm_90a"), "emulator")
        pointers = {name: x.ctypes.data if x is not None else 0 for name, x in arrays.items()}
        buffers = [
            module.Buffer(name, x.ctypes.data, x.nbytes, name == "out") for name, x in arrays.items() if x is not None
        ]
        params = self._params(kernel.text, backend, pointers, n, m, maps)
        kernel.launch(grid, params, buffers=buffers)
        return arrays["out"]

    def _params(self, text: str, backend: str, pointers: dict, n: int, m: int, maps: Sequence[tuple]) -> bytes:
        fields = {**pointers, "n": n, "m": m}
        if self.sm90:
            encoded = [tensor_map.encode(backend, pointers[name] + offset, *rest) for name, offset, *rest in maps]
            fields["maps"] = encoded + [bytes(tensor_map.BYTES)] * (4 - len(maps))
        return layout.parse(text, "ToyParams").pack(**fields)

    def _run_cuda(self, arrays: dict, n: int, m: int, grid: tuple[int, int, int], maps: Sequence[tuple]) -> np.ndarray:
        import cupy

        device = cupy.cuda.Device()
        major, minor = int(device.compute_capability[:-1]), int(device.compute_capability[-1])
        kernel = module.load(self.spec, arch.of_capability(major, minor), "cuda", device.id)
        there = {
            name: cupy.asarray(np.ascontiguousarray(x).view(np.uint8)) for name, x in arrays.items() if x is not None
        }
        pointers = {name: there[name].data.ptr if name in there else 0 for name in arrays}
        kernel.launch(grid, self._params(kernel.text, "cuda", pointers, n, m, maps))
        arrays["out"][...] = there["out"].get().view(arrays["out"].dtype).reshape(arrays["out"].shape)
        return arrays["out"]


def aligned(shape: tuple[int, ...] | int, dtype, alignment: int = 128) -> np.ndarray:
    """Zeros whose memory begins at a multiple of `alignment`, as a GPU's allocations do."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + count].view(dtype).reshape(shape)


def at_aligned(x: np.ndarray) -> np.ndarray:
    """A copy of x at an aligned address."""
    out = aligned(x.shape, x.dtype)
    out[...] = x
    return out
