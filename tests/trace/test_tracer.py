"""Mods against their traces: an expression says what the Python function computes, and a warm call sees changes."""

from __future__ import annotations

import collections
import enum
import functools
import gc
import math
import operator
import threading
import types
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from cuflash.errors import ArgumentError, TraceError
from cuflash.trace import tracer
from cuflash.trace.capture import is_array
from cuflash.trace.emit_numpy import evaluate
from cuflash.trace.expr import show
from cuflash.trace.tracer import Bound, Mod, bind, mod, static

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")

BATCH, HEADS, Q_LEN, KV_LEN = 2, 3, 5, 7
GRID = np.ogrid[:BATCH, :HEADS, :Q_LEN, :KV_LEN]
SCORES = np.random.default_rng(1).normal(size=(BATCH, HEADS, Q_LEN, KV_LEN)).astype(np.float32) * 3
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def ids(*shape: int, high: int = 3, dtype: Any = np.int32) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(dtype)


def values(bound: Bound, kind: str, real: Any = np.float32) -> np.ndarray:
    """What the traced expression gives over the whole grid."""
    b, h, q, k = (x.astype(np.int32) for x in GRID)
    leaves = {"score": SCORES, "b": b, "h": h, "q_idx": q, "kv_idx": k}
    leaves |= {"q_len": np.int32(Q_LEN), "kv_len": np.int32(KV_LEN)}
    root = bound.mods.score if kind == "score" else bound.mods.mask
    assert root is not None
    arrays = [np.asarray(a.detach() if hasattr(a, "detach") else a) for a in bound.arrays]
    (found,) = evaluate([root], leaves, arrays, bound.scalars, real)
    return np.broadcast_to(found, SCORES.shape)


def directly(function: Callable[..., Any], kind: str, number: Callable[[Any], Any] = lambda x: x) -> np.ndarray:
    """What the Python function gives, called once for every element."""
    found = np.empty(SCORES.shape, np.float32 if kind == "score" else np.bool_)
    for place in np.ndindex(found.shape):
        args = [number(np.int32(i)) for i in place]
        if kind == "score":
            args.insert(0, number(SCORES[place]))
        with np.errstate(all="ignore"):
            found[place] = np.asarray(function(*args))
    return found


def one(function: Callable[..., Any], kind: str) -> Bound:
    return bind(function) if kind == "score" else bind(None, function)


def agrees(function: Callable[..., Any], kind: str, number: Callable[[Any], Any] = lambda x: x) -> Bound:
    bound = one(function, kind)
    found, wanted = values(bound, kind), directly(function, kind, number)
    if kind == "mask":
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    return bound


# --- Mods, operator- and NumPy-written --------------------------------------------------------------------------------

BIAS = f32(Q_LEN, KV_LEN)
WINDOW = 3


@dataclass
class Settings:
    window: int = 2
    scale: float = 0.5
    table: Any = None

    def inside(self, q: Any, k: Any) -> Any:
        return q - k <= self.window


class Relative:
    """A callable object with a method, a class attribute and a property."""

    offset = 6

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @property
    def half(self) -> float:
        return 0.5

    def place(self, q: Any, k: Any) -> Any:
        return q - k + self.offset

    def __call__(self, score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + self.half * self.table[h, self.place(q, k)]

    def mask(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.table[h][self.place(q, k)] > 0


class Colour(enum.Enum):
    RED = 1


def helper(q: Any, k: Any, width: int) -> Any:
    return q // width == k // width


def both(*masks: Any) -> Any:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        result = True
        for inner in masks:
            result = result & inner(b, h, q, k)
        return result

    return mask


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


DOCUMENTS = ids(KV_LEN)


def from_default(b: Any, h: Any, q: Any, k: Any, table: Any = DOCUMENTS, *, limit: int = 2) -> Any:
    return table[k] < limit


def mask_mods() -> dict[str, Callable[..., Any]]:
    documents, offsets, prefix = ids(KV_LEN), np.array([1, 0, 2], np.int64), np.array([2, 4], np.int32)
    spans = np.array([[0, 3], [2, 6], [1, 5]], np.int32)
    flags, cube = ids(Q_LEN, KV_LEN, high=2, dtype=np.bool_), ids(BATCH, HEADS, KV_LEN, high=9, dtype=np.uint8)
    window, width, limit, settings, config = 2, 3, 1.5, Settings(table=documents), {"window": 2, "masks": [causal]}
    total, rows = np.array(3, np.int32), [documents, documents[::-1].copy()]
    Pair = namedtuple("Pair", "left right")
    pair, numbers, colour, name = Pair(1, 2), np.int64(2), Colour.RED, "causal"
    relative = Relative(f32(HEADS, 13))

    def inner_functions(b: Any, h: Any, q: Any, k: Any) -> Any:
        def near(x: Any) -> Any:
            return abs(x) <= window

        return near(q - k) | (lambda x: x == 0)(k)

    def loops(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = q < 0
        for i in range(width):
            found = found | (q - k == i)
        return found

    def branches(b: Any, h: Any, q: Any, k: Any) -> Any:
        if colour is Colour.RED and name == "causal" and width > 2:
            return q >= k
        return q < k

    def imports(b: Any, h: Any, q: Any, k: Any) -> Any:
        import math as m

        from numpy import maximum

        return maximum(q, m.floor(limit)) >= k

    def stars(b: Any, h: Any, *positions: Any) -> Any:
        q, k = positions
        return q >= k

    return {
        "causal": causal,
        "window": lambda b, h, q, k: (q >= k) & (q - k < window),
        "global number": lambda b, h, q, k: q - k < WINDOW,
        "xor and not": lambda b, h, q, k: ~(q >= k) ^ (k == 0),
        "dilated": lambda b, h, q, k: (np.abs(q - k) <= 4) & ((q - k) % width == 0),
        "negative modulo": lambda b, h, q, k: (k - q) % -3 == (q - 2 * k) % 4,
        "floor division": lambda b, h, q, k: (q - k) // 2 != (k - q) // -3,
        "reflected": lambda b, h, q, k: (7 // (k + 1) + 7 % (q + 1) - (5 - q)) & (1 << k) | 2 ^ q > 3,
        "shifts": lambda b, h, q, k: ((k << 2) >> 1) & 4 == 4,
        "powers": lambda b, h, q, k: q**2 + k**3 > 2**k,
        "divmod": lambda b, h, q, k: divmod(q, 2)[0] == divmod(k, 2)[1],
        "prefix": lambda b, h, q, k: (k < prefix[b]) | (q >= k),
        "0-d array": lambda b, h, q, k: (k < total) | (k == total[()]) & (total + 1 > q),
        "documents": lambda b, h, q, k: documents[q] == documents[k],
        "index by an indexed value": lambda b, h, q, k: q - offsets[documents[q]] >= k - offsets[documents[k]],
        "row, then element": lambda b, h, q, k: (spans[documents[k]][0] <= q) & (q < spans[documents[k], 1]),
        "unpacked row": lambda b, h, q, k: operator.and_(*(lambda lo, hi: (lo <= q, q < hi))(*spans[h])),
        "bool array": lambda b, h, q, k: flags[q][k] & ~flags[q, k - 0],
        "uint8 of three axes": lambda b, h, q, k: cube[b][h, k] > cube[b, h, 0],
        "negative constant": lambda b, h, q, k: documents[-1] == documents[k],
        "trailing ellipsis": lambda b, h, q, k: flags[q, ...][k],
        "shape": lambda b, h, q, k: k < documents.shape[0] // 2 + len(spans) - 2,
        "where": lambda b, h, q, k: np.where(q > k, k < 2, q < 3),
        "min and max": lambda b, h, q, k: min(q, 3) > max(k, 2, 1) - 1,
        "minimum, maximum, clip": lambda b, h, q, k: np.minimum(q, 3) + np.maximum(k, 2) > np.clip(q + k, 2, 5),
        "logical": lambda b, h, q, k: np.logical_or(np.logical_and(q > k, k), np.logical_not(np.logical_xor(q, k))),
        "ufuncs": lambda b, h, q, k: np.greater_equal(np.subtract(q, k), np.bitwise_and(q, 3)),
        "an int that is compared": lambda b, h, q, k: (q >= k) * 1 != 0,
        "astype": lambda b, h, q, k: (q / 2).astype(np.int32) == (k.astype(np.float32) / 2).astype("int64"),
        "narrow ints wrap": lambda b, h, q, k: (k * 50).astype(np.int8) < (k * 100 + q).astype(np.uint8),
        "helper": lambda b, h, q, k: helper(q, k, width),
        "inner functions": inner_functions,
        "loops": loops,
        "branches": branches,
        "stars": stars,
        "default and keyword default": from_default,
        "partial": functools.partial(from_default, limit=1),
        "partial of another": functools.partial(lambda lim, b, h, q, k: k < lim, 4),
        "nested": both(causal, both(lambda b, h, q, k: q - k < window, lambda b, h, q, k: k != 1)),
        "nested Mod": both(mod(causal), mod(lambda b, h, q, k: q - k < window)),
        "object": lambda b, h, q, k: settings.inside(q, k) & (settings.table[k] == 1),
        "bound method": relative.mask,
        "dictionary": lambda b, h, q, k: (q - k < config["window"]) & config["masks"][0](b, h, q, k),
        "key in a dictionary": lambda b, h, q, k: q >= k if "x" not in config and "window" in config else q < k,
        "list of arrays": lambda b, h, q, k: rows[0][k] == rows[-1][q],
        "list by a captured int": lambda b, h, q, k: rows[window - 1][k] == 1,
        "all of a list": lambda b, h, q, k: functools.reduce(operator.or_, [row[k] == 2 for row in rows]),
        "named tuple": lambda b, h, q, k: (q - k <= pair.left) & (k - q <= pair[1]),
        "NumPy numbers": lambda b, h, q, k: (q - k < numbers) & np.bool_(True),
        "float bound": lambda b, h, q, k: k / 2 < limit,
        "imports inside": imports,
        "math of captured numbers": lambda b, h, q, k: k < math.floor(limit * 2) + math.isqrt(width),
        "constant": lambda b, h, q, k: True,
        "isinstance": lambda b, h, q, k: q - k < (window if isinstance(window, int) else 9),
    }  # fmt: skip


def score_mods() -> dict[str, Callable[..., Any]]:
    slopes, bias, temperature = f32(HEADS), f32(HEADS, Q_LEN, KV_LEN), np.array(1.5, np.float32)
    left, right = f32(BATCH, HEADS, Q_LEN, 8), f32(BATCH, KV_LEN, 8)
    cap, heads, half = 30.0, 4, f32(HEADS).astype(np.float16)
    relative = Relative(f32(HEADS, 13))

    def in_steps(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        score += slopes[h] * (k - q)
        score -= 1
        score *= 0.5
        return score

    def prints(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        print(f"{score} at {q}, {k:>3}", slopes, slopes[h])
        return score

    return {
        "noop": lambda s, b, h, q, k: s,
        "relative": lambda s, b, h, q, k: s + (q - k),
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "alibi computed": lambda s, b, h, q, k: s + (k - q) * np.exp2(-((h + 1) * 8.0 / heads)),
        "softcap": lambda s, b, h, q, k: cap * np.tanh(s / cap),
        "bias": lambda s, b, h, q, k: s + bias[h, q, k],
        "bias by rows": lambda s, b, h, q, k: s + BIAS[q][k],
        "temperature": lambda s, b, h, q, k: s * temperature + temperature[()],
        "temperature inverse": lambda s, b, h, q, k: s / temperature.item(),
        "half": lambda s, b, h, q, k: s + half[h].astype(np.float32),
        "causal as a score": lambda s, b, h, q, k: np.where(q >= k, s, -float("inf")),
        "mask as a number": lambda s, b, h, q, k: s * (q >= k) + (q < k) * -1e4,
        "dot": lambda s, b, h, q, k: s + np.dot(left[b, h, q], right[b, k]),
        "dot by sum": lambda s, b, h, q, k: s + (left[b][h, q] * right[b, k]).sum(-1),
        "dot by np.sum": lambda s, b, h, q, k: s + np.sum(left[b, h, q] * right[b, k], axis=-1),
        "dot by @": lambda s, b, h, q, k: s + 0.5 * (left[b, h, q] @ right[b][k]),
        "functions": lambda s, b, h, q, k: (
            np.exp(-np.abs(s)) + np.log(1 + np.square(s)) + np.sqrt(np.abs(s)) + np.sin(s) * np.cos(q) + np.floor(s)
            + np.ceil(s) * np.log2(k + 1.0) + np.rint(s) - np.trunc(s) + np.sign(s) + np.reciprocal(k + 1.0)
        ),
        "round": lambda s, b, h, q, k: round(s) + np.round(q / 2) + abs(-s) + (+s),
        "remainders": lambda s, b, h, q, k: s % 0.7 + (-s) // 0.3 + np.fmod(s, 1.5) + np.fmod(q - k, 3) + (q - k) % 2.5,
        "powers": lambda s, b, h, q, k: s**2 + (q + 1) ** 0.5 + 2.0 ** (q - k) + np.power(s, 3),
        "select": lambda s, b, h, q, k: np.select([q > k, q == k], [s, s * 2.0], 0.0),
        "not a number": lambda s, b, h, q, k: np.where(np.isnan(s) | np.isinf(s) | ~np.isfinite(s), 0.0, s),
        "likes": lambda s, b, h, q, k: s + np.zeros_like(s) - np.ones_like(q) + np.full_like(s, 2),
        "in steps": in_steps,
        "prints": prints,
        "object": relative,
        "lambda default": lambda s, b, h, q, k, t=slopes: s + t[h],
        "math.inf": lambda s, b, h, q, k: np.where(q >= k, s, -math.inf),
        "rounded up": lambda s, b, h, q, k: s + math.floor(q / 2) + math.ceil(k / 2) + math.tanh(s),
    }  # fmt: skip


@pytest.mark.parametrize("name", mask_mods())
def test_a_mask_is_what_the_function_says(name: str) -> None:
    agrees(mask_mods()[name], "mask")


@pytest.mark.parametrize("name", score_mods())
def test_a_score_is_what_the_function_says(name: str) -> None:
    agrees(score_mods()[name], "score")


def test_lengths_are_given_to_who_names_them() -> None:
    aligned = bind(None, lambda b, h, q, k, q_len, kv_len: k <= q + kv_len - q_len)
    np.testing.assert_array_equal(values(aligned, "mask"), np.broadcast_to(GRID[3] <= GRID[2] + 2, SCORES.shape))
    one_of_them = bind(lambda s, b, h, q, k, *, kv_len=None: s / kv_len)
    np.testing.assert_allclose(values(one_of_them, "score"), SCORES / KV_LEN, rtol=1e-6)


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_masks(torch: Any) -> dict[str, Callable[..., Any]]:
    from torch.nn.attention import flex_attention as flex

    documents = torch.from_numpy(ids(KV_LEN, dtype=np.int64))
    window, width = 2, 3

    return {
        "noop": flex.noop_mask,
        "and_masks": flex.and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < window, flex.noop_mask),
        "or_masks": flex.or_masks(lambda b, h, q, k: q < k, lambda b, h, q, k: documents[k] == 1),
        "documents": lambda b, h, q, k: documents[q] == documents[k],
        "methods": lambda b, h, q, k: (q - k).abs().clamp(1, 3).le(2).logical_and(q.ge(k)).logical_not(),
        "clamped": lambda b, h, q, k: torch.clamp(q, min=1) - torch.clamp(k, 0, max=window) >= 0,
        "logical": lambda b, h, q, k: torch.logical_or(torch.logical_and(q > k, k < 4), torch.logical_xor(q, k > 5)),
        "bitwise": lambda b, h, q, k: torch.bitwise_and(q, 3).bitwise_xor(torch.bitwise_or(k, 1)) > (~k & q),
        "shifts": lambda b, h, q, k: torch.bitwise_left_shift(q, 1) > torch.bitwise_right_shift(k * 4, 1),
        "division": lambda b, h, q, k: torch.div(q - k, width, rounding_mode="floor")
        > torch.div(k - q, 2, rounding_mode="trunc") + torch.floor_divide(q, 2),
        "remainders": lambda b, h, q, k: torch.remainder(k - q, 3) > torch.fmod(q - k, 3),
        "comparisons": lambda b, h, q, k: torch.eq(q, k) | torch.ne(q, 1) & torch.lt(q, k) ^ torch.gt(q, 3),
        "minimum": lambda b, h, q, k: torch.minimum(q, k) >= torch.max(q, torch.min(k, q)) - 1,
        "casts": lambda b, h, q, k: (q.float() / 2).to(torch.int32) == k.long().int().type_as(q).bool().to(torch.int64),
        "made inside": lambda b, h, q, k: torch.where(q > k, torch.tensor(True), torch.zeros_like(q, dtype=torch.bool)),
        "of a captured number": lambda b, h, q, k: torch.tensor(window) > q - k,
        "new ones": lambda b, h, q, k: q.new_ones((), dtype=torch.bool) & (k < torch.full((), 3)),
    }  # fmt: skip


def torch_scores(torch: Any) -> dict[str, Callable[..., Any]]:
    slopes, bias = torch.from_numpy(f32(HEADS)), torch.from_numpy(f32(HEADS, Q_LEN, KV_LEN))
    left, right, t = torch.from_numpy(f32(Q_LEN, 8)), torch.from_numpy(f32(KV_LEN, 8)), torch.tensor(1.25)
    cap, parameter = 20, torch.nn.Parameter(torch.from_numpy(f32(HEADS)))

    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(bias.clone())
            self.tables = torch.nn.ParameterList([slopes.clone(), slopes * 2])
            self.linear = torch.nn.Linear(4, HEADS)

        def forward(self, score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return score + self.bias[h, q, k] * self.tables[1][h] + self.linear.bias[h]

    learned = Learned()
    return {
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "parameter": lambda s, b, h, q, k: s * parameter[h],
        "alibi computed": lambda s, b, h, q, k: s + (k - q) * torch.exp2(-((h + 1) * 8.0 / cap)),
        "softcap": lambda s, b, h, q, k: cap * torch.tanh(s / cap),
        "bias": lambda s, b, h, q, k: s + bias[h][q][k],
        "0-d tensor": lambda s, b, h, q, k: s * t + t,
        "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
        "causal by a constant tensor": lambda s, b, h, q, k: torch.where(q < k, torch.tensor(-1e4, dtype=s.dtype), s),
        "masked_fill": lambda s, b, h, q, k: s.masked_fill(q < k, -100.0) + torch.full_like(s, cap),
        "where, method": lambda s, b, h, q, k: s.where(q >= k, torch.zeros_like(s)),
        "dot": lambda s, b, h, q, k: s + torch.dot(left[q], right[k]),
        "dot by sum": lambda s, b, h, q, k: s + (left[q] * right[k]).sum(-1),
        "dot by torch.sum": lambda s, b, h, q, k: s + torch.sum(left[q] * right[k], dim=-1),
        "dot by @": lambda s, b, h, q, k: s + left[q] @ right[k] + torch.matmul(left[q], right[k]),
        "functions": lambda s, b, h, q, k: (
            torch.sigmoid(s) + s.exp().log() + torch.sqrt(s.abs() + 1) + torch.rsqrt(1 + s.square()) + torch.relu(s)
            + torch.floor(s) + s.ceil() + torch.round(s) + torch.trunc(s) + torch.sign(s) + torch.neg(s) + s.pow(2)
            + torch.rsub(s, 1) + torch.add(s, q, alpha=2) + torch.pow(2.0, q - k) + torch.nn.functional.relu(-s)
            + torch.special.expit(s) + torch.nn.functional.silu(s) + torch.nn.functional.softplus(s * 9)
            + torch.nn.functional.logsigmoid(s * 9) + torch.lerp(s, -s, 0.25) + torch.hypot(s, s + 1)
        ),
        "module": learned,
        "method of a module": learned.forward,
        "python numbers": lambda s, b, h, q, k: s + 1.0 / math.sqrt(cap),
    }  # fmt: skip


def as_torch(x: Any) -> Any:
    import torch

    return torch.tensor(x)


def _names(table: Callable[..., Any]) -> list[str]:
    if find_spec("torch") is None:
        return ["any"]
    import torch

    return list(table(torch))


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _names(torch_masks))
def test_a_mask_written_for_torch(name: str) -> None:
    import torch

    agrees(torch_masks(torch)[name], "mask", as_torch)


@needs_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _names(torch_scores))
def test_a_score_written_for_torch(name: str) -> None:
    import torch

    with torch.no_grad():
        agrees(torch_scores(torch)[name], "score", as_torch)


# --- Programs by chance -----------------------------------------------------------------------------------------------

INTEGER = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.and_, operator.or_,
           operator.xor, np.minimum, np.maximum, lambda a, b: a << (b & 7), lambda a, b: a >> (b & 7))  # fmt: skip
COMPARE = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)


def program(rng: np.random.Generator, depth: int, numbers: list[int]) -> Callable[..., Any]:
    """A function of (q, k) made of operators, captured numbers and constants."""
    kind = rng.integers(0, 8 if depth else 3)
    if kind == 0:
        return lambda q, k: q
    if kind == 1:
        return lambda q, k: k
    if kind == 2:
        number = numbers[rng.integers(len(numbers))]
        return lambda q, k: number
    a, b = program(rng, depth - 1, numbers), program(rng, depth - 1, numbers)
    if kind == 3:
        return lambda q, k: -a(q, k) + ~b(q, k) + abs(a(q, k))
    if kind == 4:
        compare = COMPARE[rng.integers(len(COMPARE))]
        return lambda q, k: np.where(compare(a(q, k), b(q, k)), a(q, k), b(q, k))
    op = INTEGER[rng.integers(len(INTEGER))]
    return lambda q, k: op(a(q, k), b(q, k))


@pytest.mark.parametrize("seed", range(20))
def test_a_program_and_its_trace_give_the_same_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = (x.astype(np.int32) for x in np.ogrid[-9:10, -9:10])
    for _ in range(15):
        inner = program(rng, 4, [np.int32(n) for n in rng.integers(-9, 10, 5)])  # type: ignore[misc]
        with np.errstate(all="ignore"):
            wanted = np.broadcast_to(inner(q, k) % np.int32(7) < 3, (19, 19))
        bound = bind(None, lambda b, h, q, k, inner=inner: inner(q, k) % 7 < 3)
        assert bound.mods.mask is not None
        (found,) = evaluate([bound.mods.mask], {"q_idx": q, "kv_idx": k}, (), bound.scalars)
        np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)


# --- What is captured -------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every trace."""
    found: list[int] = []
    run = tracer.Trace.run
    monkeypatch.setattr(tracer.Trace, "run", lambda self, *mods: found.append(1) or run(self, *mods))
    return found


def make_score(table: Any, scale: Any, shift: Any) -> Callable[..., Any]:
    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score * scale + table[h] - shift

    return score_mod


def test_new_values_are_read_and_never_traced_anew(traces: list[int]) -> None:
    bind(make_score(f32(3), 1.0, 1))
    traces.clear()
    for i in range(1000):
        table = f32(i + 1)
        bound = bind(make_score(table, i / 7, i))
        assert bound.arrays[0] is table and bound.scalars == (i / 7, i)
    assert not traces


def test_a_bool_a_dtype_and_a_rank_are_traced_anew_once(traces: list[int]) -> None:
    def made(flag: Any, table: Any) -> Callable[..., Any]:
        return lambda b, h, q, k: (q >= k) if flag else (table[k] == 1)

    def score(table: Any) -> Callable[..., Any]:
        return lambda s, b, h, q, k: s + table[h]

    for flag in (True, False, True, False):
        bound = bind(None, made(flag, ids(KV_LEN)))
        assert len(bound.arrays) == (not flag)
    assert len(traces) == 2
    for table in (f32(3), f32(3).astype(np.float64), f32(3), ids(3), np.float64(3.0)):
        try:
            kinds = [a.dtype.name for a in bind(score(table)).mods.arrays]
        except TraceError as error:
            assert "h" in str(error) and not isinstance(table, np.ndarray)
        else:
            assert kinds == [table.dtype.name]
    assert len(traces) == 2 + 4


def test_a_closure_cell_bound_to_another_kind_of_value() -> None:
    limit: Any = 3

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < (limit(k) if callable(limit) else limit)

    assert bind(None, mask).scalars == (3,)
    limit = 2.5
    assert bind(None, mask).scalars == (2.5,)
    limit = np.array(2)
    assert bind(None, mask).arrays == (limit,)
    for function in (lambda k: k // 2, lambda k: k * 2):
        limit = function
        agrees(mask, "mask")
    limit = True
    assert show(bind(None, mask).mods.mask) == "((q_idx - kv_idx) < 1)"  # type: ignore[arg-type]


def test_globals_defaults_and_attributes_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_global(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < WINDOW

    monkeypatch.setitem(globals(), "WINDOW", 1)
    assert bind(None, by_global).scalars == (1,)
    monkeypatch.setitem(globals(), "WINDOW", 5)
    assert bind(None, by_global).scalars == (5,)

    def by_default(b: Any, h: Any, q: Any, k: Any, n: Any = 2, *, m: Any = 3) -> Any:
        return q - k < n + m

    assert bind(None, by_default).scalars == (2, 3)
    by_default.__defaults__, by_default.__kwdefaults__ = (4,), {"m": 7}
    assert bind(None, by_default).scalars == (4, 7)

    settings, module = Settings(), types.ModuleType("somewhere")
    module.limit = 3  # type: ignore[attr-defined]
    config = {"deep": [settings]}

    def by_attribute(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k < config["deep"][0].window) & (k < module.limit)

    assert bind(None, by_attribute).scalars == (2, 3)
    config["deep"][0].window, module.limit = 9, 8  # type: ignore[attr-defined]
    assert bind(None, by_attribute).scalars == (9, 8)
    config["deep"] = [Settings(window=np.int64(4))]  # type: ignore[arg-type]
    assert bind(None, by_attribute).scalars == (4, 8)


def test_a_helper_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return helper(q, k, 2)

    agrees(mask, "mask")
    monkeypatch.setitem(globals(), "helper", lambda q, k, width: q % width != k)
    agrees(mask, "mask")


def test_an_attribute_that_appears() -> None:
    settings = types.SimpleNamespace()
    mask = lambda b, h, q, k: q - k < getattr(settings, "window", 1)  # noqa: E731
    assert bind(None, mask).scalars == ()
    settings.window = 6
    assert bind(None, mask).scalars == (6,)


def test_lists_and_dictionaries_that_grow() -> None:
    masks, limits = [causal], {"a": 1}
    every = lambda b, h, q, k: functools.reduce(operator.and_, [m(b, h, q, k) for m in masks])  # noqa: E731
    sums = lambda b, h, q, k: k < sum(limits[name] for name in limits)  # noqa: E731
    agrees(every, "mask")
    assert bind(None, sums).scalars == (1,)
    masks.append(lambda b, h, q, k: k != 2)
    limits["b"] = 4
    agrees(every, "mask")
    assert bind(None, sums).scalars == (1, 4)


def test_containers_of_any_kind_are_read_again() -> None:
    class Config(dict):
        __getattr__ = dict.__getitem__

    queue, config = collections.deque([1, 2]), Config(window=3)
    mask = lambda b, h, q, k: (q - k < config.window) & (k < sum(queue))  # noqa: E731
    assert sorted(bind(None, mask).scalars) == [1, 2, 3]
    queue.append(5)
    config["window"] = 4
    assert sorted(bind(None, mask).scalars) == [1, 2, 4, 5]


def test_the_same_array_has_one_slot() -> None:
    table, other = f32(HEADS), f32(HEADS)
    score = lambda s, b, h, q, k: s + table[h] + other[h]  # noqa: E731
    mask = lambda b, h, q, k: table[h] > 0  # noqa: E731
    bound = bind(score, mask)
    assert [a is b for a, b in zip(bound.arrays, (table, other), strict=True)] == [True, True]
    assert [a.name for a in bound.mods.arrays] == ["table", "other"]
    other = table
    shared = bind(score, mask)
    assert len(shared.arrays) == 1 and shared.arrays[0] is table
    other = f32(HEADS)
    assert bind(score, mask).mods == bound.mods


def test_equal_structures_are_equal_whatever_they_were_made_of() -> None:
    one_way, another = make_score(f32(3), 1.0, 2), make_score(f32(5), 7.0, 3)
    assert bind(one_way).mods == bind(another).mods
    assert hash(bind(one_way).mods) == hash(bind(another).mods)
    unused = lambda s, b, h, q, k, big=2**40, extra=BIAS: s + 0 * q  # noqa: E731
    assert bind(unused).arrays == () and bind(unused).scalars == ()


def test_what_python_needs_is_a_constant_and_explained(traces: list[int]) -> None:
    def made(n: Any, kind: str) -> Callable[..., Any]:
        def in_range(b: Any, h: Any, q: Any, k: Any) -> Any:
            return functools.reduce(operator.or_, [q - k == i for i in range(n)])

        table = {2: 5, 3: 6}
        return {
            "range": in_range,
            "if": lambda b, h, q, k: (q >= k) if n == 2 else (q > k),
            "key": lambda b, h, q, k: k < table[n],
            "floor": lambda b, h, q, k: k < math.floor(n / 2) + n,
            "index": lambda b, h, q, k: k < (4, 5, 6, 7)[n],
            "float": lambda b, h, q, k: k < math.sqrt(n) * float(n),
        }[kind]

    for kind in ("range", "if", "key", "floor", "index", "float"):
        for n in (2, 3, 2):
            bound = agrees(made(n, kind), "mask")
            assert any(note.startswith(f"n = {n} is a constant of the kernel") for note in bound.notes)
            assert not any(number.name == "n" for number in bound.mods.scalars)
        assert len(traces) == 2, kind
        traces.clear()


def test_static_is_the_number_and_a_constant(traces: list[int]) -> None:
    def made(width: Any, scale: Any) -> Callable[..., Any]:
        return lambda s, b, h, q, k: s * scale + q // width

    for width, scale in ((static(4), static(0.5)), (static(8), static(0.5)), (static(4), static(np.float32(0.5)))):
        bound = agrees(made(width, scale), "score")
        assert bound.scalars == ()
    assert len(traces) == 2
    assert static(3) + 1 == 4 and static((2, 3)) == (2, 3) and static(True) is True and static("x") == "x"
    with pytest.raises(ArgumentError, match=r"static takes numbers.*got a ndarray.*given at run time"):
        static(np.ones(3))


def test_top_left_alignment_is_pointed_out() -> None:
    (note,) = bind(None, causal).notes
    assert "q_len and kv_len differ" in note and "FlexAttention" in note
    assert not bind(None, lambda b, h, q, k, q_len, kv_len: k <= q + kv_len - q_len).notes
    assert not bind(None, lambda b, h, q, k: k < 3).notes


def test_score_and_mask_together() -> None:
    table = ids(KV_LEN)
    bound = bind(make_score(f32(HEADS), 2.0, 1), lambda b, h, q, k: table[q] == table[k])
    assert [a.name for a in bound.mods.arrays] == ["table", "table"]
    assert values(bound, "score").shape == values(bound, "mask").shape
    assert bind(None, None) == Bound(bind().mods) and bind().mods.score is None


# --- Mod --------------------------------------------------------------------------------------------------------------


def test_a_mod_is_callable_shows_itself_and_lists_what_it_captures() -> None:
    table = f32(HEADS)
    made = mod(make_score(table, 0.5, 1))
    assert isinstance(made, Mod) and made.kind == "score" and made.__name__ == "score_mod"
    assert repr(made) == (
        "<score_mod score_mod(score, b, h, q_idx, kv_idx) = (((score * scale) + table[h]) - float(shift))>"
    )
    assert made.arrays[0] is table and made.scalars == (0.5, 1)
    assert made(np.float32(1), 0, 1, 2, 3) == np.float32(0.5) + table[1] - 1
    assert made.bind() == bind(made) == bind(made.function)
    mask = mod(lambda b, h, q, k: (made(1.0, b, h, q, k) > 0) & (q >= k))
    agrees(mask, "mask")
    assert mod(mod(causal)).function is causal
    assert mod(lambda *args: args[-1] > 2, kind="mask").kind == "mask"
    assert show(made.expr, made.bind().mods.names) in repr(made)


@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        (lambda q, k: q >= k, None, r"takes \(q, k\): a score_mod takes .* kind="),
        (lambda *args: args[0], None, r"takes \(\*args\).*kind="),
        (3, None, r"mod is given a int: pass a score_mod"),
    ],
)
def test_a_mod_of_neither_kind(function: Any, kind: Any, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        mod(function, kind)


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(ArgumentError, match='kind=\'bias\' must be "score" or "mask"'):
        mod(causal, "bias")


# --- Bad input --------------------------------------------------------------------------------------------------------

TABLE = f32(4, 5)
ROW = f32(5)
LISTED = [1, 2, 3, 4, 5, 6, 7]
HUGE = 2**40
COMPLEX = np.ones(3, np.complex64)
INTS = ids(4, 5)


def branching(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q >= k:
        return q > 3
    return k < 2


def assigning(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    global WINDOW
    WINDOW = 4
    return s


def mutating(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    TABLE[h, q] = 0
    return s


def silent(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    s + 1


def endless(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return endless(s, b, h, q, k)


# what -> (mod, what the message must say: what was found, and the remedy, in this order)
BAD_MASKS: dict[str, tuple[Any, str]] = {
    "if": (branching, r"a branch needs the value of \(q_idx >= kv_idx\).*write where"),
    "a if c else b": (lambda b, h, q, k: q if q > k else k, r"a branch needs .*where\(condition, a, b\)"),
    "and": (lambda b, h, q, k: q > k and k > 1, r"a branch needs .*&, \| and ~ instead of `and`"),
    "chained": (lambda b, h, q, k: 0 <= q - k < 3, r"\(a <= b\) & \(b < c\) instead of a <= b < c"),
    "not": (lambda b, h, q, k: not q > k, r"a branch needs .*instead of .*`not`"),
    "an int": (lambda b, h, q, k: (q + k) % 2, r"returns an int, \(\(q_idx \+ kv_idx\) % 2\).*% 2\) != 0"),
    "a number": (lambda b, h, q, k: 1, r"returns an int, 1, .*compare it"),
    "a float": (lambda b, h, q, k: q / 2, r"returns a float, .*mask_mod returns whether .*: compare"),
    "too few parameters": (lambda h, q, k: q >= k, r"it takes \(h, q, k\) and is given \(b, h, q_idx, kv_idx\)"),
    "a score_mod": (lambda s, b, h, q, k: s, r"takes \(s, b, h, q, k\) .*; with 5 it is a score_mod"),
    "names exchanged": (lambda b, h, kv_idx, q_idx: q_idx >= kv_idx, r"'kv_idx' where q_idx is given.*in the order"),
    "unknown keyword": (types.FunctionType((lambda b, h, q, k, *, n: k < n).__code__, {}), r"keyword 'n'.*partial"),
    "not a function": (ids(3), r"is a ndarray: pass a function of \(b, h, q_idx, kv_idx\)"),
    "a tuple": (lambda b, h, q, k: (q, k), r"returns a tuple: return one number"),
    "a string": (lambda b, h, q, k: "yes", r"'yes' \(a str\) is used as a number"),
    "bits of a float": (lambda b, h, q, k: (q / 2) & 1, r"and of a float: compare it first, or cast it to an int"),
    "list by a traced index": (lambda b, h, q, k: LISTED[k] > 2, r"list LISTED is indexed by kv_idx.*make it an array"),
    "an int that is too large": (lambda b, h, q, k: k < HUGE, r"HUGE = 1099511627776 does not fit.*float\(HUGE\)"),
    "a constant that is too large": (lambda b, h, q, k: k & 0xFFFFFFFF == 1, r"4294967295 does not fit 32 bits"),
    "range of a position": (lambda b, h, q, k: sum(range(q)) > k, r"Python needs the value of q_idx.*`range`"),
}  # fmt: skip
BAD_SCORES: dict[str, tuple[Any, str]] = {
    "nothing": (silent, r"returns nothing: is a `return` missing"),
    "a bool": (lambda s, b, h, q, k: q >= k, r"returns a bool, .*return where\(condition, score, -inf\)"),
    "a mask_mod": (causal, r"causal at .*it takes \(b, h, q, k\) .*; with 4 it is a mask_mod"),
    "an axis is left": (lambda s, b, h, q, k: s + TABLE[h], r"TABLE\[h\] still has 1 axes.*TABLE\[b, h\]"),
    "a whole array": (lambda s, b, h, q, k: s * TABLE, r"TABLE still has 2 axes.*index all of them first"),
    "an axis too many": (lambda s, b, h, q, k: s + ROW[h, q], r"ROW has 1 axes .*\(5,\).* 2 indices: leave 1"),
    "element indexed": (lambda s, b, h, q, k: s + ROW[h][q], r"one number and cannot be indexed"),
    "a slice": (lambda s, b, h, q, k: s + TABLE[h, :].sum(), r"a slice as an index of TABLE.*every axis one index"),
    "a slice alone": (lambda s, b, h, q, k: s + ROW[1:][q], r"a slice as an index of ROW"),
    "None": (lambda s, b, h, q, k: s + ROW[None, h], r"None as an index of ROW"),
    "a float index": (lambda s, b, h, q, k: s + ROW[q / 2], r"is a float: make it an int"),
    "a bool index": (lambda s, b, h, q, k: s + ROW[q > k], r"is a bool: write where"),
    "an array index": (lambda s, b, h, q, k: s + ROW[INTS], r"INTS as an index of ROW has 2 axes: index it first"),
    "changes an array": (mutating, r"TABLE is only read by a mod"),
    "changes a global": (assigning, r"assigns to 'WINDOW'.*must not change what it captures"),
    "changes a list": (lambda s, b, h, q, k: LISTED.append(1) or s, r"\.append of LISTED: .*changes nothing"),
    "makes an array": (lambda s, b, h, q, k: s + np.arange(4)[h], r"the value of h, .*index an array that the mod"),
    "reaches an array": (lambda s, b, h, q, k: s + np.arange(4), r"array of shape \(4,\).*make it outside of the mod"),
    "sums a row": (lambda s, b, h, q, k: s + TABLE[h].sum(), r"the sum of TABLE\[h\]: sum it outside"),
    "rows of ints": (lambda s, b, h, q, k: s + INTS[h] @ TABLE[h], r"INTS\[h\] is int32 in a dot product.*cast INTS"),
    "rows of other lengths": (lambda s, b, h, q, k: s + TABLE[h] @ BIAS[h], r"of TABLE, 5 long, and of BIAS, 7 long"),
    "reshapes": (lambda s, b, h, q, k: s + TABLE.reshape(-1)[h], r"\.reshape of TABLE: .*index with \[i, j\]"),
    "transposes": (lambda s, b, h, q, k: s + TABLE.T[h, q], r"\.T of TABLE: exchange the indices"),
    "an unknown function": (lambda s, b, h, q, k: np.cumsum(s), r"cumsum is not a function mods know.*sigmoid"),
    "an unknown ufunc": (lambda s, b, h, q, k: np.arcsinh(s), r"np\.arcsinh is not a function mods know"),
    "an unknown method": (lambda s, b, h, q, k: s.lgamma(), r"\.lgamma of score is nothing a mod can use.*operators"),
    "in place": (lambda s, b, h, q, k: s.clamp_(0), r"\.clamp_\(\) would change its tensor.*use \.clamp\(\)"),
    "out=": (lambda s, b, h, q, k: np.exp(s, out=ROW), r"with out=: a mod changes nothing"),
    "reduces": (lambda s, b, h, q, k: np.add.reduce(s), r"np\.add\.reduce is nothing a mod can do"),
    "float()": (lambda s, b, h, q, k: s + float(q), r"a Python float needs the value of q_idx.*x \* 1\.0"),
    "int()": (lambda s, b, h, q, k: s + int(s), r"int\(\) needs the value of score"),
    "np.array()": (lambda s, b, h, q, k: np.asarray([s])[0], r"an array of traced values|cannot become an array"),
    "complex": (lambda s, b, h, q, k: s + COMPLEX[h], r"captured COMPLEX has dtype complex64: cast it to one of"),
    "where of one": (lambda s, b, h, q, k: np.where(s), r"where with 1 arguments: a mod needs where"),
    "int power": (lambda s, b, h, q, k: s + k**q, r"kv_idx \*\* q_idx of ints: write 1 << n"),
    "digits": (lambda s, b, h, q, k: round(s, 2), r"rounds to whole numbers only"),
    "its own mistake": (lambda s, b, h, q, k: s + undefined, r"NameError: name 'undefined' is not defined"),  # type: ignore[name-defined]  # noqa: F821
    "endless": (endless, r"calls itself without end"),
    "None added": (lambda s, b, h, q, k: s + None, r"TypeError: unsupported operand"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_mask_is_refused_with_the_remedy(name: str) -> None:
    function, says = BAD_MASKS[name]
    with pytest.raises(TraceError, match=f"(?s)^mask_mod .*{says}"):
        bind(None, function)


@pytest.mark.parametrize("name", BAD_SCORES)
def test_a_bad_score_is_refused_with_the_remedy(name: str) -> None:
    function, says = BAD_SCORES[name]
    with pytest.raises(TraceError, match=f"(?s)^score_mod .*{says}"):
        bind(function)


def test_the_line_of_the_mod_is_shown() -> None:
    line = branching.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"(?s)branching at .*test_tracer\.py:{line}: a branch .*\n    if q >= k:$"):
        bind(None, branching)
    with pytest.raises(TraceError, match=rf"(?s)<lambda> at .*test_tracer\.py:{line}: "):  # of the function called
        bind(None, lambda b, h, q, k: branching(b, h, q, k))


def test_a_refused_mod_is_traced_once_it_is_mended() -> None:
    table = TABLE
    mask = lambda b, h, q, k: table[h] > 0  # noqa: E731
    with pytest.raises(TraceError, match="still has 1 axes"):
        bind(None, mask)
    table = ROW
    assert bind(None, mask).arrays[0] is ROW


# --- The cache --------------------------------------------------------------------------------------------------------


def test_the_cache_holds_no_array_and_no_object() -> None:
    class Holder:
        def __init__(self) -> None:
            self.table = np.ones(4, np.float32)

    def call() -> list[weakref.ref]:
        holder, direct = Holder(), np.ones(3, np.float32)
        bind(lambda s, b, h, q, k: s + holder.table[h] * direct[h])
        with pytest.raises(TraceError):
            bind(lambda s, b, h, q, k: s + holder.table)
        return [weakref.ref(holder), weakref.ref(holder.table), weakref.ref(direct)]

    found = call()
    gc.collect()
    assert [ref() for ref in found] == [None, None, None]


def test_many_mods_of_one_code_do_not_push_each_other_out(traces: list[int]) -> None:
    made = [both(*[causal] * i) for i in range(1, 40)]
    for _ in range(3):
        for mask in made:
            bind(None, mask)
    assert len(traces) == 39


def test_threads_bind_what_is_theirs() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(200):
                table = np.full(4, seed, [np.float32, np.float64][i % 2])
                bound = bind(make_score(table, float(seed), static(i % 5)))
                assert bound.arrays[0] is table and bound.scalars == (float(seed),)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_counts_as_an_array() -> None:
    assert is_array(np.zeros(())) and not is_array(np.float32(1)) and not is_array(np.ndarray) and not is_array("x")


# --- Frameworks -------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_wrapped_and_compiled_functions_are_followed() -> None:
    import torch

    table = torch.ones(3)

    class Scaled(torch.nn.Module):
        def forward(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return s * table[h]

    class Shifted(Scaled):
        def forward(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return super().forward(s, b, h, q, k) + 1

    plain = make_score(table, 0.5, 1)
    for function in (torch.no_grad()(plain), torch.compile(plain), torch.compile(Scaled()), Shifted()):
        assert bind(function).arrays[0] is table


@needs_torch
def test_tensors_parameters_and_fake_tensors_are_captured() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    for table in (torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.ones(3, dtype=torch.bfloat16)):
        bound = bind(make_score(table, 1.0, 0))
        assert bound.arrays[0] is table
        assert bound.mods.arrays[0].dtype.name == str(table.dtype).rpartition(".")[2]
    with FakeTensorMode():
        fake = torch.ones(3)
        assert bind(make_score(fake, 1.0, 0)).arrays[0] is fake


@needs_torch
def test_an_approximate_tanh_is_the_hardwares() -> None:
    import torch

    if not hasattr(torch.ops.approx, "tanh"):
        torch.library.define("approx::tanh", "(Tensor x) -> Tensor")

    class Approximate(torch.autograd.Function):
        @staticmethod
        def forward(x: Any) -> Any:
            return torch.ops.approx.tanh(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(output)

    apply, cap = Approximate.apply, 20
    bound = bind(lambda s, b, h, q, k: cap * apply(s / cap))
    assert "tanh_approx" in repr(bound.mods.score)


@needs_jax
def test_jax_arrays_tracers_and_functions() -> None:
    import jax
    import jax.numpy as jnp

    table, window = jnp.arange(3, dtype=jnp.float32), 2
    score = lambda s, b, h, q, k: jnp.where(q - k < window, jnp.tanh(s) + table[h], -jnp.inf)  # noqa: E731
    bound = bind(score)
    assert bound.arrays[0] is table and bound.scalars == (2,)
    np.testing.assert_allclose(
        values(bound, "score"),
        np.where(GRID[2] - GRID[3] < 2, np.tanh(SCORES) + np.asarray(table)[GRID[1]], -np.inf),
        rtol=1e-6,
    )

    def through(x: Any) -> Any:
        assert bind(make_score(x, 1.0, 0)).arrays[0] is x
        return x.sum()

    jax.grad(through)(table)
    jax.jit(through)(table)
    jax.vmap(through)(table[None])


@needs_jax
def test_functions_of_jax_that_mods_do_not_know() -> None:
    import jax
    import jax.numpy as jnp

    with pytest.raises(TraceError, match=r"cumsum is not a function mods know"):
        bind(lambda s, b, h, q, k: jnp.cumsum(s))
    with pytest.raises(TraceError, match=r"This function of JAX takes no symbols: use operators, or np\."):
        bind(lambda s, b, h, q, k: jax.nn.logsumexp(s))
