"""Programs that use a GPU, on the driver stand-in."""

from __future__ import annotations

import pytest

from . import failure_scenarios, framework_scenarios, scenarios

ALL = scenarios.SCENARIOS + failure_scenarios.SCENARIOS + framework_scenarios.SCENARIOS


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario):
    scenario()
