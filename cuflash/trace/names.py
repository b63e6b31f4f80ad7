"""Names: under which NumPy, torch, JAX, Python's math and the methods of arrays have the functions of mods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from . import functions as f
from .expr import cast, const, make
from .operands import lift

# By the names NumPy, torch, JAX and Python's math have for them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: f.of(name) for name in ("exp", "exp2", "log", "log2", "tanh", "tanh_approx", "sigmoid", "sqrt", "rsqrt",
                                    "sin", "cos", "erf", "expm1", "log1p", "atan", "atan2", "neg", "abs", "lt", "le",
                                    "gt", "ge", "eq", "ne")},
    "negative": f.of("neg"), "absolute": f.of("abs"), "fabs": f.of("abs"), "expit": f.of("sigmoid"),
    "special_expit": f.of("sigmoid"), "special_exp2": f.of("exp2"), "logistic": f.of("sigmoid"),
    "less": f.of("lt"), "less_equal": f.of("le"), "greater": f.of("gt"), "greater_equal": f.of("ge"),
    "equal": f.of("eq"), "not_equal": f.of("ne"),
    "add": lambda a, b, alpha=1: make("add", lift(a), make("mul", lift(b), lift(alpha)) if alpha != 1 else lift(b)),
    "sub": lambda a, b, alpha=1: make("sub", lift(a), make("mul", lift(b), lift(alpha)) if alpha != 1 else lift(b)),
    "subtract": f.of("sub"), "rsub": f.reflected("sub"), "mul": f.mul, "multiply": f.mul,
    "div": f.div, "divide": f.div, "true_divide": f.div, "truediv": f.div, "rdiv": f.reflected("div"),
    "floor_divide": f.of("floordiv"), "rfloordiv": f.reflected("floordiv"),
    "remainder": f.of("mod"), "mod": f.of("mod"), "rmod": f.reflected("mod"), "fmod": f.fmod, "rem": f.fmod,
    "pow": f.power, "power": f.power, "float_power": f.of("pow"), "rpow": lambda a, b: f.power(b, a),
    "square": lambda x: make("mul", lift(x), lift(x)), "reciprocal": lambda x: make("div", const(1.0), lift(x)),
    "minimum": f.of("min"), "maximum": f.of("max"), "min": f.extreme("min"), "max": f.extreme("max"),
    "amin": f.extreme("min"), "amax": f.extreme("max"),
    "clamp": f.clip, "clip": f.clip, "clamp_min": lambda x, min: f.clip(x, min),
    "clamp_max": lambda x, max: f.clip(x, None, max), "relu": lambda x: make("max", lift(x), const(0)),
    "floor": f.whole("floor"), "ceil": f.whole("ceil"), "trunc": f.trunc, "fix": f.trunc, "round": f.rounded,
    "rint": f.rounded, "sign": f.sign, "sgn": f.sign, "isnan": f.nan, "isfinite": f.finite, "isinf": f.infinite,
    "where": f.where, "select": f.select, "positive": lambda x: lift(x),
    "special_erf": f.of("erf"), "special_expm1": f.of("expm1"), "special_log1p": f.of("log1p"), "arctan": f.of("atan"),
    "arctan2": f.of("atan2"), "gelu": f.gelu, "elu": f.elu, "heaviside": f.heaviside, "nan_to_num": f.nan_to_num,
    "signbit": f.signbit, "isin": f.isin,
    "log10": lambda x: make("mul", make("log", lift(x)), const(1 / math.log(10))),
    "tan": lambda x: make("div", make("sin", lift(x)), make("cos", lift(x))),
    "silu": lambda x: make("mul", lift(x), make("sigmoid", lift(x))),
    "softplus": lambda x: f.softplus(lift(x)), "logsigmoid": lambda x: make("neg", f.softplus(make("neg", lift(x)))),
    "log_sigmoid": lambda x: make("neg", f.softplus(make("neg", lift(x)))),
    "hypot": lambda x, y: make("sqrt", make("add", f.mul(x, x), f.mul(y, y))),
    "lerp": lambda a, b, weight: make("add", lift(a), make("mul", lift(weight), make("sub", lift(b), lift(a)))),
    "logical_and": f.logical("and"), "logical_or": f.logical("or"), "logical_xor": f.logical("xor"),
    "logical_not": f.logical("not"),
    "bitwise_and": f.of("and"), "bitwise_or": f.of("or"), "bitwise_xor": f.of("xor"), "bitwise_not": f.of("not"),
    "bitwise_invert": f.of("not"), "invert": f.of("not"), "left_shift": f.of("shl"), "bitwise_left_shift": f.of("shl"),
    "right_shift": f.of("shr"), "bitwise_right_shift": f.of("shr"),
    "dot": f.dot_product, "vdot": f.dot_product, "inner": f.dot_product, "matmul": f.dot_product, "sum": f.sum_of,
    "take": f.take, "zeros_like": f.like(0), "ones_like": f.like(1), "full_like": f.like(None),
    "zeros": f.full(0), "ones": f.full(1), "full": f.full(None),
    "tensor": f.tensor, "as_tensor": f.tensor, "scalar_tensor": f.tensor, "asarray": f.tensor, "array": f.tensor,
}  # fmt: skip

# Methods alone: of NumPy's arrays and torch's tensors.
METHODS: dict[str, Callable[..., Any]] = {
    **{name: FUNCTIONS[name] for name in FUNCTIONS if name not in ("tensor", "as_tensor", "asarray", "zeros", "ones",
       "full", "scalar_tensor", "array", "select", "tanh_approx", "zeros_like", "ones_like", "full_like")},
    "__getitem__": f.getitem,
    "where": lambda x, condition, other: f.where(condition, x, other),
    "masked_fill": lambda x, mask, value: f.where(mask, value, x),
    "to": f.to, "type": f.to, "astype": f.convert,
    "type_as": lambda x, other: f.convert(x, other.dtype),
    "float": lambda x: f.convert(x, "float32"), "double": lambda x: f.convert(x, "float64"),
    "half": lambda x: f.convert(x, "float16"), "bfloat16": lambda x: f.convert(x, "bfloat16"),
    "int": lambda x: f.convert(x, "int32"), "long": lambda x: f.convert(x, "int64"),
    "short": lambda x: f.convert(x, "int16"), "char": lambda x: f.convert(x, "int8"),
    "byte": lambda x: f.convert(x, "uint8"), "bool": lambda x: f.convert(x, "bool"),
    "new_zeros": f.full(0), "new_ones": f.full(1), "new_full": f.full(None), "new_tensor": f.tensor,
    "item": f.same, "clone": f.same, "contiguous": f.same, "copy": f.same,
    "any": lambda x: cast(lift(x), "bool"), "all": lambda x: cast(lift(x), "bool"),
    "dim": lambda x: x.ndim, "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
    "numel": lambda x: f.numel(x),
}  # fmt: skip

# What messages name of them.
KNOWN = (
    "abs, atan, atan2, bitwise_*, ceil, clamp, clip, cos, div, dot, elu, eq, erf, exp, exp2, expm1, floor, "
    "floor_divide, fmod, full_like, ge, gelu, gt, heaviside, isin (of a few), isnan, le, log, log1p, log2, logical_*, "
    "lt, matmul, maximum, minimum, nan_to_num, ne, pow, reciprocal, relu, remainder, round, rsqrt, select, sigmoid, "
    "sign, signbit, sin, sqrt, square, sum (of a product of rows), tanh, trunc, where, zeros_like and ones_like"
)
IGNORED = (
    "device", "requires_grad", "pin_memory", "memory_format", "copy", "non_blocking", "casting", "order", "subok",
    "layout", "keepdims", "keepdim",
)  # fmt: skip


# What arrays have and mods do not, and what to do instead.
REMEDIES = {
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
