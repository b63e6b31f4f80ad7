"""Runs a scenario in a process whose cuflash has one mistake: python -m fake_cuda.planted SCENARIO FILE OLD NEW

Without FILE, OLD and NEW it has none. Exit status 0: nothing was noticed.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

import cuflash

from . import stand_in


def plant(file: Path, old: str, new: str) -> None:
    """Modules of that file are compiled from its text with `new` in the one place where `old` stands."""
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{file.name} has {old!r} {text.count(old)} times, and not once")
    read = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: importlib.machinery.SourceFileLoader, name: str):
        if Path(loader.path) == file:
            return compile(text.replace(old, new), str(file), "exec")
        return read(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def main() -> None:
    scenario, *mistake = sys.argv[1:]
    package = Path(cuflash.__file__).parent
    for loaded in [module for module in sys.modules if module.partition(".")[0] == "cuflash"]:
        del sys.modules[loaded]
    if mistake:
        name, old, new = mistake
        plant(package / name, old, new)
    stand_in.install()
    from . import dispatch, failure_scenarios, framework_scenarios, scenarios

    known = scenarios.SCENARIOS + failure_scenarios.SCENARIOS + framework_scenarios.SCENARIOS
    (run,) = (s for s in known if s.__name__ == scenario)
    run()
    stand_in.run_all()
    sys.exit(bool(dispatch.errors))


if __name__ == "__main__":
    main()
