"""What every framework's test carries into its own arrays, as NumPy: one small problem, and documents to learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Sample(NamedTuple):
    """Packed arrays of three sequences, one of them empty, with two query heads a key head; and the keywords."""

    q: np.ndarray  # [12, 4, 64]
    k: np.ndarray  # [20, 2, 64]
    v: np.ndarray  # [20, 2, 64]
    lengths: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.lengths, **self.heads}


def sample(rng: np.random.Generator, dtype: str) -> Sample:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    return Sample(
        draw(12, 4, 64),
        draw(20, 2, 64),
        draw(20, 2, 64),
        {
            "cu_seqlens_q": np.array([0, 5, 5, 12], np.int32),
            "cu_seqlens_k": np.array([0, 9, 10, 20], np.int32),
            "seqused_k": np.array([8, 0, 10], np.int32),
        },
        {
            "alibi_slopes": rng.uniform(0, 1, 4).astype(np.float32),
            "sink": rng.standard_normal(4).astype(np.float32),
        },
    )


LONGEST = 48  # rows of a document


def documents() -> list[np.ndarray]:
    """Clauses of the project's licence, which does not change, of unequal length: ASCII, each a byte longer than its
    rows, as the last byte is only ever predicted."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    parts = [part.strip().encode("ascii", "ignore")[: LONGEST + 1] for part in re.split(r"[.,;:\n]+", text)]
    return [np.array(list(part)) for part in parts if len(part) > 8]


def batches(steps: int, size: int = 8) -> list[list[np.ndarray]]:
    """`size` documents for every step, always the same."""
    texts, rng = documents(), np.random.default_rng(0)
    return [[texts[i] for i in rng.integers(len(texts), size=size)] for _ in range(steps)]
