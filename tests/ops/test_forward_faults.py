"""Planted bugs: one edit of the shipped kernel text each, and the emulator (or the numbers) must notice.

Also the reverse: a barrier whose removal nothing reports would not be needed, so every one is removed in turn.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends import Emulator, using
from cases import Case
from compare import check_forward

import cuflash
from cuflash import arch
from cuflash.errors import EmulatorError
from cuflash.jit import source
from cuflash.jit.source import Edit
from cuflash.ops import forward

KERNEL = "forward_sm80.cu"
# Three key tiles and two query tiles in one block (the hint is 1), head dim short of its class, a tail in q and in k.
CASE = Case(
    "float16", (200, 40), (150, 40), 2, 1, 56, 40, window_size=(120, 40), max_seqlen_q=1, sink="float32", seed=3
)

UNORDERED = "race|uninitialised"  # read before another warp's write: which of the two depends on who came first

# name -> (edits, what the emulator's report says; None: the numbers, the guards or a report give it away)
BUGS: dict[str, tuple[tuple[Edit, ...], str | None]] = {
    "wait for K missing": (
        (Edit(KERNEL, "first time, Q\n    hw::cp_async_wait<0>();", "first time, Q\n    hw::cp_async_wait<1>();"),),
        UNORDERED,
    ),
    "wait for V missing": (
        (Edit(KERNEL, "own copies of V\n    hw::cp_async_wait<0>();", "own copies of V\n"),),
        UNORDERED,
    ),
    "barrier before S = Q K missing": (
        (Edit(KERNEL, "nobody reads the previous V any more\n    hw::sync_threads();", "\n"),),
        UNORDERED,
    ),
    "barrier before O += P V missing": (
        (Edit(KERNEL, "nobody reads K any more\n    hw::sync_threads();", "\n"),),
        UNORDERED,
    ),
    "barrier between query tiles missing": (
        (Edit(KERNEL, "[] { hw::sync_threads(); }", "[] {}"),),
        UNORDERED,
    ),
    "meeting of a warp's lanes before the store missing": (
        (Edit("tile/store.cuh", "  hw::sync_warp();\n", "\n"),),
        UNORDERED,
    ),
    "K refilled before all have read it": (
        (
            Edit(
                KERNEL,
                "    // wait   V landed <- own copies of V\n",
                "    n = find_tile(n - 1);\n    if (n >= first_k_tile) {\n"
                "      k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);\n"
                "      hw::cp_async_commit();\n      stage(n);\n    }\n",
            ),
            Edit(
                KERNEL,
                "any more\n    hw::sync_threads();\n    n = find_tile(n - 1);\n    if (n >= first_k_tile) {\n"
                "      k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);\n"
                "      hw::cp_async_commit();\n      stage(n);\n    }\n",
                "any more\n    hw::sync_threads();\n",
            ),
        ),
        UNORDERED,
    ),
    "reader's swizzle differs from the writer's": (
        (Edit("tile/shared_tile.cuh", "flip(Tile::key(lane_row) ^", "flip(Tile::key(lane_row + 1) ^"),),
        None,
    ),
    "wrong fragment row": (
        (Edit("tile/fragment.cuh", "+ hw::lane_idx() / 4; }", "+ hw::lane_idx() % 8; }"),),
        None,
    ),
    "length tail off by one": (
        (Edit("tile/mask.cuh", "(column < end[row])", "(column <= end[row])"),),
        None,
    ),
    "rows copied past the end": (
        (Edit("tile/shared_tile.cuh", "+ step * kRowStep < rows;", "+ step * kRowStep <= rows;"),),
        None,
    ),
    "row read past its end": (
        (Edit(KERNEL, "row_bytes = p.head_dim * Plan::kBytes;", "row_bytes = (p.head_dim + 1) * Plan::kBytes;"),),
        None,
    ),
    "row stored past the end": (
        (Edit("tile/store.cuh", "if (row < owned) write(", "if (row <= owned) write("),),
        None,
    ),
    "a lane leaves the others": (
        (Edit("tile/store.cuh", "  hw::sync_warp();\n", "  if (hw::lane_idx() != 5) hw::sync_warp();\n"),),
        "divergence|collective|deadlock",
    ),
    "a lane skips a shuffle": (
        (
            Edit(
                "tile/fragment.cuh",
                "return value + hw::shfl_xor(value, 2);",
                "return hw::lane_idx() == 9 ? value : value + hw::shfl_xor(value, 2);",
            ),
        ),
        "divergence|collective|deadlock",
    ),
    "O not rescaled to the new maximum": (
        (Edit("tile/softmax.cuh", "{ x *= rescale[row]; }", "{ x *= 1.0f; }"),),
        None,
    ),
    "sink forgotten in the sum": (
        (Edit("tile/softmax.cuh", "rescale, hw::exp2_approx(above > 0.0f ? 0.0f : above))", "rescale, 0.0f)"),),
        None,
    ),
    "K rows gathered before they are written": (
        (Edit(KERNEL, "    hw::cp_async_commit();\n    stage(n);\n  }\n", "    stage(n);\n  }\n"),),
        None,
    ),
}


def run() -> None:
    inputs = CASE.inputs()
    results = Emulator().run(inputs, arch="sm_80", max_seqlen_q=CASE.max_seqlen_q)
    check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords)


def test_without_a_bug_nothing_is_reported():
    run()


def test_every_barrier_and_wait_is_removed_in_turn():
    spec = forward.representative(arch.named("sm_80"))[0]
    text = "".join(
        line
        for file, _, line in source.numbered(spec.text("cuda"))
        if file == KERNEL or (file.startswith("tile/") and file != "tile/mods.cuh")  # test_mods_kernels.py has its own
    )
    taken = "".join(edit.old for name, (edits, _) in BUGS.items() if "missing" in name for edit in edits)
    for call in ("hw::sync_threads()", "hw::sync_warp()", "hw::cp_async_wait<0>()"):
        assert taken.count(call) == text.count(call) > 0


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(edited, name):
    edits, report = BUGS[name]
    edited(*edits)
    if report is None:
        with pytest.raises((EmulatorError, AssertionError)):
            run()
    else:
        with pytest.raises(EmulatorError, match=report):
            run()


@pytest.mark.parametrize("name", ["rows copied past the end", "row read past its end"])
def test_one_element_past_an_array_is_out_of_bounds(edited, name):
    """The same bugs where nothing lies behind the rows."""
    edited(*BUGS[name][0])
    q, k, v = (np.ones((1, 70, 1, d), np.float16) for d in (56, 56, 56))
    with using("emulator", "sm_80"), pytest.raises(EmulatorError, match="out of bounds"):
        cuflash.attention(q, k, v)
