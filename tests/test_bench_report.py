"""What is made of files of results: tables, budgets, pages, plots; and that the committed pages are what the committed
files say."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import cases, report, schema
from benchmarks.schema import Results, Row
from cuflash import cli

OURS, BEST, SLOW = "cuflash", "torch cudnn", "torch math"
CEILINGS = {"matmul_tflops": 800.0, "copy_gbps": 4000.0, "launch_us": 2.0}
LATENCY = {"import cuflash": 200.0, "first call, nothing cached": 1200.0, "first call, cubin on disk": 40.0}


def made_up(tflops: float, best: float, gbps: float = 3800.0, host_us: float = 10.0, **facts: Any) -> Results:
    """Results of every case: cuflash at one speed, one peer at another, one far behind."""
    results = Results("NVIDIA H200", "abc123", True, "2026-01-02T03:04:05+00:00", ceilings=CEILINGS, **facts)
    results.peers = {BEST: "2.15.0", "flash-attn 2": "2.8.4", SLOW: "2.15.0"}
    for case in cases.cases():
        if case.group == "latency":
            slower = 1.5 if case.problem.mask.kind == "prefix" else 1.0
            results.rows.append(Row(case.op, f"warm call: {case.name}", OURS, host_us * slower / 1e3, 0.001))
        elif case.group == "memory":
            built = case.problem.mask.kind == "document"
            more = {"bytes": case.problem.q_lens[0] * (8192 + 4 * built), "launches": 1 + built}
            results.rows.append(Row(case.op, case.name, OURS, more=more))
        elif case.group == "accuracy":
            histogram = {"first_exponent": -31, "counts": [1, 5, 2]}
            found = {"rms": 1e-3, "max": 1e-2, "size": 0.5, "histogram": histogram}
            results.rows.append(Row(case.op, case.name, OURS, more={"out": found}))
        else:
            for impl, speed in ((OURS, tflops), (BEST, best), ("flash-attn 2", best / 2), (SLOW, 10.0)):
                if impl == OURS or not case.variant:
                    results.rows.append(row_of(case, impl, speed, gbps if impl == OURS else gbps / 2))
    results.rows += [Row("latency", case, OURS, ms, 1.0) for case, ms in LATENCY.items()]
    return results


def row_of(case: cases.Case, impl: str, tflops: float, gbps: float) -> Row:
    if case.by_bytes:
        return Row(case.op, case.name, impl, case.bytes / gbps / 1e6, 0.0, gbps=gbps)
    ms = case.flops / tflops / 1e9
    more = {"tokens_per_s": round(sum(case.problem.q_lens) / ms * 1e3)} if case.group == "varlen" else {}
    return Row(case.op, case.name, impl, ms, 0.01, tflops=tflops, more=more)


def lines(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of every row of Markdown tables."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_committed_pages_and_plots_are_what_the_committed_files_say() -> None:
    for page, text in report.pages().items():
        assert page.read_text(encoding="utf-8") == text, "write them anew with: python -m cuflash bench-report"
    wanted = report.plots()
    assert {path.name for path in report.PLOTS.glob("*.svg")} == set(wanted)
    for name, table in wanted.items():
        assert report.digest(table) in (report.PLOTS / name).read_text(encoding="utf-8"), f"{name} shows other results"


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    assert report.long_page([]) == report.short_page([]) == "Not yet measured."
    assert all("Not yet measured." in text for text in report.pages(tmp_path).values())


def test_a_table_says_who_is_best_and_by_how_much() -> None:
    rows = [
        Row("forward", "long", OURS, 1.0, 0.1, tflops=660.0),
        Row("forward", "long", BEST, 1.1, 0.1, tflops=600.0),
        Row("forward", "long", SLOW, 9.0, 0.1, tflops=66.0),
        Row("forward", "short", OURS, 1.0, 0.1, tflops=300.0),
        Row("forward", "short", BEST, 1.0, 0.1, error=None, tflops=400.0),
        Row("forward", "broken", OURS, error="RuntimeError: no"),
        Row("forward", "broken", BEST, error="does not take this"),
        Row("latency", "warm", OURS, 0.010, 0.0),
        Row("latency", "warm", BEST, 0.020, 0.0),
    ]
    forward, latency = report.tables(rows)
    assert forward.title == "Forward, TFLOP/s" and forward.impls == (OURS, BEST, SLOW)
    said = lines(report.markdown(*forward.cells()))
    assert said["long"] == ["660 ±5 %", "600 ±5 %", "66", "1.10 x torch cudnn"]
    assert said["short"] == ["300 ±5 %", "400 ±5 %", "-", "0.75 x torch cudnn"]
    assert said["broken"] == ["failed", "-", "-", ""]
    assert lines(report.markdown(*latency.cells()))["warm"] == ["10.0", "20.0", "2.00 x torch cudnn"], "less is better"


def test_budgets_are_met_by_what_is_fast_enough() -> None:
    found = {budget.what: budget for budget in report.budgets(made_up(740.0, 700.0))}
    assert [budget for budget in found.values() if not budget.met] == [report.UNCOMPUTED]
    assert found["forward, d 128, 8k to 16k: of the matmul rate"].measured.startswith("0.93")  # 740 of 800
    assert found["decode, from 256 MiB: of the copy bandwidth"].measured.startswith("0.95")
    assert found["host time of a warm call, CuPy"].measured == "10 us"
    assert found["what a traced mod adds to it"].measured == "5 us"
    assert found["memory of forward and backward, 16k tokens beside 4k"].measured == "4.00"


def test_budgets_are_not_met_by_what_is_not_and_name_the_worst_case() -> None:
    slow = made_up(500.0, 700.0, gbps=2000.0, host_us=40.0)
    found = {budget.what: budget for budget in report.budgets(slow)}
    unmet = {what for what, budget in found.items() if budget.met is False}
    assert unmet == {what for what in found if re.search("best peer|matmul|copy|host time|traced", what)}
    assert "torch cudnn: " in found["forward, d 64 and 128, 8k to 16k: of the best peer"].measured
    assert all(budget.met is None for budget in report.budgets(dataclasses.replace(slow, rows=[])))
    one = next(row for row in slow.rows if "[mask_mod]" in row.case)
    slower = dataclasses.replace(one, ms=(one.ms or 0) * 1.2)
    slow.rows = [slower if row is one else row for row in slow.rows]
    assert [b.met for b in report.budgets(slow) if "Python function" in b.what] == [False]
    for row in slow.rows:
        if row.op == "memory" and row.more["launches"] == 2:
            row.more["launches"] = 3
        elif row.op == "memory" and "mask_mod" in row.case:
            row.more["bytes"] += 512
    built = [(b.measured, b.met) for b in report.budgets(slow) if "building" in b.what]
    assert built == [("512 bytes, 0 launches", False), ("16384 bytes, 2 launches", False)]


def test_pages_show_wins_and_losses_with_where_they_come_from(tmp_path: Path) -> None:
    results = made_up(600.0, 700.0, driver="580.82.07", skipped={"xformers": "is not installed"})
    results.notes = ["left off for lack of time"]
    failed = Row("forward", "4 x 4096, heads 16 x 128", OURS, error="RuntimeError: no")
    results.rows = [failed if (r.op, r.case, r.impl) == (failed.op, failed.case, OURS) else r for r in results.rows]
    path = schema.write(results, tmp_path)
    long, short = (page(schema.read_all(tmp_path)) for page in (report.long_page, report.short_page))
    for text in (long, short):
        assert path.name in text and "abc123" in text and "driver 580.82.07" in text and "xformers" in text
        assert "matmul 800 TFLOP/s" in text
    assert lines(short)["Forward: 2 x 8192, heads 16 x 128, causal"] == ["600 TFLOP/s", "0.86 x torch cudnn"]
    assert lines(short)["Decoding: 16 x 8192 keys, 1 query, heads 32/8 x 128"] == ["3,800 GB/s", "2.00 x torch cudnn"]
    forward = lines(long.partition("### Backward")[0])
    assert forward["4 x 4096, heads 16 x 128"][0] == "failed" and "RuntimeError: no" in long
    assert "not computed" in long and "**not met**" in long and "Note: left off for lack of time." in long
    tokens = lines(long.partition("### Packed batches, forward, million tokens/s")[2].partition("###")[0])
    case = "skewed: 42 of 5 to 2234, heads 16 x 128, causal"
    assert tokens[f"{case} [padded]"][1:] == ["-", "-", "-", ""] and tokens[case][4] == "0.86 x torch cudnn"
    assert "h200-forward.svg" in long and "benchmarks/h200-forward.svg" in short


def test_of_each_kind_the_newest_file_counts_and_no_gpus_are_mixed(tmp_path: Path) -> None:
    old, new, other = made_up(500.0, 700.0), made_up(600.0, 700.0), made_up(300.0, 350.0)
    new.date, new.rows = "2026-02-02T00:00:00+00:00", [row for row in new.rows if row.op == "forward"]
    other.gpu = "NVIDIA A100"
    offline = Results(schema.OFFLINE, "abc", True, "2026-03-03T00:00:00+00:00", rows=[Row("compile", "x", OURS, 1.0)])
    for results in (old, new, other, offline):
        schema.write(results, tmp_path)
    chosen = report.newest(schema.read_all(tmp_path))
    assert set(chosen) == {"NVIDIA H200", "NVIDIA A100"}
    assert chosen["NVIDIA H200"]["forward"][1].date == new.date
    assert chosen["NVIDIA H200"]["backward"][1].date == old.date
    long = report.long_page(schema.read_all(tmp_path))
    assert "none (offline)" not in long and long.index("## NVIDIA A100") != long.index("## NVIDIA H200")


@pytest.mark.parametrize("name", [schema.HARNESS_TEST, schema.STAND_IN])
def test_what_was_tried_without_a_gpu_is_refused(tmp_path: Path, name: str) -> None:
    results = made_up(600.0, 700.0)
    results.gpu = name
    path = schema.write(results, tmp_path)
    done = CliRunner().invoke(cli.app(), ["bench-report", "--results", str(tmp_path)])
    assert path.name in str(done.exception) and "tells of no GPU: remove it" in str(done.exception)


def test_the_command_writes_pages_and_plots_and_removes_old_ones(tmp_path: Path, monkeypatch: Any) -> None:
    for page in (report.README, report.LONG_README):
        shutil.copy(page, tmp_path / page.name.replace("README", page.parent.name))
    monkeypatch.setattr(report, "README", tmp_path / f"{report.README.parent.name}.md")
    monkeypatch.setattr(report, "LONG_README", tmp_path / "benchmarks.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    results = made_up(600.0, 700.0)
    kept = ("forward", "decode", "latency", "accuracy")
    results.rows = [row for row in results.rows if row.op in kept]
    schema.write(results, tmp_path / "results")
    (tmp_path / "a100-forward.svg").write_text("of results that are gone")
    done = CliRunner().invoke(cli.app(), ["bench-report", "--results", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "h200-forward.svg",
        "h200-decode.svg",
        "h200-accuracy.svg",
    }
    assert report.pages(tmp_path / "results") == {
        page: page.read_text() for page in (report.README, report.LONG_README)
    }
    for name, table in report.plots(tmp_path / "results").items():
        text = (tmp_path / name).read_text()
        assert report.digest(table) in text and "cuflash" in text and ("torch cudnn" in text or table.op == "accuracy")
        slower = dataclasses.replace(table, impls=())
        assert report.digest(slower) != report.digest(table)


def test_two_files_are_compared_case_by_case(tmp_path: Path) -> None:
    before, after = made_up(500.0, 700.0), made_up(600.0, 700.0)
    after.commit = "def456"
    case = "2 x 8192, heads 16 x 128, causal"
    after.rows = [dataclasses.replace(r, ms=(r.ms or 0) * 1.201) if r.case == case else r for r in after.rows]
    head, found = report.compare(before, after)
    assert head[1:3] == ["abc123 ms", "def456 ms"]
    by_name = {line[0]: line[3] for line in found}
    assert by_name["forward: 1 x 16384, heads 16 x 128"] == "1.200 x"
    assert by_name[f"forward: {case}"] == "0.999 x (within the spread)"
    paths = [schema.write(results, tmp_path) for results in (before, after)]
    done = CliRunner().invoke(cli.app(), ["bench-compare", *map(str, paths)])
    assert done.exit_code == 0 and "1.200 x" in done.output
    other = schema.write(dataclasses.replace(after, gpu="NVIDIA A100"), tmp_path)
    done = CliRunner().invoke(cli.app(), ["bench-compare", str(paths[0]), str(other)])
    assert "compare results of one GPU" in str(done.exception)
