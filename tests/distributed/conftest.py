"""Tests of several processes run where CUFLASH_TEST_RANKS is set, as .ci/run does; elsewhere they skip, counted."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("CUFLASH_TEST_RANKS"):
        skip = pytest.mark.skip(reason="several ranks: CUFLASH_TEST_RANKS=1 runs it")
        for item in items:
            if item.get_closest_marker("ranks"):
                item.add_marker(skip)
