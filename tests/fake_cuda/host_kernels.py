"""CuPy's own kernels on the driver stand-in, done by NumPy: elementwise operations by name, and whole reductions.

CuPy writes such a kernel as text, and its declaration says what a launch gives it:

    void cupy_greater__float32_float_bool(const CArray<float, 1, 1, 1> _raw_in0, const float in1,
                                          CArray<bool, 1, 1, 1> _raw_out0, CIndexer<1, 1> _ind)

Compiling it would need CUDA's headers and test nothing of cuflash. What is not in `_ELEMENTWISE` or `_REDUCTIONS` is
refused with its name.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

PATH = "kernel on the host "  # how driver/modules.cpp calls a module of these, with its number behind

_DTYPES = {
    "bool": np.bool_, "signed char": np.int8, "unsigned char": np.uint8, "short": np.int16, "unsigned short": np.uint16,
    "int": np.int32, "unsigned int": np.uint32, "long long": np.int64, "unsigned long long": np.uint64,
    "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float": np.float32, "double": np.float64,
}  # fmt: skip
_KERNEL = re.compile(r"__global__ void (\w+)\(([^)]*)\)")
_ARRAY = re.compile(r"CArray<([\w ]+), (\d+), \d, \d> (\w+)")
_INDEXER = re.compile(r"CIndexer<(\d+), \d> \w+")
_SCALAR = re.compile(r"(?:const )?([\w ]+) \w+")

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "copy": lambda x: x,
    "fill": lambda x: x,
    "arange": lambda start, step: None,  # see `run`: it alone counts
    "where": np.where,
    "isclose": lambda a, b, rtol, atol, nan: np.isclose(a, b, rtol, atol, nan),
    **{
        name: getattr(np, name)
        for name in (
            "exp", "log", "add", "subtract", "multiply", "true_divide", "negative", "absolute", "isnan", "isfinite",
            "isinf", "equal",
            "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or", "logical_not",
            "bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift", "invert", "maximum", "minimum",
        )
    },
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "all": np.all, "any": np.any, "sum": np.sum, "max": np.max, "min": np.min, "amax": np.max, "amin": np.min,
}  # fmt: skip


@dataclass(frozen=True)
class _Argument:
    kind: str  # "in", "out" or "index"
    dtype: Any
    ndim: int | None  # None: by value

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of it in a launch: an array is its pointer, size, shape and strides; an indexer its size and shape,
        and the index."""
        if self.ndim is None:
            return self.itemsize
        return (8 if self.kind == "index" else 16) + 16 * self.ndim

    def value(self, address: int) -> Any:
        """The number, or an array of the memory it names."""
        if self.ndim is None:
            return np.frombuffer(ctypes.string_at(address, self.nbytes), self.dtype)[0]
        pointer, size, *rest = struct.unpack(f"{2 + 2 * self.ndim}q", ctypes.string_at(address, self.nbytes))
        shape, strides = tuple(rest[: self.ndim]), tuple(rest[self.ndim :])
        interface = {"data": (pointer, False), "shape": shape, "strides": strides, "version": 3}
        holder = type("Memory", (), {"__array_interface__": interface | {"typestr": f"|V{self.itemsize}"}})()
        return np.asarray(holder).view(self.dtype) if size else np.empty(shape, self.dtype)


_kernels: list[tuple[str, list[_Argument]]] = []  # names are not theirs alone: one may be of any number of axes


def install() -> None:
    """CuPy's kernels are read instead of compiled."""
    from cupy.cuda import compiler, function

    def read(source: str, *rest: Any, **keywords: Any) -> Any:
        name, arguments = _declared(source)
        _kernels.append((name, arguments))
        image = f"{PATH}{len(_kernels) - 1}\n{name} {' '.join(str(a.nbytes) for a in arguments)}\n"
        module = function.Module()
        module.load(image.encode())
        return module

    compiler._compile_module_with_cache = read


def _declared(source: str) -> tuple[str, list[_Argument]]:
    """A kernel's name, and what a launch of it gets."""
    found = _KERNEL.search(source)
    if found is None:
        raise NotImplementedError("the driver stand-in knows no kernel of this text of CuPy's")
    return found[1], [_argument(text.strip()) for text in re.split(r",\s*(?![^<]*>)", found[2])]


def _argument(text: str) -> _Argument:
    if found := _ARRAY.search(text):
        return _Argument("in" if text.startswith("const") else "out", _DTYPES[found[1]], int(found[2]))
    if found := _INDEXER.search(text):
        return _Argument("index", None, int(found[1]))
    found = _SCALAR.match(text)
    assert found is not None and found[1] in _DTYPES, f"an argument {text!r}"
    return _Argument("in", _DTYPES[found[1]], None)


def run(path: str, address: int) -> None:
    """Runs the kernel of a module, whose arguments lie side by side at an address."""
    name, arguments = _kernels[int(path.removeprefix(PATH))]
    inputs, outputs, index = [], [], []
    for argument in arguments:
        value = argument.value(address) if argument.kind != "index" else None
        {"in": inputs, "out": outputs, "index": index}[argument.kind].append(value)
        address += argument.nbytes
    operation = name.removeprefix("cupy_").partition("__")[0]
    (out,) = outputs
    with np.errstate(all="ignore"):
        if operation == "arange":
            out[...] = inputs[0] + np.arange(out.size).reshape(out.shape) * inputs[1]
        elif operation in _ELEMENTWISE and len(index) == 1:
            out[...] = _ELEMENTWISE[operation](*inputs)
        elif operation in _REDUCTIONS and out.ndim == 0:
            out[...] = _REDUCTIONS[operation](inputs[0])
        else:
            raise NotImplementedError(f"the driver stand-in does not do CuPy's kernel {name}: let NumPy do it")
