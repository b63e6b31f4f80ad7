"""Faults planted in toy kernels: each is reported with its kind and lines; the mended kernel runs without a report."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from hw_toys import aligned

from cuflash import emulator
from cuflash.errors import EmulatorError


@dataclass(frozen=True)
class Fault:
    """A kernel with FAULT in its text, which `wrong` or `right` replaces.

    marks  the report names the lines with these comments at their end
    says   the report contains these words
    words  length of each array, in 4 bytes
    """

    kind: str
    body: str
    wrong: str
    right: str
    marks: tuple[str, ...]
    says: tuple[str, ...] = ()
    threads: int = 64
    words: dict[str, int] = field(default_factory=lambda: {"a": 512, "out": 512})


FAULTS = {
    "a read before the barrier that orders it": Fault(
        "race",
        """
        hw::store_shared(smem + 4 * thread, 1u);
        hw::sync_threads();
        hw::store_shared(smem + 4 * thread, 2u);  // write
        FAULT;
        const u32 x = hw::load_shared<u32>(smem + 4 * (63 - thread));  // read
        hw::store_global(out<u32>() + thread, x);
        """,
        "", "hw::sync_threads()", ("write", "read"), ("no block barrier between",),
    ),
    "a write before the barrier that orders it": Fault(
        "race",
        """
        hw::store_shared(smem + 16 * thread, u32x4{});
        hw::sync_threads();
        const u32x4 x = hw::load_shared<u32x4>(smem + 16 * (63 - thread));  // read
        FAULT;
        hw::store_shared(smem + 16 * thread, x);  // write
        """,
        "", "hw::sync_threads()", ("write", "read"),
    ),
    "a write after two warps have read": Fault(
        "race",
        """
        if (thread < 32) hw::store_shared(smem + 4 * lane, 7u);
        hw::sync_threads();
        const u32 x = hw::load_shared<u32>(smem + 4 * lane);  // read
        hw::store_global(out<u32>() + thread, x);
        FAULT;
        if (thread < 32) hw::store_shared(smem + 4 * lane, x);  // write
        """,
        "", "hw::sync_threads()", ("write", "read"),
    ),
    "two warps write one half word": Fault(
        "race",
        "hw::store_shared(smem + 2 * (FAULT), static_cast<u16>(thread));  // write\n",
        "thread - thread / 32", "thread", ("write",), ("the write of byte 62 ",),
    ),
    "a read that nobody has written for": Fault(
        "uninitialised",
        """
        if (thread < FAULT) hw::store_shared(smem + 4 * thread, 5u);
        hw::sync_threads();
        hw::store_global(out<u32>() + thread, hw::load_shared<u32>(smem + 4 * thread));  // read
        """,
        "63", "64", ("read",), ("thread 63 (warp 1, lane 31)", "byte 252"),
    ),
    "ldmatrix of a row that is half written": Fault(
        "uninitialised",
        """
        for (i32 i = 0; i < FAULT; ++i) hw::store_shared(smem + 16 * thread + 4 * i, 1u);
        hw::sync_warp();
        u32 r[4];
        hw::ldmatrix_x4(r, smem + 16 * thread);  // read
        """,
        "3 + (thread != 5)", "4", ("read",), ("thread 5 (warp 0, lane 5)", "byte 92"),
    ),
    "a copy that is not waited for": Fault(
        "race",
        """
        hw::cp_async_16(smem + 16 * thread, a<u8>() + 16 * thread, 16);  // copy
        hw::cp_async_commit();
        FAULT;
        const u32 x = hw::load_shared<u32>(smem + 16 * thread);  // read
        hw::store_global(out<u32>() + thread, x);
        """,
        "", "hw::cp_async_wait<0>()", ("copy", "read"), ("still in flight, issued by the same thread",),
    ),
    "a copy whose group the wait leaves out": Fault(
        "race",
        """
        hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, 4);
        hw::cp_async_commit();
        hw::cp_async_4(smem + 1024 + 4 * thread, a<u32>() + thread, 4);  // copy
        hw::cp_async_commit();
        hw::cp_async_wait<FAULT>();
        const u32 x = hw::load_shared<u32>(smem + 1024 + 4 * thread);  // read
        hw::store_global(out<u32>() + thread, x);
        """,
        "1", "0", ("copy", "read"),
    ),
    "a copy that was not committed": Fault(
        "race",
        """
        hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, 4);  // copy
        FAULT;
        hw::cp_async_wait<0>();
        const u32 x = hw::load_shared<u32>(smem + 4 * thread);  // read
        hw::store_global(out<u32>() + thread, x);
        """,
        "", "hw::cp_async_commit()", ("copy", "read"),
    ),
    "a copy another warp waited for, and no barrier": Fault(
        "race",
        """
        hw::store_shared(smem + 4 * thread, 1u);
        hw::sync_threads();
        if (thread < 32) hw::cp_async_4(smem + 4 * lane, a<u32>() + lane, 4);  // copy
        hw::cp_async_commit();
        hw::cp_async_wait<0>();
        FAULT;
        if (thread >= 32) hw::store_global(out<u32>() + lane, hw::load_shared<u32>(smem + 4 * lane));  // read
        """,
        "", "hw::sync_threads()", ("read",),
    ),
    "a copy into a stage that another warp still reads": Fault(
        "race",
        """
        hw::store_shared(smem + 4 * thread, 1u);
        hw::sync_threads();
        const u32 x = hw::load_shared<u32>(smem + 4 * (63 - thread));  // read
        hw::store_global(out<u32>() + thread, x);
        FAULT;
        hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, 4);  // copy
        hw::cp_async_commit();
        hw::cp_async_wait<0>();
        """,
        "", "hw::sync_threads()", ("read", "copy"),
    ),
    "a copy over a copy": Fault(
        "race",
        """
        hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, 4);  // first
        hw::cp_async_commit();
        FAULT;
        hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, 4);  // second
        hw::cp_async_commit();
        """,
        "", "hw::cp_async_wait<0>()", ("first", "second"),
    ),
    "stmatrix over what another warp reads": Fault(
        "race",
        """
        hw::store_shared(smem + 16 * thread, u32x4{});
        hw::sync_threads();
        u32 r[4];
        hw::ldmatrix_x4(r, smem + 16 * (63 - thread));  // read
        FAULT;
        hw::stmatrix_x4(smem + 16 * thread, r);  // write
        """,
        "", "hw::sync_threads()", ("read", "write"),
    ),
    "lanes at two calls": Fault(
        "divergence",
        """
        u32 x = 0;
        if (lane < FAULT)
          x = hw::shfl_xor(lane, 1);  // one
        else
          x = hw::shfl_xor(lane, 1);  // other
        hw::store_global(out<u32>() + thread, x);
        """,
        "16", "32 * (1 - thread / 32)", ("one", "other"), ("shfl_xor", "lanes of warp"),
    ),
    "lanes at two instructions": Fault(
        "divergence",
        """
        if (FAULT)
          hw::sync_warp();  // one
        else
          hw::ballot(true);  // other
        """,
        "lane == 9", "thread < 32", ("one", "other"), ("sync_warp", "ballot"),
    ),
    "warps at two barriers": Fault(
        "divergence",
        """
        if (FAULT)
          hw::sync_threads();  // one
        else
          hw::sync_threads();  // other
        """,
        "thread < 32", "n == 0", ("one", "other"), ("thread ",),
    ),
    "a lane that has left": Fault(
        "collective",
        """
        if (FAULT) return;
        hw::sync_warp();  // meet
        """,
        "thread == 40", "thread >= 32", ("meet",), ("lanes 8 have exited", "needs all 32 lanes of warp 1"),
    ),
    "half a warp at the barrier, half at a collective": Fault(
        "deadlock",
        """
        if (FAULT) hw::sync_threads();  // barrier
        hw::sync_warp();  // collective
        """,
        "lane < 16", "lane < 32", ("barrier", "collective"),
        ("threads 0-15, 32-47 wait at sync_threads", "threads 16-31, 48-63 wait at sync_warp"),
    ),
    "a loop without an end": Fault(
        "runaway",
        "for (i32 i = 0; i != FAULT; ++i) hw::store_shared(smem + 4 * thread, 1u);  // loop\n",
        "-1", "10", ("loop",), ("more than 100000 steps",),
    ),
    "global memory, one element past the end": Fault(
        "out of bounds",
        """
        for (i32 i = thread; i <= FAULT; i += 64)
          hw::store_global(out<u32>() + i % 512, hw::load_global(a<u32>() + i));  // access
        """,
        "512", "511", ("access",), ("0 bytes past the end of a, which has 2048 bytes", "read of 4 bytes", "thread 0 "),
    ),
    "global memory, before the beginning": Fault(
        "out of bounds",
        "hw::store_global(out<u16>() + thread - FAULT, static_cast<u16>(1));  // access\n",
        "1", "0", ("access",), ("write of 2 bytes", "2 bytes before the beginning of out", "thread 0 "),
    ),
    "global memory, the last bytes of an access": Fault(
        "out of bounds",
        "hw::load_global(reinterpret_cast<const u32x4*>(a<u32>() + 4 * thread + FAULT));  // access\n",
        "256", "0", ("access",), ("the last 4 past the end of a",), words={"a": 511, "out": 1},
    ),
    "an asynchronous copy past the end": Fault(
        "out of bounds",
        "hw::cp_async_16(smem + 16 * thread, a<u8>() + 16 * thread, thread == 63 ? FAULT : 16);  // access\n",
        "16", "12", ("access",), ("cp_async_16", "the last 4 past the end of a"), words={"a": 255, "out": 1},
    ),
    "an addition past the end": Fault(
        "out of bounds",
        "hw::atomic_add(out<float>() + 448 + thread + FAULT, 1.0f);  // access\n",
        "1", "0", ("access",), ("atomic_add", "0 bytes past the end of out", "thread 63 "),
    ),
    "an addition of four past the end": Fault(
        "out of bounds",
        "const float ones[4] = {1, 1, 1, 1};\n"
        "hw::atomic_add4(out<float>() + 256 + 4 * (thread % 64 + FAULT), ones);  // access\n",
        "1", "0", ("access",), ("atomic_add4", "0 bytes past the end of out", "thread 63 "),
    ),
    "an addition of four in between": Fault(
        "misaligned",
        "const float ones[4] = {1, 1, 1, 1};\nhw::atomic_add4(out<float>() + FAULT + 4 * thread, ones);  // access\n",
        "2", "0", ("access",), ("atomic_add4 of 16 bytes", "8 past a multiple of 16"),
    ),
    "a write to an input": Fault(
        "out of bounds",
        "hw::store_global(FAULT + thread, 1u);  // access\n",
        "const_cast<u32*>(a<u32>())", "out<u32>()", ("access",), ("a is read-only",),
    ),
    "a null pointer": Fault(
        "out of bounds",
        "hw::load_global(FAULT + thread);  // access\n",
        "b<u8>()", "a<u8>()", ("access",), ("null pointer",),
    ),
    "shared memory past the block's": Fault(
        "out of bounds",
        "hw::store_shared(smem + 64 * thread + FAULT, 1u);  // access\n",
        "64", "60", ("access",), ("smem_base() + 4096, but the block has 4096 bytes", "thread 63 "),
    ),
    "shared memory before smem_base()": Fault(
        "out of bounds",
        "hw::store_shared(4 * thread + FAULT, 1u);  // access\n",
        "0", "smem", ("access",), ("before smem_base()",),
    ),
    "more source bytes than a copy has": Fault(
        "out of bounds",
        "hw::cp_async_4(smem + 4 * thread, a<u32>() + thread, FAULT);  // access\n",
        "5", "4", ("access",), ("source_bytes is 5",),
    ),
    "a misaligned address in shared memory": Fault(
        "misaligned",
        "hw::store_shared(smem + 16 * thread + FAULT, u32x4{});  // access\n",
        "8", "16", ("access",), ("no multiple of 16",),
    ),
    "a misaligned address in global memory": Fault(
        "misaligned",
        "hw::load_global(reinterpret_cast<const u32*>(a<u8>() + 4 * thread + FAULT));  // access\n",
        "2", "4", ("access",), ("2 past a multiple of 4",),
    ),
    "a misaligned row of ldmatrix": Fault(
        "misaligned",
        """
        for (i32 i = 0; i < 16; ++i) hw::store_shared(smem + 64 * thread + 4 * i, 1u);
        hw::sync_warp();
        u32 r[4];
        hw::ldmatrix_x4(r, smem + 64 * thread + (lane == 11 ? FAULT : 0));  // access
        """,
        "4", "16", ("access",), ("lane 11",),
    ),
    "a misaligned source of a copy": Fault(
        "misaligned",
        "hw::cp_async_16(smem + 16 * thread, a<u8>() + 16 * thread + FAULT, 0);  // access\n",
        "4", "16", ("access",), ("4 past a multiple of 16",),
    ),
    "a pointer used outside of hw::": Fault(
        "fault",
        """
        hw::sync_warp();  // before
        *reinterpret_cast<volatile u32*>(FAULT) = 1;
        """,
        "64ull", "out<u32>()", ("before",), ("0x40",),
    ),
    "a division by zero": Fault(
        "fault",
        """
        hw::sync_warp();  // before
        hw::store_global(out<i32>() + thread, 7 / (n + FAULT));
        """,
        "0", "1", (), ("division by zero",),
    ),
    "too much on the stack": Fault(
        "fault",
        """
        hw::sync_warp();  // before
        volatile u8 frame[FAULT];
        for (i32 i = FAULT - 1; i >= 0; i -= 512) frame[i] = 1;
        """,
        "400000", "100000", (), ("stack overflow",),
    ),
}  # fmt: skip
if platform.machine() not in ("x86_64", "AMD64"):
    del FAULTS["a division by zero"]  # gives 0 there, as on a GPU it gives anything


def run(toy, fault: Fault, text: str):
    kernel = toy(fault.body.replace("FAULT", text), threads=fault.threads, smem_bytes=4096)
    arrays = {name: aligned(words, np.uint32) for name, words in fault.words.items()}
    with emulator.schedule(step_limit=100_000):
        kernel.run("emulator", **arrays)
    return kernel


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(toy, name):
    fault = FAULTS[name]
    with pytest.raises(EmulatorError) as raised:
        run(toy, fault, fault.wrong)
    report = str(raised.value)
    print(report)
    kernel = toy(fault.body.replace("FAULT", fault.wrong))
    assert report.startswith(f"{fault.kind}: ")
    for mark in fault.marks:
        assert re.search(re.escape(kernel.line(mark)) + r"\b", report), f"{mark} is at {kernel.line(mark)}"
    for words in fault.says:
        assert words in report
    assert "seed=20260, landing='late'" in report
    assert "in block (0, 0, 0)" in report


@pytest.mark.parametrize("name", FAULTS)
def test_the_mended_kernel_is_not(toy, name):
    run(toy, FAULTS[name], FAULTS[name].right)


def test_a_fault_leaves_the_emulator_usable(toy):
    """Stacks, shadow and signal handlers are as before: the next launch sees nothing of the last."""
    for fault in FAULTS.values():
        with pytest.raises(EmulatorError):
            run(toy, fault, fault.wrong)
        run(toy, fault, fault.right)


@pytest.mark.parametrize("landing", emulator.LANDINGS)
def test_shared_memory_starts_poisoned_in_every_block(toy, landing):
    """Block 0 writes; whatever block then uses the memory has not."""
    kernel = toy(
        """
        if (hw::block_idx_x() == n) hw::store_shared(smem + 4 * lane, 1u);
        hw::load_shared<u32>(smem + 4 * lane);
        """,
        smem_bytes=128,
    )
    with emulator.schedule(landing=landing, os_threads=1):
        for writer in range(4):
            with pytest.raises(EmulatorError, match="uninitialised"):
                kernel.run("emulator", n=writer, grid=(4, 1, 1))


def test_a_source_is_read_when_the_copy_lands(toy):
    body = """
        hw::cp_async_4(smem + 4 * lane, out<u32>() + lane, 4);
        hw::cp_async_commit();
        hw::store_global(out<u32>() + lane, 2u);
        hw::cp_async_wait<0>();
        hw::store_global(out<u32>() + lane, hw::load_shared<u32>(smem + 4 * lane));
    """
    kernel = toy(body, smem_bytes=128)
    for landing, found in (("late", 2), ("early", 1)):
        with emulator.schedule(landing=landing):
            out = kernel.run("emulator", out=np.ones(32, np.uint32))
        assert set(out.tolist()) == {found}


def test_races_are_found_after_many_barriers(toy):
    """Interval numbers are short and begin again: nothing is forgotten, nothing made up."""
    body = """
        hw::store_shared(smem + 512 + 4 * thread, 1u);
        for (i32 i = 0; i < n; ++i) {
          hw::store_shared(smem + 4 * thread, static_cast<u32>(i));
          hw::sync_threads();
          if (hw::load_shared<u32>(smem + 4 * (63 - thread)) != static_cast<u32>(i)) hw::store_global(out<u32>(), 1u);
          if (i < n - 1 || m == 0) hw::sync_threads();
        }
        hw::store_shared(smem + 4 * thread, hw::load_shared<u32>(smem + 512 + 4 * thread));  // last
    """
    kernel = toy(body, threads=64, smem_bytes=1024)
    for count in (253, 254, 255, 256, 600):
        assert kernel.run("emulator", out=np.zeros(1, np.uint32), n=count)[0] == 0
        with pytest.raises(EmulatorError, match=f"(?s)race.*{re.escape(kernel.line('last'))}"):
            kernel.run("emulator", n=count, m=1)


def test_the_other_reader_is_named(toy):
    """Of several that read a word, the report names one of another warp than the writer's."""
    body = """
        if (thread < 32) hw::store_shared(smem + 4 * lane, 7u);
        hw::sync_threads();
        const u32 x = hw::load_shared<u32>(smem + 4 * lane);
        hw::store_global(out<u32>() + thread, x);
        if (thread == 95) hw::store_shared(smem + 4 * lane, x);
    """
    kernel = toy(body, threads=96, smem_bytes=128)
    ways = set()
    for seed in range(20):
        with emulator.schedule(seed=seed), pytest.raises(EmulatorError, match=r"^race: ") as raised:
            kernel.run("emulator", out=np.zeros(96, np.uint32))
        writer, other = re.findall(r"by thread (\d+)", str(raised.value))
        assert {int(writer) // 32, int(other) // 32} in ({2, 0}, {2, 1})
        ways.add(int(writer) == 95)
    assert ways == {True, False}  # some orders meet the write first, some a read


def test_unwritten_memory_stays_unwritten_through_many_barriers(toy):
    body = """
        hw::store_shared(smem + 1020, 1u);
        for (i32 i = 0; i < 1200; ++i) hw::sync_threads();
        hw::store_global(out<u32>() + thread, hw::load_shared<u32>(smem + n));
    """
    kernel = toy(body, smem_bytes=1024)
    assert set(kernel.run("emulator", out=np.zeros(32, np.uint32), n=1020).tolist()) == {1}
    with pytest.raises(EmulatorError, match=r"uninitialised: .* byte 1016 "):
        kernel.run("emulator", out=np.zeros(32, np.uint32), n=1016)


def test_neighbouring_half_words_are_no_race(toy):
    """Two warps write and read the halves of every word."""
    body = """
        const u32 mine = smem + 4 * lane + 2 * (thread / 32);
        hw::store_shared(mine, static_cast<u16>(thread));
        hw::store_global(out<u16>() + thread, hw::load_shared<u16>(mine));
    """
    out = toy(body, threads=64, smem_bytes=128).run("emulator", out=np.zeros(64, np.uint16))
    np.testing.assert_array_equal(out, np.arange(64))


def test_exited_threads_do_not_hold_up_a_barrier(toy):
    body = """
        if (thread >= 64) return;
        hw::store_shared(smem + 4 * thread, static_cast<u32>(thread));
        hw::sync_threads();
        hw::store_global(out<u32>() + thread, hw::load_shared<u32>(smem + 4 * (63 - thread)));
    """
    out = toy(body, threads=128, smem_bytes=256).run("emulator", out=np.zeros(64, np.uint32))
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
