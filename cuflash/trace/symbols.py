"""What a mod computes with while it is traced: symbols that write down what is done to them.

A `Symbol` stands for a number, `Rows` for a captured array of which some axes are indexed. Python's operators, NumPy's
functions (`__array_ufunc__`, `__array_function__`), torch's (`__torch_function__`) and the methods of arrays
all end in one table, `names.FUNCTIONS`. No framework is imported: who brings none needs none.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import TraceError
from .expr import Expr, const, extent, leaves, load, make, show
from .functions import converted
from .names import FUNCTIONS, IGNORED, KNOWN, METHODS, REMEDIES, name_of
from .operands import Array, ArrayProduct, Captured, Number, Operand, Tracing, lift
from .strata import value_range

_FIELDS = (*Operand.__slots__, *Number.__slots__, *Array.__slots__)


class _Operators:
    """Python's operators and the frameworks' protocols, for symbols and rows alike."""

    __slots__ = ()
    __array_priority__ = 1e6
    trace: Tracing

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise TraceError(f"np.{ufunc.__name__}.{method} is nothing a mod can do: call np.{ufunc.__name__} itself")
        return call(ufunc.__name__, args, kwargs, f"np.{ufunc.__name__}")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return call(function.__name__, args, kwargs, f"np.{function.__name__}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, method = name_of(function), hasattr(function, "__objclass__")
        return call(name, args, kwargs or {}, f".{name}()" if method else f"torch.{name}", method)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(
            f"{self!r} is known only in the kernel and cannot become an array here: use operators and functions of "
            "NumPy or torch, and cast with x.astype(np.float32) or x.to(torch.float32)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:  # one that is not made yet
            raise AttributeError(name)
        if name in METHODS:
            return lambda *args, **kwargs: call(name, (self, *args), kwargs, f".{name}()", method=True)
        if name.endswith("_") and name[:-1] in METHODS:
            raise TraceError(f".{name}() would change its tensor, and a mod changes nothing: use .{name[:-1]}()")
        if name in REMEDIES:
            raise TraceError(f".{name} of {self!r}: {REMEDIES[name]}")
        raise TraceError(
            f".{name} of {self!r} is nothing a mod can use: write it with operators, or with the "
            f"methods it knows: {KNOWN}, and casts (to, float, int, astype)"
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TraceError(f"{self!r} is only read by a mod: use where(condition, new, old) for a changed value")

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __pos__(self) -> Any:
        return self

    def __hash__(self) -> int:
        return id(self)


def _operator(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator of a name and its reflection."""

    def forward(a: Any, b: Any) -> Any:
        return NotImplemented if _foreign(b) else call(name, (a, b), {}, name)

    def reflected(a: Any, b: Any) -> Any:
        return NotImplemented if _foreign(b) else call(name, (b, a), {}, name)

    return forward, reflected


def _foreign(x: Any) -> bool:
    return x is None or isinstance(x, str | bytes | list | tuple | dict)


for _python, _name in {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "pow", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift",
    "rshift": "right_shift", "matmul": "matmul",
}.items():  # fmt: skip
    _forward, _reflected = _operator(_name)
    setattr(_Operators, f"__{_python}__", _forward)
    setattr(_Operators, f"__r{_python}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Operators, f"__{_name}__", _operator(_name)[0])
for _python, _name in {"neg": "neg", "abs": "abs", "invert": "bitwise_not"}.items():
    setattr(_Operators, f"__{_python}__", lambda self, name=_name: call(name, (self,), {}, name))


class Symbol(_Operators, Number):
    """A number that has no value yet, but an expression."""

    __slots__ = ()

    def __init__(self, trace: Tracing, expr: Expr) -> None:
        self.trace, self.expr = trace, expr

    def __repr__(self) -> str:
        return show(self.expr, self.trace.names)

    def __format__(self, spec: str) -> str:
        return repr(self)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        # Captured numbers say they are numbers: `isinstance(window, int)` is asked about them.
        if self.expr.op == "scalar":
            return int if self.expr.kind == "int" else float
        return Symbol

    # Where Python itself needs the value -----------------------------------------------------------------------------

    def _value(self, wanted: str, remedy: str) -> Any:
        if leaves(self.expr) <= {"scalar"}:
            return self.trace.concrete(self.expr)
        raise TraceError(f"{wanted} the value of {self!r}, which is known only in the kernel: {remedy}")

    def __bool__(self) -> bool:
        return bool(
            self._value(
                "a branch needs",
                "write where(condition, a, b) (torch.where, np.where) instead of `if` and `a if c else b`; &, | and ~ "
                "instead of `and`, `or` and `not`; and (a <= b) & (b < c) instead of a <= b < c",
            )
        )

    def __index__(self) -> int:
        value = self._value(
            "Python needs",
            "index an array that the mod captures (no list, and none made inside), and compute instead of `range`",
        )
        return operator.index(value)

    def __int__(self) -> int:
        return int(self._value("int() needs", "write x.to(torch.int32), x.astype(np.int32) or x // 1"))

    def __float__(self) -> float:
        return float(
            self._value("a Python float needs", "write x * 1.0, and np.* or torch.* instead of float() or math")
        )

    def __complex__(self) -> complex:
        return complex(float(self))

    def _rounded(self, python: Callable[[Any], Any], name: str) -> Any:
        if leaves(self.expr) <= {"scalar"}:
            return python(self.trace.concrete(self.expr))
        return call("int", (call(name, (self,), {}, name),), {}, name)

    def __floor__(self) -> Any:
        return self._rounded(math.floor, "floor")

    def __ceil__(self) -> Any:
        return self._rounded(math.ceil, "ceil")

    def __trunc__(self) -> Any:
        return self._rounded(int, "trunc")

    def __round__(self, digits: Any = None) -> Any:
        if digits is not None:
            raise TraceError(f"round({self!r}, {digits}): a mod rounds to whole numbers only")
        return self._rounded(round, "round")

    def __hash__(self) -> int:
        return hash(self.trace.concrete(self.expr)) if leaves(self.expr) <= {"scalar"} else id(self)

    def __iter__(self) -> Iterator[Any]:
        raise TraceError(f"{self!r} is one number and has no elements")

    def __len__(self) -> int:
        raise TraceError(f"{self!r} is one number and has no length")

    def __getitem__(self, index: Any) -> Symbol:
        if index is Ellipsis or (isinstance(index, tuple) and all(i is Ellipsis for i in index)):
            return self
        raise TraceError(f"{self!r} is one number and cannot be indexed: it has no axis left")

    # What tensors have -----------------------------------------------------------------------------------------------

    shape = property(lambda self: ())
    ndim = property(lambda self: 0)

    @property
    def dtype(self) -> Any:
        name = {"bool": "bool", "int": "int32", "float": "float32"}[self.expr.kind]
        return getattr(sys.modules["torch"], name) if self.trace.torch else np.dtype(name)

    @property
    def device(self) -> Any:
        return sys.modules["torch"].device("cpu") if self.trace.torch else "cpu"


class Rows(_Operators, Array):
    """A captured array, its first axes indexed: what is left has at least one."""

    __slots__ = ()

    def __init__(
        self, trace: Tracing, captured: Captured, indices: tuple[Expr, ...] = (), dtype_name: str = ""
    ) -> None:
        self.trace, self.captured, self.indices, self.dtype_name = trace, captured, indices, dtype_name

    def __repr__(self) -> str:
        names = self.trace.names
        indices = ", ".join(show(i, names) for i in self.indices)
        return self.captured.name + (f"[{indices}]" if indices else "")

    def __getitem__(self, index: Any) -> Any:
        found = list(self.indices)
        given = index if isinstance(index, tuple) else (index,)
        if given and given[-1] is Ellipsis:
            given = given[:-1]
        for i in given:
            found.append(self._index(i, len(found)))
        if len(found) < self.captured.ndim:
            return Rows(self.trace, self.captured, tuple(found), self.dtype_name)
        element = load(self.captured.slot, self.captured.kind, tuple(found))
        return Symbol(self.trace, converted(element, self.dtype_name) if self.dtype_name else element)

    def converted(self, dtype_name: str) -> Rows:
        return Rows(self.trace, self.captured, self.indices, dtype_name)

    def times(self, other: Array) -> Product:
        return Product(self, other)

    def _index(self, i: Any, axis: int) -> Expr:
        if isinstance(i, slice) or i is None or i is Ellipsis:
            what = "a slice" if isinstance(i, slice) else "None" if i is None else "..."
            raise TraceError(
                f"{what} as an index of {self!r}: a mod is about one element, so give every axis one index, as in "
                f"{self.captured.name}[{', '.join('bhij'[: self.captured.ndim]) or 'i'}]"
            )
        if isinstance(i, Rows):
            raise TraceError(f"{i!r} as an index of {self!r} has {i.ndim} axes: index it first, down to one number")
        if isinstance(i, list):
            raise TraceError(f"a list as an index of {self!r}: give every axis one index, as in table[i, j]")
        if axis >= self.captured.ndim:
            raise TraceError(
                f"{self.captured.name} has {self.captured.ndim} axes (shape {tuple(self.captured.array.shape)}), and "
                f"is given {axis + 1} indices: leave {axis + 1 - self.captured.ndim} out"
            )
        x = lift(i)
        if x.kind == "float":
            raise TraceError(
                f"{i!r} as an index of {self!r} is a float: make it an int, x.to(torch.int32), x.astype(np.int32) or //"
            )
        if x.kind == "bool":
            raise TraceError(f"{i!r} as an index of {self!r} is a bool: write where(condition, a, b)")
        if value_range(x)[0] >= 0:
            return x
        from_end = make("add", extent(self.captured.slot, axis), x)
        return make("where", make("lt", x, const(0)), from_end, x)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return Rows if self.indices else type(self.captured.array)  # isinstance(table, torch.Tensor) is asked about it

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return operator.index(self.shape[0])

    def __bool__(self) -> bool:
        raise TraceError(f"a branch needs one value, and {self!r} is an array: index it, and use where")

    @property
    def shape(self) -> tuple[Symbol, ...]:
        return tuple(self.trace.extent(self.captured, axis) for axis in range(len(self.indices), self.captured.ndim))

    dtype = property(lambda self: self.captured.array.dtype)
    device = property(lambda self: getattr(self.captured.array, "device", "cpu"))
    T = property(lambda self: self._refuse("T"))

    def _refuse(self, name: str) -> Any:
        raise TraceError(f".{name} of {self!r}: {REMEDIES[name]}")


class Product(ArrayProduct):
    """Two rows, element by element: `.sum(-1)` makes their dot product."""

    __slots__ = ()

    def __init__(self, a: Array, b: Array) -> None:
        self.a, self.b = a, b

    def sum(self, axis: Any = None, dim: Any = None, **kwargs: Any) -> Any:
        return call("sum", (self, axis if dim is None else dim), kwargs, ".sum()")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(name_of(function), args, kwargs or {}, f"torch.{name_of(function)}")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return call(function.__name__, args, kwargs, f"np.{function.__name__}")

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if ufunc is np.add and method == "reduce":
            return self.sum(kwargs.get("axis"))
        return call(ufunc.__name__, args, kwargs, f"np.{ufunc.__name__}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceError(f"{self!r}.{name}: a product of rows can be summed along its axis, nothing else")

    def __repr__(self) -> str:
        return f"{self.a!r} * {self.b!r}"


# What a name means -------------------------------------------------------------------------------------------------


def call(name: str, args: Any, kwargs: Any, shown: str, method: bool = False) -> Any:
    """What a function of NumPy, torch or JAX, or a method, of this name does to its arguments."""
    function = (method and METHODS.get(name)) or FUNCTIONS.get(name) or METHODS.get(name)
    if function is None:
        raise TraceError(
            f"{shown} is not a function mods know: write it with operators and with the known ones, which are {KNOWN}"
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in IGNORED}
    if kwargs.pop("out", None) is not None:
        raise TraceError(f"{shown} with out=: a mod changes nothing, so use what the function returns")
    try:
        result = function(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"{shown} cannot be traced with these arguments: {error}") from error
    if isinstance(result, Expr):
        return Symbol(_trace_of(args, kwargs), result)
    return result


def _trace_of(args: Any, kwargs: Any) -> Tracing:
    for x in (*args, *kwargs.values()):
        if type(x) in (Symbol, Rows):
            return x.trace
        if type(x) is Product:
            return x.a.trace
        if type(x) in (list, tuple):
            for y in x:
                if type(y) in (Symbol, Rows):
                    return y.trace
    raise TraceError("nothing traced among the arguments")


def traced(x: Any) -> bool:
    """Whether a value is, or directly holds, something that is being traced."""
    return type(x) in (Symbol, Rows, Product) or (type(x) in (list, tuple) and any(traced(y) for y in x))
