"""What is compiled, and when: NVRTC for every architecture, gates on machine code, shapes that never recompile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from machine_code import checked, counts, sampled
from needs import needs_nvrtc
from recorded import recording

import cuflash
from cuflash import arch, dtypes
from cuflash.jit import module, nvrtc, sass
from cuflash.ops import forward

# Which of the representative variants each architecture compiles in a usual run, and of which the machine code is read.
COMPILED = {
    "sm_80": slice(None), "sm_90a": slice(0, None, 4), "sm_86": slice(3, None, 9), "sm_89": slice(5, None, 9),
    "sm_100a": slice(1, None, 7), "sm_120a": slice(2, None, 7),
}  # fmt: skip
READ = {
    "sm_80": slice(0, None, 4), "sm_90a": slice(0, None, 12), "sm_86": slice(0), "sm_89": slice(0),
    "sm_100a": slice(1, None, 28), "sm_120a": slice(2, 3),
}  # fmt: skip


def spec_of(name: str, index: int) -> module.KernelSpec:
    return forward.representative(arch.named(name))[index]


@pytest.mark.parametrize("name, index", sampled(forward.representative, COMPILED))
@needs_nvrtc
def test_machine_code(name, index):
    """No spill, no stack, no local memory; shared memory within the chip."""
    checked(spec_of(name, index), name)


@pytest.mark.parametrize("name, index", sampled(forward.representative, READ))
@needs_nvrtc
def test_instructions(name, index):
    """Those the kernel is made of."""
    spec = spec_of(name, index)
    found = counts(checked(spec, name))
    assert found["HMMA"] > 0 and found["LDSM"] > 0
    assert (found["LDGSTS"] > 0) == (spec.variant.load_bytes >= 4)


@pytest.mark.parametrize("d, length", [(64, 680), (128, 908), (256, 535)])
@needs_nvrtc
def test_length_of_the_key_loop(d, length):
    """Instructions for a tile that nothing is masked of. Copies take their addresses as they are."""
    spec = forward.kernel_spec(forward.choose_variant(dtypes.bfloat16, d, d, 16, arch.named("sm_80")))
    found = sass.functions(sass.disassemble(checked(spec, "sm_80").path))[spec.entry]
    assert found.loops[0].shortest <= length


def test_every_tile_fits_its_chip():
    for target in arch.ARCHES.values():
        for dtype in dtypes.KERNEL:
            for d in forward.HEAD_DIM_CLASSES:
                for d_v in forward.HEAD_DIM_CLASSES:
                    variant = forward.choose_variant(dtype, d, d_v, 16, target)
                    assert variant.smem_bytes <= target.smem_bytes, f"{target} {variant}"


def test_key_tile_depends_on_dtype_head_dim_and_chip_alone():
    """What bitwise equality alone, packed and dense rests on."""
    target = arch.named("sm_80")
    for load_bytes in (16, 4, 2):
        variant = forward.choose_variant(dtypes.float16, 100, 80, load_bytes, target)
        assert variant.tile == forward.TILES[2, 128][0]


def random_call(
    rng: np.random.Generator,
) -> tuple[forward.ForwardVariant, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """A call's shapes and keywords, and the variant that the closed list predicts for it: dtype, head-dim
    classes and load width. All else must not matter."""
    dtype, d = [("float16", 64), ("bfloat16", 32), ("float16", 40), ("float16", 27)][rng.integers(4)]
    group, heads_kv = int(rng.choice([1, 2, 8])), int(rng.integers(1, 5))
    lengths = rng.integers(0, 2000, rng.integers(1, 9))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    keywords: dict[str, Any] = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "scale": float(rng.normal()),
        "causal": bool(rng.integers(2)),
        "window_size": (int(rng.integers(-1, 500)), int(rng.integers(-1, 500))),
        "softcap": float(rng.choice([0.0, rng.uniform(1, 50)])),
        "max_seqlen_q": [None, 1, int(lengths.max()) + 1][rng.integers(3)],
        "aux": [(), ("lse",), ("lse", "max_logit")][rng.integers(3)],
    }
    if rng.integers(2):
        keywords["alibi_slopes"] = rng.uniform(0, 1, group * heads_kv).astype(np.float32)
    if rng.integers(2):
        keywords["sink"] = rng.normal(size=group * heads_kv).astype(np.float32)
    if rng.integers(2):
        keywords["seqused_k"] = (lengths // 2).astype(np.int32)
    load_bytes = {27: 2}.get(d, 16)
    variant = forward.choose_variant(dtypes.BY_NAME[dtype], d, d, load_bytes, arch.named("sm_80"))
    return variant, (int(starts[-1]), group * heads_kv, d), (int(starts[-1]), heads_kv, d), keywords


@needs_nvrtc
def test_a_thousand_calls_compile_what_was_predicted(monkeypatch, tmp_path, seed):
    """Counted at the compiler, with an empty disk cache: lengths, batches, heads, groups, numbers, hints and outputs
    never recompile."""
    compiled = []
    original = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda *a, **k: compiled.append(a[0]) or original(*a, **k))
    monkeypatch.setattr(cuflash.config, "cache_dir", tmp_path)
    module.clear()
    rng = np.random.default_rng(seed)
    calls = [random_call(rng) for _ in range(1000)]
    predicted = {variant for variant, *_ in calls}
    with recording("sm_80") as recorder:
        for variant, shape_q, shape_k, keywords in calls:
            dtype = variant.element.numpy
            arrays = [recorder.arrays["cupy stand-in"](np.empty(s, dtype)) for s in (shape_q, shape_k, shape_k)]
            device = {
                n: recorder.arrays["cupy stand-in"](x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()
            }
            cuflash.attention(*arrays, **device)
        launched = {launch.kernel.spec.variant for launch in recorder.launches}
    assert launched == predicted
    assert len(compiled) == len(predicted) == 3
