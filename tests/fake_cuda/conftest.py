from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from . import stand_in

collect_ignore = [] if find_spec("torch") else ["torch_on_gpu.py"]  # a module's doctests import it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.driver)
            if not stand_in.installed():
                item.add_marker(pytest.mark.skip(reason=f"needs the driver stand-in: {stand_in.VARIABLE}=stand-in"))
