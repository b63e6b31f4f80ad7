"""What every test run shares: the seed, the kernel cache, the tests that need a GPU, and a closing account.

CUFLASH_TEST_SEED   an integer draws other cases; "random" draws one, and prints it; unset: always the same cases
CUFLASH_TEST_ARCH   the architecture that the emulator is, where a test asks for none; unset: sm_80. With sm_90a, tests
                    of the forward run Hopper's kernel
CUFLASH_TEST_LANDING  when its asynchronous copies land, likewise: "early"; unset: late
CUFLASH_CACHE_DIR   compiled kernels; unset: a folder in pytest's cache, so that a second run compiles nothing
CUFLASH_TEST_DRIVER  "stand-in": tests that need a GPU run on the driver of tests/fake_cuda, with the emulator behind;
                    "stand-in:8.0" is one of that compute capability. Needs CuPy
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

# Tests run side by side, one a core: threads of BLAS on top would only wait for each other. Before NumPy is imported.
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

DEFAULT_SEED = "20260"


def pytest_configure(config: pytest.Config) -> None:
    # Set in the environment, which parallel workers and subprocesses of tests inherit.
    if os.environ.setdefault("CUFLASH_TEST_SEED", DEFAULT_SEED) == "random":
        os.environ["CUFLASH_TEST_SEED"] = str(secrets.randbelow(2**31))
    if "CUFLASH_CACHE_DIR" not in os.environ:
        cache = getattr(config, "cache", None)  # absent under -p no:cacheprovider
        if cache:
            os.environ["CUFLASH_CACHE_DIR"] = str(cache.mkdir("cuflash-kernels"))
        else:
            os.environ["CUFLASH_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="cuflash-")
            config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if os.environ.get("CUFLASH_TEST_DRIVER"):
        from fake_cuda import plugin, stand_in

        stand_in.install()
        stand_in.for_children()
        config.pluginmanager.register(plugin)
    # Hypothesis repeats its examples likewise; a failing one prints what makes it again. A machine's speed is no bug.
    settled = os.environ["CUFLASH_TEST_SEED"] == DEFAULT_SEED
    hypothesis.settings.register_profile("cuflash", derandomize=settled, deadline=None, print_blob=True)
    hypothesis.settings.load_profile("cuflash")
    # NumPy tells of overflow and NaN made unawares by RuntimeWarning; the host side of cuflash must not cause any.
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
    config.addinivalue_line("filterwarnings", "error:::cuflash")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and (missing := why_no_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"gpu test: {missing}"))


def why_no_gpu() -> str:
    """What is missing to run CUDA kernels here; "" if nothing is."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() > 0 else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in skipped
    )
    write = terminalreporter.write_line
    write(f"seed {os.environ['CUFLASH_TEST_SEED']}; CUFLASH_TEST_SEED={os.environ['CUFLASH_TEST_SEED']} repeats it")
    write(f"gpu tests skipped: {sum('gpu' in getattr(report, 'keywords', ()) for report in skipped)}")
    for reason, count in sorted(reasons.items()):
        write(f"skipped {count}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, of which some tests are."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def landing() -> Iterator[None]:
    from cuflash import emulator

    with emulator.schedule(landing=os.environ.get("CUFLASH_TEST_LANDING", "late")):
        yield


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of this run's random draws."""
    return int(os.environ["CUFLASH_TEST_SEED"])


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Plants bugs: after edited(*edits, where=...) every kernel that is loaded contains those of the edits whose text
    it has, where `where`, a question about its KernelSpec, is true. Each edit must get into one at least."""
    from cuflash.jit import module

    load, text = module.load, functools.cache(lambda spec: spec.text("emu"))
    unused = set()

    def apply(*edits: Any, where: Callable[[Any], bool] = lambda spec: True) -> None:
        def planted(spec: Any, *rest: Any, **keywords: Any) -> Any:
            mine = tuple(e for e in edits if where(spec) and f'"{e.file}"' in text(spec) and e.old in text(spec))
            unused.difference_update(mine)
            return load(dataclasses.replace(spec, edits=mine) if mine else spec, *rest, **keywords)

        unused.update(edits)
        monkeypatch.setattr(module, "load", planted)

    yield apply
    assert not unused, "no kernel that was loaded has the text of these"


@pytest.fixture
def rng(request: pytest.FixtureRequest, seed: int) -> np.random.Generator:
    """Random numbers of this test's own, from the seed and its name, whatever else runs before or beside it."""
    return np.random.default_rng([seed, *request.node.nodeid.encode()])
