"""Mods against their traces: the expression says what the Python function computes, and a warm call sees what changed."""

from __future__ import annotations

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
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from cuflash.errors import ArgumentError, TraceError
from cuflash.trace import tracer
from cuflash.trace.emit_numpy import evaluate
from cuflash.trace.expr import show
from cuflash.trace.tracer import Bound, Mod, bind, is_array, mod, static

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


def from_default(b: Any, h: Any, q: Any, k: Any, table: Any = ids(KV_LEN), *, limit: int = 2) -> Any:
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
        "ints as a mask": lambda b, h, q, k: (q >= k) * 1,
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
        "dictionary": lambda b, h, q, k: (q - k < config["window"]) & config["masks"][0](b, h, q, k) & ("x" not in config),
        "list of arrays": lambda b, h, q, k: rows[0][k] == rows[-1][q],
        "list by a captured int": lambda b, h, q, k: rows[window - 1][k] == 1,
        "all of a list": lambda b, h, q, k: functools.reduce(operator.or_, [row[k] == 2 for row in rows]),
        "named tuple": lambda b, h, q, k: (q - k <= pair.left) & (k - q <= pair[1]),
        "NumPy numbers": lambda b, h, q, k: (q - k < numbers) & np.bool_(True),
        "float bound": lambda b, h, q, k: k / 2 < limit,
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
        "logical": lambda b, h, q, k: torch.logical_or(torch.logical_and(q > k, k < 4), torch.logical_xor(q < 2, k > 5)),
        "bitwise": lambda b, h, q, k: torch.bitwise_and(q, 3).bitwise_xor(torch.bitwise_or(k, 1)) > (~k & q),
        "shifts": lambda b, h, q, k: torch.bitwise_left_shift(q, 1) > torch.bitwise_right_shift(k * 4, 1),
        "division": lambda b, h, q, k: torch.div(q - k, width, rounding_mode="floor")
        > torch.div(k - q, 2, rounding_mode="trunc") + torch.floor_divide(q, 2) + torch.remainder(k - q, 3) - torch.fmod(q - k, 3),
        "comparisons": lambda b, h, q, k: torch.eq(q, k) | torch.ne(q, 1) & torch.lt(q, k) | torch.ge(k, 6) ^ torch.gt(q, 3),
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
            + torch.special.expit(s)
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
