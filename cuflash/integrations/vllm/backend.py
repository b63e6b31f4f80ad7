"""The classes that vLLM instantiates, by the contract of `vllm.v1.attention.backend`. Importing this imports vLLM.

Each step vLLM builds one `Metadata` for a group of layers, from what its scheduler batched: requests with one or more
new tokens, packed, and where their keys lie in pages. Each layer then writes its new keys and values (`write_kv`) and
attends (`attention` over pages). Lengths and pages stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from ...api import attention
from ...errors import UnsupportedError
from ...slots import write_kv

_HEAD_DIMS = range(1, 257)
_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


class Backend(AttentionBackend):
    """What cuflash serves, as vLLM asks for it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUFLASH"

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in _HEAD_DIMS

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, *_ENCODERS)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= (8, 0)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A row's bits depend on its request alone: keys are not split."""
        return True


class CpuBackend(Backend):
    """In the place of CPU_ATTN, under its name."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return True


@dataclass
class Metadata:
    """A step's batch. Arrays are on the device; those that vLLM keeps stay the same objects under CUDA graphs.

    causal      of all requests; or bool or int32 [requests], which a mask reads
    image_range int32 [tokens, 2]: the first and last position of the image that a token belongs to, -1 for none
    prefix      int32 [requests]: keys that R-SWA shows every query
    """

    tokens: int
    longest_q: int
    longest_k: int
    starts: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    causal: bool | torch.Tensor
    image_range: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    rswa_window: int = 0


class Builder(AttentionMetadataBuilder[Metadata]):
    """Metadata from vLLM's; nothing is computed but the ranges of image tokens."""

    # Grid and workspace follow from the shapes of vLLM's own arrays. That graphs replay with other lengths was tried on
    # a stand-in for the driver, for decoding; not on a GPU.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = vllm_config.model_config
        self._rswa_window = getattr(config, "rswa_window", None)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        given = common_attn_metadata
        causal = given.causal
        return Metadata(
            tokens=given.num_actual_tokens,
            longest_q=int(given.max_query_len),
            longest_k=int(given.max_seq_len),
            starts=given.query_start_loc,
            lengths=given.seq_lens,
            pages=given.block_table_tensor,
            causal=causal.to(torch.int32) if isinstance(causal, torch.Tensor) else bool(causal),
            image_range=_image_ranges(given),
            prefix=None if self._rswa_window is None else given.rswa_prefix_lens,
            rswa_window=self._rswa_window or 0,
        )


def _image_ranges(given: Any) -> torch.Tensor | None:
    """int32 [tokens, 2] of the ranges of positions that requests name; None where no scheduled token is in one."""
    ranges = given.mm_req_doc_ranges
    if not ranges:
        return None
    starts = given.query_start_loc_cpu.numpy()
    known = getattr(given, "seq_lens_cpu_upper_bound", None)  # exact for prefills, and images are in prompts
    lengths = (given.seq_lens.cpu() if known is None else known).numpy()
    found = np.full((int(given.num_actual_tokens), 2), -1, np.int32)
    for request, spans in ranges.items():
        begin, end = int(starts[request]), int(starts[request + 1])
        before = int(lengths[request]) - (end - begin)  # keys of earlier steps
        for first, last in spans:
            rows = slice(max(first - before, 0) + begin, min(last + 1 - before, end - begin) + begin)
            if first < last and rows.start < rows.stop:
                found[rows] = first, last
    return torch.from_numpy(found).to(given.query_start_loc.device) if (found >= 0).any() else None


class Implementation(AttentionImpl[Metadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise UnsupportedError(
                f"{', '.join(sorted(unknown))}: vLLM passes what cuflash does not know; choose another backend"
            )
        if attn_type not in (AttentionType.DECODER, *_ENCODERS):
            raise UnsupportedError(f"attn_type={attn_type!r} is not served: choose another --attention-backend")
        if kv_cache_dtype not in Backend.supported_kv_cache_dtypes:
            raise UnsupportedError(f"kv_cache_dtype={kv_cache_dtype!r} is not served: pass --kv-cache-dtype auto")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.attn_type, self.kv_cache_dtype = attn_type, kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.window = -1 if sliding_window is None else sliding_window - 1  # keys before a query's own
        self.softcap = float(logits_soft_cap or 0.0)
        self.sinks = sinks

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """The step's keys and values into their slots."""
        if self.attn_type not in _ENCODERS and slot_mapping.numel():
            write_kv(key, value, *self._caches(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [tokens, heads, d] -> output, written: of the first `attn_metadata.tokens`, the others left."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("output_scale: outputs are not quantised here; switch vLLM's fusion of it off")
        if attn_metadata is None:  # vLLM measures the memory of a step
            return output
        step = attn_metadata
        q = query[: step.tokens].view(step.tokens, self.num_heads, self.head_size)
        keywords: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "sink": self.sinks,
            "alibi_slopes": self._slopes(q),
            "cu_seqlens_q": step.starts,
            "max_seqlen_q": step.longest_q,
        }
        if self.attn_type in _ENCODERS:
            shape = (step.tokens, self.num_kv_heads, self.head_size)
            k, v = key[: step.tokens].view(shape), value[: step.tokens].view(shape)
            keywords |= {"cu_seqlens_k": step.starts, "window_size": (self.window, self.window)}
        else:
            k, v = self._caches(kv_cache)
            keywords |= {"seqused_k": step.lengths, "page_table": step.pages, **self._mask(layer, step)}
        out = output[: step.tokens].view(step.tokens, self.num_heads, self.head_size)
        attention(q, k, v, out=out, **keywords)
        return output

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[pages, heads, page size, 2 d] -> K and V, [pages, page size, heads, d] each, as they lie."""
        k, v = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k, v

    def _slopes(self, q: torch.Tensor) -> torch.Tensor | None:
        if self.alibi_slopes is not None and self.alibi_slopes.device != q.device:
            self.alibi_slopes = self.alibi_slopes.to(q.device)
        return self.alibi_slopes

    def _mask(self, layer: Any, step: Metadata) -> dict[str, Any]:
        """causal, window and what else vLLM asks of a decoder, as keywords of `attention`."""
        if step.prefix is not None:
            return {"mask_mod": rswa(step.prefix.to(torch.int32), step.rswa_window)}
        if isinstance(step.causal, torch.Tensor):
            return {"mask_mod": causal_by_request(step.causal, self.window)}
        if step.image_range is not None and step.causal:
            clamped = self.window if getattr(layer, "mm_prefix_clamp_sliding_window", False) else -1
            return {"mask_mod": image_spans(step.image_range, step.starts, self.window, clamped)}
        return {"causal": step.causal, "window_size": (self.window, -1 if step.causal else self.window)}


# Masks ---------------------------------------------------------------------------------------------------------------
# q_len counts a request's new tokens and kv_len all of its keys, so query i is at position i + kv_len - q_len.

Mask = Callable[..., Any]


def _before(position: Any, kv_idx: Any, window: int) -> Any:
    """Whether a key is at or before a position, and at most `window` before it; -1: any."""
    return kv_idx <= position if window < 0 else (kv_idx <= position) & (kv_idx >= position - window)


def image_spans(ranges: torch.Tensor, starts: torch.Tensor, window: int, clamped: int) -> Mask:
    """Causal in a window, or within the image that the query's token belongs to, at most `clamped` keys before it."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        position, row = q_idx + kv_len - q_len, starts[b] + q_idx
        same_image = (kv_idx >= ranges[row, 0]) & (kv_idx <= ranges[row, 1])
        if clamped >= 0:
            same_image = same_image & (kv_idx >= position - clamped)
        return _before(position, kv_idx, window) | same_image

    return mask


def causal_by_request(causal: torch.Tensor, window: int) -> Mask:
    """Causal where `causal[b]` is not 0, every key elsewhere; in a window."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        position = q_idx + kv_len - q_len
        seen = (kv_idx <= position) | (causal[b] == 0)
        if window >= 0:
            seen = seen & (kv_idx >= position - window) & ((kv_idx <= position + window) | (causal[b] != 0))
        return seen

    return mask


def rswa(prefix: torch.Tensor, window: int) -> Mask:
    """Reference sliding-window attention: causal; keys of the prefix, and those less than `window` before."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        position = q_idx + kv_len - q_len
        return (kv_idx <= position) & ((kv_idx < prefix[b]) | (position - kv_idx < window))

    return mask
