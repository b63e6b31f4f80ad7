"""The benchmarks' harness: all of it on a CPU with tiny cases and peers that run there; adapters of the peers that do
not, on stand-ins with their signatures; the loop that takes the time, with a clock that the calls move."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cuflash
from benchmarks import cases, oracle, peers, run, schema, timing
from benchmarks.cases import Case, Mask, Problem
from benchmarks.inputs import Inputs, draw, floats, from_torch, to_torch
from benchmarks.schema import Row
from benchmarks.timing import HostClock, Prepared, Timing
from cuflash import cli
from cuflash.cli import machine
from cuflash.jit import module

CLOCK = HostClock()
CAUSAL = Mask("causal")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app(), list(arguments))


# --- the whole path on a CPU ------------------------------------------------------------------------------------------


def test_the_harness_runs_from_the_command_line_to_the_file(tmp_path: Path) -> None:
    """Every kind of case, cuflash's reference beside PyTorch's CPU kernels where it is installed."""
    done = invoke("bench", "--harness-test", "--peers", "torch math,torch flash", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("none-harness-test-")
    results = schema.read(path)
    assert results.gpu == schema.HARNESS_TEST and set(results.ceilings) == {"matmul_tflops", "copy_gbps", "launch_us"}
    ours = [row for row in results.rows if row.impl == "cuflash"]
    assert all(row.error is None for row in ours)
    assert {row.op for row in ours} == {case.op for case in cases.tiny()}
    timed = [row for row in ours if row.op not in ("memory", "accuracy")]
    assert all(row.ms and row.spread is not None for row in timed)
    assert all((row.gbps if row.op == "decode" else row.tflops) for row in timed if row.op != "latency")
    others = {row.impl for row in results.rows if row.ms and row.impl != "cuflash"}
    assert others == ({"torch math", "torch flash"} if machine.installed("torch") else set())
    assert not [row.error for row in results.rows if "wrong result" in (row.error or "")]
    for title in ("Forward, TFLOP/s", "Decoding, GB/s", "Host time, us"):
        assert title in done.output
    assert "cuflash failed" not in done.output


def test_json_is_the_file(tmp_path: Path) -> None:
    arguments = ("bench", "both", "--harness-test", "--peers", "jax xla", "--out", str(tmp_path / "x.json"), "--json")
    done = invoke(*arguments, "--commit", "abc")
    whole = json.loads(done.stdout)
    assert whole == json.loads((tmp_path / "x.json").read_text()) and whole["commit"] == "abc"
    (row,) = (row for row in whole["rows"] if row["impl"] == "cuflash")
    assert row["op"] == "both" and row["ms"] and row["tflops"]
    jax = [row for row in whole["rows"] if row["impl"] == "jax xla"]
    assert ("jax xla" in whole["skipped"]) != bool(jax)
    assert all(row["ms"] and row["more"]["clock"] == "host" for row in jax)


def test_without_a_gpu_and_for_unknown_names_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", tuple)
    assert "must be one of forward, backward" in str(invoke("bench", "sideways").exception)
    assert "forward needs a GPU that cuflash serves" in str(invoke("bench", "forward").exception)
    found = invoke("bench", "--harness-test", "--peers", "flsh").exception
    assert "peers='flsh' must begin the name of one of: torch cudnn" in str(found)


def test_without_a_gpu_what_can_be_measured_is_and_says_what_it_is(monkeypatch, tmp_path: Path) -> None:
    from benchmarks import offline

    def stage() -> Any:
        yield schema.Row("import", "cuflash", "cuflash", 200.0, 1.0, more={"best_ms": 199.0})

    asked: list[str] = []
    stages = {
        name: lambda name=name: asked.append(name) or (stage() if name == "import" else ()) for name in offline.STAGES
    }
    monkeypatch.setattr(offline, "STAGES", stages)
    monkeypatch.setattr(machine, "gpus", tuple)
    done = invoke("bench", "--out", str(tmp_path))
    assert done.exit_code == 0 and asked == list(stages), done.output
    assert "import, in ms" in done.output and "no row is the speed of a kernel" in done.output
    (path,) = tmp_path.iterdir()
    assert schema.read(path).gpu == schema.OFFLINE
    asked.clear()
    assert invoke("bench", "import", "--out", str(tmp_path)).exit_code == 0 and asked == ["import"]


def numpy_as_cupy() -> SimpleNamespace:
    """As much of CuPy as the harness uses, by NumPy: events read the host's clock, and copies cost nothing."""

    class Array(np.ndarray):
        data = SimpleNamespace(copy_from_device_async=lambda source, size: None)

    class MemoryHook:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.malloc_postprocess(device_id=0, size=1, mem_size=512, mem_ptr=0, pmem_id=0)  # type: ignore[attr-defined]

    class Event:
        def record(self) -> None:
            self.at = time.perf_counter()

    pool = SimpleNamespace(used_bytes=lambda: 0, free_all_blocks=lambda: None)
    device = SimpleNamespace(synchronize=lambda: None, mem_info=(1 << 30, 139 << 30))
    cuda = SimpleNamespace(
        Event=Event, Device=lambda: device, MemoryHook=MemoryHook,
        get_elapsed_time=lambda start, end: (end.at - start.at) * 1e3,
    )  # fmt: skip
    own = {
        "cuda": cuda,
        "get_default_memory_pool": lambda: pool,
        "zeros": lambda shape, dtype=float: np.zeros(shape, dtype).view(Array),
        "matmul": lambda a, b: time.sleep(1e-3),
        "copyto": lambda a, b: time.sleep(1e-3),
        "RawKernel": lambda text, name: lambda grid, block, arguments: None,
    }
    return SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if not name.startswith("_")} | own)


def test_the_command_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of the way that is taken where there is one, but for the GPU: CuPy is made of NumPy."""
    gpu = machine.Gpu(0, "NVIDIA H200", (9, 0))
    monkeypatch.setattr(machine, "gpus", lambda: (gpu,))
    monkeypatch.setattr(machine, "driver", lambda: machine.Driver((13, 0), (gpu,)))
    monkeypatch.setattr(machine, "cupy_wheels", lambda: {"cupy-cuda13x": "14.2.0"})
    monkeypatch.setitem(sys.modules, "cupy", numpy_as_cupy())
    first = [Row("latency", "import cuflash", "cuflash", 200.0, 1.0)]
    monkeypatch.setattr(run, "first_calls", lambda clock, repeats: first * (repeats == 1))  # --quick: once
    monkeypatch.setattr(timing, "_MATMUL", 64)
    kinds = ("forward", "decode", "latency", "memory", "accuracy")
    asked: list[Any] = []
    few, every = [case for case in cases.tiny() if case.group in kinds], cases.cases

    def chosen(groups: Any = cases.GROUPS, quick: bool = False) -> list[Case]:
        asked.extend([list(groups)] * quick)
        return few if quick else every(groups)

    monkeypatch.setattr(cases, "cases", chosen)
    arguments = ("bench", *kinds, "--quick", "--peers", "torch", "--minutes", "1", "--out", str(tmp_path))
    done = invoke(*arguments, "--commit", "abc-dirty")
    assert done.exit_code == 0, (done.output, done.exception)
    assert asked == [list(kinds)]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("h200-") and path.name.endswith("-abc-dirty.json")
    results = schema.read(path)
    assert results.on_gpu and results.capability == [9, 0] and results.driver == "CUDA 13.0"
    assert results.clean is False and set(results.ceilings) == {"matmul_tflops", "copy_gbps", "launch_us"}
    assert {row.op for row in results.rows} == set(kinds)
    assert all(why for name, why in results.skipped.items() if name.startswith("torch"))
    assert "1 of 6, forward: 2 x 36" in done.output and "import cuflash" in done.output
    assert "budgets" in done.output and "200 ms" in done.output and "<= 0.3 s" in done.output


def test_a_gpu_without_cupy_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu(0, "NVIDIA H200", (9, 0)),))
    monkeypatch.setattr(machine, "cupy_wheels", dict)
    assert "CuPy, which launches the kernels, is not here" in str(invoke("bench", "forward").exception)


class Broken(peers.Ours):
    """A cuflash that fails, in one way or the other."""

    def __init__(self, how: str) -> None:
        self.how = how

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        prepared = super().prepare(case, inputs)
        if self.how == "wrong":
            arrays = prepared.arrays
            prepared.arrays = lambda result: {name: x + 0.1 for name, x in arrays(result).items()}
        elif self.how == "later":
            calls = iter(range(2))  # good when checked and once more, then no longer
            good = prepared.calls[0]
            prepared.calls = [lambda: good() if next(calls, None) is not None else 1 / 0]
        else:
            raise MemoryError("out of memory")
        return prepared


@pytest.mark.parametrize(
    ("how", "said"),
    [("raises", "MemoryError: out of memory"), ("wrong", "wrong result: out differs"), ("later", "ZeroDivisionError")],
)
@pytest.mark.parametrize("group", ["forward", "latency", "memory"])
def test_who_fails_gets_a_row_that_says_so_and_the_others_go_on(group: str, how: str, said: str) -> None:
    if (group, how) == ("memory", "later"):
        said = "ZeroDivisionError"
    problem = Problem((9,), (9,), 2, 2, 16, Mask("window", 3), "float32")
    other = peers.Ours()
    other.name = "another"
    results = schema.describe(schema.HARNESS_TEST, "abc")
    case = Case(group, problem)
    run.measure([case], run.Run(CLOCK, [other], 0.001, ours=Broken(how)), results)
    ours, theirs = results.rows
    assert ours.impl == "cuflash" and said in (ours.error or "") and ours.ms is None
    assert theirs.error is None and (theirs.ms or theirs.more)
    assert results.failed == [ours]


def test_a_failure_of_cuflash_shows_in_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuflash, "attention", lambda *_, **__: 1 / 0)
    done = invoke("bench", "forward", "--harness-test", "--peers", "", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "cuflash failed: forward: 2 x 36" in done.output and "ZeroDivisionError" in done.output


def test_what_does_not_fit_into_the_time_is_left_off_from_the_end_and_told() -> None:
    chosen = [case for case in cases.tiny() if case.group in ("forward", "varlen")]
    results = schema.describe(schema.HARNESS_TEST, "abc")
    one = run.Run(CLOCK, [], 0.001)
    run.measure(chosen, one, results, minutes=1.1 * one.expected(chosen[0]) / 60)
    assert {row.op for row in results.rows} >= {"forward"}
    results.rows.clear(), results.notes.clear()
    run.measure(chosen, one, results, minutes=1e-4)
    assert results.rows == []
    assert results.notes == [
        "left off for lack of time (0.0001 minutes): 1 of forward, 3 of varlen; --minutes gives it more"
    ]


def test_a_gpu_that_answers_no_more_ends_the_run_with_what_there_is() -> None:
    class Lost(HostClock):
        def wait(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    chosen = [case for case in cases.tiny() if case.group == "forward"] * 2
    results = schema.describe(schema.HARNESS_TEST, "abc")
    run.measure(chosen, run.Run(Lost(), [], 0.001), results)
    assert len(results.rows) == 1 and "illegal memory access" in (results.rows[0].error or "")
    assert "the run ends at forward" in results.notes[0]


def test_slow_peers_come_last_in_a_quick_run_and_stand_beside_times_of_the_same_turns() -> None:
    slow, ready = peers.Ours(), peers.Ours()
    slow.name, slow.setup_seconds, ready.name, ready.setup_seconds = "slow", 5.0, "ready", 0.1
    problems = [Problem((n,), (n,), 1, 1, 16, CAUSAL, "float32") for n in (8, 9)]
    first = [Case("forward", problem, everyone=False) for problem in problems]
    chosen = [*first, dataclasses.replace(first[0], everyone=True)]
    results = schema.describe(schema.HARNESS_TEST, "abc")
    run.measure(chosen, run.Run(CLOCK, [slow, ready], 0.001), results)
    found = [(row.case, row.impl) for row in results.rows]
    both = [
        (case.name, impl)
        for case, impls in zip(first, (("cuflash", "slow", "ready"), ("cuflash", "ready")), strict=True)
        for impl in impls
    ]
    assert found == both
    assert run.possible(chosen, run.Run(CLOCK, [ready]), results) == first, "nobody slow is here: once is enough"
    assert run.possible(chosen, run.Run(CLOCK, [slow]), results) == chosen


def test_a_gpu_too_small_for_a_case_is_not_asked_for_it() -> None:
    class Small(HostClock):
        def memory(self) -> int:  # type: ignore[override]
            return 6 * small.bytes

    large, small = (Case("forward", Problem((n,), (n,), 1, 1, 16, CAUSAL, "float32")) for n in (64, 32))
    results = schema.describe(schema.HARNESS_TEST, "abc")
    assert run.possible([large, small], run.Run(Small(), []), results) == [small]
    assert results.notes == [f"not measured for want of memory: forward: {large.name}"]


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.tiny(), ids=lambda case: f"{case.op} {case.name}")
def test_work_counts_the_pairs_that_see_one_another(case: Case) -> None:
    p = case.problem
    seen = 0
    for n, m in zip(p.q_lens, p.k_lens, strict=True):
        keep = p.mask.keep(np, np.arange(n)[:, None], np.arange(m)[None], n, m)
        seen += int(np.broadcast_to(keep, (n, m)).sum())
    assert p.pairs == seen
    products = {"forward": 2, "backward": 5, "both": 7}[case.direction]
    assert case.flops == products * 2 * p.head_dim * p.heads * seen
    assert p.kv_bytes == 4 * 2 * sum(p.k_lens) * p.heads_kv * p.head_dim


def test_cases_have_names_of_their_own_fit_a_gpu_and_cover_what_is_promised() -> None:
    every = cases.cases()
    assert len({(case.op, case.name) for case in every}) == len(every)
    assert max(3 * case.bytes for case in every) < 20 << 30, "two copies, gradients and results"
    assert [case.rank for case in every] == sorted(case.rank for case in every)
    first = every[: len(cases.GROUPS)]
    assert {case.group for case in first} == set(cases.GROUPS), "every group's best case comes before any second one"
    quick = cases.cases(quick=True)
    once = [case for case in quick if not case.everyone]
    assert [dataclasses.replace(case, everyone=True) for case in once] == [case for case in every if case.rank == 0]
    assert quick[: len(once)] == once and {case.group for case in quick[len(once) :]} == set(cases.GROUPS[:6])
    dense = {(c.problem.head_dim, c.problem.q_lens[0]) for c in every if c.group == "forward"}
    assert {(d, n) for d in (64, 128, 256) for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)} <= dense
    kinds = {case.problem.mask.kind for case in every if case.group == "masks"}
    assert kinds == {"causal", "window", "prefix", "document", "natten", "softcap", "alibi", "relative"}
    decode = {max(case.problem.k_lens) for case in every if case.group == "decode"}
    assert {1024, 8192, 32768, 131072} <= decode
    assert {case.variant for case in every} == set(peers.VARIANTS)


@pytest.mark.parametrize(
    "kind", ["none", "causal", "window", "prefix", "document", "natten", "softcap", "alibi", "relative"]
)
def test_the_right_answer_is_the_references(kind: str) -> None:
    """Two ways to say the same: a mask's definition here, and cuflash's keywords for it on the NumPy reference."""
    size = {"window": 5, "prefix": 7, "natten": 3, "softcap": 2}.get(kind, 0)
    problem = Problem((16, 16), (16, 16), 4, 2, 8, Mask(kind, size), "float32")
    inputs = Inputs(problem, CLOCK, gradients=True)
    arrays = {name: x.astype(np.float64) for name, x in inputs.copies[0].items()}
    keywords = peers.features(problem, inputs, np.asarray)
    out, lse, *_ = cuflash.attention(arrays["q"], arrays["k"], arrays["v"], aux=("lse",), **keywords)
    args = (arrays["dout"], arrays["q"], arrays["k"], arrays["v"], out, lse)
    grads = cuflash.attention_backward(*args, **keywords)
    right = oracle.solve(problem, inputs.copies[0], 1, 1, np, gradients=True)
    np.testing.assert_allclose(right["out"], out[1, :, 2:], atol=1e-6)
    np.testing.assert_allclose(right["dq"], grads.dq[1, :, 2:], atol=1e-6)
    np.testing.assert_allclose(right["dk"], grads.dk[1, :, 1], atol=1e-6)
    np.testing.assert_allclose(right["dv"], grads.dv[1, :, 1], atol=1e-6)


def test_the_right_answer_in_steps_is_the_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((16,), (16,), 2, 1, 8, Mask("window", 5), "float32")
    copy = Inputs(problem, CLOCK, gradients=True).copies[0]
    whole = oracle.solve(problem, copy, 0, 0, np, gradients=True)
    monkeypatch.setattr(oracle, "_ELEMENTS", 3 * 16)
    for name, x in oracle.solve(problem, copy, 0, 0, np, gradients=True).items():
        np.testing.assert_allclose(x, whole[name], atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_result_is_refused_for_a_key_too_many_and_taken_when_rounded(dtype: str) -> None:
    problem = Problem((64,), (64,), 1, 1, 16, Mask("causal"), dtype)
    copy = Inputs(problem, CLOCK, gradients=False).copies[0]
    right = oracle.solve(problem, copy, 0, 0, np, gradients=False)["out"]
    rounded = right.astype(cuflash.dtypes.BY_NAME[dtype].numpy).astype(np.float32)
    assert oracle.difference(problem, "out", rounded, right, np) is None
    more = dataclasses.replace(problem, mask=Mask("prefix", 2))  # the first query sees the second key
    wrong = oracle.solve(more, copy, 0, 0, np, gradients=False)["out"]
    assert "out differs" in str(oracle.difference(problem, "out", wrong, right, np))
    lone = np.tile(right, (4000, 1, 1))
    lone[77] *= 1.3  # one row of many
    assert "a row of out differs" in str(oracle.difference(problem, "out", lone, np.tile(right, (4000, 1, 1)), np))
    assert "not finite" in str(oracle.difference(problem, "out", right * np.nan, right, np))


def test_errors_are_counted_by_powers_of_two() -> None:
    right = np.zeros(5)
    found = oracle.statistics(np.array([0.0, 0.5, -0.75, 2.0**-20, 64.0]), right + 0.0, np)
    counts = dict(enumerate(found["histogram"]["counts"], found["histogram"]["first_exponent"]))
    assert {exponent: n for exponent, n in counts.items() if n} == {-31: 1, -20: 1, -1: 2, 4: 1}
    assert found["max"] == 64.0 and math.isclose(found["rms"], math.sqrt((0.25 + 0.5625 + 64**2) / 5), rel_tol=1e-9)


def test_random_inputs_are_rounded_to_bfloat16_by_their_bits_and_read_back_so() -> None:
    x = draw(np, np.random.default_rng(1), (3, 5), "bfloat16")
    exact = np.random.default_rng(1).standard_normal((3, 5), dtype=np.float32)
    bfloat16 = cuflash.dtypes.bfloat16.numpy
    np.testing.assert_array_equal(x.view(np.uint16), exact.astype(bfloat16).view(np.uint16))
    np.testing.assert_array_equal(floats(np, x), x.astype(np.float32))
    torch = pytest.importorskip("torch")
    assert to_torch(x).dtype == torch.bfloat16
    np.testing.assert_array_equal(from_torch(to_torch(x), CLOCK), x.astype(np.float32))


# --- timing -----------------------------------------------------------------------------------------------------------


class FakeClock(HostClock):
    """Time passes by what calls say they take, `device` ms on the device; a log of what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.log = 0.0, []

    def mark(self) -> float:
        return self.now

    def between(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        self.log.append("wait")

    def get_ahead(self, ms: float) -> None:
        self.log.append(f"ahead {ms:g}")
        self.now += ms

    def call(self, name: str, ms: Callable[[int], float], seen: list[str], copies: int = 3) -> Prepared:
        def one(copy: int) -> Callable[[], str]:
            def run() -> str:
                seen.append(f"{name}{copy}")
                self.now += ms(len(seen))
                return name

            return run

        return Prepared([one(copy) for copy in range(copies)], dict)


def test_contestants_take_turns_on_inputs_in_turn_and_the_median_counts() -> None:
    clock, seen = FakeClock(), []
    slow = {40}  # one call that a mean would show
    contestants = {
        "a": clock.call("a", lambda n: 100.0 if n in slow else 2.0, seen),
        "b": clock.call("b", lambda n: 4.0, seen),
    }
    found = timing.take_turns(contestants, clock, seconds=0.1, host_clock=lambda: clock.now / 1e3)
    assert found == {"a": Timing(2.0, 0.0), "b": Timing(4.0, 0.0)}
    who = "".join(call[0] for call in seen)
    warm = timing.WARM_UP
    assert who.startswith("a" * 2 * warm + "b" * 2 * warm)
    bursts = ["a" * 10, "b" * 5], ["b" * 5, "a" * 10]  # 0.1 s in 5 rounds: 20 ms each
    assert who[4 * warm :] == "".join("".join(bursts[turn % 2]) for turn in range(timing.ROUNDS))
    of_a = [int(call[1:]) for call in seen if call[0] == "a"]
    assert all(one != following for one, following in zip(of_a[2 * warm :], of_a[2 * warm + 1 :], strict=False))
    assert set(of_a) == {0, 1, 2}
    assert clock.log.count("ahead 0") == 2 and "ahead 30" in clock.log, "1.5 times the host's time of a burst"


def test_the_host_gets_ahead_of_the_device_before_anything_is_timed() -> None:
    """What a call's time is made of: nothing of what was given to get ahead."""
    clock, seen = FakeClock(), []
    host = iter(range(10**6))
    found = timing.take_turns({"a": clock.call("a", lambda n: 3.0, seen)}, clock, 0.05, host_clock=lambda: next(host))
    assert found == {"a": Timing(3.0, 0.0)} and any(entry.startswith("ahead 1") for entry in clock.log)


def test_who_raises_is_out_and_the_others_go_on() -> None:
    clock, seen = FakeClock(), []

    def fails(n: int) -> float:
        if n > 20:
            raise RuntimeError("out of memory\nand more")
        return 1.0

    contestants = {
        "a": clock.call("a", fails, seen),
        "b": clock.call("b", lambda n: 1.0, seen),
        "c": Prepared([lambda: 1 / 0], dict),
    }
    found = timing.take_turns(contestants, clock, 0.01, host_clock=lambda: clock.now)
    assert found["a"] == "RuntimeError: out of memory" and found["c"] == "ZeroDivisionError: division by zero"
    assert found["b"] == Timing(1.0, 0.0)


def test_streams_of_their_own_are_timed_by_the_hosts_clock_burst_by_burst() -> None:
    clock, seen, finished = FakeClock(), [], []
    one = clock.call("a", lambda n: 2.0, seen)
    one.finish = finished.append
    found = timing.take_turns({"a": one}, clock, 0.1, host_clock=lambda: clock.now / 1e3)
    assert isinstance(found["a"], Timing) and math.isclose(found["a"].ms, 2.0)
    assert len(finished) == timing.ROUNDS + 2 and not [entry for entry in clock.log if entry.startswith("ahead")]


def test_what_the_gpus_clock_asks_of_cupy_is_there() -> None:
    """CuPy can be imported without a GPU: names and signatures, at least, are right."""
    cupy = pytest.importorskip("cupy")
    assert {"malloc_postprocess"} <= set(dir(cupy.cuda.MemoryHook))
    assert hasattr(cupy.cuda.Device, "mem_info")
    for name in ("Event", "get_elapsed_time", "Device"):
        assert hasattr(cupy.cuda, name)
    assert hasattr(cupy.cuda.Event, "record") and hasattr(cupy.cuda.Device, "synchronize")
    assert hasattr(cupy.cuda.MemoryPointer, "copy_from_device_async")
    assert {"used_bytes", "free_all_blocks"} <= set(dir(cupy.cuda.MemoryPool))
    for name in ("random", "from_dlpack", "copyto", "RawKernel", "get_default_memory_pool", "bincount", "log2"):
        assert hasattr(cupy, name)


def test_the_gpus_clock_on_a_stand_in_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose copies take 2 ms: the clock finds that out, and gives as many as it takes to get ahead."""
    now, copies = [0.0], [0]

    class Event:
        def record(self) -> None:
            self.at = now[0]

    class Memory:
        def copy_from_device_async(self, source: Any, size: int) -> None:
            assert isinstance(source, Memory) and size == 256 << 20
            copies[0] += 1
            now[0] += 2.0

    used = [100]
    hooks: list[Any] = []

    class MemoryHook:
        def __enter__(self) -> Any:
            hooks.append(self)
            return self

        def __exit__(self, *_: Any) -> None:
            hooks.pop()

    def allocate(size: int) -> None:
        used[0] += size
        for hook in hooks:
            hook.malloc_postprocess(device_id=0, size=size, mem_size=size, mem_ptr=0, pmem_id=0)

    pool = SimpleNamespace(used_bytes=lambda: used[0], free_all_blocks=lambda: None)
    cuda = SimpleNamespace(
        Event=Event, get_elapsed_time=lambda start, end: end.at - start.at, MemoryHook=MemoryHook,
        Device=lambda: SimpleNamespace(synchronize=lambda: None),
    )  # fmt: skip
    zeros = lambda size, dtype: SimpleNamespace(data=Memory())  # noqa: E731
    fake = SimpleNamespace(cuda=cuda, zeros=zeros, uint8=np.uint8, get_default_memory_pool=lambda: pool)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    clock = timing.CudaClock()
    start = clock.mark()
    clock.get_ahead(10.0)
    assert clock.between(start, clock.mark()) == 12.0 and copies[0] == 10 + 6

    def call() -> None:
        allocate(50)
        allocate(70)
        used[0] -= 70
        allocate(10)

    assert clock.bytes_at_peak(call, "numpy") == 120
    assert clock.bytes_at_peak(call, "jax") is None


# --- peers on stand-ins -----------------------------------------------------------------------------------------------

torch_needed = pytest.mark.skipif(machine.installed("torch") is None, reason="PyTorch is not installed")
DENSE = Problem((20, 20), (20, 20), 4, 2, 16, CAUSAL, "float16")
PACKED = Problem((5, 20, 1), (5, 20, 1), 4, 2, 16, CAUSAL, "float16", "packed")
CACHE = Problem((1, 1), (20, 9), 4, 2, 16, CAUSAL, "float16", "cache")
PAGES = Problem((1, 1), (20, 9), 4, 2, 16, CAUSAL, "float16", "pages", 4)


def with_mask(problem: Problem, kind: str, size: int = 0) -> Problem:
    return dataclasses.replace(problem, mask=Mask(kind, size))


def check(peer: peers.Peer, problem: Problem, direction: str = "forward", variant: str = "") -> None:
    """What the peer computes, called as its adapter calls it, is right."""
    case = Case("forward", problem, direction, variant=variant)
    inputs = Inputs(problem, CLOCK, gradients=direction != "forward")
    prepared = peer.prepare(case, inputs)
    assert len(prepared.calls) == len(inputs.copies)
    assert run.Checker(case, inputs).wrong(prepared) is None


def test_every_variant_of_cuflash_is_asked_for_what_its_name_says() -> None:
    seen: list[dict[str, Any]] = []
    calls = {
        "": (DENSE, "forward"), "sm_80 kernel": (DENSE, "forward"), "deterministic": (DENSE, "backward"),
        "padded": (PACKED, "forward"), "mask_mod": (DENSE, "forward"), "split_size 1024": (PAGES, "forward"),
    }  # fmt: skip
    if machine.installed("torch"):
        calls |= {"PyTorch": (PACKED, "forward"), "PyTorch autograd": (DENSE, "both")}

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            seen.append(keywords | {"q": args[0]})
            return function(*args, **keywords)

        return call

    names = ("attention", "attention_backward", "flash_attn_with_kvcache")
    own = {name: getattr(cuflash, name) for name in names}
    asked = {
        "sm_80 kernel": {"kernel_options": {"kernel": "sm_80"}}, "deterministic": {"deterministic": True},
        "padded": {"causal": True}, "split_size 1024": {"split_size": 1024}, "mask_mod": {"causal": False},
    }  # fmt: skip
    for variant, (problem, direction) in calls.items():
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name, function in own.items():
                patch.setattr(cuflash, name, watched(function))
            check(peers.Ours(), problem, direction, variant)
        for word, value in asked.get(variant, {}).items():
            assert seen[-1][word] == value, variant
        assert ("cu_seqlens_q" in seen[-1]) == (problem is PACKED and variant != "padded")
        assert ("mask_mod" in seen[-1]) == (variant == "mask_mod")
        assert type(seen[-1]["q"]).__module__.startswith("torch" if "PyTorch" in variant else "numpy")
    with pytest.raises(ValueError, match="variant='faster' must be one of"):
        check(peers.Ours(), DENSE, variant="faster")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module made of functions into sys.modules."""

    def put(name: str, **members: Any) -> None:
        for depth in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))

    return put


def flash_attn_2() -> dict[str, Any]:
    """flash-attn 2.8.4's functions with its own signatures, by cuflash's on the NumPy reference."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return cuflash.flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
        )

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (max_seqlen_q, max_seqlen_k) == (20, 20)
        return cuflash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic,
        )  # fmt: skip

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        assert block_table is None or k_cache.shape[1] % 256 == 0
        return cuflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=block_table, causal=causal
        )

    return locals()


@torch_needed
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize(
    "problem",
    [DENSE, with_mask(DENSE, "none"), with_mask(DENSE, "window", 6), with_mask(DENSE, "softcap", 5), PACKED],
    ids=lambda p: p.name,
)
def test_flash_attention_2_is_called_right(stand_in: Any, problem: Problem, direction: str) -> None:
    stand_in("flash_attn", **flash_attn_2())
    if direction == "forward" or problem in (DENSE, PACKED):
        check(peers.FlashAttention(2), problem, direction)


@torch_needed
def test_flash_attention_2_decodes_and_says_what_it_does_not(stand_in: Any) -> None:
    stand_in("flash_attn", **flash_attn_2())
    check(peers.FlashAttention(2), with_mask(DENSE, "alibi"))
    check(peers.FlashAttention(2), CACHE)
    check(peers.FlashAttention(2), dataclasses.replace(PAGES, page_size=256))
    for problem, said in (
        (PAGES, "pages of 4: multiples of 256 alone"),
        (with_mask(DENSE, "natten", 3), "no natten"),
        (dataclasses.replace(DENSE, dtype="float32"), "no float32"),
    ):
        with pytest.raises(peers.NotTaken, match=said):
            check(peers.FlashAttention(2), problem)


@torch_needed
def test_flash_attention_3_is_called_right(stand_in: Any) -> None:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return cuflash.flash_attn_func(q, k, v, 0.0, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
        return_attn_probs=False,
    ):  # fmt: skip
        longest = max_seqlen_q, max_seqlen_k
        out = cuflash.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, causal=causal)
        return out, None  # older ones return the lse, too

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        return cuflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, causal=causal
        )

    members = dict(locals())
    members.pop("stand_in")
    stand_in("flash_attn_3.flash_attn_interface", **members)
    for problem in (DENSE, with_mask(DENSE, "window", 6), with_mask(DENSE, "softcap", 5), PACKED, CACHE, PAGES):
        check(peers.FlashAttention(3), problem)
    check(peers.FlashAttention(3), DENSE, "both")
    with pytest.raises(peers.NotTaken, match="no alibi"):
        check(peers.FlashAttention(3), with_mask(DENSE, "alibi"))


@torch_needed
def test_flash_attention_4_is_called_right(stand_in: Any) -> None:
    def none_means_all(window: tuple[int | None, int | None]) -> tuple[int, int]:
        assert all(side is None or side >= 0 for side in window), "-1 does not mean all here"
        return tuple(-1 if side is None else side for side in window)  # type: ignore[return-value]

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        return cuflash.flash_attn_func(q, k, v, 0.0, None, causal, none_means_all(window_size), softcap), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None,
        causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert qv is None
        longest = max_seqlen_q, max_seqlen_k
        return cuflash.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, causal=causal), None

    stand_in("flash_attn.cute", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    for problem in (DENSE, with_mask(DENSE, "none"), with_mask(DENSE, "window", 6), with_mask(DENSE, "softcap", 5)):
        check(peers.FlashAttention(4), problem)
    check(peers.FlashAttention(4), PACKED, "both")
    with pytest.raises(peers.NotTaken, match="no cache"):
        check(peers.FlashAttention(4), CACHE)


@torch_needed
def test_flash_attention_4_alone_is_not_taken_for_2(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stand_in("flash_attn.cute", flash_attn_func=None)
    with pytest.raises(peers.Missing, match="not generation 2"):
        peers.FlashAttention(2).version()


@torch_needed
def test_flashinfer_is_planned_and_run_right(stand_in: Any) -> None:
    import torch

    class Prefill:
        def __init__(self, float_workspace_buffer, kv_layout="NHD"):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

        def plan(
            self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None,
            packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False,
            window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
            q_data_type="float16", kv_data_type=None,
        ):  # fmt: skip
            assert (num_qo_heads, head_dim_qk) == (4, 16) and q_data_type == kv_data_type == torch.float16
            assert (pos_encoding_mode == "ALIBI") == (num_kv_heads == 4)
            self.keywords = {"cu_seqlens_q": qo_indptr, "cu_seqlens_k": kv_indptr, "causal": causal}
            self.keywords |= {"window_size": (window_left, -1), "softcap": logits_soft_cap or 0.0}
            if pos_encoding_mode == "ALIBI":
                self.keywords["alibi_slopes"] = to_torch(cases.slopes(4))

        def run(self, q, k, v, *args, out=None, lse=None, return_lse=False, enable_pdl=None):
            return cuflash.attention(q, k, v, **self.keywords)

    class Decode:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
            assert use_tensor_cores

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
        ):  # fmt: skip
            counts = indptr.diff().tolist()
            lens = [(n - 1) * page_size + last for n, last in zip(counts, last_page_len.tolist(), strict=True)]
            table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
            for row, first, n in zip(table, indptr.tolist(), counts, strict=False):
                row[:n] = indices[first : first + n]
            self.lens, self.table = torch.tensor(lens, dtype=torch.int32), table

        def run(self, q, paged_kv_cache, *args, out=None, lse=None, return_lse=False):
            k, v = paged_kv_cache
            used = {"cache_seqlens": self.lens, "page_table": self.table}
            return cuflash.flash_attn_with_kvcache(q[:, None], k, v, **used)[:, 0]

    stand_in("flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Prefill, BatchDecodeWithPagedKVCacheWrapper=Decode)
    alibi = with_mask(dataclasses.replace(DENSE, heads_kv=4), "alibi")
    masks = [with_mask(DENSE, "none"), with_mask(DENSE, "window", 6), with_mask(DENSE, "softcap", 5), alibi]
    for problem in (DENSE, *masks, PACKED, PAGES, CACHE):
        check(peers.FlashInfer(), problem)
    with pytest.raises(peers.NotTaken, match="no gradients"):
        check(peers.FlashInfer(), DENSE, "both")


@torch_needed
def test_xformers_is_called_right(stand_in: Any) -> None:
    class LowerTriangularMask:
        lens = None
        causal = True

    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            assert isinstance(q_seqlen, list)
            mask = cls()
            mask.lens = q_seqlen
            return mask

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        causal = True

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        if query.ndim == 5:
            assert key.stride(3) == 0, "keys are repeated without a copy"
            query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
        causal = attn_bias is not None and attn_bias.causal
        if attn_bias is not None and attn_bias.lens is not None:
            assert query.shape[0] == 1
            starts = np.cumsum([0, *attn_bias.lens]).astype(np.int32)
            lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
            out = cuflash.attention(query[0], key[0], value[0], causal=causal, **lengths)[None]
        else:
            out = cuflash.attention(query, key, value, causal=causal)
        return out.unflatten(2, (2, 2))

    stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    stand_in(
        "xformers.ops.fmha.attn_bias", LowerTriangularMask=LowerTriangularMask, BlockDiagonalMask=BlockDiagonalMask,
        BlockDiagonalCausalMask=BlockDiagonalCausalMask,
    )  # fmt: skip
    sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for problem in (DENSE, with_mask(DENSE, "none"), PACKED, with_mask(PACKED, "none")):
        check(peers.Xformers(), problem)
    check(peers.Xformers(), DENSE, "both")
    with pytest.raises(peers.NotTaken, match="no window here"):
        check(peers.Xformers(), with_mask(DENSE, "window", 6))


@torch_needed
def test_torch_varlen_is_called_right(stand_in: Any) -> None:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa and window_size[1] in (-1, 0)
        lengths = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_k": cu_seq_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return cuflash.attention(query, key, value, window_size=window_size, **lengths)

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        lengths = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_k": cu_seq_k}
        return cuflash.attention(query, key, value, causal=is_causal, **lengths)

    stand_in("torch.nn.attention.varlen", varlen_attn=varlen_attn)
    for problem in (PACKED, with_mask(PACKED, "none"), with_mask(PACKED, "window", 6)):
        check(peers.TorchVarlen(), problem)
    check(peers.TorchVarlen(), PACKED, "both")
    stand_in("torch.nn.attention.varlen", varlen_attn=older)
    check(peers.TorchVarlen(), dataclasses.replace(PACKED, heads_kv=4))
    for problem, said in ((PACKED, "no grouped queries"), (DENSE, "packed batches alone")):
        with pytest.raises(peers.NotTaken, match=said):
            check(peers.TorchVarlen(), problem)


@torch_needed
@pytest.mark.parametrize(
    "problem",
    [
        *(
            with_mask(DENSE, kind, size)
            for kind, size in (("causal", 0), ("window", 6), ("prefix", 7), ("document", 0))
        ),
        with_mask(dataclasses.replace(DENSE, q_lens=(16,), k_lens=(16,)), "natten", 3),
        *(with_mask(DENSE, kind, size) for kind, size in (("softcap", 5), ("alibi", 0), ("relative", 0))),
        PACKED,
        with_mask(PACKED, "none"),
        CACHE,
    ],
    ids=lambda p: f"{p.layout} {p.mask}",
)
def test_flex_attention_gets_the_masks_that_are_meant(problem: Problem) -> None:
    """The real one, not compiled. Not in float16, in which a CPU's is not accurate."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    check(peers.FlexEager(), dataclasses.replace(problem, dtype="float32"))


@torch_needed
@pytest.mark.parametrize("layout", ["dense", "packed", "cache"])
def test_sdpa_gets_matrices_and_padded_batches_that_are_meant(layout: str) -> None:
    masks = [("none", 0), ("causal", 0), ("window", 6), ("prefix", 7), ("alibi", 0), ("relative", 0)]
    for kind, size in masks if layout == "dense" else masks[:2] if layout == "packed" else masks[1:2]:
        base = {"dense": DENSE, "packed": PACKED, "cache": CACHE}[layout]
        problem = dataclasses.replace(base, heads_kv=4, dtype="float32", mask=Mask(kind, size))
        check(peers.Sdpa("math"), problem)
        if layout == "packed":
            check(peers.Sdpa("math"), problem, "both")


def test_jax_is_asked_for_the_window_and_lengths_that_are_meant() -> None:
    pytest.importorskip("jax")
    for problem in (with_mask(DENSE, "window", 6), CACHE):
        check(peers.Jax("xla"), dataclasses.replace(problem, dtype="float32"))
    with pytest.raises(peers.NotTaken, match="no pages"):
        check(peers.Jax("xla"), PAGES)


def test_peers_that_are_not_here_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flashinfer", "torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)
    found, versions, skipped = peers.present(None, peers.peers())
    assert found == [] and versions == {}
    assert {"torch cudnn", "flex", "flash-attn 2", "flash-attn 4", "flashinfer", "xformers", "jax xla"} <= set(skipped)
    assert "jax cannot be imported" in skipped["jax xla"]
    _, _, skipped = peers.present(["flash-attn"], peers.peers())
    assert set(skipped) == {"flash-attn 2", "flash-attn 3", "flash-attn 4"}


def test_a_peer_that_does_not_start_is_skipped_and_the_others_are_there() -> None:
    class Broken(peers.Peer):
        name = "broken"

        def version(self) -> str:
            raise RuntimeError("Unable to initialize backend 'cuda'")

    class Sound(peers.Peer):
        name = "sound"

        def version(self) -> str:
            return "1"

    found, versions, skipped = peers.present(None, [Broken(), Sound()])
    assert [peer.name for peer in found] == ["sound"] and versions == {"sound": "1"}
    assert skipped == {"broken": "does not start here (RuntimeError: Unable to initialize backend 'cuda')"}


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["both", "varlen", "decode", "memory", "accuracy"])
def test_the_harness_on_a_gpu(group: str) -> None:
    """Events, copies that give the host a lead, and the check against float64 on the device, with cuflash alone."""
    clock = timing.CudaClock()
    chosen = [
        dataclasses.replace(case, problem=dataclasses.replace(case.problem, head_dim=64)) for case in cases.tiny()
    ]
    results = schema.describe(commit="abc")
    run.measure([c for c in chosen if c.group == group][:2], run.Run(clock, [], 0.01), results)
    assert results.rows and not results.notes
    assert [row.error for row in results.rows] == [None] * len(results.rows)
    assert all(row.ms or row.more for row in results.rows)


@pytest.mark.gpu
def test_the_ceilings_of_a_gpu() -> None:
    found = timing.ceilings(timing.CudaClock(), 0.05)
    assert found["matmul_tflops"] > 1 and found["copy_gbps"] > 10 and found["launch_us"] > 0


def test_launches_are_counted_and_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []
    monkeypatch.setattr(module, "launch_cuda", lambda kernel, *rest: happened.append(rest))
    kernel = SimpleNamespace(spec=SimpleNamespace(name="forward_sm80"))
    with run._launches() as launched:
        module.launch_cuda(kernel, (1, 1, 1), (128, 1, 1), b"", 0, None)
    module.launch_cuda(kernel, "later")
    assert launched == ["forward_sm80"] and happened == [((1, 1, 1), (128, 1, 1), b"", 0, None), ("later",)]
