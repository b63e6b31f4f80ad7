from __future__ import annotations

import itertools

import pytest
from hw_toys import Toy


@pytest.fixture
def toy(tmp_path):
    """Makes a toy kernel: toy(body, threads=32, smem_bytes=0, includes=())."""
    numbers = itertools.count()

    def make(body: str, **shape) -> Toy:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return Toy(folder, body, **shape)

    return make
