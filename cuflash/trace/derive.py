"""Derivatives of expressions, as expressions: reverse mode through the graph.

Ints and comparisons have no derivative. Where a function has a corner it gets what PyTorch's autograd gives: abs 0 at
0, min and max one half to each of two equals, floor and `//` 0, `%` 1 by its first operand.

A branch that `where` did not take, or an operand that min or max left out, adds 0 whatever its own derivative is: the
adjoint of a node is a value under conditions, and everything further down is computed under the same conditions. So
`where(x > 0, log(x), 0)` has no NaN at 0, which a product 0 * inf would bring.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from ..errors import UnsupportedError
from .expr import SCORE, Expr, const, make, walk

ZERO, ONE = const(0.0), const(1.0)

# Conditions that hold together: (bool expression, whether it is true), in the order in which they were met.
Guard = tuple[tuple[Expr, bool], ...]


def derivative(x: Expr, by: Expr) -> Expr:
    """d x / d by, for a leaf: SCORE, a float `load`, `scalar` or `dot` node. All other leaves are held fast.

    Two `load` nodes of one array are two leaves: the gradient of an element is the sum over the nodes that read it.

    >>> derivative(make("add", SCORE, const(2.0)), SCORE), derivative(make("tanh", SCORE), SCORE)
    (1.0, (1.0 - (tanh(score) * tanh(score))))
    """
    return _adjoints(x, {by})[by]


def gradients(x: Expr, arrays: Collection[int] | None = None) -> tuple[Expr, dict[Expr, Expr]]:
    """d x / d score, and d x / d load for every `load` node of float arrays.

    arrays   the slots whose gradients are wanted; None: all of them

    Raises UnsupportedError if a `dot` reads one of them.

    >>> from .expr import coordinate, load
    >>> gradients(make("add", SCORE, load(0, "float", (coordinate("h"),))))
    (1.0, {array0[h]: 1.0})
    """
    loads: list[Expr] = []
    for node in walk(x):
        if node.op == "load" and node.kind == "float" and (arrays is None or node.value in arrays):
            loads.append(node)
        if node.op == "dot" and (arrays is None or not {*node.value[:2]}.isdisjoint(arrays)):
            raise UnsupportedError(
                f"the gradient of an array that a mod reads through a dot of rows: {node} has none yet; write the sum "
                "of products with single elements, or detach the array (.detach(), jax.lax.stop_gradient)"
            )
    found = _adjoints(x, {SCORE, *loads})
    return found[SCORE], {node: found[node] for node in loads}


def _adjoints(root: Expr, leaves: set[Expr]) -> dict[Expr, Expr]:
    order = list(walk(root))
    # What depends on a leaf by floats alone: the rest is never visited.
    moves: set[Expr] = set()
    for x in order:
        if x in leaves or (x.kind == "float" and x.op != "load" and any(a in moves for a in x.args)):
            moves.add(x)
    found = dict.fromkeys(leaves, ZERO)
    if root not in moves:
        return found
    parts: dict[Expr, list[tuple[Guard, Expr]]] = {root: [((), ONE)]}
    for x in reversed(order):
        if x not in moves or x not in parts:
            continue
        guard, g = _sum(parts.pop(x))
        if x in leaves:
            found[x] = _under(guard, g)
            continue
        for a, condition, d in _pulled(x, g):
            if a in moves and d is not ZERO:
                parts.setdefault(a, []).append((_joined(guard, condition), d))
    return found


def _pulled(x: Expr, g: Expr) -> list[tuple[Expr, Guard, Expr]]:
    """What the adjoint g of x gives its operands: (operand, under which conditions, adjoint)."""
    op, args = x.op, x.args
    if op == "where":
        condition, yes, no = args
        condition, taken = (condition.args[0], False) if condition.op == "not" else (condition, True)
        return [(yes, ((condition, taken),), g), (no, ((condition, not taken),), g)]
    a, b = args[0], args[-1]
    if op in ("min", "max"):
        half = make("where", make("eq", a, b), _mul(g, const(0.5)), g)
        less = "le" if op == "min" else "ge"
        return [(a, ((make(less, a, b), True),), half), (b, ((make(less, b, a), True),), half)]
    if op == "abs":
        d = make("where", make("gt", a, ZERO), g, make("where", make("lt", a, ZERO), _neg(g), ZERO))
        return [(a, (), d)]
    if op == "add":
        return [(a, (), g), (b, (), g)]
    if op == "sub":
        return [(a, (), g), (b, (), _neg(g))]
    if op == "mul":
        return [(a, (), _mul(g, b)), (b, (), _mul(g, a))]
    if op == "div":
        return [(a, (), make("div", g, b)), (b, (), _neg(make("div", _mul(g, x), b)))]
    if op == "mod":
        return [(a, (), g), (b, (), _neg(_mul(g, make("floordiv", a, b))))]
    if op == "pow":
        return _pulled_pow(x, a, b, g)
    if op == "neg":
        return [(a, (), _neg(g))]
    if op in ("exp", "exp2"):
        return [(a, (), _mul(_mul(g, x), ONE if op == "exp" else const(math.log(2))))]
    if op in ("log", "log2"):
        return [(a, (), make("div", _mul(g, ONE if op == "log" else const(1 / math.log(2))), a))]
    if op in ("tanh", "tanh_approx"):
        return [(a, (), _mul(g, make("sub", ONE, make("mul", x, x))))]
    if op == "sigmoid":
        return [(a, (), _mul(g, make("mul", x, make("sub", ONE, x))))]
    if op == "sqrt":
        return [(a, (), make("div", _mul(g, const(0.5)), x))]
    if op == "rsqrt":
        return [(a, (), _mul(_mul(g, const(-0.5)), make("mul", x, make("mul", x, x))))]
    if op == "sin":
        return [(a, (), _mul(g, make("cos", a)))]
    if op == "cos":
        return [(a, (), _neg(_mul(g, make("sin", a))))]
    if op == "erf":
        return [(a, (), _mul(g, _mul(const(2 / math.sqrt(math.pi)), make("exp", make("neg", make("mul", a, a))))))]
    if op == "expm1":
        return [(a, (), _mul(g, make("add", x, ONE)))]
    if op == "log1p":
        return [(a, (), make("div", g, make("add", a, ONE)))]
    if op == "atan":
        return [(a, (), make("div", g, make("add", make("mul", a, a), ONE)))]
    if op == "atan2":
        square = make("add", make("mul", a, a), make("mul", b, b))
        return [(a, (), _mul(g, make("div", b, square))), (b, (), _neg(_mul(g, make("div", a, square))))]
    if op in ("float16", "bfloat16"):
        return [(a, (), g)]
    assert op in ("floor", "ceil", "floordiv"), op
    return []


def _pulled_pow(x: Expr, a: Expr, b: Expr, g: Expr) -> list[tuple[Expr, Guard, Expr]]:
    by_base = _mul(g, _mul(b, make("pow", a, make("sub", b, ONE))))
    if b.op == "const":
        return [(a, (), by_base)] if b.value != 0.0 else []
    # NOTE: as PyTorch's: x**0 has derivative 0 by x everywhere, 0**y with y >= 0 has derivative 0 by y.
    flat = make("and", make("eq", a, ZERO), make("ge", b, ZERO))
    by_exponent = _mul(g, _mul(x, make("log", a)))
    return [(a, ((make("ne", b, ZERO), True),), by_base), (b, ((flat, False),), by_exponent)]


# Adjoints under conditions ------------------------------------------------------------------------------------------


def _joined(outer: Guard, inner: Guard) -> Guard:
    return outer + tuple(c for c in inner if c not in outer)


def _sum(parts: list[tuple[Guard, Expr]]) -> tuple[Guard, Expr]:
    """Adjoints that meet in one node, as one."""
    by_guard: dict[Guard, Expr] = {}
    for guard, g in parts:
        by_guard[guard] = _add(by_guard[guard], g) if guard in by_guard else g
    while pair := _opposites(by_guard):
        one, other, common = pair
        g = make("where", one[-1][0], by_guard.pop(one), by_guard.pop(other))
        by_guard[common] = _add(by_guard[common], g) if common in by_guard else g
    if len(by_guard) == 1:
        return next(iter(by_guard.items()))
    total, either = ZERO, const(False)
    for guard, g in by_guard.items():
        total = _add(total, _under(guard, g))
        either = make("or", either, _all(guard))
    return () if either.op == "const" else ((either, True),), total


def _opposites(guards: Collection[Guard]) -> tuple[Guard, Guard, Guard] | None:
    """Two of them that differ in the last condition alone, the one where it is true first, and what they share."""
    for guard in guards:
        if guard and guard[-1][1] and (other := (*guard[:-1], (guard[-1][0], False))) in guards:
            return guard, other, guard[:-1]
    return None


def _all(guard: Guard) -> Expr:
    held = const(True)
    for condition, value in guard:
        held = make("and", held, condition if value else make("not", condition))
    return held


def _under(guard: Guard, g: Expr) -> Expr:
    if len(guard) == 1 and not guard[0][1]:
        return make("where", guard[0][0], ZERO, g)
    return make("where", _all(guard), g, ZERO)


# Products and sums in which 0 and 1 vanish: a derivative has no use for the sign of a zero ---------------------------


def _mul(a: Expr, b: Expr) -> Expr:
    if a is ZERO or b is ZERO:
        return ZERO
    for x, other in ((a, b), (b, a)):
        if x.op == "const" and x.value == -1.0:
            return _neg(other)
    return make("mul", a, b)


def _add(a: Expr, b: Expr) -> Expr:
    if a is ZERO or b is ZERO:
        return b if a is ZERO else a
    if b.op == "neg":
        return make("sub", a, b.args[0])
    return make("mul", const(2.0), a) if a is b else make("add", a, b)


def _neg(a: Expr) -> Expr:
    return ZERO if a is ZERO else make("neg", a)
