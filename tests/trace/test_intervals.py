"""What is said of tiles against every element of them: never wrong, and exact where exactness is promised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import expressions
import numpy as np
import pytest
from compiled import Library
from expressions import World

from cuflash.trace.emit_numpy import evaluate
from cuflash.trace.expr import COORDINATES, Expr, Mods, const, coordinate, load, make, scalar
from cuflash.trace.intervals import EMPTY, FULL, MIXED, classify

B, H, Q, K, Q_LEN, KV_LEN = (coordinate(name) for name in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len"))
NAMES = {EMPTY: "EMPTY", MIXED: "MIXED", FULL: "FULL"}
Ends = tuple[np.ndarray, np.ndarray]


def truth(
    mask: Expr, q: Ends, k: Ends, values: dict[str, int], arrays: Sequence[Any], scalars: Sequence[int | float]
) -> np.ndarray:
    """EMPTY, MIXED or FULL of tiles, by counting in the mask over all elements."""
    rows, columns = int(q[1].max()) + 1, int(k[1].max()) + 1
    leaves = values | {"q_idx": np.arange(rows)[:, None], "kv_idx": np.arange(columns)}
    seen = np.broadcast_to(evaluate([mask], leaves, arrays, scalars)[0], (rows, columns))
    sums = np.zeros((rows + 1, columns + 1), np.int64)
    sums[1:, 1:] = seen.cumsum(0).cumsum(1)
    q_end, k_end = q[1] + 1, k[1] + 1
    count = sums[q_end, k_end] - sums[q[0], k_end] - sums[q_end, k[0]] + sums[q[0], k[0]]
    size = (q_end - q[0]) * (k_end - k[0])
    return np.where(count == 0, EMPTY, np.where(count == size, FULL, MIXED))


def tiles(rng: np.random.Generator, count: int, q_len: int, k_len: int) -> tuple[Ends, Ends]:
    """Random ranges: many small, some as large as tiles are."""
    ends = []
    for length in (q_len, k_len):
        size = np.where(rng.random(count) < 0.5, rng.integers(1, 9, count), rng.integers(1, 129, count))
        first = rng.integers(0, length, count)
        ends.append((first, np.minimum(first + size, length) - 1))
    return ends[0], ends[1]


# --- Never wrong ----------------------------------------------------------------------------------------------------


def sweep(seed: int, count: int) -> None:
    rng = expressions.generator(seed)
    claims = 0
    for i in range(count):
        world = World.draw(rng, max_len=150)
        mask = world.expression(rng, "bool", 1 + i % 8, COORDINATES)
        values = {
            "b": int(rng.integers(world.batch)), "h": int(rng.integers(world.heads)),
            "q_len": int(rng.integers(1, 151)), "kv_len": int(rng.integers(1, 151)),
        }  # fmt: skip
        q, k = tiles(rng, 200, values["q_len"], values["kv_len"])
        found = classify(mask, q, k, values, world.arrays, world.scalars)
        expected = truth(mask, q, k, values, world.arrays, world.scalars)
        wrong = (found != MIXED) & (found != expected)
        if wrong.any():
            n = int(np.argmax(wrong))
            raise AssertionError(
                f"{mask} at q {q[0][n]}..{q[1][n]}, k {k[0][n]}..{k[1][n]}, {values}, numbers {world.scalars}: "
                f"{NAMES[int(found[n])]}, not {NAMES[int(expected[n])]}"
            )
        claims += int(((found != MIXED) & (expected != MIXED)).sum())
    assert claims > 20 * count  # something was said


def test_never_wrong() -> None:
    sweep(11, 520)


@pytest.mark.slow
def test_never_wrong_of_many() -> None:
    sweep(12, 10_000)


# --- Exact ----------------------------------------------------------------------------------------------------------


def both(*conditions: Expr) -> Expr:
    mask = conditions[0]
    for c in conditions[1:]:
        mask = make("and", mask, c)
    return mask


def either(*conditions: Expr) -> Expr:
    mask = conditions[0]
    for c in conditions[1:]:
        mask = make("or", mask, c)
    return mask


def plus(a: Expr, b: Expr | int) -> Expr:
    return make("add", a, const(b) if isinstance(b, int) else b)


D = make("sub", Q, K)
CAUSAL = make("ge", Q, K)
BOTTOM_RIGHT = make("ge", plus(Q, make("sub", KV_LEN, Q_LEN)), K)
NUMBER, OTHER = scalar(0, "int"), scalar(1, "int")


def window(left: Any, right: Any = 0) -> Expr:
    left, right = (const(x) if isinstance(x, int) else x for x in (left, right))
    return both(make("le", D, left), make("ge", D, make("neg", right)))


def chunked(c: Any) -> Expr:
    c = const(c) if isinstance(c, int) else c
    return make("eq", make("floordiv", Q, c), make("floordiv", K, c))


def dilated(c: int, reach: int) -> Expr:
    return both(make("eq", make("mod", D, const(c)), const(0)), make("le", make("abs", D), const(reach)))


def natten_2d(width: Any, radius: int, height: int | None = None) -> Expr:
    """Of an image stored row by row: a square around each query; with a height, moved to lie inside of the image."""
    width = const(width) if isinstance(width, int) else width
    ends = []
    for op, extent in (("floordiv", const(height) if height else None), ("mod", width)):
        center, at = make(op, Q, width), make(op, K, width)
        if height:
            last = make("sub", extent, const(1 + radius))
            center = make("min", make("max", center, const(radius)), last)
        ends.append(make("le", make("abs", make("sub", center, at)), const(radius)))
    return both(*ends)


def same_document(inner: Expr | None = None) -> Expr:
    same = make("eq", load(0, "int", (Q,)), load(0, "int", (K,)))
    return same if inner is None else both(same, inner)


PREFIX = either(make("lt", K, load(1, "int", (B,))), CAUSAL)
DOCUMENTS = np.repeat(np.arange(9), [1, 40, 64, 3, 90, 0, 130, 17, 155]).astype(np.int32)
ARRAYS = (DOCUMENTS, np.array([0, 17, 128, 500], np.int64))
FAMILIES: dict[str, Expr] = {
    "causal": CAUSAL,
    "causal, bottom right": BOTTOM_RIGHT,
    "anticausal": make("lt", Q, K),
    "window": window(50, 20),
    "window of a number": both(CAUSAL, make("le", D, NUMBER)),
    "window by abs": make("lt", make("abs", D), const(33)),
    "empty window": window(-30, 20),
    "band and ends": both(CAUSAL, make("le", Q, const(100)), make("ge", K, const(70))),
    "outside of a band and ends": either(make("lt", Q, K), make("gt", Q, const(100)), make("lt", K, NUMBER)),
    "prefix": PREFIX,
    "prefix, negated": make("not", PREFIX),
    "prefix by max": make("lt", K, make("max", plus(Q, 1), load(1, "int", (B,)))),
    "chunked": chunked(48),
    "chunked, causal": both(chunked(48), CAUSAL),
    "chunked by a number": both(chunked(NUMBER), CAUSAL),
    "chunked by shifts": make("eq", make("shr", Q, const(5)), make("shr", K, const(5))),
    "chunked with a window": both(chunked(96), window(40)),
    "dilated": both(dilated(4, 60), CAUSAL),
    "dilated far": dilated(100, 350),
    "dilated far, negated": make("not", dilated(100, 350)),
    "strided": make("eq", make("mod", K, const(40)), const(39)),
    "strided by bits": make("eq", make("and", K, const(31)), const(3)),
    "strided queries of a number": make("lt", make("mod", Q, NUMBER), const(9)),
    "NATTEN 2D": natten_2d(56, 3),
    "NATTEN 2D of a number": natten_2d(NUMBER, 6),
    "NATTEN 2D inside": natten_2d(20, 3, 24),
    "NATTEN 2D, rows of 2": natten_2d(200, 3, 10),
    "documents": same_document(),
    "documents, causal": same_document(CAUSAL),
    "documents, causal window": same_document(window(30)),
    "nothing": const(False),
    "all": const(True),
    "a head": either(make("lt", H, const(2)), CAUSAL),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name: str) -> None:
    mask = FAMILIES[name]
    for q_len, kv_len in ((1, 1), (77, 77), (64, 480), (333, 150), (500, 500)):
        for number in (1, 37, 1000):
            values = {"b": q_len % 4, "h": q_len % 3, "q_len": q_len, "kv_len": kv_len}
            for rows, columns in ((16, 16), (64, 64), (128, 64), (128, 128), (32, 96), (1, 64)):
                starts = [np.arange(0, length, size) for length, size in ((q_len, rows), (kv_len, columns))]
                q = (starts[0][:, None], np.minimum(starts[0] + rows, q_len)[:, None] - 1)
                k = (starts[1], np.minimum(starts[1] + columns, kv_len) - 1)
                found = classify(mask, q, k, values, ARRAYS, (number, -7))
                expected = truth(mask, q, k, values, ARRAYS, (number, -7))
                assert found.shape == expected.shape
                if (found != expected).any():
                    i, j = np.argwhere(found != expected)[0]
                    pytest.fail(
                        f"{mask}, {values}, number {number}, q {q[0][i, 0]}..{q[1][i, 0]}, k {k[0][j]}..{k[1][j]}: "
                        f"{NAMES[found[i, j]]}, not {NAMES[expected[i, j]]}"
                    )
            if "number0" not in repr(mask):
                break


# --- C --------------------------------------------------------------------------------------------------------------


def compare_with_text(seed: int, count: int) -> None:
    """The text says what NumPy says, tile by tile, for random masks and for the families."""
    rng = expressions.generator(seed)
    worlds = [World.draw(rng, max_len=150) for _ in range(4)]
    masks = [worlds[0].expression(rng, "bool", 1 + i % 8, COORDINATES) for i in range(count)]
    slots = worlds[0].array_slots, worlds[0].scalar_slots
    families = [World(ARRAYS, (number, -7), 4, 3, 500) for number in (1, 37, 1000)]
    of_family = families[0].array_slots, families[0].scalar_slots
    mods = [Mods(None, mask, *slots) for mask in masks]
    mods += [Mods(None, mask, *of_family) for mask in FAMILIES.values()]
    library = Library(mods, ["classify"])
    for i, m in enumerate(mods):
        for world in worlds[i % 4 : i % 4 + 1] if i < count else families:
            values = {
                "b": int(rng.integers(world.batch)), "h": int(rng.integers(world.heads)),
                "q_len": int(rng.integers(1, world.max_len + 1)), "kv_len": int(rng.integers(1, world.max_len + 1)),
            }  # fmt: skip
            q, k = tiles(rng, 200, values["q_len"], values["kv_len"])
            assert m.mask is not None
            expected = classify(m.mask, q, k, values, world.arrays, world.scalars)
            np.testing.assert_array_equal(library.classify(i, world, values, q, k), expected, err_msg=repr(m.mask))


def test_c_says_what_numpy_says() -> None:
    compare_with_text(13, 100)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_c_says_what_numpy_says_of_many(part: int) -> None:
    compare_with_text(14 + part, 600)


# --- By hand --------------------------------------------------------------------------------------------------------


def one(mask: Expr, q: tuple[int, int], k: tuple[int, int], *captured: Any, **values: int) -> str:
    arrays = [np.asarray(a) for a in captured if not isinstance(a, int | float)]
    return NAMES[int(classify(mask, q, k, values, arrays, [a for a in captured if isinstance(a, int | float)]))]


def test_what_may_wrap_is_not_known() -> None:
    far = make("lt", plus(Q, NUMBER), K)  # q_idx + 2^31 - 1 is negative but for q_idx 0
    assert one(far, (0, 0), (64, 127), 2**31 - 1) == "EMPTY"
    assert one(far, (0, 63), (64, 127), 2**31 - 1) == "MIXED"
    assert one(far, (1, 63), (64, 127), 2**31 - 1) == "MIXED"
    assert one(make("ge", make("abs", NUMBER), const(0)), (0, 1), (0, 1), -(2**31)) == "EMPTY"
    # What comes back into 32 bits is what it is.
    assert one(make("lt", make("sub", plus(Q, NUMBER), NUMBER), K), (0, 63), (64, 127), 2**31 - 1) == "FULL"


def test_divisors_of_any_sign() -> None:
    for c, said in ((16, "FULL"), (0, "MIXED"), (-16, "MIXED")):
        assert one(chunked(NUMBER), (32, 40), (33, 41), c) == said


def test_floats_are_known_as_far_as_ints_are() -> None:
    slope = load(0, "float", (H,))
    near = make("lt", make("mul", slope, make("abs", D)), const(4.0))
    slopes = np.array([0.5, 0.25, np.nan, np.inf], np.float32)
    assert one(near, (0, 3), (0, 3), slopes, h=0) == "FULL"
    assert one(near, (0, 15), (64, 79), slopes, h=0) == "EMPTY"
    assert one(near, (0, 15), (16, 31), slopes, h=1) == "MIXED"
    assert one(near, (0, 3), (0, 3), slopes, h=2) == one(near, (64, 65), (0, 3), slopes, h=3) == "MIXED"
    chosen = make("gt", load(0, "float", (K,)), const(0.5))
    weights = np.repeat(np.float32([0.1, 0.9, 0.2]), 64)
    assert [one(chosen, (0, 63), (k, k + 63), weights) for k in (0, 64, 96, 128)] == ["EMPTY", "FULL", "MIXED", "EMPTY"]
    weights[70] = np.nan
    assert one(chosen, (0, 63), (64, 127), weights) == "MIXED"


def test_captured_arrays_are_looked_at_where_few_elements_decide() -> None:
    ids = np.zeros(4096, np.int32)
    same = same_document()
    assert one(same, (0, 255), (512, 767), ids) == "FULL"
    assert one(same, (0, 256), (512, 767), ids) == "MIXED"  # more than are looked at
    ids[700] = 1  # contents are read anew, whatever was said before
    assert one(same, (0, 255), (512, 767), ids) == "MIXED"
    dense = load(0, "bool", (H, Q, K))
    table = np.ones((2, 8, 64), np.bool_)
    assert one(dense, (3, 3), (0, 63), table, h=1) == "FULL"
    assert one(dense, (3, 4), (0, 63), table, h=1) == "MIXED"
    # Indices outside of the array are errors of the mask: what is inside decides.
    assert one(make("lt", load(0, "int", (plus(K, -4),)), const(1)), (0, 1), (0, 63), np.zeros(32, np.int8)) == "FULL"
    assert one(make("lt", load(0, "int", (K,)), const(1)), (0, 1), (0, 63), np.zeros(0, np.int8)) == "MIXED"


def test_grids_of_tiles() -> None:
    q, k = np.arange(0, 512, 64), np.arange(0, 256, 32)
    found = classify(CAUSAL, (q[:, None], q[:, None] + 63), (k, k + 31), {})
    assert found.shape == (8, 8) and found.dtype == np.int8
    lengths = np.array([64, 512])[:, None, None]
    both_lengths = classify(
        BOTTOM_RIGHT, (q[:, None], q[:, None] + 63), (k, k + 31), {"q_len": lengths, "kv_len": lengths}
    )
    np.testing.assert_array_equal(both_lengths, np.broadcast_to(found, (2, 8, 8)))
    assert classify(CAUSAL, (5, 4), (0, 3), {}) == EMPTY  # no query
