"""Functions that mods know by their names in PyTorch and NumPy: values, derivatives, and what kernels compute."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compiled import Library
from expressions import World
from needs import needs_nvrtc

import cuflash
from cuflash import arch
from cuflash.errors import TraceError
from cuflash.jit import nvrtc, source
from cuflash.trace.derive import derivative
from cuflash.trace.emit_numpy import evaluate
from cuflash.trace.expr import SCORE, Mods
from cuflash.trace.intervals import classify

torch = pytest.importorskip("torch")
F = torch.nn.functional

X = np.concatenate([np.linspace(-9, 9, 181), [-1e-3, 1e-6, -1e-20, 0.0, -0.0, 30, -40, 127, 128, 300.5]]).astype(
    np.float32
)
TORCH: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda s: F.gelu(s),
    "gelu by tanh": lambda s: F.gelu(s, approximate="tanh"),
    "elu": lambda s: F.elu(s, alpha=0.5),
    "erf": lambda s: torch.erf(s / 2),
    "special.erf": lambda s: torch.special.erf(s),
    "expm1": lambda s: torch.expm1(s.clamp(None, 20)),
    "log1p": lambda s: torch.log1p(abs(s)),
    "atan": lambda s: torch.atan(s) + s.arctan(),
    "atan2": lambda s: torch.atan2(s, 1 - s),
    "atan2 of an angle": lambda s: torch.atan2(s, torch.full_like(s, -2.0)),
    "signbit": lambda s: torch.where(torch.signbit(s), s * 2, s),
    "nan_to_num": lambda s: torch.nan_to_num(s / 0.0, nan=3.0, posinf=5.0) + torch.nan_to_num(s),
    "heaviside": lambda s: torch.heaviside(s, torch.full_like(s, 0.25)) * s,
    "isin": lambda s: torch.where(torch.isin(s, torch.tensor([0.0, 3.0, -2.0])), s * 3, s),
    "half": lambda s: s.half().float() * 2,
    "bfloat16": lambda s: s.bfloat16().float() * 2,
    "to": lambda s: s.to(torch.float16).to(torch.float32) + s.to(torch.bfloat16),
    "to int8": lambda s: s.to(torch.int32).to(torch.int8) + 0 * s,
    "to uint8": lambda s: s.to(torch.int32).byte() + 0 * s,
}
NUMPY: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "expm1": (lambda s: np.expm1(s / 9), lambda s: np.expm1(s / 9)),
    "log1p": (lambda s: np.log1p(abs(s)), lambda s: np.log1p(abs(s))),
    "arctan": (lambda s: np.arctan(s), np.arctan),
    "arctan2": (lambda s: np.arctan2(s, -1.0), lambda s: np.arctan2(s, np.float32(-1))),
    "signbit": (lambda s: np.where(np.signbit(s), 1.0, 2.0), lambda s: np.where(np.signbit(s), 1.0, 2.0)),
    "heaviside": (lambda s: np.heaviside(s, 0.5), lambda s: np.heaviside(s, 0.5)),
    "nan_to_num": (
        lambda s: np.nan_to_num(s * float("inf"), nan=7.0),
        lambda s: np.nan_to_num(s * np.float32("inf"), nan=7.0),
    ),
    "isin": (lambda s: np.where(np.isin(s, (0, 3.0)), 1.0, 2.0), lambda s: np.where(np.isin(s, (0, 3.0)), 1.0, 2.0)),
    "astype": (lambda s: s.astype(np.float16) * 1.0, lambda s: s.astype(np.float16)),
}


def of(function: Callable[[Any], Any]) -> Any:
    """The expression of a function of the score."""
    return cuflash.mod(lambda score, b, h, q_idx, kv_idx: function(score)).expr


@pytest.mark.parametrize("name", TORCH)
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    expr = of(TORCH[name])
    (found,) = evaluate([expr], {"score": X})
    s = torch.tensor(X, dtype=torch.float32, requires_grad=name != "heaviside")  # which has no derivative there
    expected = TORCH[name](s)
    scale = np.maximum(np.abs(expected.detach().numpy()), np.abs(X) / 2 + 1e-6)
    assert (np.abs(found - expected.detach().numpy()) <= 2.0**-20 * scale).all()
    if expected.requires_grad:
        (expected,) = torch.autograd.grad(expected.float().sum(), s)
        usable = np.isfinite(expected.numpy()) & (np.abs(X) > 1e-30)
        got = np.broadcast_to(evaluate([derivative(expr, SCORE)], {"score": X})[0], X.shape)
        np.testing.assert_allclose(got[usable], expected.numpy()[usable], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NUMPY)
def test_values_are_numpys(name: str) -> None:
    ours, theirs = NUMPY[name]
    with np.errstate(all="ignore"):
        expected = np.asarray(theirs(X), np.float32)
    np.testing.assert_allclose(evaluate([of(ours)], {"score": X})[0], expected, rtol=1e-6)


def test_gelu_of_jax_is_by_tanh_unless_told_otherwise() -> None:
    jax = pytest.importorskip("jax")
    for ours in (lambda s: jax.nn.gelu(s), lambda s: jax.nn.gelu(s, approximate=False)):
        (found,) = evaluate([of(ours)], {"score": X})
        np.testing.assert_allclose(found, ours(X), rtol=1e-5, atol=2e-5)
    assert of(lambda s: jax.nn.gelu(s)) is of(lambda s: F.gelu(s, approximate="tanh"))


def test_casts_of_captured_arrays_wrap_and_round() -> None:
    table, fine = np.array([100, 200, 300, -200], np.int32), np.array([1 / 3, 1e-6, 7e4, 1], np.float32)
    x = cuflash.mod(lambda s, b, h, i, j: s + table.astype(np.int8)[j] + fine.astype(np.float16)[j])
    (found,) = evaluate([x.expr], {"score": 0.0, "kv_idx": np.arange(4)}, x.arrays)
    with np.errstate(all="ignore"):
        expected = table.astype(np.int8) + fine.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_in_a_mask() -> None:
    mask = cuflash.mod(lambda b, h, i, j: np.isin(j, (1, 3)) | (np.signbit((j - 5) * 1.0) & (i > 1)))
    (found,) = evaluate([mask.expr], {"q_idx": np.arange(3)[:, None], "kv_idx": np.arange(7)})
    assert ["".join("1" if x else "." for x in row) for row in found] == [".1.1...", ".1.1...", "11111.."]
    assert classify(mask.expr, (0, 2), (0, 6), {}) == 1  # MIXED
    assert classify(cuflash.mod(lambda b, h, i, j: np.isin(j, (1, 3))).expr, (0, 2), (4, 6), {}) == 0


def test_what_they_do_not_take() -> None:
    for function, says in (
        (lambda s: np.isin(s, range(99)), "isin of 99 elements: .*capture an array"),
        (lambda s: F.gelu(s, approximate="erf"), 'it is "none" or "tanh"'),
    ):
        with pytest.raises(TraceError, match=says):
            of(function)


# What kernels compute -------------------------------------------------------------------------------------------------

KERNEL: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "erf": (torch.erf, np.vectorize(math.erf)),
    "expm1": (torch.expm1, np.expm1),
    "log1p": (lambda s: torch.log1p(abs(s)), lambda x: np.log1p(np.abs(x))),
    "atan": (torch.atan, np.arctan),
    "atan2": (lambda s: torch.atan2(s, 1 - s), lambda x: np.arctan2(x, np.float64(np.float32(1) - np.float32(x)))),
    "signbit": (lambda s: torch.where(torch.signbit(s), 1.0, 2.0), lambda x: np.where(np.signbit(x), 1.0, 2.0)),
    "half": (lambda s: s.half() * 1.0, lambda x: x.astype(np.float16)),
    "bfloat16": (lambda s: s.bfloat16() * 1.0,
                 lambda x: torch.tensor(x, dtype=torch.float32).bfloat16().float().numpy()),
    "to int8": (lambda s: s.to(torch.int8) * 1.0, lambda x: x.astype(np.int32).astype(np.int8)),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_kernels_compute_them_as_exactly_as_pytorch() -> None:
    library = Library([Mods(of(ours), None) for ours, _ in KERNEL.values()], ["score"])
    nowhere = {name: np.zeros(len(X), np.int32) for name in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")}
    for i, (name, (_, exact)) in enumerate(KERNEL.items()):
        found = library.score(i, World((), ()), {"score": X, **nowhere})
        with np.errstate(all="ignore"):
            expected = np.asarray(exact(X.astype(np.float64)), np.float64)
            expected = np.where(np.abs(expected) > 3.4028235e38, np.copysign(np.inf, expected), expected)
        np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-23, atol=1e-37, err_msg=name)


@needs_nvrtc
def test_nvrtc_compiles_them() -> None:
    calls = "erf expm1 log1p atan".split()
    lines = [f"x += hw::{name}(x);" for name in calls]
    lines += ["x += hw::atan2(x, 2.0f) + rounded_to<hw::Half>(x) + rounded_to<hw::Bfloat16>(x);"]
    lines += ["if (sign_bit(x)) x = 1.0f;"]
    body = "\n  ".join(lines)
    text = source.flatten("tile/arithmetic.cuh", "cuda")
    cubin = nvrtc.compile(
        f'{text}\nextern "C" __global__ void f(float* p) {{\n  float x = *p;\n  {body}\n  *p = x;\n}}\n',
        arch.named("sm_80"),
        "functions.cu",
    )
    assert cubin.resources["f"].spill_stores == 0
