"""Programs that use a GPU, on the driver stand-in."""

from __future__ import annotations

import pytest

from . import scenarios


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario):
    scenario()
