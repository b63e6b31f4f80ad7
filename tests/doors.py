"""The front doors of the library, for `test_front_door`: each public function with the arguments of a right call."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuflash
from cuflash import emulator, mods, packing, workbench

F16 = np.float16


def floats(*shape: int, dtype: Any = F16) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Door:
    """A public function, and the arguments of a right call."""

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    kernels: bool = True  # whether a call runs kernels
    deep: bool = False  # whether no other test compiles these


def dense() -> dict[str, Any]:
    return {"q": floats(2, 6, 4, 64), "k": floats(2, 9, 2, 64), "v": floats(2, 9, 2, 64)}


def lengths() -> dict[str, Any]:
    return {"cu_seqlens_q": i32(0, 2, 6), "cu_seqlens_k": i32(0, 3, 9), "max_seqlen_q": 4, "max_seqlen_k": 6}


def packed() -> dict[str, Any]:
    return {"q": floats(6, 4, 64), "k": floats(9, 2, 64), "v": floats(9, 2, 64), **lengths()}


def paged() -> dict[str, Any]:
    pages = {"page_table": i32(1, 3, 4, 0).reshape(2, 2), "seqused_k": i32(5, 8)}
    return {"q": floats(2, 6, 4, 64), "k": floats(5, 4, 2, 64), "v": floats(5, 4, 2, 64), **pages}


def options() -> dict[str, Any]:
    return {
        "scale": 0.25, "causal": True, "window_size": (4, 0), "softcap": 0.0, "alibi_slopes": None, "sink": None,
        "score_mod": None, "mask_mod": None, "block_mask": None, "dropout_p": 0.0, "seed": 3, "offset": 0,
        "deterministic": False, "split_size": None, "kernel_options": None,
    }  # fmt: skip


def forward() -> dict[str, Any]:
    return {**options(), "seqused_q": None, "seqused_k": None, "page_table": None, "out": None, "aux": ("lse",)}


def planned(q: Any, k: Any, v: Any, out: Any, **keywords: Any) -> Any:
    """Planned for one set of arrays, and run on those given."""
    return cuflash.plan(**dense(), **keywords).run(q, k, v, out)


def headed() -> dict[str, Any]:
    """What has a number for each head."""
    return {"alibi_slopes": floats(4, dtype=np.float32), "sink": floats(4, dtype=np.float32)}


def backward(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: x for name, x in arguments.items() if name not in ("out", "aux")}
    out, lse, *_ = cuflash.attention(**arguments, aux=("lse",))
    given = {"dout": np.ones_like(out), "out": out, "lse": lse, "dlse": None, "captured_grads": False}
    return {**arguments, **given, "dq": None, "dk": None, "dv": None}


def fa(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keywords of flash-attn's names."""
    kept = ("causal", "window_size", "softcap", "alibi_slopes", "deterministic", "score_mod", "mask_mod", "block_mask")
    return {
        **arguments, **{name: x for name, x in options().items() if name in kept}, "dropout_p": 0.0,
        "softmax_scale": 0.25,
    }  # fmt: skip


def cache(**more: Any) -> dict[str, Any]:
    names = (
        "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "block_table", "alibi_slopes", "page_table",
        "cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k_new", "rotary_seqlens", "sink", "score_mod", "mask_mod",
        "split_size", "qv", "q_descale", "k_descale", "v_descale", "scheduler_metadata", "pack_gqa",
    )  # fmt: skip
    return {
        "q": floats(2, 3, 4, 64), "k_cache": floats(2, 16, 2, 64), "v_cache": floats(2, 16, 2, 64),
        "k": floats(2, 3, 2, 64), "v": floats(2, 3, 2, 64), "cache_seqlens": i32(0, 5), **dict.fromkeys(names),
        "softmax_scale": 0.25, "causal": True, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
        "num_splits": 0, "return_softmax_lse": True, "attention_chunk": 0, "sm_margin": 0, **more,
    }  # fmt: skip


def features() -> dict[str, Any]:
    return {
        "dtype": "float16", "head_dim": 64, "head_dim_v": None, "arch": None, "backward": False, "causal": True,
        "page_table": False, "split_size": None, "dropout_p": 0.0, "softcap": None, "sink": False, "lse": True,
        "alibi_slopes": None,
    }  # fmt: skip


def set_option(name: str) -> Callable[[Any], None]:
    def call(value: Any) -> None:
        before = getattr(cuflash.config, f"_{name}")
        setattr(cuflash.config, name, value)
        setattr(cuflash.config, name, before)

    return call


def scheduled(**keywords: Any) -> None:
    with emulator.schedule(**keywords):
        pass


def traced(limit: Any) -> None:
    with emulator.tracing(limit):
        pass


def part_lse() -> np.ndarray:
    return floats(2, 4, 6, dtype=np.float32)


# Masks and scores. What makes one gives what it shows.


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def flex(**more: Any) -> dict[str, Any]:
    return {
        "query": floats(2, 4, 6, 64), "key": floats(2, 4, 9, 64), "value": floats(2, 4, 9, 64), "score_mod": None,
        "block_mask": None, "scale": 0.25, "enable_gqa": False, "return_lse": True, "kernel_options": None,
        "return_aux": None, **more,
    }  # fmt: skip


def listed() -> dict[str, Any]:
    return {
        "kv_num_blocks": i32(1, 2), "kv_indices": i32(0, 0, 0, 1).reshape(2, 2), "full_kv_num_blocks": None,
        "full_kv_indices": None, "BLOCK_SIZE": 64, "mask_mod": causal, "seq_lengths": (128, 128),
    }  # fmt: skip


def parts(block_mask: cuflash.BlockMask) -> list[np.ndarray]:
    """What a block mask is."""
    shape = np.array([*block_mask.shape, *block_mask.BLOCK_SIZE])
    if block_mask.numel() > 10**6:
        return [shape, np.array(block_mask.sparsity())]
    b, h, q_len, kv_len = block_mask.shape
    seen = cuflash.create_mask(block_mask.as_mask_mod(), b, h, q_len, kv_len, device="cpu")
    return [shape, np.asarray(seen), block_mask.kinds, *(np.asarray(x) for x in (block_mask.kv_indices,))]


def on_blocks(method: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        block_mask = cuflash.create_block_mask(causal, 2, 1, 256, 384)
        found = getattr(block_mask, method)(**arguments)
        return parts(found) if isinstance(found, cuflash.BlockMask) else [np.array(found)]

    return call


def index_blocks(index: Any) -> list[np.ndarray]:
    return parts(cuflash.create_block_mask(causal, 2, 1, 256, 384)[index])


def set_on_blocks(name: str) -> Callable[..., Any]:
    def call(value: Any) -> list[np.ndarray]:
        block_mask = cuflash.create_block_mask(causal, 2, 1, 256, 384)
        setattr(block_mask, name, value)
        return parts(block_mask)

    return call


def applied(make: Callable[..., Any], kind: str = "mask") -> Callable[..., Any]:
    """What a mod that `make` makes does to a small problem."""

    def call(**arguments: Any) -> list[np.ndarray]:
        made = make(**arguments)
        x = floats(2, 6, 2, 8, dtype=np.float32)
        with_mod = {f"{kind}_mod": made}
        found = [cuflash.attention(x, x, x, **with_mod)]
        if kind == "mask":
            found += [np.asarray(cuflash.create_mask(made, 2, 2, 6, 6, device="cpu"))]
        return found

    return call


def printed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> list[np.ndarray]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            function(**arguments)
        return [np.array(out.getvalue())]

    return call


def ids() -> np.ndarray:
    return i32(0, 0, 0, 1, 1, 1)


def a_kernel(**arguments: Any) -> None:
    workbench.kernel(**arguments)


TEXT = """
struct Params {
  const float* x;
  float* y;
};
HW_KERNEL(32) twice(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));
}
"""
OWN = {"x": floats(32, dtype=np.float32), "y": floats(32, dtype=np.float32)}


def own() -> workbench.Kernel:
    return workbench.kernel(TEXT, OWN)


MASKS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "sliding_window": (mods.sliding_window, lambda: {"left": 2, "right": 0}),
    "prefix_lm": (mods.prefix_lm, lambda: {"prefix_length": 2}),
    "prefix_lm of an array": (mods.prefix_lm, lambda: {"prefix_length": i32(2, 3)}),
    "document": (mods.document, lambda: {"ids": ids(), "kv_ids": None, "mask_mod": causal}),
    "document of two": (mods.document, lambda: {"ids": ids(), "kv_ids": ids()}),
    "document of starts": (mods.document, lambda: {"cu_seqlens": i32(0, 2, 6), "total": 6, "mask_mod": None}),
    "chunked": (mods.chunked, lambda: {"size": 2}),
    "dilated_window": (mods.dilated_window, lambda: {"window": 2, "dilation": 2}),
    "natten_1d": (mods.natten_1d, lambda: {"kernel": 3}),
    "natten_2d": (mods.natten_2d, lambda: {"height": 2, "width": 3, "kernel": 1, "tile": None}),
    "image_spans": (mods.image_spans, lambda: {"ranges": i32(*[0, 2] * 6).reshape(6, 2), "mask_mod": None}),
    "tree": (mods.tree, lambda: {"bits": np.arange(6, dtype=np.uint8).reshape(6, 1)}),
    "and_masks": (lambda a, b: mods.and_masks(a, b), lambda: {"a": causal, "b": mods.causal()}),
    "or_masks": (lambda a, b: mods.or_masks(a, b), lambda: {"a": causal, "b": mods.causal()}),
    "not_mask": (mods.not_mask, lambda: {"mask_mod": causal}),
    "mod": (cuflash.mod, lambda: {"function": causal, "kind": "mask"}),
    "static": (lambda x: lambda b, h, q_idx, kv_idx: q_idx // cuflash.static(x) == 0, lambda: {"x": 3}),
}
SCORES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "alibi": (mods.alibi, lambda: {"slopes": floats(2, dtype=np.float32)}),
    "alibi of heads": (mods.alibi, lambda: {"slopes": 2}),
    "softcap": (mods.softcap, lambda: {"cap": 2.0, "approximate": False}),
    "relative_bias": (mods.relative_bias, lambda: {"table": floats(2, 11, dtype=np.float32)}),
    "bias": (mods.bias, lambda: {"values": floats(2, 6, 6, dtype=np.float32)}),
    "compose": (lambda a, b: mods.compose(a, b), lambda: {"a": mods.softcap(2.0), "b": mods.softcap(3.0)}),
}
SETTINGS = {
    "backend": "emulator", "arch": "sm_80", "check": False, "cache_dir": None, "dump": None, "on_compile": "quiet",
}  # fmt: skip
MASK = np.array([[True, True, False], [False, True, True]])
DOORS = (
    Door("attention", cuflash.attention, lambda: dense() | forward()),
    Door("attention of heads", cuflash.attention, lambda: dense() | forward() | headed()),
    Door("attention packed", cuflash.attention, lambda: packed() | forward()),
    Door("attention paged", cuflash.attention, lambda: dense() | forward() | paged()),
    Door("attention dropout", cuflash.attention, lambda: dense() | forward() | {"dropout_p": 0.5}),
    Door("attention dropout mask", cuflash.attention, lambda: dense() | forward() | {
        "dropout_p": 0.5, "aux": ("lse", "dropout_mask"), "out": floats(2, 6, 4, 64),
    }),
    Door("attention split", cuflash.attention, lambda: dense() | forward() | {"split_size": 64}),
    Door("plan", planned, lambda: dense() | options() | {"out": floats(2, 6, 4, 64)}),
    Door("attention_backward", cuflash.attention_backward, lambda: backward(dense() | options())),
    Door("attention_backward packed", cuflash.attention_backward, lambda: backward(packed() | options())),
    Door("explain", cuflash.explain, lambda: dense() | forward() | {"backward": False}),
    Door("explain backward", cuflash.explain, lambda: packed() | forward() | {"backward": True}),
    Door("supports", cuflash.supports, features, kernels=False),
    Door("warmup", cuflash.warmup, lambda: features() | {"device": None}),
    Door("flash_attn_func", cuflash.flash_attn_func, lambda: fa(dense()) | {"return_attn_probs": False}),
    Door("flash_attn_kvpacked_func", cuflash.flash_attn_kvpacked_func, lambda: fa(
        {"q": floats(2, 6, 4, 64), "kv": floats(2, 9, 2, 2, 64)}
    )),
    Door("flash_attn_qkvpacked_func", cuflash.flash_attn_qkvpacked_func, lambda: fa({"qkv": floats(2, 6, 3, 4, 64)})),
    Door("flash_attn_varlen_func", cuflash.flash_attn_varlen_func, lambda: fa(packed()) | {"block_table": None}),
    Door("flash_attn_varlen_func paged", cuflash.flash_attn_varlen_func, lambda: fa(packed()) | {
        "k": floats(5, 4, 2, 64), "v": floats(5, 4, 2, 64), "block_table": i32(1, 3, 4, 0).reshape(2, 2),
    }),
    Door("flash_attn_varlen_kvpacked_func", cuflash.flash_attn_varlen_kvpacked_func, lambda: fa(
        {"q": floats(6, 4, 64), "kv": floats(9, 2, 2, 64), **lengths()}
    )),
    Door("flash_attn_varlen_qkvpacked_func", cuflash.flash_attn_varlen_qkvpacked_func, lambda: fa(
        {"qkv": floats(6, 3, 4, 64), "cu_seqlens": i32(0, 2, 6), "max_seqlen": 4}
    )),
    Door("flash_attn_with_kvcache", cuflash.flash_attn_with_kvcache, cache),
    Door("flash_attn_with_kvcache one length", cuflash.flash_attn_with_kvcache, lambda: cache(cache_seqlens=5)),
    Door("flash_attn_with_kvcache paged", cuflash.flash_attn_with_kvcache, lambda: cache(
        k_cache=floats(8, 4, 2, 64), v_cache=floats(8, 4, 2, 64), block_table=i32(1, 3, 4, 0, 5, 7).reshape(2, 3),
        rotary_cos=floats(20, 16), rotary_sin=floats(20, 16), rotary_interleaved=False, rotary_seqlens=i32(2, 3),
    )),
    Door("flash_attn_with_kvcache rows", cuflash.flash_attn_with_kvcache, lambda: cache(
        q=floats(5, 4, 64), cu_seqlens_q=i32(0, 2, 5), max_seqlen_q=3, k=floats(4, 2, 64), v=floats(4, 2, 64),
        cu_seqlens_k_new=i32(0, 1, 4), cache_batch_idx=i32(1, 0), cache_leftpad=i32(0, 2),
    )),
    Door("merge_states", cuflash.merge_states, lambda: {
        "outs": [floats(2, 6, 4, 8, dtype=np.float32)] * 2, "lses": [part_lse(), part_lse() + 1],
    }, kernels=False),
    Door("pack", packing.pack, lambda: {"arrays": [floats(3, 4), floats(2, 4)]}, kernels=False),
    Door("unpack", packing.unpack, lambda: {"data": floats(5, 4), "cu_seqlens": [0, 3, 5]}, kernels=False),
    Door("unpack of an array", packing.unpack, lambda: {
        "data": floats(5, 4), "cu_seqlens": i32(0, 3, 5),
    }, kernels=False),
    Door("unpad_input", packing.unpad_input, lambda: {
        "x": floats(2, 3, 4), "mask": MASK, "unused_mask": None,
    }, kernels=False),
    Door("pad_input", packing.pad_input, lambda: {
        "x": floats(4, 4), "indices": np.array([0, 1, 4, 5]), "batch": 2, "seqlen": 3,
    }, kernels=False),
    Door("cu_seqlens_from lengths", packing.cu_seqlens_from, lambda: {"lengths": [3, 0, 2]}, kernels=False),
    Door("cu_seqlens_from array", packing.cu_seqlens_from, lambda: {"lengths": i32(3, 0, 2)}, kernels=False),
    Door("cu_seqlens_from mask", packing.cu_seqlens_from, lambda: {"mask": MASK, "lengths": None}, kernels=False),
    Door("cu_seqlens_from position_ids", packing.cu_seqlens_from, lambda: {
        "position_ids": i32(0, 1, 2, 0, 1), "mask": None,
    }, kernels=False),
    Door("emulator.schedule", scheduled, lambda: {
        "seed": 3, "landing": "early", "step_limit": 10**6, "os_threads": 1,
    }, kernels=False),
    Door("emulator.tracing", traced, lambda: {"limit": 100}, kernels=False),
    Door("flex_attention", cuflash.flex_attention, flex),
    Door("scaled_dot_product_attention", cuflash.scaled_dot_product_attention, lambda: {
        "query": floats(2, 4, 6, 64), "key": floats(2, 4, 9, 64), "value": floats(2, 4, 9, 64), "attn_mask": None,
        "dropout_p": 0.0, "is_causal": True, "scale": 0.25, "enable_gqa": False, "seed": 3, "offset": 0,
    }),
    Door("dot_product_attention", cuflash.dot_product_attention, lambda: {
        "query": floats(2, 6, 4, 64), "key": floats(2, 9, 2, 64), "value": floats(2, 9, 2, 64), "bias": None,
        "mask": None, "scale": 0.25, "is_causal": True, "query_seq_lengths": None, "key_value_seq_lengths": None,
        "local_window_size": None, "implementation": None, "return_residual": False,
    }),
    Door("flex_attention of a mask", cuflash.flex_attention, lambda: flex(
        block_mask=cuflash.create_block_mask(causal, None, None, 6, 9)
    ), deep=True),
    Door("create_block_mask", lambda **given: parts(cuflash.create_block_mask(**given)), lambda: {
        "mask_mod": causal, "B": None, "H": None, "Q_LEN": 256, "KV_LEN": 256, "device": None, "BLOCK_SIZE": 128,
        "_compile": False, "separate_full_blocks": True, "compute_dq_write_order": False, "dq_kv_order": True,
        "cu_seqlens": None,
    }, kernels=False),
    Door("create_block_mask of documents", lambda **given: parts(cuflash.create_block_mask(**given)), lambda: {
        "mask_mod": causal, "B": None, "H": None, "Q_LEN": 9, "KV_LEN": 9, "cu_seqlens": [0, 3, 9],
    }, kernels=False),
    Door("create_mask", cuflash.create_mask, lambda: {
        "mod_fn": causal, "B": 1, "H": 1, "Q_LEN": 6, "KV_LEN": 9, "device": None,
    }, kernels=False),
    Door("BlockMask", lambda **given: parts(cuflash.BlockMask(**given)), listed, kernels=False),
    Door("BlockMask.from_kv_blocks", lambda **given: parts(cuflash.BlockMask.from_kv_blocks(**given)), lambda: {
        **listed(), "compute_q_blocks": True, "dq_kv_order": None,
    }, kernels=False),
    Door("BlockMask.to_string", on_blocks("to_string"), lambda: {"grid_size": (20, 20), "limit": 4}, kernels=False),
    Door("BlockMask.to", on_blocks("to"), lambda: {"device": None}, kernels=False),
    Door("BlockMask._adjust", on_blocks("_adjust"), lambda: {"new_q_len": 128, "new_kv_len": 128}, kernels=False),
    Door("BlockMask[]", index_blocks, lambda: {"index": (0, 0, 1)}, kernels=False),
    Door("BlockMask.seq_lengths", set_on_blocks("seq_lengths"), lambda: {"value": (200, 300)}, kernels=False),
    Door("BlockMask.mask_mod", set_on_blocks("mask_mod"), lambda: {"value": mods.causal()}, kernels=False),
    Door("mods.visible", printed(mods.visible), lambda: {
        "mask_mod": causal, "q_len": 4, "kv_len": 4, "b": 0, "h": 0,
    }, kernels=False),
    *(Door(f"mods.{name}", applied(make), arguments, kernels=False)
      for name, (make, arguments) in MASKS.items()),
    *(Door(f"mods.{name}", applied(make, "score"), arguments, kernels=False)
      for name, (make, arguments) in SCORES.items()),
    Door("workbench.kernel", a_kernel, lambda: {
        "text": TEXT, "arguments": OWN, "grid": 1, "threads": None, "smem_bytes": 0, "reference": None,
        "tolerance": None, "arch": "sm_80", "label": None, "first_line": 1,
    }, kernels=False),
    Door("workbench.Kernel.bind", lambda **given: own().bind(**given) and None, lambda: {
        "arguments": None, "grid": None, "threads": None, "smem_bytes": None,
    }, kernels=False),
    Door("workbench.Kernel.replace", lambda **given: own().replace(**given) and None, lambda: {
        "file": "twice.cu", "text": TEXT, "label": None, "first_line": 1,
    }, kernels=False),
    Door("workbench.Kernel.edit", lambda **given: own().edit(**given) and None, lambda: {
        "file": "twice.cu", "old": "2.0f", "new": "3.0f",
    }, kernels=False),
    Door("workbench.Kernel.on", lambda **given: own().on(**given) and None, lambda: {"backend": "cuda"}, kernels=False),
    *(Door(f"config.{name}", set_option(name), lambda value=value: {"value": value}, kernels=False)
      for name, value in SETTINGS.items()),
)  # fmt: skip
