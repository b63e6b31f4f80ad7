"""What the emulator records of a launch that is traced: every meeting and every copy, in the order of the program."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
from backends import using
from test_emulator import BARRIER, LENGTH, SPEED, attend

import cuflash
from cuflash import emulator
from cuflash.emulator import Event
from cuflash.errors import ArgumentError, EmulatorError
from cuflash.jit import source


def by_warp(events: Iterable[Event]) -> dict[tuple, list[tuple]]:
    """What each warp of each block did, without when."""
    found = defaultdict(list)
    for e in events:
        found[e.block, e.warp].append((e.what, e.passed, e.object, e.phase, e.lanes, e.line, e.buffer, e.begin, e.end))
    return found


def test_everything_a_warp_does_is_there():
    untraced = attend(3)
    with emulator.counting() as counters, emulator.tracing() as trace:
        traced = attend(3)
    assert traced[3].tobytes() == untraced[3].tobytes()
    assert (trace.launches, trace.dropped) == (1, 0)
    events = trace.events
    assert repr(trace) == f"Trace({len(events):,} events, of emu_speed)"
    assert {e.kernel for e in events} == {"emu_speed"} and {e.lanes for e in events} == {32}
    whats = Counter((e.what, e.passed) for e in events)
    assert whats["mma_m16n8k16", False] == counters.matrix_instructions["mma_m16n8k16_bf16"]
    blocks, warps, tiles = LENGTH // 64, 4, LENGTH // 64
    meetings = blocks * warps * (1 + 2 * tiles)
    assert whats["sync_threads", False] == whats["sync_threads", True] == meetings
    assert whats["exit", False] == blocks * warps
    assert whats["cp_async_commit", False] == blocks * warps * (1 + 2 * tiles + 0)
    # A copy of a warp has 4 rows of 128 bytes; each block reads its own q and all of k and v.
    copies = Counter()
    for e in events:
        if e.what == "cp_async_16":
            copies[e.buffer] += e.end - e.begin
    assert copies == {"q": LENGTH * 128, "k": blocks * LENGTH * 128, "v": blocks * LENGTH * 128}


def test_a_file_and_line_for_each():
    with emulator.tracing() as trace:
        attend()
    text = source.read(source.folder() / SPEED).splitlines()
    assert {e.file for e in trace.events} == {SPEED, ""}  # nobody wrote the end of a thread
    for e in trace.events:
        assert e.what == "exit" or e.what.removesuffix("_m16n8k16") in text[e.line - 1], e


def hopper(**how) -> emulator.Trace:
    """Three key tiles, the last of them short, two consumers of three with queries."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (130, 300, 300))
    with using("emulator", "sm_90a"), emulator.schedule(**how), emulator.tracing() as trace:
        cuflash.attention(q, k, v)
    return trace


def test_no_one_goes_on_before_what_it_waits_for():
    """For every mbarrier: as many arrivals a phase, all of them, and all its copies, before anyone passes."""
    events = hopper(landing="early").events
    assert [e for e in events if e.what == "mbarrier_wait" and e.passed]
    for at, e in enumerate(events):
        if not e.passed or e.phase < 0:
            continue
        same = [i for i, x in enumerate(events) if (x.object, x.phase) == (e.object, e.phase) and not x.passed]
        if e.what == "mbarrier_wait":
            needed = [i for i in same if events[i].what.startswith("mbarrier_arrive") or events[i].what == "tma_load"]
        else:
            needed = [i for i in same if events[i].what in (e.what, "named_arrive")]
        assert needed and max(needed) < at, e


def test_a_warp_does_the_same_under_any_schedule(seed):
    """Its lanes come one by one, in any order: a warp's events stand as its program has them."""
    expected = by_warp(hopper().events)
    assert len(expected) == 16
    for n in range(4):
        assert by_warp(hopper(seed=seed + n, landing="early" if n % 2 else "late").events) == expected
    producer = [what for what, passed, *_ in expected[(0, 0, 0), 0] if not passed]
    load = producer.index("tma_load")
    # One lane announces and copies, between waits of all.
    assert producer[load - 2 : load + 1] == ["mbarrier_wait", "mbarrier_arrive_expect_tx", "tma_load"]
    assert Counter(producer)["tma_load"] == 3 + 3 + 3  # Q of three consumers, three tiles of K and of V


def test_what_stands_there():
    events = hopper().events
    codes = {(e.what, e.function, e.code) for e in events}
    assert ("mbarrier_init", "init", "hw::mbarrier_init(v_full(i), 1);") in codes
    issued = [e for e in events if e.what == "wgmma"]
    assert {e.function for e in issued} == {"issue_qk", "issue_pv"} and all("wgmma" in e.code for e in issued)
    assert {e.function for e in events if e.what == "shfl_xor"} == {"quad_max", "quad_sum"}
    assert {e.function for e in events if e.what == "sync_threads"} == {"compute_tiles"}


def test_threads_of_this_machine_change_nothing():
    found = []
    for n in (1, 2):
        with emulator.schedule(os_threads=n), emulator.tracing() as trace:
            attend(5)
        found.append(trace.events)
    assert found[0] == found[1] and {e.block for e in found[0]} == {(0, 0, 0), (1, 0, 0)}


def test_a_launch_that_fails_leaves_what_it_did():
    edit = source.Edit(SPEED, BARRIER, BARRIER.replace("hw::sync_threads();", ""))
    with emulator.tracing() as trace, pytest.raises(EmulatorError, match="race"):
        attend(0, edit)
    assert "cp_async_16" in {e.what for e in trace.events}
    assert "exit" not in {e.what for e in trace.events if e.block == trace.events[-1].block}


def test_the_limit_is_a_block_s():
    with emulator.tracing(limit=100) as trace:
        attend()
    assert Counter(e.block for e in trace.events) == {(0, 0, 0): 100, (1, 0, 0): 100}
    assert trace.dropped > 0
    with pytest.raises(ArgumentError, match="limit=0 must be an int from 1"), emulator.tracing(limit=0):
        pass
