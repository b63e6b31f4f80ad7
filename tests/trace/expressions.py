"""Random expressions, the captured values they read, and points to compute them at: what the tests of trace share.

    rng = expressions.generator(7)
    world = World.draw(rng)
    x = world.expression(rng, "bool", depth=8)
    leaves = world.points(rng, 1000)
    evaluate([x], leaves, world.arrays, world.scalars)

Every index that occurs is inside of its array, as `%`, min and max keep it, for coordinates within the world's limits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cuflash.dtypes import BY_NUMPY
from cuflash.errors import TraceError
from cuflash.trace.expr import COORDINATES, SCORE, ArraySlot, Expr, ScalarSlot, const, coordinate, load, make, scalar

INTS = (-7, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 100, 1000, -1000, 65537, 2**31 - 1, -(2**31))
FLOATS = (-2.5, -1.0, -0.5, 0.0, 0.125, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0)

# How often each operation is drawn. Smooth and tame ones come more often: a NaN tests little.
INT_OPS = {
    "add": 4, "sub": 6, "mul": 3, "floordiv": 4, "mod": 4, "neg": 1, "abs": 2, "min": 2, "max": 2, "and": 1, "or": 1,
    "xor": 1, "not": 1, "shl": 1, "shr": 2, "where": 2, "int": 1, "load": 3, "leaf": 3, "const": 2,
}  # fmt: skip
FLOAT_OPS = {
    "add": 5, "sub": 5, "mul": 5, "div": 1, "floordiv": 1, "mod": 1, "pow": 1, "neg": 1, "abs": 1, "min": 2, "max": 2,
    "where": 3, "exp": 1, "exp2": 1, "log": 1, "log2": 1, "tanh": 3, "tanh_approx": 1, "sigmoid": 2, "sqrt": 1,
    "rsqrt": 1, "sin": 1, "cos": 1, "floor": 1, "ceil": 1, "float": 3, "load": 3, "leaf": 5, "const": 2,
}  # fmt: skip
BOOL_OPS = {
    "lt": 3, "le": 3, "gt": 3, "ge": 3, "eq": 2, "ne": 1, "and": 5, "or": 4, "xor": 1, "not": 2, "where": 1, "bool": 1,
    "load": 1, "const": 1,
}  # fmt: skip
OPS = {"int": INT_OPS, "float": FLOAT_OPS, "bool": BOOL_OPS}


def generator(*seed: int) -> np.random.Generator:
    """Random numbers of CUFLASH_TEST_SEED and of the numbers given."""
    return np.random.default_rng([int(os.environ.get("CUFLASH_TEST_SEED", "20260")), *seed])


@dataclass(frozen=True)
class World:
    """Captured arrays and numbers, and the ends of coordinates: b < batch, h < heads, q_idx < q_len <= max_len, ..."""

    arrays: tuple[np.ndarray, ...]
    scalars: tuple[int | float, ...]
    batch: int = 3
    heads: int = 4
    max_len: int = 300

    @classmethod
    def draw(cls, rng: np.random.Generator, max_len: int = 300) -> World:
        """Int, bool and float arrays of 0 to 3 axes, sorted ones and constant ones among them; two ints, two floats."""
        n = max_len
        sorted_ids = np.sort(rng.integers(0, int(rng.integers(2, 12)), n)).astype(np.int32)
        arrays = (
            sorted_ids,
            rng.integers(-5, 300, n).astype(np.int64),
            rng.integers(0, 2, (cls.batch, n)).astype(np.bool_),
            rng.integers(-4, 5, (cls.batch, cls.heads)).astype(np.int8),
            np.asarray(rng.integers(-3, 60), np.int32),
            np.repeat(rng.integers(0, 2, -(-n // 50)), 50).astype(np.bool_),
            rng.normal(size=(cls.heads,)).astype(np.float32),
            rng.normal(size=(cls.heads, n)).astype(np.float16),
            np.asarray(rng.normal(), np.float32),
            rng.integers(0, 200, n).astype(np.uint8),
        )
        floats = (float(x) for x in np.float32((rng.normal(), rng.uniform(0.5, 9))))
        scalars = (int(rng.integers(1, 70)), int(rng.integers(-40, 40)), *floats)
        return cls(arrays, scalars, max_len=max_len)

    @property
    def array_slots(self) -> tuple[ArraySlot, ...]:
        return tuple(ArraySlot(f"array{i}", BY_NUMPY[a.dtype], a.ndim) for i, a in enumerate(self.arrays))

    @property
    def scalar_slots(self) -> tuple[ScalarSlot, ...]:
        return tuple(
            ScalarSlot(f"number{i}", "int" if isinstance(s, int) else "float") for i, s in enumerate(self.scalars)
        )

    def expression(
        self, rng: np.random.Generator, kind: str, depth: int, leaves: Sequence[str] = ("score", *COORDINATES)
    ) -> Expr:
        """A random expression of at most some depth: of a kind, over some of the leaves ("score" in floats only)."""
        while True:
            try:
                return self._expression(rng, kind, depth, tuple(leaves))
            except TraceError:  # a constant that its kind cannot hold
                continue

    def _expression(self, rng: np.random.Generator, kind: str, depth: int, leaves: tuple[str, ...]) -> Expr:
        def sub(kind: str) -> Expr:
            return self._expression(rng, kind, depth - 1, leaves)

        ops = OPS[kind]
        weights = np.array(list(ops.values()), float)
        op = str(rng.choice(list(ops), p=weights / weights.sum()))
        if depth <= 0:
            op = str(rng.choice(["leaf", "leaf", "const"])) if kind != "bool" else "compare"
        if op == "const":
            choices = {"bool": (False, True), "int": INTS, "float": FLOATS}[kind]
            return const(choices[rng.integers(len(choices))])
        if op == "leaf":
            return self._leaf(rng, kind, leaves)
        if op == "compare":
            k = str(rng.choice(["int", "float"]))
            return make("lt", self._leaf(rng, k, leaves), self._leaf(rng, k, leaves))
        if op == "load":
            slots = [i for i, a in enumerate(self.array_slots) if a.kind == kind]
            slot = int(rng.choice(slots))
            indices = [self._index(rng, extent, depth - 1, leaves) for extent in self.arrays[slot].shape]
            return load(slot, kind, tuple(indices))
        if op == "where":
            return make("where", sub("bool"), sub(kind), sub(kind))
        if op == "float":
            return make("float", sub("int"))
        if op == "int":
            return make("int", sub(str(rng.choice(["float", "bool"]))))
        if op == "bool":
            return make("bool", sub("int"))
        if kind == "bool" and op not in ("and", "or", "xor", "not"):
            k = str(rng.choice(["int", "int", "float"]))
            return make(op, sub(k), sub(k))
        if op in ("shl", "shr"):
            return make(op, sub("int"), const(int(rng.integers(0, 6))) if rng.random() < 0.7 else sub("int"))
        if op in ("floordiv", "mod") and kind == "int" and rng.random() < 0.6:
            return make(op, sub("int"), const(int(rng.choice([1, 2, 3, 4, 7, 16, 20, 64, -3]))))
        # What many functions do at the far ends of float32 is of no use here: their operands stay near 0.
        if op in ("exp", "exp2"):
            return make(op, make("min", sub("float"), const(4.0)))
        if op in ("log", "log2", "sqrt", "rsqrt"):
            return make(op, make("add", make("abs", sub("float")), const(0.25)))
        if op == "pow":
            base = make("add", make("abs", sub("float")), const(0.5))
            return make(op, base, make("min", make("max", sub("float"), const(-2.0)), const(3.0)))
        if op == "div" and rng.random() < 0.7:
            return make(op, sub("float"), const(float(rng.choice([-3.0, 0.5, 2.0, 7.0]))))
        return make(op, *(sub(kind) for _ in range(1 if op in _UNARY else 2)))

    def _leaf(self, rng: np.random.Generator, kind: str, leaves: tuple[str, ...]) -> Expr:
        if kind == "float":
            if "score" in leaves and rng.random() < 0.6:
                return SCORE
            return scalar(int(rng.integers(2, 4)), "float")
        names = [name for name in leaves if name != "score"]
        if not names or rng.random() < 0.15:
            return scalar(int(rng.integers(0, 2)), "int")
        # Positions are what mods are about.
        weights = np.array([4.0 if name in ("q_idx", "kv_idx") else 1.0 for name in names])
        return coordinate(names[rng.choice(len(names), p=weights / weights.sum())])

    def _index(self, rng: np.random.Generator, extent: int, depth: int, leaves: tuple[str, ...]) -> Expr:
        """Inside of an axis: a coordinate that is, or any int brought there."""
        limits = {"b": self.batch, "h": self.heads, "q_idx": self.max_len, "kv_idx": self.max_len}
        fitting = [name for name, limit in limits.items() if limit <= extent and name in leaves]
        if fitting and rng.random() < 0.7:
            return coordinate(fitting[-1 - int(rng.integers(min(2, len(fitting))))])
        x = self._expression(rng, "int", min(depth, 3), leaves)
        if rng.random() < 0.5:
            return make("mod", x, const(extent))
        return make("min", make("max", x, const(0)), const(extent - 1))

    def points(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """Leaves for `evaluate`: one value each per point, within the world's limits."""
        q_len, kv_len = rng.integers(1, self.max_len + 1, (2, count))
        return {
            "score": rng.normal(size=count) * 2,
            "b": rng.integers(0, self.batch, count),
            "h": rng.integers(0, self.heads, count),
            "q_idx": (rng.random(count) * q_len).astype(np.int64),
            "kv_idx": (rng.random(count) * kv_len).astype(np.int64),
            "q_len": q_len,
            "kv_len": kv_len,
        }


_UNARY = (
    "neg", "abs", "not", "exp", "exp2", "log", "log2", "tanh", "tanh_approx", "sigmoid", "sqrt", "rsqrt", "sin", "cos",
    "floor", "ceil",
)  # fmt: skip
