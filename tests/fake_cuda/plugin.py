"""What a test run on the driver stand-in adds to pytest; tests/conftest.py registers it where `VARIABLE` is set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import stand_in

# Tests that need more of a GPU than there is here: the beginning of their names, and why.
NOT_HERE = {
    "tests/test_bench.py::test_the_harness_on_a_gpu": "the benchmark compares with CuPy's matmul, which is cuBLAS",
    "tests/test_bench.py::test_the_ceilings_of_a_gpu": "measures a GPU by kernels that are not cuflash's",
    "tests/jit/test_module.py::test_cupys_raw_module_takes_the_text": "CuPy compiles the text, and no twin is known",
    "tests/hw/test_primitives.py::test_checked_index[cuda]": "the twin reports an index that a GPU clamps",
    "tests/test_packing.py::test_unpad_and_pad[cupy": "CuPy finds what is not zero by kernels of its own",
    "tests/test_packing.py::test_unpad_with_unused_rows[cupy": "CuPy finds what is not zero by kernels of its own",
    "tests/test_packing.py::test_unpad_nothing[cupy": "CuPy finds what is not zero by kernels of its own",
    "tests/test_packing.py::test_cu_seqlens_from[cupy": "CuPy adds up by kernels of its own",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for begin, why in NOT_HERE.items():
            if item.nodeid.startswith(begin):
                item.add_marker(pytest.mark.skip(reason=f"not on the driver stand-in: {why}"))


@pytest.fixture(autouse=True)
def all_work_ran() -> Iterator[None]:
    """Every launch of a test runs before the test ends, and a kernel that failed fails it."""
    from . import dispatch

    yield
    stand_in.run_all()
    stand_in.mend()
    errors, dispatch.errors[:] = dispatch.errors[:], []
    if errors:
        raise errors[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where tests that need a GPU ran."""
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    ran = sum("gpu" in report.keywords for report in reports if report.when == "call")
    terminalreporter.write_line(f"gpu tests run on the driver stand-in, not on a GPU: {ran}")
