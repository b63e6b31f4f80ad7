"""What the functions that mods call do to expressions. `names` says under which names they are called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..dtypes import BY_NAME
from ..errors import TraceError
from .expr import Expr, cast, const, dot, make, show
from .operands import Array, ArrayProduct, Number, Operand, lift


def of(op: str) -> Callable[..., Expr]:
    def function(*args: Any, **kwargs: Any) -> Expr:
        if kwargs:
            raise TypeError(f"unexpected {', '.join(kwargs)}")
        return make(op, *[lift(x) for x in args])

    return function


def mul(a: Any, b: Any) -> Any:
    if isinstance(a, Array) and isinstance(b, Array) and a.ndim == b.ndim == 1:
        return a.times(b)
    return make("mul", lift(a), lift(b))


def dot_product(a: Any, b: Any, **kwargs: Any) -> Expr:
    if not isinstance(a, Array) or not isinstance(b, Array):
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


def sum_of(x: Any, axis: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    if isinstance(x, ArrayProduct):
        axis = dim if axis is None else axis
        if axis not in (None, 0, -1, (0,), (-1,)):
            raise TraceError(f"{x!r} has one axis and is summed along axis {axis}")
        return dot_product(x.a, x.b)
    if isinstance(x, Array):
        raise TraceError(f"the sum of {x!r}: sum it outside of the mod, or use a dot product of two rows")
    return lift(x)


def div(a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
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
        return trunc(make("div", a, b))
    quotient, rest = make("floordiv", a, b), make("mod", a, b)
    inexact = make("and", make("ne", rest, const(0)), _signs_differ(a, b))
    return make("where", inexact, make("add", quotient, const(1)), quotient)


def fmod(a: Any, b: Any) -> Expr:
    a, b = lift(a), lift(b)
    rest = make("mod", a, b)
    inexact = make("and", make("ne", rest, const(0)), _signs_differ(a, b))
    return make("where", inexact, make("sub", rest, b), rest)


def trunc(x: Any) -> Expr:
    x = lift(x) if not isinstance(x, Expr) else x
    if x.kind != "float":
        return x
    return make("where", make("lt", x, const(0.0)), make("ceil", x), make("floor", x))


def whole(op: str) -> Callable[..., Expr]:
    """floor and ceil, which leave ints alone."""
    return lambda x: lift(x) if lift(x).kind != "float" else make(op, lift(x))


def rounded(x: Any, decimals: int = 0) -> Expr:
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


def power(a: Any, b: Any) -> Expr:
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


def clip(x: Any, *bounds: Any, **named: Any) -> Expr:
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


def where(*args: Any, **kwargs: Any) -> Expr:
    if kwargs:
        args = (*args, *[kwargs[k] for k in ("condition", "input", "self", "x", "y", "other") if k in kwargs])
    if len(args) != 3:
        raise TraceError(f"where with {len(args)} arguments: a mod needs where(condition, a, b)")
    return make("where", *[lift(x) for x in args])


def extreme(op: str) -> Callable[..., Expr]:
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


def logical(op: str) -> Callable[..., Expr]:
    return lambda *args: make(op, *[cast(lift(x), "bool") for x in args])


def select(conditions: Any, choices: Any, default: Any = 0) -> Expr:
    if type(conditions) not in (list, tuple):  # jax.lax's is where
        return where(conditions, choices, default)
    result = lift(default)
    for condition, choice in reversed(list(zip(conditions, choices, strict=True))):
        result = make("where", lift(condition), lift(choice), result)
    return result


def sign(x: Any) -> Expr:
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


def convert(x: Any, dtype: Any) -> Any:
    name = kind_of_dtype(dtype)
    return x.converted(name) if isinstance(x, Array) else converted(lift(x), name)


def converted(x: Expr, name: str) -> Expr:
    """x as a mod has what is of a dtype: floats in float32, ints in 32 bits; narrower ints wrap as theirs do, and
    narrower floats round."""
    target = BY_NAME[name]
    kind = "bool" if name == "bool" else "float" if target.is_float else "int"
    x = cast(x, kind)
    bits = target.itemsize * 8
    if name in ("float16", "bfloat16"):
        return make(name, x)
    if kind != "int" or bits >= 32:
        return x
    if name.startswith("u"):
        return make("and", x, const((1 << bits) - 1))
    return make("shr", make("shl", x, const(32 - bits)), const(32 - bits))


def to(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    for given in args:
        if isinstance(given, Operand):
            dtype = given.dtype
        elif dtype is None and not isinstance(given, bool | int) and _is_dtype(given):
            dtype = given
    if dtype is None:
        return x
    return convert(x, dtype)


def _is_dtype(x: Any) -> bool:
    return isinstance(x, type | np.dtype) or str(x).rpartition(".")[2] in BY_NAME


def _made(value: Any, dtype: Any) -> Expr:
    x = lift(value)
    return x if dtype is None else converted(x, kind_of_dtype(dtype))


def like(value: Any) -> Callable[..., Expr]:
    def function(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Expr:
        given = value if value is not None else args[0] if args else kwargs.pop("fill_value")
        made = cast(lift(given), lift(x).kind) if dtype is None else _made(given, dtype)
        return made

    return function


def full(value: Any) -> Callable[..., Expr]:
    """zeros, ones and full, and a tensor's new_...: of no axes."""

    def function(*args: Any, dtype: Any = None, size: Any = None, shape: Any = None, **kwargs: Any) -> Expr:
        template = args[0] if args and isinstance(args[0], Operand) else None
        args = args[1:] if template is not None else args
        given = value if value is not None else kwargs.pop("fill_value", args[-1] if args else None)
        extents = size if size is not None else shape if shape is not None else args[0] if args else ()
        if extents not in ((), [], 1) and tuple(extents) not in ((), (1,)):
            raise TraceError(f"an array of shape {extents} made inside a mod: make it outside and capture it")
        if dtype is None and template is not None:
            dtype = template.dtype
        return _made(float(given) if dtype is None and isinstance(given, int) else given, dtype)

    return function


def tensor(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    data = args[-1] if args else kwargs["data"]
    if type(data) in (list, tuple):
        raise TraceError("an array of traced values made inside a mod: use where, or capture an array and index it")
    if len(args) == 1 and isinstance(data, Array):
        return data if dtype is None else convert(data, dtype)
    return _made(data, dtype)


def take(array: Any, indices: Any, axis: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    axis = dim if axis is None else axis
    if not isinstance(array, Array) or axis not in (None, 0) or (axis is None and array.ndim != 1):
        raise TraceError(f"take from {array!r} along axis {axis}: index it, array[i, j]")
    return array[indices]


def same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def getitem(x: Any, index: Any) -> Any:
    if not isinstance(x, Operand):
        lift(x)  # says what to do about an array that was not captured
        raise TraceError(f"{x!r} is indexed by a traced value: capture an array and index that")
    return x[index]


def nan(x: Any) -> Expr:
    x = lift(x)
    return make("ne", x, x) if x.kind == "float" else const(False)


def finite(x: Any) -> Expr:
    x = lift(x)
    return make("lt", make("abs", cast(x, "float")), const(float("inf")))


def infinite(x: Any) -> Expr:
    return make("eq", make("abs", cast(lift(x), "float")), const(float("inf")))


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x)), whatever the size of x."""
    small = make("exp", make("neg", make("abs", cast(x, "float"))))
    return make("add", make("max", x, const(0.0)), make("log", make("add", const(1.0), small)))


def gelu(x: Any, approximate: Any = "none") -> Expr:
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


def elu(x: Any, alpha: Any = 1.0, inplace: bool = False) -> Expr:
    x = cast(lift(x), "float")
    below = make("mul", lift(alpha), make("expm1", make("min", x, const(0.0))))
    return make("where", make("gt", x, const(0.0)), x, below)


def heaviside(x: Any, values: Any) -> Expr:
    x, at_zero = lift(x), cast(lift(values), "float")
    positive = make("where", make("gt", x, const(0)), const(1.0), const(0.0))
    return make("where", make("eq", x, const(0)), at_zero, positive)


def nan_to_num(x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Expr:
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


def signbit(x: Any) -> Expr:
    x = lift(x)
    return make("signbit", x) if x.kind == "float" else make("lt", x, const(0))


def isin(x: Any, among: Any, assume_unique: bool = False, invert: bool = False) -> Expr:
    """Whether a number is one of a few."""
    x = lift(x)
    if not isinstance(among, Array) and hasattr(among, "tolist"):
        among = among.tolist()
    among = [among] if isinstance(among, Number) or isinstance(among, bool | int | float) else list(among)
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


def reflected(op: str) -> Callable[..., Expr]:
    return lambda a, b: make(op, lift(b), lift(a))


def numel(x: Any) -> Any:
    result: Any = 1
    for length in x.shape:
        result = result * length
    return result
