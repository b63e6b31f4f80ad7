"""One small problem in NumPy, which every framework's test carries into its own arrays."""

from __future__ import annotations

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
