"""Attention forward over keys in pages: bit for bit what it is over the same keys side by side.

Every test makes a call on contiguous keys through the API and launches what that call launched once more, its keys
scattered over pages: of the rest nothing is said twice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from backends import using
from cases import Case, Entry, Inputs, draw_one, poisoned

import cuflash
from cuflash import arch, array, dtypes
from cuflash.array import TensorView, of_numpy
from cuflash.errors import EmulatorError
from cuflash.jit.source import Edit
from cuflash.ops import forward

AUX = ("lse", "max_logit")
PAGE_SIZES = (1, 2, 3, 16, 48, 100, 256)
ABSURD = 2**31 - 1  # an entry of a page table that nobody may follow
# Every head-dim class, dtype and load width; with rows of 64 bytes, an odd multiple of it, and of 128.
PALETTE = (
    Entry("bfloat16", 32, 32, 16),
    Entry("float16", 64, 64, 16),
    Entry("bfloat16", 96, 96, 4),
    Entry("float16", 128, 128, 16),
    Entry("bfloat16", 192, 128, 16),
    Entry("float16", 256, 256, 2),
    Entry("float32", 64, 64, 16),
    Entry("float32", 128, 32, 4),
    Entry("float32", 192, 192, 16),
)
CASES_EACH = 8
COST = 40_000  # matrix instructions a case, at most


@dataclasses.dataclass
class Launch:
    """What a call on contiguous keys launched, and what it wrote."""

    plan: forward.ForwardPlan
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any]

    @property
    def results(self) -> dict[str, bytes]:
        return {name: self.arrays[name].tobytes() for name in ("out", *AUX) if name in self.arrays}

    def lengths(self) -> np.ndarray:
        """Keys in use of every sequence."""
        problem, starts = self.plan.problem, self.arrays.get("cu_seqlens_k")
        rows = np.full(problem.batch, problem.k_rows) if starts is None else np.diff(starts)
        return np.minimum(rows, self.arrays.get("seqused_k", rows))


def launched(call: Callable[[], Any], name: str = "sm_80") -> Launch:
    """The one launch of a call on the emulator."""
    found = []
    launch = forward.ForwardPlan.launch

    def record(plan: forward.ForwardPlan, views: dict[str, TensorView], **numbers: Any) -> None:
        launch(plan, views, **numbers)
        found.append(Launch(plan, {name: view.as_numpy() for name, view in views.items()}, numbers))

    with using("emulator", name), mock.patch.object(forward.ForwardPlan, "launch", record):
        call()
    (one,) = found
    return one


def in_pages(
    given: Launch,
    page_size: int,
    rng: np.random.Generator,
    *,
    layout: str = "contiguous",
    offset: int = 0,
    leftpad: np.ndarray | None = None,
) -> Launch:
    """The same launch, not yet run, with keys in shuffled pages: NaN in every slot that is not a key, absurd entries
    for pages that no key needs, and no entry at all behind the last one that the longest sequence needs."""
    problem, arrays = given.plan.problem, dict(given.arrays)
    lengths = given.lengths()
    pad = np.zeros_like(lengths) if leftpad is None else leftpad
    needed = -(-(lengths + pad) // page_size)
    max_pages = int(max(needed, default=0))
    spare = 3  # pages that no sequence owns
    ids = rng.permutation(int(needed.sum()) + spare).astype(np.int32)
    table = np.full((problem.batch, max_pages), ABSURD, np.int32)
    pages = {
        name: poisoned(
            (len(ids), page_size, *arrays[name].shape[-2:]), arrays[name].dtype, layout=layout, offset=offset
        ).array
        for name in "kv"
    }
    starts = arrays.pop("cu_seqlens_k", None)
    for b, length in enumerate(lengths):
        used, ids = ids[: needed[b]], ids[needed[b] :]
        table[b, pad[b] // page_size : needed[b]] = used[pad[b] // page_size :]
        for name in "kv":
            keys = arrays[name][b] if starts is None else arrays[name][starts[b] :]
            for j in range(length):
                slot = pad[b] + j
                pages[name][table[b, slot // page_size], slot % page_size] = keys[j]
    arrays |= pages
    arrays |= {"seqused_k": lengths.astype(np.int32), "page_table": table}
    if leftpad is not None:
        arrays["cache_leftpad"] = pad.astype(np.int32)
    for name in ("out", *AUX):
        if name in arrays:
            arrays[name] = array.empty_host(arrays[name].shape, dtypes.BY_NUMPY[arrays[name].dtype])
            arrays[name].reshape(-1).view(np.uint8)[...] = 0xFF
    steps: Any = {name: of_numpy(x).strides[:3] for name, x in pages.items()}
    problem = dataclasses.replace(
        problem, page_size=page_size, num_pages=len(pages["k"]), max_pages=max_pages, page_table_stride=max_pages,
        k_rows=max_pages * page_size,
        seqused_k=True, k_strides=steps["k"], v_strides=steps["v"],
        out_strides=tuple(given.plan.problem.out_strides[:1]) + of_numpy(arrays["out"]).strides[-3:-1],
    )  # fmt: skip
    return Launch(forward.plan(problem, given.plan.arch), arrays, given.numbers)


def attend(inputs: Inputs, **more: Any) -> Callable[[], Any]:
    """The call of a case on contiguous keys."""
    return lambda: cuflash.attention(inputs.q, inputs.k, inputs.v, aux=AUX, **inputs.keywords, **more)


def run(launch: Launch) -> dict[str, bytes]:
    launch.plan.launch({name: of_numpy(x) for name, x in launch.arrays.items()}, **launch.numbers)
    return launch.results


def check_paged(call: Callable[[], Any], page_size: int, rng: np.random.Generator, **how: Any) -> None:
    contiguous = launched(call, how.pop("name", "sm_80"))
    paged = in_pages(contiguous, page_size, rng, **how)
    assert paged.plan.grid[0] == 0 or paged.plan.variant.paged
    assert run(paged) == contiguous.results, f"page size {page_size}"


@pytest.mark.parametrize("entry", PALETTE, ids=lambda e: f"{e.dtype}-{e.dim_class}-{e.dim_v_class}-{e.load_bytes}")
def test_generated_cases(entry, seed):
    """Queries dense and packed; causal, window, softcap, ALiBi, sink, strides, used lengths; head dims between classes;
    one case in four with dropout."""
    rng = np.random.default_rng([seed, PALETTE.index(entry)])
    for i in range(CASES_EACH):
        case = draw_one(entry, rng, features=int(rng.integers(0, 6)), cost=COST)
        if i % 4 == 3:
            case = dataclasses.replace(case, dropout=(0.3, 7, i))
        inputs = case.inputs()
        page_size = int(rng.choice(PAGE_SIZES))
        try:
            if case.batch and max(case.lengths_q):
                check_paged(attend(inputs), page_size, rng, layout=case.layout, offset=case.offset)
        except Exception as error:
            error.add_note(f"page size {page_size}, case: {case!r}")
            raise


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("lengths_q, packed", [((1, 1, 1, 1), False), ((130, 0, 1, 7), True)])
def test_page_sizes(page_size, lengths_q, packed, rng):
    """Steps of generation, and chunks of prompts mixed with them."""
    case = Case(
        "float16", lengths_q, (300, 256, 0, 17), 4, 2, 64, 64, packed=packed, causal=True, window_size=(200, 0),
        softcap=20.0, sink="float32", seqused_k=(300, 256, 0, 17),
    )  # fmt: skip
    inputs = case.inputs()
    check_paged(attend(inputs), page_size, rng)


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_padding_before_the_first_key(page_size, rng):
    """NaN there, and of pages that hold nothing else no entry is read."""
    case = Case("float16", (130, 0, 1, 7), (300, 256, 0, 17), 4, 2, 64, 64, causal=True, window_size=(200, 0))
    check_paged(attend(case.inputs()), page_size, rng, leftpad=np.array([3, 0, 5, 130]))


# Tiles that end with a sequence's keys and past the table; query tiles of one block (the hint is 1), and without a key.
HOPPER = Case(
    "float16", (130, 40, 260), (0, 256, 300), 2, 1, 56, 40, window_size=(300, 140), max_seqlen_q=1, sink="float32"
)


@pytest.mark.parametrize("page_size", [1, 3, 8, 20, 48, 128, 256, 272])
def test_on_hopper(page_size, rng):
    """Parts of pages that are parts of key tiles, and rows one by one; with padding before the first key."""
    contiguous = launched(attend(HOPPER.inputs(), max_seqlen_q=1), "sm_90a")
    for n, leftpad in enumerate((None, None, np.array([3, 0, 5]))):
        paged = in_pages(contiguous, page_size, rng, layout="heads_first", leftpad=leftpad)
        assert isinstance(paged.plan.variant, forward.ForwardSm90Variant)
        with cuflash.emulator.schedule(seed=page_size, landing="early" if n == 1 else "late"):
            assert run(paged) == contiguous.results


@pytest.mark.parametrize("page_size", [3, 16])
def test_heads_that_share_tiles_on_hopper(page_size, rng):
    inputs = Case("float16", (3, 1, 70), (300, 7, 90), 6, 2, 56, 40, causal=True).inputs()
    for pack_heads in (True, False):
        check_paged(attend(inputs, kernel_options={"pack_heads": pack_heads}), page_size, rng, name="sm_90a")


@pytest.mark.parametrize("d, d_v", [(96, 64), (256, 256)])
def test_chunks_of_tiles_on_hopper(d, d_v, rng):
    """Rows of 64 bytes, and tiles that are no multiple of the 32 rows that are looked up at a time."""
    inputs = Case("bfloat16", (70, 3), (330, 70), 2, 1, d, d_v, causal=True).inputs()
    for page_size in (3, 16):
        check_paged(attend(inputs), page_size, rng, name="sm_90a")


@pytest.mark.parametrize("name", ["sm_86", "sm_90a"])
def test_tiles_of_other_chips(name, rng):
    for dtype, d in (("bfloat16", 128), ("float16", 256), ("float32", 256)):
        inputs = Case(dtype, (70, 3), (130, 70), 2, 1, d, d, causal=True).inputs()
        check_paged(attend(inputs, kernel_options={"kernel": "sm_80"}), 16, rng, name=name)


def test_mods_see_positions_and_not_pages(rng):
    """A mask of documents, read from memory, and a bias of distance, beside window and softcap."""
    inputs = Case("float16", (70, 33), (150, 70), 4, 2, 64, 64, window_size=(90, 0), softcap=5.0).inputs()
    documents = np.sort(rng.integers(0, 4, 150)).astype(np.int32)
    slope = 0.125

    def score_mod(score, b, h, q_idx, kv_idx):
        return score - slope * abs(q_idx - kv_idx) * (h + 1)

    def mask_mod(b, h, q_idx, kv_idx):
        return documents[q_idx] == documents[kv_idx]

    for mods in ({"mask_mod": mask_mod}, {"score_mod": score_mod}, {"mask_mod": mask_mod, "score_mod": score_mod}):
        check_paged(attend(inputs, **mods), 24, rng)
    for page_size in (24, 20):
        check_paged(attend(inputs, **mods), page_size, rng, name="sm_90a")


@pytest.mark.parametrize("name, page_sizes", [("sm_80", (7,)), ("sm_90a", (7, 16))])
def test_same_bits_under_any_schedule(name, page_sizes, rng):
    inputs = Case("bfloat16", (70, 0, 131), (90, 3, 131), 2, 1, 128, 128, causal=True).inputs()
    contiguous = launched(attend(inputs), name)
    for i in range(10 * len(page_sizes)):
        with cuflash.emulator.schedule(seed=i, landing="early" if i % 3 == 2 else "late"):
            assert run(in_pages(contiguous, page_sizes[i % len(page_sizes)], rng)) == contiguous.results


def test_a_table_may_be_a_slice_of_a_wider_one(rng):
    inputs = Case("float16", (3, 3), (100, 100), 1, 1, 64, 64, packed=False).inputs()
    contiguous = launched(attend(inputs))
    paged = in_pages(contiguous, 16, rng)
    wide = np.full((2, 50), ABSURD, np.int32)
    wide[:, 4:11] = paged.arrays["page_table"]
    paged.arrays["page_table"] = wide[:, 4:11]
    problem = dataclasses.replace(paged.plan.problem, page_table_stride=50)
    assert run(dataclasses.replace(paged, plan=forward.plan(problem, paged.plan.arch))) == contiguous.results


@pytest.mark.parametrize("name, page_size", [("sm_80", 4), ("sm_90a", 4), ("sm_90a", 8)])
def test_pages_far_apart(name, page_size):
    """A page whose bytes begin past 2^31."""
    d = 64
    pages, step = 9, 2**29 // page_size * page_size  # elements from page to page
    base = np.zeros(pages * step, np.float16)  # the system maps pages when they are touched
    far = np.lib.stride_tricks.as_strided(base, (pages, page_size, 1, d), (2 * step, 2 * d, 2 * d, 2))
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, n, 1, d)).astype(np.float16) for n in (5, 2 * page_size))
    contiguous = launched(lambda: cuflash.attention(q, k, k, aux=AUX), name)
    paged = in_pages(contiguous, page_size, rng)
    paged.arrays["page_table"] = np.array([[8, 7]], np.int32)
    far[8, :, :], far[7, :, :] = k[0, :page_size], k[0, page_size:]
    paged.arrays |= {"k": far, "v": far}
    steps: Any = of_numpy(far).strides[:3]
    problem = dataclasses.replace(paged.plan.problem, k_strides=steps, v_strides=steps, num_pages=pages)
    assert run(dataclasses.replace(paged, plan=forward.plan(problem, paged.plan.arch))) == contiguous.results


@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_keys_and_values_are_read_once(name, page_size, rng):
    """One query tile over 1,024 keys: the bytes of its keys and values, and no more than contiguous ones cost."""
    inputs = Case("float16", (16,), (1024,), 2, 2, 128, 128, packed=False).inputs()
    contiguous = launched(attend(inputs), name)
    paged = in_pages(contiguous, page_size, rng)
    counted = []
    for launch in (contiguous, paged):
        with cuflash.emulator.counting() as counters:
            run(launch)
        counted.append(counters)
    for name in "kv":
        read = [c.global_bytes_read[name] for c in counted]
        assert read[0] == read[1] == 2 * 1024 * 128 * 2  # heads, keys, dims, bytes
    assert not any(n for site, n in counted[1].bank_conflicts.items() if "tile/store.cuh" not in site)


def test_division_by_the_page_size():
    """The kernel's division, in Python, for every small size and some large ones, at multiples and beside them."""
    for size in (*range(1, 600), 1000, 2**15, 2**15 + 1, 65_535, 999_983, 2**30 - 1, 2**30):
        values = forward.page_values(size, 0)
        assert 0 <= values["page_multiplier"] < 2**32
        rows = np.array([0, 1, size - 1, size, size + 1, 2**30, 2**31 - 1, 2**31 - 1 - 2**31 % size], np.int64)
        rows = rows[rows < 2**31].tolist()
        for row in rows:
            high = (2 * row * values["page_multiplier"]) >> 32
            assert high >> values["page_shift"] == row // size, (row, size)


def test_page_numbers_do_not_compile(rng):
    """Page size, table width, lengths and batch: one variant, another than that of contiguous keys."""
    plans: set[forward.ForwardVariant | forward.ForwardSm90Variant] = set()
    for batch, length, page_size in ((1, 40, 16), (3, 100, 1), (2, 33, 64)):
        q, k = (np.ones((batch, n, 1, 64), np.float16) for n in (3, length))
        contiguous = launched(lambda: cuflash.attention(q, k, k))  # noqa: B023
        paged = in_pages(contiguous, page_size, rng)
        plans.add(paged.plan.variant)
        assert paged.plan.variant != contiguous.plan.variant
    assert len(plans) == 1


def test_launch_bytes_do_not_depend_on_lengths(rng):
    """What a replayed CUDA graph rests on: lengths and pages are the device's alone."""
    q, k = (np.ones((2, n, 1, 64), np.float16) for n in (1, 64))
    paged = in_pages(launched(lambda: cuflash.attention(q, k, k)), 16, rng)
    pointers = [1] * len(forward.POINTERS)
    before = paged.plan.params(pointers), paged.plan.grid
    paged.arrays["seqused_k"][...] = (3, 17)
    run(paged)
    assert (paged.plan.params(pointers), paged.plan.grid) == before


# Planted bugs --------------------------------------------------------------------------------------------------------

LOADER = "tile/paged.cuh"
PAD = np.array([0, 5])
BUGS = {
    "an entry read past the last page": (Edit(LOADER, "return slot < slots ?", "return slot < slots + 16 ?"),),
    "rows copied past the end": (
        Edit(LOADER, "return slot < slots ?", "return slot <= slots ?"),
        Edit(LOADER, "const i32 left = slot < slots ?", "const i32 left = slot <= slots ?"),
    ),
    "the page of a thread's first row for all its rows": (
        Edit(LOADER, "pages[step] = look_up(slot_of(step));", "pages[step] = look_up(slot_of(0));"),
    ),
    "a row counted from the tile and not from its page": (
        Edit(LOADER, "+ row_in_page(p, slot) * stride;", "+ (row_in_page(p, slot) - begin) * stride;"),
    ),
    "division off by a bit": (Edit("tile/arithmetic.cuh", ">> 32) >> shift;", ">> 31) >> shift;"),),
    "another sequence's table": (
        Edit(LOADER, "p.page_table + sequence * p.page_table_stride;", "p.page_table + 0 * p.page_table_stride;"),
    ),
    "padding forgotten": (Edit(LOADER, "slots = rows + pad;", "slots = rows;"),),
    "padding of the first sequence for all": (Edit(LOADER, "p.cache_leftpad + sequence)", "p.cache_leftpad)"),),
    "pages a page size of rows apart": (
        Edit(LOADER, "page * page_stride + row_in", "page * (p.page_size * stride) + row_in"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(edited, name, rng):
    # Other heads lie between a head's pages; the last sequence needs its table's last entry, of that page a part.
    inputs = Case("float16", (5, 7), (40, 90), 2, 2, 64, 64, causal=True).inputs()
    edited(*BUGS[name], where=lambda spec: spec.variant.paged)
    contiguous = launched(attend(inputs))
    with pytest.raises((EmulatorError, AssertionError)):
        assert run(in_pages(contiguous, 24, rng, layout="heads_first", leftpad=PAD)) == contiguous.results


def test_nothing_planted_nothing_caught(rng):
    inputs = Case("float16", (5, 7), (40, 90), 2, 2, 64, 64, causal=True).inputs()
    check_paged(attend(inputs), 24, rng, layout="heads_first", leftpad=PAD)


def test_every_paged_tile_fits_its_chip():
    for target in arch.ARCHES.values():
        for dtype in dtypes.KERNEL:
            for d in forward.HEAD_DIM_CLASSES:
                plain = forward.choose_variant(dtype, d, d, 16, target)
                paged = forward.choose_variant(dtype, d, d, 16, target, paged=True)
                assert paged.smem_bytes <= target.smem_bytes
                assert paged.tile.block_k == plain.tile.block_k, "sums are taken in the same order"


# Of Hopper's kernel: (page size; 20 is gathered), edit, what the emulator's report says.
KERNEL = "forward_sm90.cu"
UNORDERED = "race|uninitialised"
HOPPER_BUGS: dict[str, tuple[int, Edit, str | None]] = {
    "an entry read past the last page": (
        16, Edit(LOADER, "look_up_page(p, sequence, slot, keys)", "look_up_page(p, sequence, slot, keys + 16)"),
        "out of bounds"),
    "the page before": (16, Edit(LOADER, "slot = begin + row;", "slot = max_of(begin + row - 16, 0);"), None),
    "the first rows of every page": (48, Edit(LOADER, "keys), row_in_page(p, slot));", "keys), 0);"), None),
    "parts of a page in one place": (
        48, Edit(KERNEL, "to + static_cast<u32>(row * Chunk::kBytes), kV", "to + static_cast<u32>(0 * row), kV"), None),
    "copies before they are announced": (
        16, Edit(KERNEL, "      hw::sync_warp();\n      for_each_page", "      for_each_page"), "announced"),
    "too few bytes announced for pages": (
        16, Edit(KERNEL, "kHeadDim * Plan::kBytes);", "kHeadDim * Plan::kBytes - 16);"), None),
    "padding not gathered": (
        16, Edit(KERNEL, "if (p.page_rows > 0 && p.cache_leftpad == nullptr) {", "if (p.page_rows > 0) {"), None),
    "V of pages copied over what is read": (
        16, Edit(KERNEL, "if constexpr (kValues) hw::mbarrier_wait(barriers.v_empty(stage), "
                 "barriers.parity(tile) ^ 1);", ""), UNORDERED),
    "a key tile's word read early": (
        16, Edit(KERNEL, "key tile's word <-> loaders\n    if constexpr (V::kPaged) meet_loaders();", "\n"), None),
    "a query tile's words read early": (
        16, Edit(KERNEL, "query tile's words <-> loaders\n  if constexpr (V::kPaged) meet_loaders();", "\n"), None),
    "an entry gathered past the last page": (
        20, Edit(LOADER, "slots = min_of(keys, begin + kRows) + pad;", "slots = keys + 20 + pad;"), None),
    "rows of another lane": (20, Edit(LOADER, "hw::shfl(in_page, own)", "hw::shfl(in_page, own ^ 1)"), None),
    "gathered with another swizzle": (
        20, Edit(LOADER, "Chunk::unit_at(first + own, unit)", "Chunk::unit_at(first + own, unit ^ 1)"), None),
    "gathered rows not waited for": (20, Edit(KERNEL, "      hw::cp_async_wait<0>();\n", ""), UNORDERED),
    "gathered rows not fenced": (
        20, Edit(KERNEL, "wait<0>();\n      hw::fence_proxy_async();\n", "wait<0>();\n"), "proxy"),
    "one lane arrives before the others have fenced": (
        20, Edit(KERNEL, "      hw::sync_warp();\n      // arrive   k full", "      // arrive   k full"), None),
    "gathered rows not announced": (
        20, Edit(KERNEL, "if (hw::lane_idx() == 0) hw::mbarrier_arrive(full);", ""), "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOPPER_BUGS)
def test_planted_bug_is_caught_on_hopper(edited, name, rng):
    page_size, edit, report = HOPPER_BUGS[name]
    edited(edit, where=lambda spec: spec.variant.paged)
    contiguous = launched(attend(HOPPER.inputs(), max_seqlen_q=1), "sm_90a")
    leftpad = np.array([3, 0, 5]) if "padding" in name else None
    with pytest.raises((EmulatorError, AssertionError)) as caught:
        for n in range(8):
            with cuflash.emulator.schedule(seed=n, landing="early" if n % 2 else "late"):
                assert run(in_pages(contiguous, page_size, rng, leftpad=leftpad)) == contiguous.results
    if report is not None:
        assert re.search(report, str(caught.value))
