"""The backward's machine code, by NVRTC for every architecture; lengths, seeds and rates that never recompile."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import using
from machine_code import checked, counts, sampled
from needs import needs_nvrtc

import cuflash
from cuflash import arch, dtypes
from cuflash.jit import hostcxx, module
from cuflash.ops import backward, forward

# Which of the representative variants each architecture compiles in a usual run, and of which the machine code is read.
COMPILED = {
    "sm_80": slice(0, None, 2), "sm_90a": slice(1, None, 6), "sm_86": slice(7, None, 24), "sm_89": slice(9, None, 24),
    "sm_100a": slice(3, None, 12), "sm_120a": slice(5, None, 12),
}  # fmt: skip
READ = {
    "sm_80": slice(0, None, 6), "sm_90a": slice(1, None, 24), "sm_86": slice(0), "sm_89": slice(0),
    "sm_100a": slice(3, None, 48), "sm_120a": slice(5, 6),
}  # fmt: skip


def spec_of(name: str, index: int) -> module.KernelSpec:
    return backward.representative(arch.named(name))[index]


@pytest.mark.parametrize("name, index", sampled(backward.representative, COMPILED))
@needs_nvrtc
def test_machine_code(name, index):
    """No spill, no stack, no local memory; shared memory within the chip."""
    checked(spec_of(name, index), name)


@pytest.mark.parametrize("name, index", sampled(backward.representative, READ))
@needs_nvrtc
def test_instructions(name, index):
    """Those the kernel is made of."""
    spec = spec_of(name, index)
    found = counts(checked(spec, name))
    # Gradients are summed in one order, but for dq where it is accumulated.
    assert found["ATOM"] == found["ATOMG"] == 0
    assert (found["RED"] + found["REDG"] > 0) == getattr(spec.variant, "accumulate_dq", False)
    if isinstance(spec.variant, backward.BackwardVariant):
        assert found["HMMA"] > 0 and found["LDSM"] > 0
        # Rows aligned to 2 bytes go through registers; lse and delta never do.
        assert (found["LDGSTS"] > 0) == (spec.variant.load_bytes >= 4 or spec.variant.keys_held)


def test_every_tile_fits_every_chip():
    smallest = min(target.smem_bytes for target in arch.ARCHES.values())
    for dtype in dtypes.KERNEL:
        for d in forward.HEAD_DIM_CLASSES:
            for d_v in forward.HEAD_DIM_CLASSES:
                for deterministic in (True, False):
                    for variant in backward.choose_variants(dtype, d, d_v, 16, deterministic=deterministic):
                        assert variant.smem_bytes <= smallest, variant


# --- Compiled once ------------------------------------------------------------------------------------------------

HEAD_DIM = 16
KINDS = list(itertools.product((False, True), repeat=3))  # of training: with dropout, with slopes, deterministic


def kernels_of(dropout: bool, slopes: bool, deterministic: bool) -> set[module.KernelSpec]:
    """Those that train a kind: of a dense row of one head, which stands for every shape, length and number."""
    target = arch.named("sm_80")
    problem = backward.BackwardProblem(
        dtype=dtypes.bfloat16, batch=1, packed=False, q_rows=1, k_rows=1, max_seqlen_q=1, max_seqlen_k=1, heads_q=1,
        heads_kv=1, head_dim=HEAD_DIM, head_dim_v=HEAD_DIM, load_bytes=16, scale=1.0, dropout_p=dropout * 0.5,
        alibi="head" if slopes else None, dslopes=slopes, deterministic=deterministic,
        **{f"{name}_strides": (HEAD_DIM,) * 3 for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")},
    )  # fmt: skip
    return {
        *backward.BackwardPlan(problem, target).specs,
        forward.kernel_spec(forward.choose_variant(dtypes.bfloat16, HEAD_DIM, HEAD_DIM, 16, target, dropout=dropout)),
    }


def training_call(rng: np.random.Generator, dropout: bool, slopes: bool, deterministic: bool):
    """Shapes of q and k, and keywords, of one step: all that may change from step to step, drawn."""
    heads_kv, batch = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    heads = heads_kv * int(rng.integers(1, 3))
    lengths = rng.integers(0, 40, batch)
    lengths[0] += 1  # a batch without any row would launch nothing
    keywords: dict[str, Any] = {
        "causal": bool(rng.integers(2)),
        "window_size": (int(rng.integers(-1, 30)), int(rng.integers(-1, 30))),
        "softcap": float(rng.choice([0.0, rng.uniform(1, 50)])),
        "scale": float(rng.normal()),
        "deterministic": deterministic,
    }
    if slopes:
        keywords["alibi_slopes"] = rng.uniform(0, 1, heads).astype(np.float32)
    if dropout:
        keywords |= {"dropout_p": float(rng.uniform(0.1, 0.9)), "seed": int(rng.integers(2**63)),
                     "offset": int(rng.integers(2**32))}  # fmt: skip
        if rng.integers(2):  # read by the kernel
            keywords["seed"] = np.array([keywords["seed"]])
    if rng.integers(2):
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        hints = ([None, 1, 64][i] for i in rng.integers(3, size=2))
        keywords |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        keywords |= dict(zip(("max_seqlen_q", "max_seqlen_k"), hints, strict=True))
        rows = [(starts[-1],)] * 2
    else:
        rows = [(batch, n) for n in rng.integers(1, 40, 2)]
    return (*rows[0], heads, HEAD_DIM), (*rows[1], heads_kv, HEAD_DIM), keywords


def by_hand(q: np.ndarray, k: np.ndarray, keywords: dict[str, Any]) -> None:
    out, lse, *_ = cuflash.attention(q, k, k, aux=("lse",), **keywords)
    cuflash.attention_backward(out, q, k, k, out, lse, captured_grads="alibi_slopes" in keywords, **keywords)


def by_autograd(q: np.ndarray, k: np.ndarray, keywords: dict[str, Any]) -> None:
    import torch

    q, k = (torch.from_numpy(x.astype(np.float32)).bfloat16().requires_grad_() for x in (q, k))
    keywords = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    if "alibi_slopes" in keywords:
        keywords["alibi_slopes"].requires_grad_()
    cuflash.attention(q, k, k, **keywords).float().square().sum().backward()
    assert q.grad is not None and k.grad is not None


def test_training_compiles_the_variants_predicted_and_nothing_afterwards(monkeypatch, tmp_path, rng):
    """Counted at the compiler, from an empty folder on: a step's lengths, batch, heads, seed, rate, cap, window, scale
    and hints are arguments of its kernels."""
    ways = [by_hand, by_autograd] if importlib.util.find_spec("torch") else [by_hand]
    runtime = hostcxx.runtime()  # no kernel: compiled, if this machine never did, before counting
    monkeypatch.setattr(hostcxx, "runtime", lambda: runtime)
    compiled, compile_text = [], hostcxx._compile
    monkeypatch.setattr(hostcxx, "_compile", lambda *a: compiled.append(a) or compile_text(*a))
    used, load = set(), module.load
    monkeypatch.setattr(module, "load", lambda spec, *a, **k: used.add(spec) or load(spec, *a, **k))
    monkeypatch.setattr(cuflash.config, "cache_dir", tmp_path)
    module.clear()

    def step(way, kind):
        shape_q, shape_k, keywords = training_call(rng, *kind)
        q, k = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in (shape_q, shape_k))
        way(q, k, keywords)

    with using("emulator"):
        for kind, way in itertools.product(KINDS, ways):
            step(way, kind)
        predicted = set().union(*(kernels_of(*kind) for kind in KINDS))
        assert used == predicted and len(compiled) == len(predicted)
        monkeypatch.setattr(cuflash.config, "on_compile", "error")
        for kind, way, _ in itertools.product(KINDS, ways, range(5)):
            step(way, kind)
    assert used == predicted and len(compiled) == len(predicted)
    module.clear()
