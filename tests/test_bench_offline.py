"""What is measured without a GPU: that it is what it says it is. Of a time it is only asked that there is one."""

from __future__ import annotations

import pytest
from needs import needs_nvrtc

import cuflash
from benchmarks import nowhere, offline, schema
from benchmarks.schema import Row
from cuflash import arch, dtypes
from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.ops import backward_sm90, dropout_mask, forward


@needs_nvrtc
def test_calls_go_all_the_way_to_the_launch(monkeypatch):
    """Every framework's, dense, packed and with a mod; and nothing is left replaced."""
    launched = []
    no_gpu = nowhere.no_gpu

    def counting(name, *, launch, **rest):
        return no_gpu(name, launch=lambda kernel, *_: launched.append(kernel), **rest)

    monkeypatch.setattr(nowhere, "no_gpu", counting)
    before = cuflash.frameworks.cupy.empty, cuflash.jit.module.launch_cuda
    rows = list(offline.host(names=("sm_80",), rounds=2, calls=3))
    assert len(rows) % 3 == 0 and len({row.case for row in rows}) == len(rows)
    assert len(launched) == len(rows) * 3 * 3  # the first round is run and not counted
    assert len(set(launched)) == 2, "numbers that a mod captures are no new kernel"
    assert all(row.ms and row.more["best_ms"] <= row.ms for row in rows)
    assert (cuflash.frameworks.cupy.empty, cuflash.jit.module.launch_cuda) == before


@needs_nvrtc
def test_compiling_finds_nothing_cached(monkeypatch):
    monkeypatch.setattr(offline.compile_command, "specs", lambda target: [dropout_mask.SPEC])
    compiled, folder = [], cuflash.config.cache_dir
    compile_ = offline.module.compile
    monkeypatch.setattr(offline.module, "compile", lambda *a: compiled.append(compile_(*a)) or compiled[-1])
    for _ in range(2):
        (row,) = offline.compiling(("sm_80",))
        assert row.case == "dropout_mask, sm_80" and row.ms
    assert not any(c.cached for c in compiled) and len(compiled) == 2
    assert cuflash.config.cache_dir == folder


def test_one_kernel_of_each_name_with_head_dim_128_where_there_is_one():
    specs = offline._one_of_each(offline.compile_command.specs(arch.named("sm_90a")))
    assert len({spec.name for spec in specs}) == len(specs)
    for name in ("forward_sm80", "forward_sm90", "backward_sm80", "decode_sm80"):
        assert [spec.variant.head_dim for spec in specs if spec.name == name] == [128]


def test_counters_are_over_the_least_there_is_to_do():
    """Lengths that tiles divide, and one query tile: nothing is done in vain, nothing read twice."""
    rows = {row.case: row.more for row in offline.counting(length=128, dims=(64,))}
    full = rows["forward, 1 x 128, heads 2 x 64, sm_80"]
    assert full["flop_over_least"] == full["read_over_least"] == 1
    assert full["matrix_instructions"] == 2 * 2 * (128 // 16) * (128 // 8) * (64 // 16)  # heads, products, m, n, k
    causal = rows["forward, 1 x 128, heads 2 x 64, causal, sm_80"]
    assert causal["flop_over_least"] == pytest.approx(128**2 / (128 * 129 / 2), abs=1e-3)
    hopper = rows["forward, 1 x 128, heads 2 x 64, sm_90a"]
    assert hopper["flop_over_least"] == 192 / 128, "rows of a tile that are no queries are multiplied too"
    assert rows["backward, 1 x 128, heads 2 x 64, sm_80"]["flop_over_least"] == 1


def test_the_reference_beside_naive_numpy():
    found = list(offline.on_numpy.rows(lengths=(16,), times=2))
    assert len(found) == 2 * 2 * 2 * 2 and all(row.ms for row in found)
    assert {row.more["of_naive"] for row in found if row.impl != "cuflash"} == {1.0}


@needs_nvrtc
def test_the_model_of_every_hopper_kernel(monkeypatch):
    every = forward.representative_sm90(arch.named("sm_90a"))
    assert len(every) > 10
    one = forward.kernel_spec(forward.choose_sm90_variant(dtypes.bfloat16, 128, 128))
    other = backward_sm90.kernel_spec(backward_sm90.choose_variant(dtypes.bfloat16, 128, 128, rich=True))
    monkeypatch.setattr(forward, "representative_sm90", lambda target: [one])
    monkeypatch.setattr(backward_sm90, "representative", lambda target: [other])
    rows = list(offline.predicting())
    assert [row.case for row in rows] == [
        "forward_sm90, d 128, tile 128 x 128", "backward_sm90, d 128, tile 64 x 128, rich"
    ]  # fmt: skip
    for row in rows:
        assert row.ms is row.tflops is None, "a prediction is no measurement"
        assert row.more["tensor_use"] == pytest.approx(
            row.more["clocks"]["tensor"] / row.more["clocks"]["clocks"], abs=2e-3
        )


def test_results_say_that_no_gpu_was_there(monkeypatch):
    def missing():
        raise UnsupportedError("nothing here:\nget it")
        yield

    rows = {
        "host": Row("host", "a call", "cuflash", ms=0.02, spread=0.001, more={"best_ms": 0.019}),
        "import": Row("import", "cuflash", "cuflash", ms=300.0, more={"best_ms": 290.0}),
        "compile": Row("compile", "a kernel", "cuflash", ms=1234.0),
        "emulator": Row("emulator", "mma", "cuflash", more={"per_second": 400_000}),
        "counters": Row("counters", "a call", "cuflash", more={
            "flop_over_least": 1.25, "read_over_least": 2.0, "bank_conflicts": 7}),
        "reference": Row("reference", "a call", "cuflash", ms=31.0, more={"of_naive": 0.63}),
    }  # fmt: skip
    stages = {name: lambda row=row: iter([row]) for name, row in rows.items()} | {"model": missing}
    monkeypatch.setattr(offline, "STAGES", stages)
    seen: list[Row] = []
    results = offline.run(commit="abc", on_row=seen.append)
    assert results.rows == seen == list(rows.values())
    assert results.gpu == schema.OFFLINE and not results.on_gpu and results.file_name.startswith("none-offline-")
    assert results.skipped == {"model": "nothing here:"} and "no row is the speed of a kernel" in results.notes[0]
    shown = "".join(_shown(table) for table in offline.tables(results))
    for text in ("20.0", "19.0", "300", "290", "1234", "400,000", "1.25", "7", "31.0", "0.63"):
        assert text in shown
    assert offline.run(("import",)).rows == [rows["import"]]
    with pytest.raises(ArgumentError, match="speed must be one of host, import"):
        offline.run(("speed",))


def _shown(table) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=150).print(table)
    return out.getvalue()
