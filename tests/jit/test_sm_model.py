"""The model of a multiprocessor, on loops so plain that what binds them is known; test_forward_sm90.py has kernels."""

from __future__ import annotations

import pytest

from cuflash.jit import sm_model

SCORES = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"  # both operands from shared memory
OUT = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88"  # one from registers
BACK = "@!P0 BRA `(.L_x_1)"


def wait(left: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}"


def predict(*loop: str, consumers: int = 2, copied_bytes: int = 0) -> sm_model.TileTime:
    return sm_model.predict((*loop, BACK), consumers=consumers, copied_bytes=copied_bytes)


def test_totals():
    """By the rates of the hardware: m64n128k16 in 64 clocks, an exponential of a warp in 8, 128 bytes a clock."""
    tile = predict(*[SCORES] * 3, OUT + ", gsb0", *["MUFU.EX2 R1, R2"] * 5, wait(0), consumers=3, copied_bytes=1280)
    assert tile.tensor == 3 * 4 * 64
    assert tile.mufu == 3 * 5 * 8
    assert tile.shared == (3 * (3 * (64 * 16 * 2 + 128 * 16 * 2) + 128 * 16 * 2) + 1280) / 128
    assert tile.issue == 3 * 11


@pytest.mark.parametrize("n, bound", [(64, 1.0), (32, 16 / 24), (256, 1.0)])
def test_products_of_few_columns_are_bound_by_shared_memory(n, bound):
    tile = predict(*[f"HGMMA.64x{n}x16.F32.BF16 R24, gdesc[UR8], R24"] * 8, wait(0))
    assert tile.tensor == pytest.approx(2 * 8 * max(n / 2, (2048 + 32 * n) / 128))
    assert n / 2 / (tile.tensor / 16) == pytest.approx(bound)


def test_copies_bind_where_they_are_slower():
    loop = (*[SCORES] * 8, OUT + ", gsb0", wait(0))
    assert predict(*loop, copied_bytes=128 * 10_000).tensor_use < 0.15 < 0.8 < predict(*loop).tensor_use


def test_exponentials_bind():
    tile = predict(SCORES + ", gsb0", *[f"MUFU.EX2 R{i}, R200" for i in range(50)], wait(0))
    assert tile.clocks == pytest.approx(tile.mufu, rel=0.02)


def test_one_waits_for_its_operand():
    """A chain of dependent additions takes their latency each, independent ones do not."""
    chain = predict(*["FADD R1, R1, R2"] * 40, consumers=1)
    free = predict(*[f"FADD R{3 + i}, R1, R2" for i in range(40)], consumers=1)
    assert chain.simulated == pytest.approx(4 * free.simulated, rel=0.1)


def softmax(turns: bool) -> tuple[str, ...]:
    """S and O of a tile, then as long a softmax, with its results needed by the products that come next."""
    exponentials = [f"MUFU.EX2 R{i}, R{i}" for i in range(60)]
    first, then = (["BAR.SYNC R1, 0x100"], ["BAR.ARV R1, 0x100"]) if turns else ([], [])
    return (*first, *[SCORES] * 7, SCORES + ", gsb0", *then, wait(0), *exponentials)


def test_turns_put_a_softmax_under_the_others_products():
    assert predict(*softmax(turns=True)).tensor_use > 0.95
    assert predict(*softmax(turns=True), consumers=1).tensor_use < 0.55


def test_a_softmax_before_the_wait_is_hidden():
    """Under as many products as may be issued ahead."""
    exponentials = [f"MUFU.EX2 R{i}, R{i}" for i in range(25)]
    wide = OUT.replace("64x128", "64x256")
    products = [wide, wide + ", gsb0"]
    hidden = predict(*products, *exponentials, wait(0), consumers=1)
    behind = predict(*products, wait(0), *exponentials, consumers=1)
    assert hidden.tensor_use > 0.9 > 0.6 > behind.tensor_use


def test_who_is_first_by_chance_is_averaged():
    """Two warps that get into each other's way or not, by when each began, and stay so."""
    exponentials, additions = ([f"{x} R{i}, R{i}" for i in range(n)] for x, n in (("MUFU.EX2", 30), ("FADD", 60)))
    products = [*[SCORES] * 7, SCORES + ", gsb0", *[OUT] * 3, OUT + ", gsb0"]
    loop = (*products, wait(1), *exponentials, wait(0), *additions)
    steps = [sm_model._step(x) for x in (*loop, BACK)]
    each = [sm_model._simulate(steps, 2, skew) for skew in sm_model._SKEWS]
    assert len(each) == 7 and max(each) > 1.02 * min(each)
    assert predict(*loop).simulated == pytest.approx(sum(each) / 7)
