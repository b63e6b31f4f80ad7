"""C against NumPy: the generated text of random mods, compiled for the host, at random points."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import expressions
import numpy as np
import pytest
from compiled import Library
from expressions import World

from cuflash.trace.emit_numpy import FUNCTIONS, evaluate
from cuflash.trace.expr import COORDINATES, SCORE, Expr, Mods, ScalarSlot, cast, const, make, scalar, walk

POINTS = 200
ULP = 2.0**-23
TINY = 2.0**-120  # what flushing denormals may take, a few times over


# --- How far from exact a float may be -------------------------------------------------------------------------------


def errors(root: Expr, points: Mapping[str, np.ndarray], world: World) -> tuple[np.ndarray, np.ndarray]:
    """(values of an expression in float64, how far from them the text may be: infinite where nothing is said).

    A bound goes along with every value: what an operation makes of its operands' errors, and what it adds by itself, a
    few ulp of its result. A comparison, a floor, a cast to an int within the errors of turning out otherwise makes all
    that depends on it unknown; so does what overflows.
    """
    nodes = list(walk(root))
    points = {name: np.float32(x) if name == "score" else x for name, x in points.items()}
    value = dict(zip(nodes, evaluate(nodes, points, world.arrays, world.scalars, np.float64), strict=True))
    error: dict[Expr, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for x in nodes:
            e = np.asarray(_error(x, [value[a] for a in x.args], [error[a] for a in x.args], value[x]), np.float64)
            known = ~np.isnan(e)
            if x.kind == "float":
                known = known & (np.abs(value[x]) < 1e37)
            error[x] = np.where(known, e, np.inf)
    return value[root], error[root]


def _error(x: Expr, v: list[np.ndarray], e: list[np.ndarray], value: np.ndarray) -> np.ndarray | float:
    """Of a node, from its operands' values and errors. Of ints and bools: 0, or infinite where they may be others."""
    unsure = sum((np.where(np.isfinite(a), 0.0, np.inf) for a in e), start=np.zeros(()))
    if not x.args:
        return np.abs(value) * ULP if x.op == "const" and x.kind == "float" else 0.0
    if x.op == "load":
        return unsure
    if x.op == "where":
        return unsure[...] * 0 + np.where(v[0], e[1], e[2]) + np.where(np.isfinite(e[0]), 0, np.inf)
    inner = x.args[0].kind
    if x.op == "float":
        return e[0] + (np.abs(value) * ULP if inner == "int" else 0.0)
    if x.op == "int" and inner == "float":
        return _steps(np.trunc, v[0], e[0])
    if x.op == "bool" and inner == "float":
        return np.where((np.abs(v[0]) > e[0]) | (e[0] == 0), unsure, np.inf)
    if x.op in ("lt", "le", "gt", "ge", "eq", "ne") and inner == "float":
        return np.where((np.abs(v[0] - v[1]) > e[0] + e[1]) | (e[0] + e[1] == 0), unsure, np.inf)
    if x.kind != "float":
        return unsure
    a, b = np.abs(v[0]), np.abs(v[-1])
    ea, eb = e[0], e[-1]
    own = np.abs(value) * 4 * ULP + TINY
    if x.op in ("neg", "abs"):
        return ea
    if x.op in ("min", "max"):
        return np.maximum(ea, eb)
    if x.op in ("add", "sub"):
        return ea + eb + own
    if x.op == "mul":
        return a * eb + b * ea + ea * eb + own
    if x.op in ("floor", "ceil"):
        return _steps(FUNCTIONS[x.op], v[0], ea)
    if x.op in ("div", "floordiv", "mod"):
        quotient = v[0] / v[1]
        of_quotient = np.where(b > eb, (ea + np.abs(quotient) * eb) / (b - eb), np.inf) + np.abs(quotient) * 4 * ULP
        if x.op == "div":
            return of_quotient + own
        stepped = _steps(np.floor, quotient, of_quotient + TINY)
        return stepped if x.op == "floordiv" else stepped + ea + np.abs(np.floor(quotient)) * eb + own
    near = np.where(a > ea, a - ea, np.nan)  # how near to 0 the operand may be
    if x.op == "exp":
        return np.abs(value) * np.expm1(ea + a * 4 * ULP) + own
    if x.op == "exp2":
        return np.abs(value) * np.expm1(ea) + own
    if x.op in ("log", "log2"):
        return 1.5 * ea / near + own
    if x.op == "sqrt":
        return ea / np.sqrt(near) + own
    if x.op == "rsqrt":
        return ea * near**-1.5 + own
    if x.op == "tanh":
        return ea + np.abs(value) * 2.0**-21
    if x.op == "tanh_approx":
        return ea + np.abs(value) * 2.0**-10
    if x.op == "sigmoid":
        return ea + (1 - value) * value * a * 4 * ULP + own
    if x.op in ("sin", "cos"):  # what is left of whole turns has the rounding of a turn
        return np.where(a < 1e6, ea + 2.0**-20 + a * 2.0**-30, np.inf)
    assert x.op == "pow", x.op
    exponent = b * ea / near * 1.5 + np.abs(np.log2(a)) * (eb + b * 4 * ULP)
    return np.abs(value) * np.expm1(exponent) + own


def _steps(step: Callable[..., np.ndarray], v: np.ndarray, e: np.ndarray) -> np.ndarray:
    return np.where(step(v - e) == step(v + e), 0.0, np.inf)


def meant_as_sums(root: Expr, points: Mapping[str, np.ndarray], world: World) -> np.ndarray:
    """Where no sum leaves 2^29: masks are turned around as if there were no others."""
    nodes = [x for x in walk(root) if x.kind == "int"]
    value = dict(zip(nodes, evaluate(nodes, points, world.arrays, world.scalars), strict=True))
    fine = np.ones(POINTS, bool)
    for x in nodes:
        wide = value[x].astype(np.int64)
        if x.op in ("add", "sub", "mul", "neg", "abs"):
            wide = FUNCTIONS[x.op](*(value[a].astype(np.int64) for a in x.args))
        fine &= np.abs(wide) <= 2**29
    return fine


# --- Random mods ----------------------------------------------------------------------------------------------------


def draw(seed: int, kind: str, count: int) -> tuple[list[Expr], list[World], np.random.Generator, Library]:
    """Expressions of depth 1 to 8, worlds of one structure to compute them in, their text compiled."""
    rng = expressions.generator(seed)
    worlds = [World.draw(rng) for _ in range(4)]
    leaves = ("score", "b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
    roots = [worlds[0].expression(rng, kind, 1 + i % 8, leaves[kind == "bool" :]) for i in range(count)]
    slots = worlds[0].array_slots, worlds[0].scalar_slots
    part = {"bool": "mask", "int": "value", "float": "score"}[kind]
    mods = [Mods(None, x, *slots) if kind == "bool" else Mods(cast(x, "float"), None, *slots) for x in roots]
    return roots, worlds, rng, Library(mods, [part])


def check_floats(seed: int, count: int) -> None:
    roots, worlds, rng, library = draw(seed, "float", count)
    known = 0
    for i, x in enumerate(roots):
        world = worlds[i % len(worlds)]
        points = world.points(rng, POINTS)
        found = library.score(i, world, points)
        value, error = errors(x, points, world)
        with np.errstate(all="ignore"):
            bad = np.isfinite(error) & ~(np.abs(found - value) <= error)
        if bad.any():
            _fail(x, points, world, bad, found, np.broadcast_to(value, found.shape), error)
        known += int((np.broadcast_to(error, found.shape) < 1e-2 * (1 + np.abs(value))).sum())
    assert known > 0.7 * count * POINTS


def check_ints(seed: int, count: int) -> None:
    roots, worlds, rng, library = draw(seed, "int", count)
    known = 0
    for i, x in enumerate(roots):
        world = worlds[i % len(worlds)]
        points = world.points(rng, POINTS)
        found = library.value(i, world, points)
        value, error = (np.broadcast_to(y, found.shape) for y in errors(x, points, world))
        bad = np.isfinite(error) & (found != value)
        if bad.any():
            _fail(x, points, world, bad, found, value, error)
        known += int(np.isfinite(error).sum())
    assert known > 0.9 * count * POINTS


def check_bools(seed: int, count: int) -> None:
    roots, worlds, rng, library = draw(seed, "bool", count)
    known = 0
    for i, x in enumerate(roots):
        world = worlds[i % len(worlds)]
        points = world.points(rng, POINTS)
        value, error = errors(x, points, world)
        sure = np.isfinite(error) & meant_as_sums(x, points, world)
        for found in library.mask(i, world, points):
            bad = sure & (found != value)
            if bad.any():
                _fail(x, points, world, bad, found, np.broadcast_to(value, found.shape), error)
        known += int(sure.sum())
    assert known > 0.5 * count * POINTS


def _fail(
    x: Expr, points: Mapping[str, np.ndarray], world: World, bad: np.ndarray, found: np.ndarray, value: np.ndarray,
    error: np.ndarray,
) -> None:  # fmt: skip
    n = int(np.argmax(bad))
    at = {name: p[n].item() for name, p in points.items()}
    error = np.broadcast_to(error, found.shape)
    raise AssertionError(f"{x} at {at}, numbers {world.scalars}: {found[n]}, not {value[n]} within {error[n]}")


CHECKS = {"float": check_floats, "int": check_ints, "bool": check_bools}


@pytest.mark.parametrize("kind", CHECKS)
def test_c_computes_what_numpy_does(kind: str) -> None:
    CHECKS[kind](100, 240)


def test_what_is_exact_is_so_at_the_ends_of_numbers() -> None:
    """NaN, infinities, zeros of both signs, and what no int holds."""
    ends = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -1.5, -7, 3e9, -3e9, 2.5e38])
    other = scalar(0, "float")
    unary = [make(op, SCORE) for op in ("abs", "neg", "floor", "ceil", "bool")]
    # All 32 bits of an int, half by half.
    halves = [make("and", make("int", SCORE), const(65535)), make("shr", make("int", SCORE), const(16))]
    binary = [make(op, SCORE, other) for op in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne")]
    binary.append(make("where", make("lt", SCORE, other), SCORE, other))
    roots = [cast(x, "float") for x in (*unary, *halves, *binary)]
    library = Library([Mods(x, None, (), (ScalarSlot("other", "float"),)) for x in roots], ["score"])
    points = {"score": ends} | {name: np.zeros(ends.size, np.int64) for name in COORDINATES}
    for i, x in enumerate(roots):
        for value in ends.tolist():
            expected = evaluate([x], points, (), (value,))[0]
            found = library.score(i, World((), (value,)), points)
            np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape), err_msg=f"{x}, {value}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("kind", CHECKS)
def test_c_computes_what_numpy_does_for_many(kind: str, part: int) -> None:
    CHECKS[kind](200 + part, 700)
