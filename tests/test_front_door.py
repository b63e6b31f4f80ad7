"""Fuzz of the front door: any argument of any public function replaced by something else.

The outcome is a right result or a `CuflashError`, nothing else. A right result is that of the same call with plain
arguments: Python's numbers for NumPy's, contiguous arrays for strided ones. On the emulator it is the reference's, too.
A refused call has written nothing.

A call is drawn from (seed, number) alone, and a failure prints the line that repeats it. Kernels come from the
Variants that the right calls below compile; a call that needs another one is refused, as `config.on_compile` asks.
"""

from __future__ import annotations

import contextlib
import decimal
import fractions
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import using
from doors import DOORS, F16, Door, i32

import cuflash
from cuflash import mods
from cuflash.errors import CuflashError

BY_NAME = {door.name: door for door in DOORS}
KERNELS = tuple(door for door in DOORS if door.kernels)
REFUSED = object()

# What is put in its place ---------------------------------------------------------------------------------------------


class Odd:
    """Is nothing, and compares and counts as nothing."""

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __eq__(self, other: object) -> bool:
        raise ValueError("incomparable")

    __hash__ = object.__hash__


def others() -> list[Any]:
    """Things of every kind, anew."""
    return [
        None, True, False, np.True_, np.False_, 0, 1, -1, 3, -7, 64, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400,
        np.int8(-1), np.uint8(2), np.int32(4), np.int64(-1), np.int64(6), np.uint64(2**63), np.uint64(5), 0.0, -0.0,
        0.5, 4.0, -1.5, 1e-30, 1e300, float("nan"), float("inf"), -float("inf"), F16(0.25), np.float32(0.5),
        np.float64(0.25), np.float64("nan"), np.longdouble(0.5), ml_dtypes.bfloat16(0.5), 1j, np.complex64(1),
        fractions.Fraction(1, 4), decimal.Decimal("0.25"), "", "lse", "float32", "sm_80", "\0", "a" * 300, b"lse",
        (), [], {}, set(), (1,), (1, 2), (None, 0), (-1, np.int64(0)), (1.5, 0), (2**64, 0), [3, 0], [None], [0, 2, 6],
        [0, 3, 9], (0, 3, 9), [0, -1, 5], [[0], [1]], ["lse"], ("lse", "lse"), ("lse", None), {"kernel": "sm_80"},
        {"kernel": np.arange(2)}, {3: 4}, {"cluster": 2.0}, range(3), iter([1, 2]), slice(2), Ellipsis, object(), Odd(),
        print, int, np.float32, np.dtype("f4"), np.ndarray, lambda *_: 1, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
        lambda score, b, h, q_idx, kv_idx: score, np.datetime64("2020"), np.str_("lse"), mods.causal(),
        *arrays(),
    ]  # fmt: skip


def arrays() -> Iterator[np.ndarray]:
    for dtype in ("f2", "f4", "f8", "i1", "i4", "i8", "u8", "?", "c8", "O", "U3", "M8[s]", ml_dtypes.bfloat16, "i4,f4"):
        yield np.zeros((), dtype)
        yield np.zeros(0, dtype)
        yield np.ones(1, dtype if dtype != "M8[s]" else "i8").astype(dtype)
        yield np.zeros((2, 3), dtype)
    yield from (np.array([None, 1]), np.array(["lse"]), np.array([0, 2, 6]), i32(0, 2, 6), i32(0, 3, 9), i32(9, 9))
    yield from (i32(4, 0), i32(0, -1), np.ma.ones((2, 6, 4, 64), F16), np.ones((2, 2)).view(np.matrix))
    yield np.broadcast_to(F16(1), (1, 2**40, 1, 64))
    yield np.broadcast_to(np.int32(0), (2**33,))
    yield np.zeros((2, 6, 4, 64), ">f4")


def changed(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Another array like x: of other dtype, shape or strides, read-only, of other values."""
    dtypes = ("f2", "f4", "f8", "i4", "i8", "u1", "?", "c8", "O", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
    wide = np.repeat(x, 2, -1) if x.ndim else x
    frozen = x.copy()
    frozen.flags.writeable = False
    choices: list[Callable[[], np.ndarray]] = [
        lambda: x.astype(dtypes[rng.integers(len(dtypes))]), lambda: x[..., None], lambda: x[None], lambda: x[:0],
        lambda: x[0], lambda: x.reshape(-1), lambda: x.T, lambda: np.asfortranarray(x), lambda: x[::-1],
        lambda: x[..., ::-1], lambda: wide[..., ::2], lambda: np.broadcast_to(x[:1], x.shape), lambda: frozen, x.copy,
        lambda: x[1:], lambda: np.concatenate([x, x]), lambda: x[..., :-1], lambda: x.swapaxes(0, -1),
        lambda: -x if x.dtype.kind in "if" else x, lambda: x.view(np.ndarray), lambda: np.zeros_like(x),
        lambda: x.swapaxes(1, 2) if x.ndim > 2 else x, lambda: x.view(x.dtype.newbyteorder()), x.tolist,
    ]  # fmt: skip
    return choices[rng.integers(len(choices))]()


def alike(rng: np.random.Generator, x: Any) -> Any:
    """Something that means the same as x."""
    if isinstance(x, bool):
        return np.bool_(x)
    if isinstance(x, int):
        fitting = [
            t for t in (np.int64, np.int32, np.int8, np.uint8, np.uint64) if np.can_cast(np.min_scalar_type(x), t)
        ]
        return fitting[rng.integers(len(fitting))](x)
    if isinstance(x, float):
        return [np.float64, np.float32, fractions.Fraction, np.longdouble][rng.integers(4)](x)
    if isinstance(x, str):
        return np.str_(x)
    if isinstance(x, tuple):
        return list(x) if rng.random() < 0.5 else tuple(alike(rng, each) for each in x)
    if isinstance(x, list):
        return tuple(x)
    if isinstance(x, np.ndarray) and x.ndim > 1:
        wide = np.zeros((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 8), x.dtype)
        wide[..., 1:-1, 8:] = x
        return wide[..., 1:-1, 8:]
    return x.tolist() if isinstance(x, np.ndarray) and x.dtype.kind == "i" else x


class Draw:
    """One call: a right one with an argument or two replaced."""

    def __init__(self, seed: int, number: int, doors: tuple[Door, ...]) -> None:
        rng = np.random.default_rng([seed, number])
        self.door = doors[rng.integers(len(doors))]
        self.arguments = self.door.arguments()
        self.replaced = []
        for name in rng.choice([*self.arguments], min(1 + (rng.random() < 0.2), len(self.arguments)), replace=False):
            old, things = self.arguments[name], others()
            if rng.random() < 0.25:
                new = alike(rng, old)
            elif isinstance(old, np.ndarray) and rng.random() < 0.5:
                new = changed(rng, old)
            else:
                new = things[rng.integers(len(things))]
            self.arguments[name] = new
            self.replaced.append(str(name))

    def __repr__(self) -> str:
        def shown(x: Any) -> str:
            if isinstance(x, np.ndarray):
                return f"{type(x).__name__} {x.dtype} {x.shape} strides {x.strides}" + (f" {x}" if x.size < 5 else "")
            return repr(x) if not isinstance(x, Odd) else "Odd()"

        return f"{self.door.name}: " + ", ".join(f"{n}={shown(self.arguments[n])[:200]}" for n in self.replaced)


def plain(x: Any) -> Any:
    """The same in Python's numbers and contiguous arrays of a memory of their own."""
    if isinstance(x, (np.generic, bool)) and type(x).__name__ not in ("bfloat16", "longdouble", "datetime64"):
        return x.item() if isinstance(x, np.generic) else x
    if isinstance(x, np.ndarray):
        return x.copy("C") if x.size < 10**6 else x
    if isinstance(x, (list, tuple)):
        return type(x)(map(plain, x))
    return x


# What comes of it -----------------------------------------------------------------------------------------------------


def called(draw: Draw) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # one of the mods is `print`
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        return draw.door.call(**draw.arguments)


def run(draw: Draw) -> Any:
    """The call's result, or REFUSED."""
    before = {name: x.copy() for name, x in draw.arguments.items() if isinstance(x, np.ndarray) and x.size < 10**6}
    try:
        return called(draw)
    except CuflashError as error:
        assert str(error)
        for name, x in before.items():
            assert x.tobytes() == draw.arguments[name].tobytes(), f"{name} was written by a refused call"
        return REFUSED


def leaves(x: Any) -> list[np.ndarray]:
    """The arrays of a result."""
    if isinstance(x, np.ndarray):
        return [x]
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, (list, tuple)) else []


def same(a: Any, b: Any, exact: bool) -> None:
    found, expected = leaves(a), leaves(b)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if exact or x.dtype.kind not in "fV":
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=2e-2, atol=2e-2)


def of_its_lse(seed: int, number: int, doors: tuple[Door, ...]) -> bool:
    """Whether a call of the backward has the result of its forward. Of another lse the weights may be above 1, by which
    rounding grows, and nothing is promised."""
    given = Draw(seed, number, doors).arguments
    if "dout" not in given:
        return True
    names = ("captured_grads", "dout", "dlse", "dq", "dk", "dv", "lse", "out", "kernel_options", "deterministic")
    with using("reference"):
        right = cuflash.attention(**{name: x for name, x in given.items() if name not in names}, aux=("lse",))
    return np.allclose(right.lse, given["lse"], atol=1e-2) and np.allclose(right.out, given["out"], atol=1e-2)


def check(seed: int, number: int, doors: tuple[Door, ...] = DOORS) -> bool:
    """Draws a call and looks at what comes of it -> whether it was accepted."""
    draw = Draw(seed, number, doors)
    try:
        result = run(draw)
        if result is REFUSED:
            return False
        again = Draw(seed, number, doors)  # what a call writes to is new
        again.arguments = {name: plain(x) for name, x in again.arguments.items()}
        # Arrays of other strides may be read by another kernel.
        exact = cuflash.config.backend != "emulator" or all(
            x.flags.c_contiguous for x in draw.arguments.values() if isinstance(x, np.ndarray)
        )
        same(result, called(again), exact)
        if draw.door.kernels and cuflash.config.backend == "emulator" and of_its_lse(seed, number, doors):
            with using("reference"):
                expected = called(Draw(seed, number, doors))
            same(result, expected, exact=False)
        return True
    except Exception as error:
        error.add_note(f"{draw}\nagain: tests/test_front_door.py: check({seed}, {number})")
        raise


def check_many(seed: int, numbers: range, doors: tuple[Door, ...] = DOORS) -> None:
    accepted = sum(check(seed, number, doors) for number in numbers)
    assert 0.02 < accepted / len(numbers) < 0.9, accepted  # both outcomes are met


@pytest.mark.parametrize("name", BY_NAME)
def test_each_right_call_is_right(name):
    """What is drawn from is accepted, so that a refusal is for what was replaced."""
    door = BY_NAME[name]
    if name == "warmup":
        with using("reference"):
            door.call(**door.arguments())
    else:
        door.call(**door.arguments())


CHUNK = 100


@pytest.mark.parametrize("chunk", range(500 // CHUNK))
def test_the_reference(seed, chunk):
    check_many(seed, range(chunk * CHUNK, (chunk + 1) * CHUNK))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(20))
def test_the_reference_deeply(seed, chunk):
    check_many(seed + 1, range(chunk * 1000, (chunk + 1) * 1000))


@contextlib.contextmanager
def emulating(arch: str, doors: tuple[Door, ...]) -> Iterator[None]:
    """The emulator, its kernels those of the right calls."""
    with using("emulator", arch), pytest.MonkeyPatch.context() as patched:
        for door in doors:
            door.call(**door.arguments())
        patched.setattr(cuflash.config, "on_compile", "error")
        yield


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_emulator(seed, arch):
    doors = tuple(door for door in KERNELS if not door.deep)
    with emulating(arch, doors):
        check_many(seed + 2, range(50), doors)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_emulator_deeply(seed, arch):
    with emulating(arch, KERNELS):
        check_many(seed + 3, range(2000), KERNELS)
