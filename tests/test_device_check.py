"""device-check without a GPU: its stages with stand-ins for what they start, and what their workers do on the emulator.

The stand-ins are shell scripts, which begin at once. Where one hangs, the time it is given is short, and nothing but
that it was stopped is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backends import using
from rich.console import Console
from typer.testing import CliRunner

import cuflash
from benchmarks import schema
from benchmarks.schema import Results, Row
from cuflash import api, arch, cli, dtypes, kvcache, questions
from cuflash.cli import device_check, machine, on_device
from cuflash.cli.device_check import FAILED, OK, SKIPPED, UNFINISHED, Share, Stage
from cuflash.cli.machine import Gpu
from cuflash.errors import ArgumentError
from cuflash.jit import module
from cuflash.ops import forward

HOPPER, TURING, AMPERE = (Gpu(0, *named) for named in (("NVIDIA H200", (9, 0)), ("T4", (7, 5)), ("A100", (8, 0))))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app(), ["device-check", *arguments])


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes a shell script what is started instead of Python; the arguments are those for Python. `grace`: how long it
    has to end once it is asked to. One that does end is given more than it takes on the busiest machine."""

    def script(text: str, grace: float = 1.0) -> None:
        monkeypatch.setattr(device_check, "GRACE", grace)
        path = tmp_path / "instead.sh"
        path.write_text(text)
        monkeypatch.setattr(device_check, "python", lambda *arguments: ["sh", str(path), *arguments])

    return script


@pytest.fixture
def share(tmp_path: Path) -> Callable[[float], Share]:
    folder = tmp_path / "work"
    folder.mkdir()
    return lambda seconds: Share(folder, seconds)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "cupy", "said"),
    [
        ((), {}, "no GPU here"),
        ((TURING,), {"cupy-cuda12x": "14.2.0"}, "T4 is older"),
        ((HOPPER,), {}, "CuPy is not; install it with"),
    ],
)
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, tmp_path: Path, gpus, cupy, said) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(machine, "cupy_wheels", lambda: cupy)
    done = invoke("--out", str(tmp_path))
    assert done.exit_code == 2 and said in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--minutes", "3"), "minutes=3 must be one of 2, 5, 9"),
        (("--only", "speed"), "'speed' must be one of the stages"),
    ],
)
def test_wrong_arguments(arguments, said) -> None:
    done = invoke(*arguments)
    assert isinstance(done.exception, ArgumentError) and said in str(done.exception)


def stages(monkeypatch: pytest.MonkeyPatch, **found: Any) -> list[Share]:
    """Stand-ins for stages, in their order: each gives or raises what it is named with, and writes some files."""
    shares: list[Share] = []

    def run(what: Any) -> Callable[[Share], Stage]:
        def stage(share: Share) -> Stage:
            shares.append(share)
            for n in range(10):
                (share.folder / f"{n}.txt").write_text("much")
            if isinstance(what, Exception):
                raise what
            return what

        return stage

    monkeypatch.setattr(device_check, "STAGES", {name: (1.0, run(what)) for name, what in found.items()})
    return shares


def test_every_stage_runs_and_three_files_tell_what_it_found(monkeypatch, tmp_path: Path) -> None:
    many = [{"name": f"test_y{n}", "message": "nor this"} for n in range(1, 10)]
    shares = stages(
        monkeypatch,
        hopper=Stage(OK, "all right"),
        primitives=ValueError("no such luck"),
        tests=Stage(FAILED, "10 failed", [{"name": "test_x", "message": "x is not y"}, *many]),
        sanitizer=Stage(SKIPPED, "not here"),
    )
    monkeypatch.setattr(machine, "gpus", lambda: (HOPPER,))
    monkeypatch.setattr(machine, "cupy_wheels", lambda: {"cupy-cuda13x": "14.2.0"})
    done = invoke("--out", str(tmp_path / "new"), "--commit", "abc123", "--minutes", "2")
    assert done.exit_code == 1 and len(shares) == 4
    files = {path.suffix: path for path in (tmp_path / "new").iterdir()}
    assert set(files) == {".json", ".log", ".gz"} and all(f.name.startswith("h200-") for f in files.values())
    results = schema.read(files[".json"])
    assert results.gpu == "NVIDIA H200" and results.commit == "abc123"
    told = results.more["device_check"]
    assert {name: stage["state"] for name, stage in told.items()} == {
        "hopper": OK, "primitives": FAILED, "tests": FAILED, "sanitizer": SKIPPED,
    }  # fmt: skip
    assert told["primitives"]["found"] == "ValueError: no such luck"
    log = files[".log"].read_text()
    shown = device_check.MOST_SHOWN
    assert f"test_y{shown}" in log and f"test_y{shown}" not in done.output and "and 2 more, in the log" in done.output
    assert "test_x: x is not y" in log and "begin with primitives: primitives: ValueError: no such luck" in log
    with tarfile.open(files[".gz"]) as archive:
        assert len(archive.getnames()) == 40 and "tests/3.txt" in archive.getnames()


@pytest.mark.parametrize("found, status", [(OK, 0), (SKIPPED, 0), (UNFINISHED, 0), (FAILED, 1)])
def test_the_status_says_whether_anything_failed(monkeypatch, tmp_path: Path, found, status) -> None:
    stages(monkeypatch, tests=Stage(found, "this"), benchmark=Stage(OK, "that"))
    assert run_check(tmp_path, ["tests", "benchmark"])[0] is (status == 0)


def run_check(out: Path, wanted: list[str], seconds: float = 90.0) -> tuple[bool, str]:
    said = io.StringIO()
    results = Results("NVIDIA H200", "abc", True, "2026-01-02T03:04:05+00:00")
    return device_check.check(results, wanted, seconds, out, Console(file=said, width=200)), said.getvalue()


def test_a_stage_has_its_share_and_what_others_left(monkeypatch, tmp_path: Path) -> None:
    shares = stages(monkeypatch, hopper=Stage(OK, ""), tests=Stage(OK, ""), benchmark=Stage(OK, ""))
    run_check(tmp_path, ["hopper", "tests", "benchmark"], 90.0)
    assert [share.seconds for share in shares] == pytest.approx([30, 45, 90], abs=15)


def test_where_nothing_can_be_written_all_stages_run_and_it_is_no_success(monkeypatch, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    shares = stages(monkeypatch, hopper=Stage(OK, ""), tests=Stage(OK, "12 passed"))
    well, said = run_check(in_the_way, ["hopper", "tests"])
    assert not well and len(shares) == 2
    assert "12 passed" in said and "not written: the log:" in said and "the results:" in said and "archive" in said


def test_a_full_disk_leaves_what_was_written(monkeypatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    stages(monkeypatch, hopper=Stage(OK, "all right"))
    monkeypatch.setattr(device_check, "_archive", full)
    well, said = run_check(tmp_path, ["hopper"])
    assert not well and "not written: the archive: [Errno 28] No space left" in said
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".log"]


def test_ctrl_c_leaves_no_process_behind(monkeypatch, tmp_path: Path, instead) -> None:
    started = []
    instead('trap "" INT; sleep 30 & wait')

    def stage(share: Share) -> Stage:
        started.append(device_check.start(device_check.python(), share.folder / "out.txt"))
        raise KeyboardInterrupt

    monkeypatch.setattr(device_check, "STAGES", {"tests": (1.0, stage)})
    with pytest.raises(KeyboardInterrupt):
        run_check(tmp_path, ["tests"])
    assert started[0].wait(20) != 0


def test_long_files_stay_out_of_the_archive(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_check, "LONGEST_KEPT", 3)
    (tmp_path / "work").mkdir()
    for name, text in (("long", "1234"), ("short", "123")):
        (tmp_path / "work" / name).write_text(text)
    device_check._archive(tmp_path / "work", tmp_path / "all.tar.gz")
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert archive.getnames() == ["short"]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "tests" / "hw").mkdir(parents=True)
    (root / "tests" / "ops").mkdir()
    monkeypatch.setattr(device_check, "CHECKOUT", root)
    return root


def test_pytest_runs_what_is_marked_gpu(checkout: Path, share) -> None:
    """The real one, on files of its own."""
    (checkout / "tests" / "hw" / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_error(broken): pass\n"
    )
    (checkout / "tests" / "hw" / "test_none.py").write_text("# mark.gpu\ndef test_of_the_emulator(): assert False\n")
    (checkout / "tests" / "hw" / "test_broken.py").write_text("# mark.gpu\nimport nothing_like_it\n")
    stage = device_check.primitives(share(100.0))
    assert stage.state == FAILED and stage.found.startswith("1 passed, 3 failed, 1 skipped")
    messages = {failure["name"].rpartition("::")[2]: failure["message"] for failure in stage.failures}
    assert "one is not two" in messages["test_bad"] and "ValueError: broken" in messages["test_error"]
    assert "test_of_the_emulator" not in messages and len(messages) == 3


def test_a_files_tests_are_run_by_the_dozen_slow_ones_left_out(checkout: Path, share, monkeypatch) -> None:
    """The real pytest collects; what would have been run is seen."""
    many, broken = checkout / "tests" / "hw" / "test_many.py", checkout / "tests" / "hw" / "test_broken.py"
    many.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('x', range(13))\ndef test_x(x): pass\n"
        "@pytest.mark.parametrize('x', ['a b::c'])\ndef test_y(x): pass\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
    )
    broken.write_text("# mark.gpu\nimport nothing_like_it\n")
    asked: list[tuple[Path, list[str]]] = []

    def ran(file: Path, tests: list[str], *_: Any) -> dict[str, Any]:
        asked.append((file, tests))
        return {"passed": len(tests), "failed": 0, "skipped": 0, "failures": [], "stopped": False}

    monkeypatch.setattr(device_check, "run_pytest", ran)
    assert device_check.primitives(share(100.0)).found == "15 passed, 0 failed, 0 skipped"
    first, second, whole = sorted(asked, key=lambda pair: (pair[0].name != "test_many.py", -len(pair[1])))
    assert first == (many, [f"{many}::test_x[{x}]" for x in range(12)])
    assert second == (many, [f"{many}::test_x[12]", f"{many}::test_y[a b::c]"]) and whole == (broken, [str(broken)])


def test_the_files_with_tests_for_a_gpu_kernels_first(checkout: Path, monkeypatch) -> None:
    files = {"hw/test_a.py": "BACKENDS", "test_b.py": "@pytest.mark.gpu", "ops/test_c.py": "mark.gpu", "test_d.py": ""}
    for name, text in files.items():
        (checkout / "tests" / name).write_text(text)
    asked: list[str] = []
    monkeypatch.setattr(device_check, "tests_of", lambda files, share: asked.extend(f.name for f in files))
    device_check.primitives(Share(checkout, 1.0))
    device_check.other_tests(Share(checkout, 1.0))
    assert asked == ["test_a.py", "test_c.py", "test_b.py"]
    (real,) = [f for f in device_check.gpu_files(Path(__file__).parent) if f.name == "test_pipeline.py"]
    assert real.parent.name == "hw"


REPORT = """<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>"""
WRITE_REPORT = f"""for x in "$@"; do case "$x" in --junitxml=*) echo '{REPORT}' > "${{x#--junitxml=}}";; esac; done\n"""


def test_a_kernel_that_hangs_ends_its_file_and_is_named(checkout: Path, instead, share) -> None:
    for name in ("test_good.py", "test_hangs.py"):
        (checkout / "tests" / "hw" / name).write_text("mark.gpu")
    instead(
        'case "$*" in *test_hangs.py*) trap "" INT; echo "collected 2 items"; '
        f'printf "tests/hw/test_hangs.py::test_of_it "; sleep 30 & wait; sleep 30;; *) {WRITE_REPORT};; esac\n'
    )
    stage = device_check.primitives(share(3.0))
    assert stage.state == FAILED and stage.found.startswith("1 passed, 1 failed")
    (failure,) = stage.failures
    assert failure["name"] == "tests/hw/test_hangs.py::test_of_it" and "hangs" in failure["message"]


def test_a_test_that_is_silent_hangs_and_those_before_it_count(checkout: Path, instead, share, monkeypatch) -> None:
    monkeypatch.setattr(device_check, "SILENCE", 0.5)
    (checkout / "tests" / "hw" / "test_a.py").write_text("mark.gpu")
    said = "test_a.py::b PASSED \\ntest_a.py::c[1 2] FAILED \\ntest_a.py::d SKIPPED (no) \\ntest_a.py::e "
    instead(f'printf "{said}"; sleep 30 & wait\n')
    stage = device_check.primitives(share(15.0))  # a third of it for the collection, which hangs, too
    assert stage.state == FAILED and stage.found == "1 passed, 2 failed, 1 skipped"
    assert [failure["name"] for failure in stage.failures] == ["test_a.py::c[1 2]", "test_a.py::e"]
    assert "hangs: nothing for" in stage.failures[1]["message"]


def test_tests_that_are_many_are_stopped_and_no_failure(checkout: Path, instead, share) -> None:
    (checkout / "tests" / "hw" / "test_many.py").write_text("mark.gpu")
    instead(f"finish() {{ {WRITE_REPORT} exit 2; }}\ntrap 'finish \"$@\"' INT\nsleep 30 & wait\n", grace=30.0)
    stage = device_check.primitives(share(4.0))
    assert stage.state == UNFINISHED and "1 passed, 0 failed" in stage.found and "no time for all of" in stage.found


def test_without_time_or_tests(checkout: Path, share) -> None:
    assert device_check.primitives(share(9.0)).state == SKIPPED
    (checkout / "tests" / "hw" / "test_a.py").write_text("mark.gpu")
    stage = device_check.primitives(share(0.0))
    assert stage.state == UNFINISHED and "test_a.py" in stage.found


def test_tests_that_are_all_skipped_are_no_success(checkout: Path, instead, share) -> None:
    (checkout / "tests" / "hw" / "test_a.py").write_text("mark.gpu")
    instead(WRITE_REPORT.replace('name="b"/>', 'name="b"><skipped/></testcase>'))
    stage = device_check.primitives(share(30.0))
    assert stage.state == FAILED and "1 skipped" in stage.found


def test_pytest_that_does_not_start_is_a_failure(checkout: Path, instead, share) -> None:
    (checkout / "tests" / "hw" / "test_a.py").write_text("mark.gpu")
    instead("echo 'No module named pytest'; exit 1")
    stage = device_check.primitives(share(30.0))
    assert stage.state == FAILED and "No module named pytest" in stage.failures[0]["message"]


# --- workers ----------------------------------------------------------------------------------------------------------

# Of five items one hangs, one kills its process, one is wrong and says so.
WORKER = r"""
while [ "$1" != --skip ]; do shift; done
say() { echo "{\"item\": $1, \"name\": \"n$1\"$2}"; }
for i in 0 1 2 3 4; do
  [ $i -lt $2 ] && continue
  say $i
  case $i in
    1) sleep 30;;
    2) echo "Segmentation fault"; exit 139;;
    3) say 3 ', "ok": false, "message": "off by one"';;
    *) say $i ', "ok": true, "ratio": 1.5';;
  esac
done
"""


def test_behind_an_item_that_hangs_or_kills_its_process_a_new_one_goes_on(instead, share) -> None:
    instead(WORKER)
    found, left = device_check.items_of("hopper", share(60.0), each=1.0)
    assert not left and [item["item"] for item in found] == [0, 1, 2, 3, 4]
    assert [item["ok"] for item in found] == [True, False, False, False, True]
    assert "hangs" in found[1]["message"] and found[3]["message"] == "off by one"
    assert "139" in found[2]["message"] and "Segmentation fault" in found[2]["message"]
    stage = device_check._stage_of(found, left, "")
    assert stage.state == FAILED and stage.found == "2 of 5 right"
    assert [failure["name"] for failure in stage.failures] == ["n1", "n2", "n3"]


def test_a_worker_has_no_more_than_its_time(instead, share) -> None:
    instead(WORKER)
    found, left = device_check.items_of("hopper", share(1.0), each=30.0)
    assert "no time" in left and [item["item"] for item in found] == [0], "what was under way failed nobody"
    assert device_check._stage_of(found, left, "").state == UNFINISHED


def test_processes_that_are_ruined_one_after_the_other_are_not_begun_for_ever(instead, share) -> None:
    instead(WORKER.replace("0 1 2 3 4", "$(seq 0 99)").replace("    1) sleep", "    *) exit 7;; 1) sleep"))
    found, left = device_check.items_of("hopper", share(60.0))
    assert len(found) == device_check.MOST_RUINED and "ruined" in left


def test_a_worker_that_does_not_start_is_a_failure(instead, share) -> None:
    instead("echo no module; exit 1")
    found, left = device_check.items_of("hopper", share(30.0))
    assert left == "it does not begin" and len(found) == 1 and "no module" in found[0]["message"]


def test_hopper_is_for_hopper(monkeypatch, instead, share) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (AMPERE,))
    assert device_check.hopper(share(1.0)).state == SKIPPED
    monkeypatch.setattr(machine, "gpus", lambda: (HOPPER,))
    instead('echo \'{"item": 0, "name": "time, d 64", "ok": true, "ratio": 1.5}\'')
    stage = device_check.hopper(share(30.0))
    assert stage.state == OK and stage.found == "1 of 1 right; as fast as forward_sm80: d 64 1.50 x"


def test_tiles_are_ranked_and_kept(instead, share) -> None:
    tile = '{"item": %d, "name": "d 64: %s", "ok": true, "d": 64, "tflops": %d, "now": %s}'
    instead("\n".join(f"echo '{tile % x}'" for x in ((0, "a", 400, "true"), (1, "b", 500, "false"))))
    stage = device_check.tune(share(30.0))
    line = "d 64: 1. b 500 TFLOP/s, 2. a 400 TFLOP/s (now)"
    assert stage.state == OK and line in stage.found
    assert (share(0).folder / "ranking.txt").read_text() == line + "\n"


def test_a_worker_says_each_item_and_ends_when_it_may_be_ruined(capsys) -> None:
    def wrong() -> dict[str, Any]:
        raise on_device.Wrong("off by one")

    def ruined() -> dict[str, Any]:
        raise RuntimeError("an illegal memory access")

    items = [("a", lambda: {"x": 1}), ("b", wrong), ("c", ruined), ("d", lambda: {})]
    assert on_device.work(iter(items), 1) == on_device.RUINED
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line.get("ok")) for line in said] == [("b", None), ("b", False), ("c", None), ("c", False)]
    assert "illegal" in said[-1]["message"]
    assert on_device.work(iter(items), 3) == 0


@pytest.fixture
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Hopper in the worker's eyes, with short calls; what would have been compiled for it is in the list."""
    ahead: list[str] = []
    timing = on_device.benchmarks("timing")
    monkeypatch.setattr(timing, "CudaClock", timing.HostClock)
    monkeypatch.setattr(timing, "take_turns", functools.partial(timing.take_turns, host_clock=lambda: 0.0))
    monkeypatch.setattr(on_device, "_upload", lambda x: x)
    monkeypatch.setattr(on_device.frameworks.cupy, "current_device", lambda: 0)
    monkeypatch.setattr(on_device.frameworks.cupy, "arch_of", lambda device: arch.named("sm_90a"))
    monkeypatch.setattr(on_device.module, "compile", lambda spec, target: ahead.append(spec.name))
    for name, value in (("LENGTH", 64), ("BATCH", 1), ("DIMS", (64,)), ("WIDTH", 64), ("SECONDS", 1e-3)):
        monkeypatch.setattr(on_device, name, value)
    with using("emulator", "sm_90a"):
        yield ahead


def test_the_time_of_both_kernels(monkeypatch, on_the_emulator, capsys) -> None:
    monkeypatch.setattr(on_device, "compared", lambda: [CASES["one tile"]])
    assert on_device.main(["hopper", "--skip", "0"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line != "."]
    done = {line["name"]: line for line in said if "ok" in line}
    assert all(line["ok"] for line in done.values()), done
    assert on_the_emulator.count("forward_sm90") == on_the_emulator.count("forward_sm80") == 2
    timed = done["time, 1 x 64, d 64, causal"]
    assert set(timed["tflops"]) == {"forward_sm90", "forward_sm80"} and timed["ratio"] > 0
    assert list(done) == ["compiling", "one tile", "time, 1 x 64, d 64", "time, 1 x 64, d 64, causal"]


def test_tiles_are_timed_and_checked(monkeypatch, on_the_emulator, capsys) -> None:
    monkeypatch.setattr(on_device, "SM90_CANDIDATES", {64: ()})  # but for the one in use
    monkeypatch.setattr(on_device, "LENGTH", 384)  # a pair of tiles
    assert on_device.main(["tune"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line != "."]
    done = {line["name"]: line for line in said if "ok" in line and "d" in line}
    assert len(done) == 6 and all(line["ok"] for line in done.values())
    assert any("tiles by position" in name for name in done)
    assert on_the_emulator == ["forward_sm90", "forward_sm90_pair"]
    lines = device_check.ranking(list(done.values()))
    assert [line.partition(":")[0] for line in lines] == ["d 64", "d 64, causal"]
    assert all("192 x 128, 16 warps, persistent" in line for line in lines)
    assert [line.count("(now)") for line in lines] == [3, 3] and "clusters of two" in lines[0]

    now, other = forward.SM90_TILES[64], forward.Tile(128, 128, 12)
    monkeypatch.setattr(api, "attention", lambda q, *_, **__: q + q.dtype.type(forward.SM90_TILES[64] == other))
    with pytest.raises(on_device.Wrong, match="from the tile in use"):
        on_device.time_tile(arch.named("sm_90a"), 64, other, now, False, None)


CASES = {case.what: case for case in on_device.compared()}


@pytest.mark.parametrize("what", ["one tile", "a tail of keys", "packed", "clusters of two"])
def test_both_kernels_of_hopper_are_compared(what) -> None:
    """On the emulator; of clusters at its own head dim, where V lies in two chunks."""
    case = CASES[what] if what == "clusters of two" else dataclasses.replace(CASES[what], dims=(64, 64))
    with using("emulator", "sm_90a"):
        found = on_device.compare(case)
    assert 0 < found["error"]["out"]["forward_sm90"] < 2e-3


@pytest.mark.slow
def test_every_comparison_and_every_call_for_the_sanitizer() -> None:
    with using("emulator", "sm_90a"):
        for case in CASES.values():
            short = case.what == "many tiles for each block"
            on_device.compare(dataclasses.replace(case, q_lens=(600,)) if short else case)
        on_device.small(lambda x: x)


def test_what_the_sanitizer_looks_at_is_compiled_before(monkeypatch) -> None:
    """The same calls side by side, all of them, whichever ends first."""
    asked = []
    for target, name in ((api, "attention"), (api, "attention_backward"), (kvcache, "flash_attn_with_kvcache")):
        result = SimpleNamespace(out=0, lse=0)
        monkeypatch.setattr(target, name, lambda *a, name=name, result=result, **k: asked.append(name) or result)
    on_device.small(lambda x: x, ahead=True)
    assert sorted(asked) == ["attention"] * 5 + ["attention_backward", "flash_attn_with_kvcache"]


def test_a_wrong_result_other_bits_or_another_kernel_is_said(monkeypatch) -> None:
    attention = api.attention
    case = CASES["one tile"]
    with using("emulator", "sm_80"), pytest.raises(on_device.Wrong, match="forward_sm80 was asked"):
        on_device.compare(case)
    for off, said in ((0.05, "out is off by"), (1e-3, "other bits the second time")):
        calls = []

        @functools.wraps(attention)
        def changed(*arrays: Any, off: float = off, calls: list[int] = calls, **keywords: Any) -> Any:
            result = attention(*arrays, **keywords)
            if keywords.get("kernel_options") is None and cuflash.config.backend == "emulator":
                calls.append(1)
                out = result.out + np.float16(off if off > 0.01 or len(calls) == 2 else 0)
                return SimpleNamespace(out=out, lse=result.lse)
            return result

        monkeypatch.setattr(api, "attention", changed)
        with using("emulator", "sm_90a"), pytest.raises(on_device.Wrong, match=said):
            on_device.compare(case)


def test_the_kernels_compiled_ahead_are_those_that_calls_take(monkeypatch) -> None:
    ahead = {(spec.source, spec.variant) for spec in on_device.specs_of(on_device.compared(), arch.named("sm_90a"))}
    asked = set()
    load = module.load

    def noting(spec: Any, *rest: Any) -> Any:
        asked.add((spec.source, spec.variant))
        return load(spec, *rest)

    monkeypatch.setattr(module, "load", noting)
    with using("emulator", "sm_90a"):
        for what in ("one tile", "dropout", "mask_mod of bounds", "pages of 64"):
            on_device.compare(CASES[what])
    assert len(asked) == 8 and asked <= ahead


@pytest.mark.parametrize("name", ["sm_80", "sm_90a", "sm_120a"])
def test_the_tiles_that_are_tried_fit_and_the_one_in_use_is_among_them(name) -> None:
    target = arch.named(name)
    found = on_device.candidates(target)
    for d in (64, 96, 128, 192, 256):
        tiles = [tile for dim, tile, _ in found if dim == d]
        now = on_device._variant(target, d).tile
        assert now in tiles and len(set(tiles)) == len(tiles) > 1
        for tile in tiles:
            with on_device.tile_of(target, d, tile):
                variant = on_device._variant(target, d)
                assert variant.tile == tile and variant.smem_bytes <= target.smem_bytes
        assert on_device._variant(target, d).tile == now


def test_a_tile_is_taken_by_calls_while_it_is_tried(rng) -> None:
    q = rng.standard_normal((1, 300, 1, 64)).astype(np.float16)
    target, tile = arch.named("sm_80"), forward.Tile(64, 64, 4)
    with using("emulator", "sm_80"):
        before = questions.explain(q, q, q).grid
        with on_device.tile_of(target, 64, tile):
            assert questions.explain(q, q, q).grid == (5, 1, 1) != before
        assert questions.explain(q, q, q).grid == before


# --- sanitizer and benchmark ------------------------------------------------------------------------------------------


def test_without_a_sanitizer_the_stage_is_left_out(monkeypatch, share) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(device_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    stage = device_check.sanitizer(share(1.0))
    assert stage.state == SKIPPED and "CUDA toolkit" in stage.found


@pytest.mark.parametrize(
    "tools, state",
    [("memcheck racecheck", FAILED), ("memcheck", OK), ("memcheck slow", UNFINISHED), ("memcheck refused", SKIPPED)],
)
def test_what_sanitizers_report(monkeypatch, tmp_path: Path, instead, share, tools, state) -> None:
    instead('[ "$*" = "-m cuflash.cli.on_device small --ahead" ]')
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\ncase "$2" in racecheck) echo "========= ERROR SUMMARY: 3 errors"; exit 99;; slow) sleep 30;;\n'
        'refused) echo "========= Error: Device not supported."; exit 1;; memcheck) echo "$@" > "$0.said";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(device_check, "compute_sanitizer", lambda: str(tool))
    monkeypatch.setattr(device_check, "TOOLS", tools.split())
    stage = device_check.sanitizer(share(2.0 if "slow" in tools else 60.0))
    assert stage.state == state
    assert stage.found.startswith("no tool ok, memcheck ok") or "does not serve this machine" in stage.found
    assert "--report-api-errors no" in (tmp_path / "compute-sanitizer.said").read_text()
    if state == FAILED:
        assert stage.failures == [{"name": "racecheck", "message": "status 99: ERROR SUMMARY: 3 errors"}]


def test_calls_that_fail_without_a_tool_fail_the_stage(monkeypatch, tmp_path: Path, instead, share) -> None:
    instead("echo no such kernel; exit 1")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(device_check, "compute_sanitizer", lambda: str(tool))
    stage = device_check.sanitizer(share(60.0))
    assert stage.state == FAILED and stage.found.startswith("no tool failed, memcheck ok")
    assert stage.failures == [{"name": "no tool", "message": "status 1: no such kernel"}]


def test_the_sanitizer_of_a_toolkit_is_found(monkeypatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert device_check.compute_sanitizer() == str(tool)


BENCHED = Results(
    "NVIDIA H200", "other", None, "2026-05-05T00:00:00+00:00", ceilings={"copy_gbps": 4300.0},
    rows=[Row("forward", "a", "cuflash", ms=1.0, spread=0.1, tflops=500.0), Row("forward", "a", "torch", error="no")],
)  # fmt: skip


@pytest.mark.parametrize(
    ("then", "rows", "state", "said"),
    [
        ("exit 0", [], OK, "2 rows, 0 failed"),
        ("exit 1", [Row("forward", "b", "cuflash", error="wrong result")], FAILED, "3 rows, 1 failed"),
        ("exit 1", [], FAILED, "1 failed"),
        ("sleep 30 & wait", [], UNFINISHED, "2 rows"),
    ],
)
def test_the_benchmarks_rows_become_part_of_the_results(
    instead, share, tmp_path: Path, then, rows, state, said
) -> None:
    source = schema.write(dataclasses.replace(BENCHED, rows=[*BENCHED.rows, *rows]), tmp_path / "made.json")
    find = 'while [ "$1" != --out ]; do shift; done\n'
    instead(f'{find}trap "exit 130" INT\ncp {source} "$2"\necho words\n{then}\n', grace=30.0)
    stage = device_check.benchmark(share(34.0 if "sleep" in then else 60.0))
    assert stage.state == state and said in stage.found
    results = Results("NVIDIA H200", "abc", True, "2026-01-02T03:04:05+00:00", more={"device_check": {"hopper": {}}})
    merged = device_check._with(results, "benchmark", stage, share(0).folder)
    assert merged.rows[:2] == BENCHED.rows and merged.ceilings == BENCHED.ceilings
    assert (merged.commit, merged.clean, merged.date) == ("abc", True, "2026-01-02T03:04:05+00:00")
    assert set(merged.more["device_check"]) == {"hopper", "benchmark"}


def test_a_benchmark_that_sees_no_gpu_is_a_failure(instead, share, tmp_path: Path) -> None:
    source = schema.write(dataclasses.replace(BENCHED, gpu=schema.OFFLINE), tmp_path / "made.json")
    instead(f'while [ "$1" != --out ]; do shift; done\ncp {source} "$2"\n')
    stage = device_check.benchmark(share(60.0))
    assert stage.state == FAILED and "saw no GPU" in stage.failures[0]["message"]


def test_a_benchmark_without_results_is_a_failure(instead, share) -> None:
    instead("echo Traceback; echo KeyError; exit 1")
    stage = device_check.benchmark(share(30.0))
    assert stage.state == FAILED and "KeyError" in stage.found


def test_what_is_started_is_this_python_on_this_cuflash(monkeypatch, tmp_path: Path) -> None:
    output = tmp_path / "said.txt"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    words = "sys.executable, cuflash.__file__, os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']"
    command = device_check.python("-c", f"import os, sys, cuflash; print({words})")
    ended = device_check.finish(device_check.start(command, output), 100.0)
    assert ended == device_check.Ended("ended", 0)
    assert output.read_text().split() == [
        sys.executable,
        str(device_check.CHECKOUT / "cuflash" / "__init__.py"),
        "false",
    ]


def test_normal_draws_are_rounded_to_bfloat16_by_their_bits() -> None:
    found = on_device._normal(np, np.random.default_rng(1), (3, 50))
    exact = np.random.default_rng(1).standard_normal((3, 50), dtype=np.float32)
    np.testing.assert_array_equal(found.view(np.uint16), exact.astype(dtypes.bfloat16.numpy).view(np.uint16))
