"""Fuzz of the front door: any argument of any public function replaced by something else.

The outcome is a right result or a `CuflashError`, nothing else. A right result is that of the same call with plain
arguments: Python's numbers for NumPy's, contiguous arrays for strided ones. On the emulator it is the reference's, too.
A refused call has written nothing.

A call is drawn from (seed, number) alone, and a failure prints the line that repeats it. Kernels come from the
Variants that the right calls below compile; a call that needs another one is refused, as `config.on_compile` asks.
"""

from __future__ import annotations

import decimal
import fractions
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import emulator, mods, packing
from cuflash.errors import CuflashError

F16 = np.float16


def floats(*shape: int, dtype: Any = F16) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# What is called -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """A public function, and the arguments of a right call."""

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    kernels: bool = True  # whether a call runs kernels


def dense() -> dict[str, Any]:
    return {"q": floats(2, 6, 4, 64), "k": floats(2, 9, 2, 64), "v": floats(2, 9, 2, 64)}


def lengths() -> dict[str, Any]:
    return {"cu_seqlens_q": i32(0, 2, 6), "cu_seqlens_k": i32(0, 3, 9), "max_seqlen_q": 4, "max_seqlen_k": 6}


def packed() -> dict[str, Any]:
    return {"q": floats(6, 4, 64), "k": floats(9, 2, 64), "v": floats(9, 2, 64), **lengths()}


def paged() -> dict[str, Any]:
    pages = {"page_table": i32(1, 3, 4, 0).reshape(2, 2), "seqused_k": i32(5, 8)}
    return {"q": floats(2, 6, 4, 64), "k": floats(5, 4, 2, 64), "v": floats(5, 4, 2, 64), **pages}


def options() -> dict[str, Any]:
    return {
        "scale": 0.25, "causal": True, "window_size": (4, 0), "softcap": 0.0, "alibi_slopes": None, "sink": None,
        "score_mod": None, "mask_mod": None, "block_mask": None, "dropout_p": 0.0, "seed": 3, "offset": 0,
        "deterministic": False, "split_size": None, "kernel_options": None,
    }  # fmt: skip


def forward() -> dict[str, Any]:
    return {**options(), "seqused_q": None, "seqused_k": None, "page_table": None, "out": None, "aux": ("lse",)}


def headed() -> dict[str, Any]:
    """What has a number for each head."""
    return {"alibi_slopes": floats(4, dtype=np.float32), "sink": floats(4, dtype=np.float32)}


def backward(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: x for name, x in arguments.items() if name not in ("out", "aux")}
    out, lse, *_ = cuflash.attention(**arguments, aux=("lse",))
    given = {"dout": np.ones_like(out), "out": out, "lse": lse, "dlse": None, "captured_grads": False}
    return {**arguments, **given, "dq": None, "dk": None, "dv": None}


def fa(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keywords of flash-attn's names."""
    kept = ("causal", "window_size", "softcap", "alibi_slopes", "deterministic", "score_mod", "mask_mod", "block_mask")
    return {
        **arguments, **{name: x for name, x in options().items() if name in kept}, "dropout_p": 0.0,
        "softmax_scale": 0.25,
    }  # fmt: skip


def cache(**more: Any) -> dict[str, Any]:
    names = (
        "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "block_table", "alibi_slopes", "page_table",
        "cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k_new", "rotary_seqlens", "sink", "score_mod", "mask_mod",
        "split_size", "qv", "q_descale", "k_descale", "v_descale", "scheduler_metadata", "pack_gqa",
    )  # fmt: skip
    return {
        "q": floats(2, 3, 4, 64), "k_cache": floats(2, 16, 2, 64), "v_cache": floats(2, 16, 2, 64),
        "k": floats(2, 3, 2, 64), "v": floats(2, 3, 2, 64), "cache_seqlens": i32(0, 5), **dict.fromkeys(names),
        "softmax_scale": 0.25, "causal": True, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
        "num_splits": 0, "return_softmax_lse": True, "attention_chunk": 0, "sm_margin": 0, **more,
    }  # fmt: skip


def features() -> dict[str, Any]:
    return {
        "dtype": "float16", "head_dim": 64, "head_dim_v": None, "arch": None, "backward": False, "causal": True,
        "page_table": False, "split_size": None, "dropout_p": 0.0, "softcap": None, "sink": False, "lse": True,
        "alibi_slopes": None,
    }  # fmt: skip


def set_option(name: str) -> Callable[[Any], None]:
    def call(value: Any) -> None:
        before = getattr(cuflash.config, f"_{name}")
        setattr(cuflash.config, name, value)
        setattr(cuflash.config, name, before)

    return call


def scheduled(**keywords: Any) -> None:
    with emulator.schedule(**keywords):
        pass


def traced(limit: Any) -> None:
    with emulator.tracing(limit):
        pass


def part_lse() -> np.ndarray:
    return floats(2, 4, 6, dtype=np.float32)


SETTINGS = {
    "backend": "emulator", "arch": "sm_80", "check": False, "cache_dir": None, "dump": None, "on_compile": "quiet",
}  # fmt: skip
MASK = np.array([[True, True, False], [False, True, True]])
DOORS = (
    Door("attention", cuflash.attention, lambda: dense() | forward()),
    Door("attention of heads", cuflash.attention, lambda: dense() | forward() | headed()),
    Door("attention packed", cuflash.attention, lambda: packed() | forward()),
    Door("attention paged", cuflash.attention, lambda: dense() | forward() | paged()),
    Door("attention dropout", cuflash.attention, lambda: dense() | forward() | {"dropout_p": 0.5}),
    Door("attention split", cuflash.attention, lambda: dense() | forward() | {"split_size": 64}),
    Door("attention_backward", cuflash.attention_backward, lambda: backward(dense() | options())),
    Door("attention_backward packed", cuflash.attention_backward, lambda: backward(packed() | options())),
    Door("explain", cuflash.explain, lambda: dense() | forward() | {"backward": False}),
    Door("explain backward", cuflash.explain, lambda: packed() | forward() | {"backward": True}),
    Door("supports", cuflash.supports, features, kernels=False),
    Door("warmup", cuflash.warmup, lambda: features() | {"device": None}),
    Door("flash_attn_func", cuflash.flash_attn_func, lambda: fa(dense()) | {"return_attn_probs": False}),
    Door("flash_attn_kvpacked_func", cuflash.flash_attn_kvpacked_func, lambda: fa(
        {"q": floats(2, 6, 4, 64), "kv": floats(2, 9, 2, 2, 64)}
    )),
    Door("flash_attn_qkvpacked_func", cuflash.flash_attn_qkvpacked_func, lambda: fa({"qkv": floats(2, 6, 3, 4, 64)})),
    Door("flash_attn_varlen_func", cuflash.flash_attn_varlen_func, lambda: fa(packed()) | {"block_table": None}),
    Door("flash_attn_varlen_func paged", cuflash.flash_attn_varlen_func, lambda: fa(packed()) | {
        "k": floats(5, 4, 2, 64), "v": floats(5, 4, 2, 64), "block_table": i32(1, 3, 4, 0).reshape(2, 2),
    }),
    Door("flash_attn_varlen_kvpacked_func", cuflash.flash_attn_varlen_kvpacked_func, lambda: fa(
        {"q": floats(6, 4, 64), "kv": floats(9, 2, 2, 64), **lengths()}
    )),
    Door("flash_attn_varlen_qkvpacked_func", cuflash.flash_attn_varlen_qkvpacked_func, lambda: fa(
        {"qkv": floats(6, 3, 4, 64), "cu_seqlens": i32(0, 2, 6), "max_seqlen": 4}
    )),
    Door("flash_attn_with_kvcache", cuflash.flash_attn_with_kvcache, cache),
    Door("flash_attn_with_kvcache one length", cuflash.flash_attn_with_kvcache, lambda: cache(cache_seqlens=5)),
    Door("flash_attn_with_kvcache paged", cuflash.flash_attn_with_kvcache, lambda: cache(
        k_cache=floats(8, 4, 2, 64), v_cache=floats(8, 4, 2, 64), block_table=i32(1, 3, 4, 0, 5, 7).reshape(2, 3),
        rotary_cos=floats(20, 16), rotary_sin=floats(20, 16), rotary_interleaved=False, rotary_seqlens=i32(2, 3),
    )),
    Door("flash_attn_with_kvcache rows", cuflash.flash_attn_with_kvcache, lambda: cache(
        q=floats(5, 4, 64), cu_seqlens_q=i32(0, 2, 5), max_seqlen_q=3, k=floats(4, 2, 64), v=floats(4, 2, 64),
        cu_seqlens_k_new=i32(0, 1, 4), cache_batch_idx=i32(1, 0), cache_leftpad=i32(0, 2),
    )),
    Door("merge_states", cuflash.merge_states, lambda: {
        "outs": [floats(2, 6, 4, 8, dtype=np.float32)] * 2, "lses": [part_lse(), part_lse() + 1],
    }, kernels=False),
    Door("pack", packing.pack, lambda: {"arrays": [floats(3, 4), floats(2, 4)]}, kernels=False),
    Door("unpack", packing.unpack, lambda: {"data": floats(5, 4), "cu_seqlens": [0, 3, 5]}, kernels=False),
    Door("unpack of an array", packing.unpack, lambda: {
        "data": floats(5, 4), "cu_seqlens": i32(0, 3, 5),
    }, kernels=False),
    Door("unpad_input", packing.unpad_input, lambda: {
        "x": floats(2, 3, 4), "mask": MASK, "unused_mask": None,
    }, kernels=False),
    Door("pad_input", packing.pad_input, lambda: {
        "x": floats(4, 4), "indices": np.array([0, 1, 4, 5]), "batch": 2, "seqlen": 3,
    }, kernels=False),
    Door("cu_seqlens_from lengths", packing.cu_seqlens_from, lambda: {"lengths": [3, 0, 2]}, kernels=False),
    Door("cu_seqlens_from array", packing.cu_seqlens_from, lambda: {"lengths": i32(3, 0, 2)}, kernels=False),
    Door("cu_seqlens_from mask", packing.cu_seqlens_from, lambda: {"mask": MASK, "lengths": None}, kernels=False),
    Door("cu_seqlens_from position_ids", packing.cu_seqlens_from, lambda: {
        "position_ids": i32(0, 1, 2, 0, 1), "mask": None,
    }, kernels=False),
    Door("emulator.schedule", scheduled, lambda: {
        "seed": 3, "landing": "early", "step_limit": 10**6, "os_threads": 1,
    }, kernels=False),
    Door("emulator.tracing", traced, lambda: {"limit": 100}, kernels=False),
    *(Door(f"config.{name}", set_option(name), lambda value=value: {"value": value}, kernels=False)
      for name, value in SETTINGS.items()),
)  # fmt: skip
BY_NAME = {door.name: door for door in DOORS}


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


def run(draw: Draw) -> Any:
    """The call's result, or None where it is refused as it should be."""
    before = {name: x.copy() for name, x in draw.arguments.items() if isinstance(x, np.ndarray) and x.size < 10**6}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return draw.door.call(**draw.arguments)
    except CuflashError as error:
        assert str(error)
        for name, x in before.items():
            assert x.tobytes() == draw.arguments[name].tobytes(), f"{name} was written by a refused call"
        return None


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


def check(seed: int, number: int, doors: tuple[Door, ...] = DOORS) -> bool:
    """Draws a call and looks at what comes of it -> whether it was accepted."""
    draw = Draw(seed, number, doors)
    try:
        result = run(draw)
        if result is None:
            return False
        again = Draw(seed, number, doors)  # what a call writes to is new
        again.arguments = {name: plain(x) for name, x in again.arguments.items()}
        same(result, again.door.call(**again.arguments), exact=True)
        if draw.door.kernels and cuflash.config.backend == "emulator":
            with using("reference"):
                on_host = Draw(seed, number, doors)
                expected = on_host.door.call(**on_host.arguments)
            # Gradients for the lse of other arguments may be of any size.
            if all(np.abs(x.astype(np.float64)).max(initial=0) < 1e3 for x in leaves(expected) if x.dtype.kind == "f"):
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


@pytest.fixture(params=["sm_80", "sm_90a"])
def emulated(request, monkeypatch):
    """The emulator, its kernels those of the right calls."""
    with using("emulator", request.param):
        for door in KERNELS:
            door.call(**door.arguments())
        monkeypatch.setattr(cuflash.config, "on_compile", "error")
        yield


KERNELS = tuple(door for door in DOORS if door.kernels)


def test_the_emulator(seed, emulated):
    check_many(seed + 2, range(50), KERNELS)


@pytest.mark.slow
def test_the_emulator_deeply(seed, emulated):
    check_many(seed + 3, range(2000), KERNELS)
