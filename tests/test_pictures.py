"""The pictures of the workbench: the data they draw, against what can be counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cuflash
from cuflash import emulator, mods, workbench
from cuflash.errors import ArgumentError

matplotlib = pytest.importorskip("matplotlib")


def seen(q_len: int, k_len: int, causal=False, window=(-1, -1)) -> np.ndarray:
    """By the definition: bottom-right, key by key."""
    out = np.ones((q_len, k_len), bool)
    for i, j in itertools.product(range(q_len), range(k_len)):
        distance = j - (i + k_len - q_len)
        out[i, j] &= not causal or distance <= 0
        out[i, j] &= window[0] < 0 or distance >= -window[0]
        out[i, j] &= window[1] < 0 or distance <= window[1]
    return out


# --- Masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal, window", [(False, (-1, -1)), (True, (-1, -1)), (False, (40, 7)), (True, (30, -1))])
def test_tiles_of_a_mask(causal, window):
    lengths, tile = [(70, 70), (33, 100)], (32, 16)
    figure = workbench.plot_mask(*zip(*lengths, strict=True), causal=causal, window_size=window, tile=tile)
    images = figure.axes[0].get_images()
    assert len(images) == 4
    q_begin = k_begin = 0
    for (q_len, k_len), kinds, pairs in zip(lengths, images[::2], images[1::2], strict=True):
        expected = seen(q_len, k_len, causal, window)
        np.testing.assert_array_equal(pairs.get_array()[..., 3] > 0, expected)
        assert pairs.get_extent() == [k_begin, k_begin + k_len, q_begin + q_len, q_begin]
        for (i, j), kind in np.ndenumerate(kinds.get_array()):
            own = expected[tile[0] * i : tile[0] * (i + 1), tile[1] * j : tile[1] * (j + 1)]
            cut = tile[1] * (j + 1) > k_len
            assert kind == (0 if not own.any() else 2 if own.all() and not cut else 1), (i, j)
        q_begin, k_begin = q_begin + q_len, k_begin + k_len


def test_a_mask_mod_is_asked_for_its_sequence_and_head():
    figure = workbench.plot_mask(
        [16, 16], mask_mod=lambda b, h, q_idx, kv_idx: (q_idx + b + h) % 2 == kv_idx % 2, tile=(16, 16), h=1
    )
    first, second = (image.get_array()[..., 3] > 0 for image in figure.axes[0].get_images()[1::2])
    rows, keys = np.ogrid[:16, :16]
    np.testing.assert_array_equal(first, (rows + 1) % 2 == keys % 2)
    np.testing.assert_array_equal(second, rows % 2 == keys % 2)


# --- Visits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("causal, window", [(True, (-1, -1)), (False, (70, 20)), (False, (-1, -1))])
def test_a_block_visits_what_the_mask_leaves(arch, causal, window):
    """All tiles with a key that is seen and no other, the last first, each once."""
    sequences, heads = (1, 2) if causal else (2, 1)
    q, k = (np.zeros((sequences, n, heads, 64), np.float16) for n in (260, 420))
    found = workbench.visits(q, k, k, arch=arch, causal=causal, window_size=window)
    expected = seen(260, 420, causal, window)
    size = {"sm_80": 64, "sm_90a": 128}[arch]
    for sequence, head in itertools.product(range(sequences), range(heads)):
        own = sorted((x for x in found if (x.sequence, x.head) == (sequence, head)), key=lambda x: x.queries)
        assert [n for x in own for n in range(*x.queries)] == list(range(260))
        for visit in own:
            rows = expected[slice(*visit.queries)]
            tiles = [begin for begin in range(0, 420, size) if rows[:, begin : begin + size].any()]
            assert visit.keys == tuple((begin, min(begin + size, 420)) for begin in tiles[::-1])


def test_visits_of_a_packed_batch():
    starts = np.array([0, 70, 70, 300], np.int32)
    x = np.zeros((300, 1, 64), np.float16)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    found = workbench.visits(x, x, x, causal=True, **lengths)
    assert sorted(x.queries for x in found) == [(0, 70), (70, 198), (198, 300)]
    assert {x.queries: x.keys for x in found} == {
        (0, 70): ((64, 70), (0, 64)),
        (70, 198): ((134, 198), (70, 134)),
        (198, 300): ((262, 300), (198, 262), (134, 198), (70, 134)),
    }
    axes = workbench.plot_visits(x, x, x, causal=True, **lengths).axes[0]
    drawn = {(p.get_y(), p.get_x(), p.get_width()): t.get_text() for p, t in zip(axes.patches, axes.texts, strict=True)}
    assert len(drawn) == 8 and drawn[198, 70, 64] == "4" and drawn[0, 64, 6] == "1"


# --- Timelines ----------------------------------------------------------------------------------------------------


def traced(arch="sm_90a", dim=64, **how) -> emulator.Trace:
    """Five tiles of keys; on sm_90a for three warpgroups of consumers, at head dim 128 for two, which take turns."""
    q, k = (np.zeros((1, n, 1, dim), np.float16) for n in (130, 600))
    with emulator.schedule(**how), emulator.tracing() as trace:
        workbench.visits(q, k, k, arch=arch)
    return trace


def test_a_timeline_does_not_depend_on_the_schedule(seed):
    expected = workbench.timeline(traced())
    for n in range(3):
        found = workbench.timeline(traced(seed=seed + n, landing="early" if n % 2 else "late"))
        assert found == expected


def test_a_timeline_is_possible():
    """Nobody does two things at once, and nobody is let go on before somebody has let him."""
    found = workbench.timeline(traced())
    assert found.kernel == "forward_sm90" and found.rows[:3] == ["warp 0", "warp 4", "products of warp 4"]
    for row in found.rows:
        bars = found.of(row)
        assert all(a.end <= b.begin for a, b in itertools.pairwise(bars)), row
    products = sorted((bar for row in found.rows for bar in found.of(row, "product")), key=lambda bar: bar.begin)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(products))  # warps 4, 8, 12 have one matrix unit
    copies = found.of("k_full[0]", "copy") + found.of("k_full[1]", "copy")
    assert len(copies) == 5 and {bar.label for bar in copies} == {"k"}
    waits = found.of("warp 0", "wait")
    assert {bar.label for bar in waits} <= {"k_empty[0]", "k_empty[1]", "v_empty[0]", "v_empty[1]"}
    for bar in waits:
        signals = [x.end for w in (4, 8, 12) for x in found.of(f"warp {w}", "signal") if x.label == bar.label]
        assert bar.end in signals and bar.after in range(4, 16)
    # Two stages: two tiles of keys on their way before the first product, the third only behind the first scores.
    starts = sorted(bar.begin for bar in copies)
    scores = [bar for bar in products if bar.label == "issue_qk"]
    assert starts[1] < scores[0].begin < starts[2]
    assert {bar.label for bar in products} == {"issue_qk", "issue_pv"}


def test_who_issues_first_multiplies_first():
    """Of two warps with one matrix unit, whichever the emulator ran first."""

    def does(warp: int, *what: str) -> list[emulator.Event]:
        return [emulator.Event("toy", 0, (0, 0, 0), warp, 32, w, False, -1, 0, 0, "toy.cu", 1) for w in what]

    slow, quick = does(4, "shfl", "wgmma", "wgmma_wait"), does(0, "bulk_commit", "wgmma", "wgmma_wait")
    for events in (slow + quick, quick + slow):
        found = workbench.timeline(emulator.Trace(events, launches=1), product_ticks=9, shuffle_ticks=4)
        products = {row: found.of(f"products of {row}") for row in ("warp 0", "warp 4")}
        assert {row: (bar.begin, bar.end) for row, (bar,) in products.items()} == {
            "warp 0": (2, 11),
            "warp 4": (11, 20),
        }
        assert found.waited("warp 4") == {"products": 20 - 5}


def under_products(found: workbench.Timeline) -> int:
    """How many tiles of a consumer have their maxima taken while O is computed."""
    products = [bar for bar in found.of("products of warp 8") if bar.label == "issue_pv"]
    shuffles = [bar for bar in found.of("warp 8", "shuffle") if bar.label == "quad_max"]
    return sum(any(p.begin < s.begin < p.end for p in products) for s in shuffles)


def test_softmax_runs_under_the_product_before():
    """Between the wait for S and that for O, as the kernel's page says; not where it waits for both first."""
    found = workbench.timeline(traced(dim=128))
    assert under_products(found) == 4  # of five tiles: when the first is weighed, there is no O yet
    assert "barrier 3" in found.waited("warp 8")

    q, k = (np.zeros((1, n, 1, 128), np.float16) for n in (130, 600))
    kernel = workbench.load("forward_sm90", q, k, k).edit(
        "forward_sm90.cu", "struct ForwardPlan {", "struct\n\nForwardPlan {"
    )
    kernel = kernel.edit("forward_sm90.cu", "hw::wgmma_wait<1>();", "hw::wgmma_wait<0>();")
    edited = workbench.timeline(kernel.trace())
    assert under_products(edited) == 0 and edited.rows == found.rows  # names come from the text that ran
    assert max(bar.end for bar in edited.bars) > max(bar.end for bar in found.bars)


def test_a_timeline_of_the_other_kernel():
    found = workbench.timeline(traced("sm_80"))
    warps = [f"warp {n}" for n in range(4)]
    assert workbench.plot_timeline(found).axes[0].get_yticklabels()[0].get_text() == "warp 0"  # which does everything
    assert found.kernel == "forward_sm80" and [row for row in found.rows if row.startswith("warp")] == warps
    for row in warps:  # alike: they meet at every tile, and wait for copies alone
        assert set(found.waited(row)) == {"copies"}
        copied = {bar.label for bar in found.of(f"copies of {row}")}
        assert copied >= {"k", "v"} and copied <= {"q", "k", "v", "zeros"}  # of two queries not all have one
        assert {bar.label for bar in found.of(row, "product")} == {"multiply_qk", "multiply_pv"}


def test_longer_copies_make_longer_waits():
    trace = traced()
    short, long = (workbench.timeline(trace, copy_ticks=n).waited("warp 4") for n in (10, 300))
    assert long["q_full[0]"] == short["q_full[0]"] + 290 and long["k_full[0]"] > short.get("k_full[0]", 0)


def test_a_timeline_is_drawn():
    found = workbench.timeline(traced())
    axes = workbench.plot_timeline(found).axes[0]
    assert len(axes.patches) == len(found.bars) and f"{len(found.bars)} bars in {len(found.rows)} rows" in repr(found)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert [name.split(",")[0] for name in names] == found.rows
    assert names[:3] == ["warp 0, producer", "warp 4, consumer", "products of warp 4"]
    part = workbench.plot_timeline(found, rows=["warp 0"], ticks=(0, 50)).axes[0]
    assert len(part.patches) == sum(bar.begin < 50 for bar in found.of("warp 0"))
    with pytest.raises(
        ArgumentError, match=r"rows=\['warp 3'\] are not in the timeline, whose rows are warp 0, warp 4"
    ):
        workbench.plot_timeline(found, rows=["warp 3"])
    with pytest.raises(ArgumentError, match="is not in the trace of 1 launches"):
        workbench.timeline(traced(), launch=1)


# --- Bytes --------------------------------------------------------------------------------------------------------


def test_bytes_of_each_way():
    n, size = 256, 256 * 128  # an array of rows
    naive, outside, ours = workbench.bytes_moved([n])
    pairs, blocks = n * n * 2, n // 128
    assert naive.read == {"q": size, "k": blocks * size, "v": blocks * size, "s": pairs, "p": pairs}
    assert naive.written == {"s": pairs, "p": pairs, "out": size}
    tiles = n // 128
    numbers = {"out": tiles * 2 * size, "l": tiles * n * 4, "m": tiles * n * 4}  # float32
    assert outside.read == {"q": tiles * size, "k": size, "v": size, **numbers}
    assert outside.written == numbers
    assert ours.read == {"q": size, "k": blocks * size, "v": blocks * size} and ours.written == {"out": size}
    for way in (naive, outside, ours):
        assert way.total == sum(way.arrays.values()) and way.error < 1e-3
    axes = workbench.plot_bytes([naive, outside, ours]).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) * 1024 == naive.total + outside.total + ours.total
    assert "queries\noutside" in [text.get_text() for text in axes.texts]


def test_what_is_refused():
    x = np.zeros((1, 8, 1, 32), np.float16)
    for refused, message in (
        (lambda: workbench.plot_mask([3, 0]), r"q_len=\[3, 0\]"),
        (lambda: workbench.plot_mask(5000), "at most 4096"),
        (lambda: workbench.plot_mask(8, tile=(0, 8)), r"tile=\(0, 8\)"),
        (lambda: workbench.plot_visits(x, x, x, head=1), r"head=1 is not among .*: \[\(0, 0\)\]"),
        (lambda: workbench.plot_bytes([]), "moved is empty"),
        (lambda: workbench.plot_timeline(workbench.Timeline("k", (0, 0, 0)), ticks=(5, 1)), r"ticks=\(5, 1\)"),
        (lambda: workbench.visits(x.tolist(), x, x), "q is a list, must be a NumPy array"),
        (lambda: workbench.bytes_moved([100]), "lengths has 100, must be multiples of 128"),
        (lambda: workbench.bytes_moved([128], ["mine"]), "ways has 'mine', must be among three kernels"),
    ):
        with pytest.raises(ArgumentError, match=message):
            refused()


def test_settings_come_back():
    before = cuflash.config.backend, cuflash.config.arch
    x = np.zeros((1, 8, 1, 64), np.float16)
    workbench.visits(x, x, x, arch="sm_90a")
    with pytest.raises(ArgumentError):
        workbench.visits(x, x, x, scale="much")
    assert (cuflash.config.backend, cuflash.config.arch) == before
    assert mods.causal()
