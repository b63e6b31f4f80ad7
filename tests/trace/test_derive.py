"""Derivatives of expressions against finite differences, PyTorch's autograd, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import expressions
import numpy as np
import pytest
from expressions import World

from cuflash.errors import UnsupportedError
from cuflash.trace.derive import derivative, gradients
from cuflash.trace.emit_numpy import evaluate
from cuflash.trace.expr import SCORE, Expr, const, coordinate, dot, load, make, rebuild, scalar, walk

B, H, Q, K = (coordinate(name) for name in ("b", "h", "q_idx", "kv_idx"))
POINTS = 24


# --- Finite differences ---------------------------------------------------------------------------------------------


def differences(x: Expr, by: Expr, leaves: dict[str, np.ndarray], world: World) -> tuple[np.ndarray, np.ndarray]:
    """d x / d by by central differences in float64, and where it is to be had: away from corners, steps and poles."""
    free = scalar(len(world.scalars), "float")
    moved = rebuild(x, {by: free})
    base = evaluate([by], leaves, world.arrays, world.scalars, np.float64)[0]
    found = []
    for step in (1e-5, 3e-6):
        ends: list[np.ndarray] = []
        for sign in (1, -1):
            scalars: Sequence[Any] = (*world.scalars, base + sign * step)
            ends.append(evaluate([moved], leaves, world.arrays, scalars, np.float64)[0])
        with np.errstate(all="ignore"):
            found.append((ends[0] - ends[1]) / (2 * step))
    a, b = np.broadcast_arrays(*found)
    nodes = [node for node in walk(x) if node.kind == "float"]
    values = evaluate(nodes, leaves, world.arrays, world.scalars, np.float64)
    with np.errstate(all="ignore"):
        # Rounding of the values, and what the two steps say, bound what can be known; beyond a pole nothing is.
        usable = np.isfinite(a) & np.isfinite(b) & (np.abs(a - b) <= 1e-5 * (1 + np.abs(b)))
        of = dict(zip(nodes, values, strict=True))
        for node, value in of.items():
            usable = usable & (np.abs(value) < (1e4 if node is x else 1e6))
            if node.op in ("mod", "floordiv"):  # teeth finer than the steps are not seen by them
                usable = usable & (np.abs(of[node.args[0]]) < 1e3 * np.abs(of[node.args[1]]))
    return b, usable


def check(x: Expr, by: Expr, leaves: dict[str, np.ndarray], world: World) -> int:
    """Compares, and says at how many points."""
    expected, usable = differences(x, by, leaves, world)
    found = evaluate([derivative(x, by)], leaves, world.arrays, world.scalars, np.float64)[0]
    found, expected, usable = np.broadcast_arrays(found, expected, usable)
    with np.errstate(all="ignore"):
        bad = usable & ~(np.abs(found - expected) <= 1e-3 * (1 + np.abs(expected)))
    if bad.any():
        i = int(np.argmax(bad))
        raise AssertionError(f"d({x}) / d({by}) = {derivative(x, by)}: {found.flat[i]}, not {expected.flat[i]}")
    return int(usable.sum())


def sweep(seed: int, count: int) -> None:
    rng = expressions.generator(seed)
    compared = points = 0
    for i in range(count):
        world = World.draw(rng)
        x = world.expression(rng, "float", 1 + i % 8)
        leaves = world.points(rng, POINTS)
        bys = {n for n in walk(x) if n is SCORE or (n.kind == "float" and n.op in ("load", "scalar"))}
        for by in sorted(bys | {SCORE}, key=repr)[:4]:
            compared += check(x, by, leaves, world)
            points += POINTS
    # Most points must have said something.
    assert compared > 0.6 * points


def test_random_expressions_agree_with_finite_differences() -> None:
    sweep(1, 600)


@pytest.mark.slow
def test_many_random_expressions_agree_with_finite_differences() -> None:
    sweep(2, 6000)


# --- PyTorch --------------------------------------------------------------------------------------------------------

SCORES = np.array([-3.0, -1.0, -0.0, 0.0, 0.25, 1.0, 2.0, 30.0])


def where_positive(s: Any, op: Callable[..., Any], other: float = 0.0) -> Any:
    return op("where", op("gt", s, const(0.0)), op("log", s), const(other))


@pytest.mark.parametrize(
    ("name", "make_expr", "in_torch"),
    [
        ("softcap", lambda s: make("mul", make("tanh", make("div", s, const(20.0))), const(20.0)),
         lambda s, t: 20 * t.tanh(s / 20)),
        ("abs", lambda s: make("abs", s), lambda s, t: t.abs(s)),
        ("maximum", lambda s: make("max", s, const(1.0)), lambda s, t: t.maximum(s, t.ones_like(s))),
        ("minimum", lambda s: make("min", const(0.25), s), lambda s, t: t.minimum(t.full_like(s, 0.25), s)),
        ("minimum of itself", lambda s: make("min", make("neg", s), s), lambda s, t: t.minimum(-s, s)),
        ("floor", lambda s: make("mul", make("floor", s), s), lambda s, t: t.floor(s) * s),
        ("remainder", lambda s: make("mod", s, const(0.75)), lambda s, t: t.remainder(s, 0.75)),
        ("remainder by", lambda s: make("mod", const(5.0), make("add", s, const(7.0))),
         lambda s, t: t.remainder(t.full_like(s, 5.0), s + 7)),
        ("square", lambda s: make("pow", s, const(2.0)), lambda s, t: s**2),
        ("cube", lambda s: make("pow", s, const(3.0)), lambda s, t: s**3),
        ("to the power of itself", lambda s: make("pow", make("abs", s), s), lambda s, t: t.abs(s) ** s),
        ("exponent", lambda s: make("pow", const(0.0), s), lambda s, t: t.zeros_like(s) ** s),
        ("sigmoid", lambda s: make("sigmoid", s), lambda s, t: t.sigmoid(s)),
        ("rsqrt", lambda s: make("rsqrt", make("exp", s)), lambda s, t: t.rsqrt(t.exp(s))),
        ("exp2, log2", lambda s: make("log2", make("add", make("exp2", s), const(1.0))),
         lambda s, t: t.log2(t.exp2(s) + 1)),
        ("sin, cos", lambda s: make("mul", make("sin", s), make("cos", s)), lambda s, t: t.sin(s) * t.cos(s)),
        ("division", lambda s: make("div", s, make("add", make("mul", s, s), const(1.0))),
         lambda s, t: s / (s * s + 1)),
        ("where", lambda s: make("where", make("ge", s, const(0.0)), make("mul", s, s), make("neg", s)),
         lambda s, t: t.where(s >= 0, s * s, -s)),
        ("sqrt of where", lambda s: make("where", make("gt", s, const(0.0)), make("sqrt", make("where",
            make("gt", s, const(0.0)), s, const(1.0))), const(0.0)),
         lambda s, t: t.where(s > 0, t.sqrt(t.where(s > 0, s, 1.0)), 0.0)),
    ],
)  # fmt: skip
def test_as_autograd_does(name: str, make_expr: Callable[[Expr], Expr], in_torch: Callable[..., Any]) -> None:
    torch = pytest.importorskip("torch")
    s = torch.tensor(SCORES, requires_grad=True)
    value = in_torch(s, torch)
    value.sum().backward()
    x = make_expr(SCORE)
    assert evaluate([x], {"score": SCORES}, real=np.float64)[0] == pytest.approx(value.detach().numpy(), nan_ok=True)
    found = evaluate([derivative(x, SCORE)], {"score": SCORES}, real=np.float64)[0]
    np.testing.assert_allclose(np.broadcast_to(found, SCORES.shape), s.grad.numpy(), rtol=1e-12, atol=1e-300)


def test_captured_arrays_as_autograd_does() -> None:
    """score * temperature + slopes[h] * (k - q) + table[q - k + 7] + table[k]: each load node its own gradient."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    slopes, table, temperature = rng.normal(size=4), rng.normal(size=16), np.asarray(rng.normal())
    distance = make("sub", K, Q)
    temp, slope = load(2, "float", ()), load(0, "float", (H,))
    near, far = load(1, "float", (make("add", make("neg", distance), const(7)),)), load(1, "float", (K,))
    x = make("add", make("mul", SCORE, temp), make("add", make("mul", slope, distance), make("mul", near, far)))
    h, q, k = np.ogrid[:4, :8, :8]
    leaves = {"score": rng.normal(size=(4, 8, 8)), "h": h, "q_idx": q, "kv_idx": k}
    by_score, by_load = gradients(x)
    assert set(by_load) == {temp, slope, near, far}
    captured = [torch.tensor(a, requires_grad=True) for a in (slopes, table, temperature)]
    t_slopes, t_table, t_temp = captured
    score = torch.tensor(leaves["score"], requires_grad=True)
    tq, tk, th = torch.tensor(q), torch.tensor(k), torch.tensor(h)
    (score * t_temp + t_slopes[th] * (tk - tq) + t_table[tq - tk + 7] * t_table[tk]).sum().backward()
    sums = [np.zeros_like(a) for a in (slopes, table, temperature)]
    nodes = list(by_load)
    values = evaluate([by_score, *by_load.values()], leaves, (slopes, table, temperature), real=np.float64)
    for node, value in zip(nodes, values[1:], strict=True):
        indices = evaluate(node.args, leaves) if node.args else []
        shape = leaves["score"].shape
        where = tuple(np.broadcast_to(i, shape) for i in indices)
        np.add.at(sums[node.value], where, np.broadcast_to(value, shape)) if where else np.add(
            sums[node.value], np.broadcast_to(value, shape).sum(), out=sums[node.value]
        )
    np.testing.assert_allclose(np.broadcast_to(values[0], score.shape), score.grad.numpy())
    for found, expected in zip(sums, captured, strict=True):
        np.testing.assert_allclose(found, expected.grad.numpy(), rtol=1e-10)


# --- By hand --------------------------------------------------------------------------------------------------------


def test_additive_mods_leave_the_gradient_alone() -> None:
    one = const(1.0)
    alibi = make("sub", SCORE, make("mul", load(0, "float", (H,)), make("abs", make("sub", Q, K))))
    bias = make("add", load(1, "float", (B, H, Q, K)), SCORE)
    for x in (SCORE, alibi, bias, make("sub", SCORE, const(3.0)), make("add", SCORE, make("sub", Q, K))):
        assert derivative(x, SCORE) is one
    assert derivative(make("mul", SCORE, const(0.5)), SCORE) is const(0.5)
    assert derivative(make("sub", const(1.0), SCORE), SCORE) is const(-1.0)
    assert derivative(const(0.0), SCORE) is derivative(make("float", Q), SCORE) is const(0.0)
    masked = make("where", make("ge", Q, K), SCORE, const(-np.inf))
    assert derivative(masked, SCORE) is make("where", make("ge", Q, K), one, const(0.0))
    both = make("where", make("ge", Q, K), SCORE, make("add", SCORE, one))
    assert derivative(both, SCORE) is one


def test_what_where_did_not_take_adds_nothing() -> None:
    """Not even NaN, however deep the condition stands."""
    positive = make("gt", SCORE, const(0.0))
    s = {"score": np.array([-1.0, 0.0, 2.0])}
    for x, expected in (
        (make("where", positive, make("log", SCORE), const(0.0)), [0, 0, 0.5]),
        (make("where", make("not", positive), const(0.0), make("log", SCORE)), [0, 0, 0.5]),
        (make("sqrt", make("where", positive, SCORE, const(0.0))), [0, 0, 0.5 / 2**0.5]),
        (make("where", positive, make("mul", make("log", SCORE), make("log", SCORE)), SCORE), [1, 1, np.log(2)]),
        (make("max", make("where", positive, make("log", SCORE), const(0.0)), const(0.0)), [0, 0, 0.5]),
    ):
        found = evaluate([derivative(x, SCORE)], s, real=np.float64)[0]
        np.testing.assert_allclose(found, expected, err_msg=repr(x))


def test_ints_have_no_derivative() -> None:
    x = make("add", make("float", make("int", SCORE)), make("float", make("lt", SCORE, const(1.0))))
    assert derivative(x, SCORE) is const(0.0)
    assert gradients(load(0, "float", (load(1, "int", (Q,)),)))[1].keys() == {load(0, "float", (load(1, "int", (Q,)),))}


def test_a_dot_of_rows_has_a_gradient_by_the_score_alone() -> None:
    rows = dot(0, (Q,), 1, (K,))
    x = make("mul", SCORE, rows)
    assert gradients(x, arrays=()) == (rows, {})
    for arrays in (None, (1,), (0, 2)):
        with pytest.raises(UnsupportedError, match="dot"):
            gradients(x, arrays)
    by_other = make("add", x, load(2, "float", (H,)))
    assert gradients(by_other, arrays=(2,))[1] == {load(2, "float", (H,)): const(1.0)}
    assert derivative(x, rows) is SCORE
