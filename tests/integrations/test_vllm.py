"""cuflash inside vLLM: whole engines on a CPU beside vLLM's own attention, and one layer beside float64.

vLLM logs a plug-in that does not load and goes on with its own attention: each test looks at whose was used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cuflash

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")

from cuflash.integrations import vllm as plugin  # noqa: E402
from cuflash.integrations.vllm import backend  # noqa: E402

WORKER = Path(__file__).with_name("vllm_models.py")


def run(model: str, impl: str, where: Path) -> dict:
    root = str(Path(cuflash.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(WORKER), model, impl, str(where)], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((where / f"{model}-{impl}.json").read_text())


def beside(model: str, where: Path) -> tuple[dict, dict]:
    """What vLLM makes of a model by its own attention, and by cuflash's; the implementations checked."""
    own = run(model, "own", where)  # makes the model's folder
    ours = run(model, "cuflash", where)
    assert own["impls"] == ["vllm.v1.attention.backends.cpu_attn"]
    assert ours["impls"] == ["cuflash.integrations.vllm.backend"]
    return own, ours


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    where = tmp_path_factory.mktemp("vllm")
    names = ("llama", "mistral", "gemma2", "bloom", "bert")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: beside(name, where), names), strict=True))


@pytest.mark.parametrize("model", ["llama", "mistral", "gemma2", "bloom"])
def test_the_same_tokens(engines, model):
    """Greedy, float32: chunks of at most 64 tokens, prefixes from the cache, fewer pages than requests want."""
    own, ours = engines[model]
    assert ours["tokens"] == own["tokens"] and len(ours["tokens"]) == 20
    assert ours["cached"] == own["cached"] > 500


def test_the_same_vectors(engines):
    own, ours = engines["bert"]
    np.testing.assert_allclose(ours["vectors"], own["vectors"], atol=1e-5)


@pytest.mark.slow
def test_the_same_tokens_by_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_BACKEND", "emulator")
    own, ours = beside("llama", tmp_path)
    assert ours["tokens"] == own["tokens"]


# One layer ------------------------------------------------------------------------------------------------------------

HEADS, HEADS_KV, DIM, PAGE = 4, 2, 16, 8
NEW, KEYS = [5, 1, 12, 0], [21, 40, 12, 9]  # of each request: tokens of this step, and all


class Step:
    """A batch in pages as vLLM lays them out, with what is in them as plain arrays."""

    def __init__(self, **metadata) -> None:
        rng = np.random.default_rng(0)
        most = -(-max(KEYS) // PAGE)
        pages = len(KEYS) * most + 3
        cache = torch.from_numpy(rng.standard_normal((pages, HEADS_KV, PAGE, 2 * DIM), dtype=np.float32))
        self.table = rng.permutation(pages)[: len(KEYS) * most].reshape(len(KEYS), most).astype(np.int32)
        self.cache = cache
        starts = np.concatenate([[0], np.cumsum(NEW)]).astype(np.int32)
        self.q = torch.from_numpy(rng.standard_normal((starts[-1] + 2, HEADS, DIM), dtype=np.float32))
        self.metadata = backend.Metadata(
            tokens=int(starts[-1]), longest_q=max(NEW), longest_k=max(KEYS), starts=torch.from_numpy(starts),
            lengths=torch.tensor(KEYS, dtype=torch.int32), pages=torch.from_numpy(self.table),
            **{"causal": True, **metadata},
        )  # fmt: skip

    def run(self, layer=None, **options) -> np.ndarray:
        made = backend.Implementation(HEADS, DIM, 0.3, HEADS_KV, **options)
        output = torch.full((len(self.q), HEADS, DIM), torch.nan)
        nothing = self.q.new_empty(0)
        made.forward(layer or SimpleNamespace(), self.q, nothing, nothing, self.cache, self.metadata, output)
        assert output[self.metadata.tokens :].isnan().all(), "rows of nobody are left"
        return output[: self.metadata.tokens].numpy()

    def exactly(self, mask, bias=None, sinks=None, softcap=0.0) -> np.ndarray:
        """In float64; mask(request, position, key) and bias(head, position, key)."""
        rows = []
        for b, (new, keys) in enumerate(zip(NEW, KEYS, strict=True)):
            held = self.cache.numpy()[self.table[b]].transpose(0, 2, 1, 3).reshape(-1, HEADS_KV, 2 * DIM)[:keys]
            k, v = (x.astype(np.float64) for x in np.split(held, 2, axis=2))
            for i in range(new):
                at, row = keys - new + i, int(self.metadata.starts[b]) + i
                out = np.zeros((HEADS, DIM))
                for h in range(HEADS):
                    s = 0.3 * k[:, h // 2] @ self.q[row, h].double().numpy()
                    s = softcap * np.tanh(s / softcap) if softcap else s
                    s = s + [bias(h, at, n) for n in range(keys)] if bias else s
                    s = np.where([mask(b, at, n) for n in range(keys)], s, -np.inf)
                    w = np.exp(s - s.max())
                    total = w.sum() + (np.exp(float(sinks[h]) - s.max()) if sinks is not None else 0)
                    out[h] = w @ v[:, h // 2] / total
                rows.append(out)
        return np.array(rows)


def causal(b, at, n):
    return n <= at


def test_plain_layers():
    slopes, sinks = [0.5, 0.25, 0.125, 0.0625], torch.tensor([0.3, -1.0, 2.0, 0.0])
    for options, right in (
        ({}, {"mask": causal}),
        ({"sliding_window": 6}, {"mask": lambda b, at, n: at - 6 < n <= at}),
        ({"logits_soft_cap": 2.0}, {"mask": causal, "softcap": 2.0}),
        ({"sinks": sinks}, {"mask": causal, "sinks": sinks}),
        ({"alibi_slopes": slopes}, {"mask": causal, "bias": lambda h, at, n: -slopes[h] * abs(at - n)}),
    ):
        step = Step()
        np.testing.assert_allclose(step.run(**options), step.exactly(**right), atol=2e-5, err_msg=str(options))


def test_a_layer_that_is_not_causal():
    step = Step(causal=False)
    np.testing.assert_allclose(step.run(), step.exactly(lambda b, at, n: True), atol=2e-5)
    near = step.exactly(lambda b, at, n: abs(at - n) < 6)
    np.testing.assert_allclose(step.run(sliding_window=6), near, atol=2e-5)


def test_causal_by_request():
    step = Step(causal=torch.tensor([1, 0, 0, 1], dtype=torch.int32))
    right = step.exactly(lambda b, at, n: n <= at or b in (1, 2))
    np.testing.assert_allclose(step.run(), right, atol=2e-5)


SPANS = {0: [(3, 6), (17, 20)], 2: [(0, 4), (8, 11)]}  # first and last position of images


@pytest.mark.parametrize("window, clamp", [(None, False), (6, False), (6, True)])
def test_ranges_of_image_tokens(window, clamp):
    starts = torch.tensor([0, *np.cumsum(NEW).tolist()], dtype=torch.int32)
    given = SimpleNamespace(
        mm_req_doc_ranges=SPANS, query_start_loc_cpu=starts, query_start_loc=starts, num_actual_tokens=int(starts[-1]),
        seq_lens_cpu_upper_bound=torch.tensor(KEYS, dtype=torch.int32),
    )  # fmt: skip
    step = Step(image_range=backend._image_ranges(given))

    def seen(b, at, n):
        image = any(first <= at <= last and first <= n <= last for first, last in SPANS.get(b, ()))
        if clamp:
            image = image and at - n < window
        return image or (n <= at and (window is None or at - n < window))

    layer = SimpleNamespace(mm_prefix_clamp_sliding_window=clamp)
    np.testing.assert_allclose(step.run(layer, sliding_window=window), step.exactly(seen), atol=2e-5)


def test_images_of_other_steps_are_no_mask():
    starts = torch.tensor([0, 5], dtype=torch.int32)
    given = SimpleNamespace(
        mm_req_doc_ranges={0: [(0, 3), (30, 40)]}, query_start_loc_cpu=starts, query_start_loc=starts,
        num_actual_tokens=5, seq_lens_cpu_upper_bound=torch.tensor([21], dtype=torch.int32),
    )  # fmt: skip
    assert backend._image_ranges(given) is None


def test_rswa():
    prefix = torch.tensor([4, 30, 0, 2])
    step = Step(prefix=prefix, rswa_window=6)
    right = step.exactly(lambda b, at, n: n <= at and (n < int(prefix[b]) or at - n < 6))
    np.testing.assert_allclose(step.run(), right, atol=2e-5)


def test_keys_go_to_their_slots():
    cache = torch.zeros(3, HEADS_KV, PAGE, 2 * DIM)
    k, v = torch.randn(2, 4, HEADS_KV, DIM)
    made = backend.Implementation(HEADS, DIM, 1.0, HEADS_KV)
    made.do_kv_cache_update(SimpleNamespace(), k, v, cache, torch.tensor([17, -1, 0]))
    assert torch.equal(cache[2, :, 1], torch.cat([k[0], v[0]], -1)) and torch.equal(cache[0, :, 0, DIM:], v[2])
    assert int((cache.abs().sum(-1) > 0).sum()) == 2 * HEADS_KV


def test_the_profiling_run_writes_nothing():
    made = backend.Implementation(HEADS, DIM, 1.0, HEADS_KV)
    output = torch.ones(3, HEADS, DIM)
    assert made.forward(SimpleNamespace(), output, output, output, output, None, output) is output


# Choosing it ----------------------------------------------------------------------------------------------------------


def reasons(**change) -> list[str]:
    given = dict(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=True,
        use_sparse=False, use_mm_prefix=True, use_per_head_quant_scales=False,
        device_capability=SimpleNamespace(major=8, minor=0), attn_type="decoder", has_sliding_window=True,
        use_non_causal=True, use_batch_invariant=True, use_rswa=True,
    )  # fmt: skip
    return backend.Backend.validate_configuration(**given | change)


def test_what_is_served_and_why_not():
    assert reasons() == []
    for change, reason in (
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"use_mla": True}, "MLA"),
        ({"head_size": 576}, "head_size"),
        ({"use_sparse": True}, "sparse"),
        ({"attn_type": "encoder_decoder"}, "attention type"),
        ({"device_capability": SimpleNamespace(major=7, minor=5)}, "compute capability"),
        ({"use_dcp": True}, "DCP"),
    ):
        (found,) = reasons(**change)
        assert reason in found


@pytest.mark.parametrize("options", [
    {"kv_cache_dtype": "fp8"}, {"attn_type": "encoder_decoder"}, {"something_new": 1},
])  # fmt: skip
def test_a_layer_that_is_not_served_is_refused(options):
    with pytest.raises(cuflash.errors.UnsupportedError):
        backend.Implementation(HEADS, DIM, 1.0, HEADS_KV, **options)


def test_the_entry_point_and_the_registry(monkeypatch):
    from importlib.metadata import entry_points

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    found = [x for x in entry_points(group="vllm.general_plugins") if x.name == "cuflash"]
    if not found:
        pytest.skip("cuflash runs from its checkout here: an entry point is there once it is installed")
    found[0].load()()
    assert AttentionBackendEnum[plugin.NAME].get_class() is backend.Backend
    assert AttentionBackendEnum.CPU_ATTN.get_class().__module__.startswith("vllm."), "inactive unless it is chosen"
    monkeypatch.setattr(plugin, "_version", lambda: "0.99.1")
    with pytest.warns(UserWarning, match=r"vLLM 0\.99\.1 is not among those that cuflash was tested with, 0\.32"):
        plugin.register()
