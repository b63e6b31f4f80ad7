"""What a mod computes with while it is traced: symbols that write down what is done to them.

A `Symbol` stands for a number, `Rows` for a captured array of which some axes are indexed. Python's operators, NumPy's
functions (`__array_ufunc__`, `__array_function__`), torch's (`__torch_function__`) and the methods of arrays
all end in one table, `FUNCTIONS`, by name. No framework is imported: who brings none needs none.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ..dtypes import BY_NAME, DType
from ..errors import TraceError
from .expr import Expr, cast, const, dot, extent, leaves, load, make, show
from .strata import value_range


class Tracing(Protocol):
    """What symbols ask of the trace they belong to."""

    torch: bool

    @property
    def names(self) -> dict[tuple[str, int], str]:
        """Of captured values, for messages."""
        ...

    def concrete(self, x: Expr) -> Any:
        """The value of an expression of captured numbers alone, which become constants of this trace."""
        ...

    def extent(self, array: Captured, axis: int) -> Symbol:
        """A captured array's length along an axis, a number like any captured one."""
        ...

    def same_extent(self, a: Captured, b: Captured) -> None:
        """That the last axes of both are as long as each other, now and in later calls."""
        ...


class Captured:
    """A captured array: `array` is there while the trace lasts, and is asked for nothing but its shape and dtype."""

    __slots__ = ("array", "dtype", "name", "ndim", "slot", "variable")

    def __init__(self, array: Any, dtype: DType, slot: int, name: str, variable: str) -> None:
        self.array, self.dtype, self.ndim = array, dtype, len(array.shape)
        self.slot, self.name, self.variable = slot, name, variable

    @property
    def kind(self) -> str:
        return "bool" if self.dtype.name == "bool" else "float" if self.dtype.is_float else "int"


class _Operand:
    """Python's operators and the frameworks' protocols, for symbols and rows alike."""

    __slots__ = ("trace",)
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
        if name.startswith("__") or name in type(self).__slots__ or name == "trace":  # one that is not made yet
            raise AttributeError(name)
        if name in METHODS:
            return lambda *args, **kwargs: call(name, (self, *args), kwargs, f".{name}()", method=True)
        if name.endswith("_") and name[:-1] in METHODS:
            raise TraceError(f".{name}() would change its tensor, and a mod changes nothing: use .{name[:-1]}()")
        if name in _REMEDIES:
            raise TraceError(f".{name} of {self!r}: {_REMEDIES[name]}")
        raise TraceError(
            f".{name} of {self!r} is nothing a mod can use: write it with operators, or with the "
            f"methods it knows: {_KNOWN}, and casts (to, float, int, astype)"
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
    setattr(_Operand, f"__{_python}__", _forward)
    setattr(_Operand, f"__r{_python}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Operand, f"__{_name}__", _operator(_name)[0])
for _python, _name in {"neg": "neg", "abs": "abs", "invert": "bitwise_not"}.items():
    setattr(_Operand, f"__{_python}__", lambda self, name=_name: call(name, (self,), {}, name))


class Symbol(_Operand):
    """A number that has no value yet, but an expression."""

    __slots__ = ("expr",)

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


class Rows(_Operand):
    """A captured array, its first axes indexed: what is left has at least one."""

    __slots__ = ("captured", "dtype_name", "indices")

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
        return Symbol(
            self.trace, _convert(Symbol(self.trace, element), self.dtype_name) if self.dtype_name else element
        )

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

    ndim = property(lambda self: self.captured.ndim - len(self.indices))
    dtype = property(lambda self: self.captured.array.dtype)
    device = property(lambda self: getattr(self.captured.array, "device", "cpu"))
    T = property(lambda self: self._refuse("T"))

    def _refuse(self, name: str) -> Any:
        raise TraceError(f".{name} of {self!r}: {_REMEDIES[name]}")


class Product:
    """Two rows, element by element: `.sum(-1)` makes their dot product."""

    __slots__ = ("a", "b")

    def __init__(self, a: Rows, b: Rows) -> None:
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


# What a name means ------------------------------------------------------------------------------------------------


def call(name: str, args: Any, kwargs: Any, shown: str, method: bool = False) -> Any:
    """What a function of NumPy, torch or JAX, or a method, of this name does to its arguments."""
    function = (method and METHODS.get(name)) or FUNCTIONS.get(name) or METHODS.get(name)
    if function is None:
        raise TraceError(
            f"{shown} is not a function mods know: write it with operators and with the known ones, which are {_KNOWN}"
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED}
    if kwargs.pop("out", None) is not None:
        raise TraceError(f"{shown} with out=: a mod changes nothing, so use what the function returns")
    try:
        result = function(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"{shown} cannot be traced with these arguments: {error}") from error
    if isinstance(result, Expr):
        return Symbol(_trace_of(args, kwargs), result)
    return result


_KNOWN = (
    "abs, atan, atan2, bitwise_*, ceil, clamp, clip, cos, div, dot, elu, eq, erf, exp, exp2, expm1, floor, "
    "floor_divide, fmod, full_like, ge, gelu, gt, heaviside, isin (of a few), isnan, le, log, log1p, log2, logical_*, "
    "lt, matmul, maximum, minimum, nan_to_num, ne, pow, reciprocal, relu, remainder, round, rsqrt, select, sigmoid, "
    "sign, signbit, sin, sqrt, square, sum (of a product of rows), tanh, trunc, where, zeros_like and ones_like"
)
_IGNORED = (
    "device", "requires_grad", "pin_memory", "memory_format", "copy", "non_blocking", "casting", "order", "subok",
    "layout", "keepdims", "keepdim",
)  # fmt: skip


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


def name_of(function: Any) -> str:
    """Under which a torch function stands in the table."""
    qualified = getattr(function, "_qualified_op_name", None) or getattr(function, "_name", None)
    if isinstance(qualified, str) and "::" in qualified:  # torch.ops.approx.tanh, torch.ops.aten.tanh.default
        space, _, name = qualified.partition("::")
        name = name.partition(".")[0]
        return f"{name}_approx" if space == "approx" else name
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = "item"  # a property of tensors; ours answer for themselves
    return _TORCH_DUNDERS.get(name, name)


_TORCH_DUNDERS = {
    "__radd__": "add", "__rmul__": "mul", "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "__rand__": "bitwise_and", "__ror__": "bitwise_or", "__rxor__": "bitwise_xor", "__rsub__": "rsub",
    "__lshift__": "left_shift", "__rshift__": "right_shift", "__rtruediv__": "rdiv", "__rdiv__": "rdiv",
    "__rpow__": "rpow", "__rfloordiv__": "rfloordiv", "__rmod__": "rmod",
}  # fmt: skip


def lift(x: Any) -> Expr:
    """The expression of a traced value, or of a number that stands in the mod."""
    kind = type(x)
    if kind is Symbol:
        return x.expr
    if kind in (bool, int, float):
        return const(x)
    if kind is Rows:
        raise TraceError(
            f"{x!r} still has {x.ndim} axes, and a mod computes with single numbers: index all of them first, as in "
            f"{x.captured.name}[{', '.join('bhij'[: x.captured.ndim])}]"
            + (", or take the dot product of two rows, a[i] @ b[j]" if x.ndim == 1 else "")
        )
    if kind is Product:
        raise TraceError(f"{x!r} is a product of rows: sum it, (a[i] * b[j]).sum(-1)")
    value: Any = x.item() if isinstance(x, np.generic) else x
    if isinstance(value, bool | int | float):
        return const(int(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        if len(x.shape) == 0 and "racer" not in type(x).__name__:
            return lift(x.item())  # torch.tensor(-inf) and the like, made by the mod itself
        raise TraceError(
            f"an array of shape {tuple(x.shape)} is used that the mod made itself, or reached in a way that cannot be "
            "followed: make it outside of the mod and capture it by name"
        )
    raise TraceError(
        f"{x!r} (a {x.__class__.__qualname__}) is used as a number: a mod computes with numbers and arrays"
    )


def _of(op: str) -> Callable[..., Expr]:
    def function(*args: Any, **kwargs: Any) -> Expr:
        if kwargs:
            raise TypeError(f"unexpected {', '.join(kwargs)}")
        return make(op, *[lift(x) for x in args])

    return function


def _mul(a: Any, b: Any) -> Any:
    if type(a) is Rows and type(b) is Rows and a.ndim == b.ndim == 1:
        return Product(a, b)
    return make("mul", lift(a), lift(b))


def _dot(a: Any, b: Any, **kwargs: Any) -> Expr:
    if type(a) is not Rows or type(b) is not Rows:
        raise TraceError(f"a dot product of {a!r} and {b!r}: it takes a row of two captured arrays, a[i] @ b[j]")
    for x in (a, b):
        if x.ndim != 1:
            raise TraceError(f"{x!r} has {x.ndim} axes in a dot product: index it down to one")
        if x.captured.kind != "float":
            raise TraceError(
                f"{x!r} is {x.captured.dtype} in a dot product, which takes floats: cast {x.captured.name}"
            )
    a.trace.same_extent(a.captured, b.captured)
    return dot(a.captured.slot, a.indices, b.captured.slot, b.indices)


def _sum(x: Any, axis: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    if type(x) is Product:
        axis = dim if axis is None else axis
        if axis not in (None, 0, -1, (0,), (-1,)):
            raise TraceError(f"{x!r} has one axis and is summed along axis {axis}")
        return _dot(x.a, x.b)
    if type(x) is Rows:
        raise TraceError(f"the sum of {x!r}: sum it outside of the mod, or use a dot product of two rows")
    return lift(x)


def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
    a, b = lift(a), lift(b)
    if rounding_mode == "floor":
        return make("floordiv", a, b)
    if rounding_mode == "trunc":
        return _trunc_div(a, b)
    return make("div", a, b)


def _signs_differ(a: Expr, b: Expr) -> Expr:
    zero = const(0)
    return make("xor", make("lt", a, zero), make("lt", b, zero))


def _trunc_div(a: Expr, b: Expr) -> Expr:
    if "float" in (a.kind, b.kind):
        return _trunc(make("div", a, b))
    quotient, rest = make("floordiv", a, b), make("mod", a, b)
    inexact = make("and", make("ne", rest, const(0)), _signs_differ(a, b))
    return make("where", inexact, make("add", quotient, const(1)), quotient)


def _fmod(a: Any, b: Any) -> Expr:
    a, b = lift(a), lift(b)
    rest = make("mod", a, b)
    inexact = make("and", make("ne", rest, const(0)), _signs_differ(a, b))
    return make("where", inexact, make("sub", rest, b), rest)


def _trunc(x: Any) -> Expr:
    x = lift(x) if not isinstance(x, Expr) else x
    if x.kind != "float":
        return x
    return make("where", make("lt", x, const(0.0)), make("ceil", x), make("floor", x))


def _whole(op: str) -> Callable[..., Expr]:
    """floor and ceil, which leave ints alone."""
    return lambda x: lift(x) if lift(x).kind != "float" else make(op, lift(x))


def _round(x: Any, decimals: int = 0) -> Expr:
    x = lift(x)
    if decimals != 0:
        raise TraceError(f"round to {decimals} digits: a mod rounds to whole numbers only")
    if x.kind != "float":
        return x
    down = make("floor", x)
    rest, half = make("sub", x, down), const(0.5)
    up = make("add", down, const(1.0))
    tie = make("add", down, make("mod", down, const(2.0)))  # to the even neighbour
    return make("where", make("lt", rest, half), down, make("where", make("gt", rest, half), up, tie))


def _pow(a: Any, b: Any) -> Expr:
    a, b = lift(a), lift(b)
    if "float" in (a.kind, b.kind):
        return make("pow", a, b)
    if b.op == "const" and 0 <= b.value <= 64:
        result, square, rest = const(1), cast(a, "int"), int(b.value)
        while rest:
            result = make("mul", result, square) if rest & 1 else result
            rest >>= 1
            square = make("mul", square, square) if rest else square
        return result
    if a.op == "const" and a.value == 2:
        return make("shl", const(1), b)
    raise TraceError(
        f"{show(a)} ** {show(b)} of ints: write 1 << n for powers of two, or make the base a float, 1.0 * x"
    )


def _clip(x: Any, *bounds: Any, **named: Any) -> Expr:
    given: dict[str, Any] = dict(zip(("min", "max"), bounds, strict=False))
    for key, value in named.items():
        given[{"a_min": "min", "a_max": "max", "minimum": "min", "maximum": "max"}.get(key, key)] = value
    if not set(given) <= {"min", "max"} or len(bounds) > 2:
        raise TypeError("clamp takes a value, min and max")
    x = lift(x)
    if given.get("min") is not None:
        x = make("max", x, lift(given["min"]))
    if given.get("max") is not None:
        x = make("min", x, lift(given["max"]))
    return x


def _where(*args: Any, **kwargs: Any) -> Expr:
    if kwargs:
        args = (*args, *[kwargs[k] for k in ("condition", "input", "self", "x", "y", "other") if k in kwargs])
    if len(args) != 3:
        raise TraceError(f"where with {len(args)} arguments: a mod needs where(condition, a, b)")
    return make("where", *[lift(x) for x in args])


def _extreme(op: str) -> Callable[..., Expr]:
    def function(x: Any, *others: Any, **kwargs: Any) -> Expr:
        if type(x) in (list, tuple):  # np.max([a, b])
            x, others = x[0], (*x[1:], *others)
        others = (*others, *[kwargs.pop(k) for k in ("other", "x2") if k in kwargs])
        if kwargs:
            raise TraceError(f"{op} along an axis: a mod takes the {op} of two numbers, {op}imum(a, b)")
        result = lift(x)
        for other in others:
            result = make(op, result, lift(other))
        return result

    return function


def _logical(op: str) -> Callable[..., Expr]:
    return lambda *args: make(op, *[cast(lift(x), "bool") for x in args])


def _select(conditions: Any, choices: Any, default: Any = 0) -> Expr:
    if type(conditions) not in (list, tuple):  # jax.lax's is where
        return _where(conditions, choices, default)
    result = lift(default)
    for condition, choice in reversed(list(zip(conditions, choices, strict=True))):
        result = make("where", lift(condition), lift(choice), result)
    return result


def _sign(x: Any) -> Expr:
    x = lift(x)
    zero, one = cast(const(0), x.kind), cast(const(1), x.kind)
    return make("where", make("gt", x, zero), one, make("where", make("lt", x, zero), make("neg", one), x))


def kind_of_dtype(dtype: Any) -> str:
    """Of a NumPy, torch or JAX dtype, or its name, the dtype's name."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    known = {"float": "float32", "double": "float64", "half": "float16", "int": "int32", "long": "int64",
             "short": "int16", "bool_": "bool"}.get(name, name)  # fmt: skip
    if known not in BY_NAME:
        known = str(np.dtype(dtype)) if isinstance(dtype, np.dtype | type) else known
    if known not in BY_NAME:
        raise TraceError(f"{dtype!r} is not a dtype mods know: use one of {', '.join(BY_NAME)}")
    return known


def _convert(x: Any, dtype: Any) -> Any:
    """x as a mod has it: floats in float32, ints in 32 bits; narrower ints wrap as theirs do, and narrower floats
    round."""
    name = kind_of_dtype(dtype)
    target = BY_NAME[name]
    kind = "bool" if name == "bool" else "float" if target.is_float else "int"
    if type(x) is Rows:
        return Rows(x.trace, x.captured, x.indices, name)
    x = cast(lift(x), kind)
    bits = target.itemsize * 8
    if name in ("float16", "bfloat16"):
        return make(name, x)
    if kind != "int" or bits >= 32:
        return x
    if name.startswith("u"):
        return make("and", x, const((1 << bits) - 1))
    return make("shr", make("shl", x, const(32 - bits)), const(32 - bits))


def _to(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    for given in args:
        if type(given) in (Symbol, Rows):
            dtype = given.dtype
        elif dtype is None and not isinstance(given, bool | int) and _is_dtype(given):
            dtype = given
    if dtype is None:
        return x
    return _convert(x, dtype)


def _is_dtype(x: Any) -> bool:
    return isinstance(x, type | np.dtype) or str(x).rpartition(".")[2] in BY_NAME


def _made(value: Any, dtype: Any) -> Expr:
    x = lift(value)
    return x if dtype is None else _convert(Symbol(None, x), dtype)  # type: ignore[arg-type]


def _like(value: Any) -> Callable[..., Expr]:
    def function(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Expr:
        given = value if value is not None else args[0] if args else kwargs.pop("fill_value")
        made = cast(lift(given), lift(x).kind) if dtype is None else _made(given, dtype)
        return made

    return function


def _full(value: Any) -> Callable[..., Expr]:
    """zeros, ones and full, and a tensor's new_...: of no axes."""

    def function(*args: Any, dtype: Any = None, size: Any = None, shape: Any = None, **kwargs: Any) -> Expr:
        template = args[0] if args and type(args[0]) in (Symbol, Rows) else None
        args = args[1:] if template is not None else args
        given = value if value is not None else kwargs.pop("fill_value", args[-1] if args else None)
        extents = size if size is not None else shape if shape is not None else args[0] if args else ()
        if extents not in ((), [], 1) and tuple(extents) not in ((), (1,)):
            raise TraceError(f"an array of shape {extents} made inside a mod: make it outside and capture it")
        if dtype is None and template is not None:
            dtype = template.dtype
        return _made(float(given) if dtype is None and isinstance(given, int) else given, dtype)

    return function


def _tensor(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    data = args[-1] if args else kwargs["data"]
    if type(data) in (list, tuple):
        raise TraceError("an array of traced values made inside a mod: use where, or capture an array and index it")
    if len(args) == 1 and type(data) is Rows:
        return data if dtype is None else _convert(data, dtype)
    return _made(data, dtype)


def _take(array: Any, indices: Any, axis: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    axis = dim if axis is None else axis
    if type(array) is not Rows or axis not in (None, 0) or (axis is None and array.ndim != 1):
        raise TraceError(f"take from {array!r} along axis {axis}: index it, array[i, j]")
    return array[indices]


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _getitem(x: Any, index: Any) -> Any:
    if type(x) not in (Symbol, Rows):
        lift(x)  # says what to do about an array that was not captured
        raise TraceError(f"{x!r} is indexed by a traced value: capture an array and index that")
    return x[index]


def _nan(x: Any) -> Expr:
    x = lift(x)
    return make("ne", x, x) if x.kind == "float" else const(False)


def _finite(x: Any) -> Expr:
    x = lift(x)
    return make("lt", make("abs", cast(x, "float")), const(float("inf")))


def _infinite(x: Any) -> Expr:
    return make("eq", make("abs", cast(lift(x), "float")), const(float("inf")))


def _softplus(x: Expr) -> Expr:
    """log(1 + exp(x)), whatever the size of x."""
    small = make("exp", make("neg", make("abs", cast(x, "float"))))
    return make("add", make("max", x, const(0.0)), make("log", make("add", const(1.0), small)))


def _gelu(x: Any, approximate: Any = "none") -> Expr:
    x = lift(x)
    if approximate not in ("none", "tanh", True, False):
        raise TraceError(f'gelu with approximate={approximate!r}: it is "none" or "tanh"')
    if approximate in ("tanh", True):
        cube = make("mul", make("mul", x, x), x)
        inner = make("mul", const(math.sqrt(2 / math.pi)), make("add", x, make("mul", const(0.044715), cube)))
        part = make("tanh", inner)
    else:
        part = make("erf", make("mul", x, const(math.sqrt(0.5))))
    return make("mul", make("mul", const(0.5), x), make("add", const(1.0), part))


def _elu(x: Any, alpha: Any = 1.0, inplace: bool = False) -> Expr:
    x = cast(lift(x), "float")
    below = make("mul", lift(alpha), make("expm1", make("min", x, const(0.0))))
    return make("where", make("gt", x, const(0.0)), x, below)


def _heaviside(x: Any, values: Any) -> Expr:
    x, at_zero = lift(x), cast(lift(values), "float")
    positive = make("where", make("gt", x, const(0)), const(1.0), const(0.0))
    return make("where", make("eq", x, const(0)), at_zero, positive)


def _nan_to_num(x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Expr:
    x = lift(x)
    if x.kind != "float":
        return x
    nan = None if isinstance(nan, bool) else nan  # NumPy's second argument is `copy`
    largest = float(np.finfo(np.float32).max)
    given = (nan, 0.0), (posinf, largest), (neginf, -largest)
    of_nan, of_inf, of_minus = (const(float(default)) if own is None else lift(own) for own, default in given)
    result = make("where", make("eq", x, const(float("inf"))), of_inf, x)
    result = make("where", make("eq", x, const(-float("inf"))), of_minus, result)
    return make("where", make("ne", x, x), of_nan, result)


def _signbit(x: Any) -> Expr:
    x = lift(x)
    return make("signbit", x) if x.kind == "float" else make("lt", x, const(0))


def _isin(x: Any, among: Any, assume_unique: bool = False, invert: bool = False) -> Expr:
    """Whether a number is one of a few."""
    x = lift(x)
    if type(among) is not Rows and hasattr(among, "tolist"):
        among = among.tolist()
    among = [among] if type(among) is Symbol or isinstance(among, bool | int | float) else list(among)
    if len(among) > _MOST_OF_ISIN:
        raise TraceError(
            f"isin of {len(among)} elements: a mod compares with each, at most {_MOST_OF_ISIN}; capture an array that "
            "says of each index whether it is in, and read it: table[kv_idx]"
        )
    found = const(False)
    for y in among:
        found = make("or", found, make("eq", x, lift(y)))
    return make("not", found) if invert else found


_MOST_OF_ISIN = 32


def _reflected(op: str) -> Callable[..., Expr]:
    return lambda a, b: make(op, lift(b), lift(a))


# By the names NumPy, torch, JAX and Python's math have for them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _of(name) for name in ("exp", "exp2", "log", "log2", "tanh", "tanh_approx", "sigmoid", "sqrt", "rsqrt",
                                    "sin", "cos", "erf", "expm1", "log1p", "atan", "atan2", "neg", "abs", "lt", "le",
                                    "gt", "ge", "eq", "ne")},
    "negative": _of("neg"), "absolute": _of("abs"), "fabs": _of("abs"), "expit": _of("sigmoid"),
    "special_expit": _of("sigmoid"), "special_exp2": _of("exp2"), "logistic": _of("sigmoid"),
    "less": _of("lt"), "less_equal": _of("le"), "greater": _of("gt"), "greater_equal": _of("ge"), "equal": _of("eq"),
    "not_equal": _of("ne"),
    "add": lambda a, b, alpha=1: make("add", lift(a), make("mul", lift(b), lift(alpha)) if alpha != 1 else lift(b)),
    "sub": lambda a, b, alpha=1: make("sub", lift(a), make("mul", lift(b), lift(alpha)) if alpha != 1 else lift(b)),
    "subtract": _of("sub"), "rsub": _reflected("sub"), "mul": _mul, "multiply": _mul,
    "div": _div, "divide": _div, "true_divide": _div, "truediv": _div, "rdiv": _reflected("div"),
    "floor_divide": _of("floordiv"), "rfloordiv": _reflected("floordiv"),
    "remainder": _of("mod"), "mod": _of("mod"), "rmod": _reflected("mod"), "fmod": _fmod, "rem": _fmod,
    "pow": _pow, "power": _pow, "float_power": _of("pow"), "rpow": lambda a, b: _pow(b, a),
    "square": lambda x: make("mul", lift(x), lift(x)), "reciprocal": lambda x: make("div", const(1.0), lift(x)),
    "minimum": _of("min"), "maximum": _of("max"), "min": _extreme("min"), "max": _extreme("max"),
    "amin": _extreme("min"), "amax": _extreme("max"),
    "clamp": _clip, "clip": _clip, "clamp_min": lambda x, min: _clip(x, min),
    "clamp_max": lambda x, max: _clip(x, None, max), "relu": lambda x: make("max", lift(x), const(0)),
    "floor": _whole("floor"), "ceil": _whole("ceil"), "trunc": _trunc, "fix": _trunc, "round": _round, "rint": _round,
    "sign": _sign, "sgn": _sign, "isnan": _nan, "isfinite": _finite, "isinf": _infinite,
    "where": _where, "select": _select, "positive": lambda x: lift(x),
    "special_erf": _of("erf"), "special_expm1": _of("expm1"), "special_log1p": _of("log1p"), "arctan": _of("atan"),
    "arctan2": _of("atan2"), "gelu": _gelu, "elu": _elu, "heaviside": _heaviside, "nan_to_num": _nan_to_num,
    "signbit": _signbit, "isin": _isin,
    "log10": lambda x: make("mul", make("log", lift(x)), const(1 / math.log(10))),
    "tan": lambda x: make("div", make("sin", lift(x)), make("cos", lift(x))),
    "silu": lambda x: make("mul", lift(x), make("sigmoid", lift(x))),
    "softplus": lambda x: _softplus(lift(x)), "logsigmoid": lambda x: make("neg", _softplus(make("neg", lift(x)))),
    "log_sigmoid": lambda x: make("neg", _softplus(make("neg", lift(x)))),
    "hypot": lambda x, y: make("sqrt", make("add", _mul(x, x), _mul(y, y))),
    "lerp": lambda a, b, weight: make("add", lift(a), make("mul", lift(weight), make("sub", lift(b), lift(a)))),
    "logical_and": _logical("and"), "logical_or": _logical("or"), "logical_xor": _logical("xor"),
    "logical_not": _logical("not"),
    "bitwise_and": _of("and"), "bitwise_or": _of("or"), "bitwise_xor": _of("xor"), "bitwise_not": _of("not"),
    "bitwise_invert": _of("not"), "invert": _of("not"), "left_shift": _of("shl"), "bitwise_left_shift": _of("shl"),
    "right_shift": _of("shr"), "bitwise_right_shift": _of("shr"),
    "dot": _dot, "vdot": _dot, "inner": _dot, "matmul": _dot, "sum": _sum, "take": _take,
    "zeros_like": _like(0), "ones_like": _like(1), "full_like": _like(None),
    "zeros": _full(0), "ones": _full(1), "full": _full(None),
    "tensor": _tensor, "as_tensor": _tensor, "scalar_tensor": _tensor, "asarray": _tensor, "array": _tensor,
}  # fmt: skip

# Methods alone: of NumPy's arrays and torch's tensors.
METHODS: dict[str, Callable[..., Any]] = {
    **{name: FUNCTIONS[name] for name in FUNCTIONS if name not in ("tensor", "as_tensor", "asarray", "zeros", "ones",
       "full", "scalar_tensor", "array", "select", "tanh_approx", "zeros_like", "ones_like", "full_like")},
    "__getitem__": _getitem,
    "where": lambda x, condition, other: _where(condition, x, other),
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
    "to": _to, "type": _to, "astype": _convert,
    "type_as": lambda x, other: _convert(x, other.dtype),
    "float": lambda x: _convert(x, "float32"), "double": lambda x: _convert(x, "float64"),
    "half": lambda x: _convert(x, "float16"), "bfloat16": lambda x: _convert(x, "bfloat16"),
    "int": lambda x: _convert(x, "int32"), "long": lambda x: _convert(x, "int64"),
    "short": lambda x: _convert(x, "int16"), "char": lambda x: _convert(x, "int8"),
    "byte": lambda x: _convert(x, "uint8"), "bool": lambda x: _convert(x, "bool"),
    "new_zeros": _full(0), "new_ones": _full(1), "new_full": _full(None), "new_tensor": _tensor,
    "item": _same, "clone": _same, "contiguous": _same, "copy": _same,
    "any": lambda x: cast(lift(x), "bool"), "all": lambda x: cast(lift(x), "bool"),
    "dim": lambda x: x.ndim, "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
    "numel": lambda x: _numel(x),
}  # fmt: skip


def _numel(x: Any) -> Any:
    result: Any = 1
    for length in x.shape:
        result = result * length
    return result


_REMEDIES = {
    "view": "a mod is about one element: index with [i, j] instead of reshaping",
    "reshape": "a mod is about one element: index with [i, j] instead of reshaping",
    "flatten": "a mod is about one element: index with [i, j] instead of reshaping",
    "squeeze": "a mod is about one element: leave it out",
    "unsqueeze": "a mod is about one element: leave it out",
    "expand": "a mod is about one element: leave it out",
    "expand_as": "a mod is about one element: leave it out",
    "T": "exchange the indices instead",
    "t": "exchange the indices instead",
    "transpose": "exchange the indices instead",
    "permute": "exchange the indices instead",
    "detach": "detach the tensor outside of the mod and capture the result",
    "cpu": "move the array before the mod captures it",
    "cuda": "move the array before the mod captures it",
    "numpy": "use its elements as they are, by operators and where",
    "tolist": "use its elements as they are, by operators and where",
    "gather": "index with [i, j] instead",
    "index_select": "index with [i, j] instead",
}
