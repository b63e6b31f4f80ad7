"""`cuflash explain`: which kernel a call would launch and why, for made-up arrays on the host."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import typer

from .. import packing
from ..dtypes import BY_NAME, KERNEL
from ..errors import require
from ..settings import config


def explain(
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 8,
    heads_kv: Annotated[int | None, typer.Option(help="Key heads; as many as query heads if not given.", min=1)] = None,
    head_dim: Annotated[int, typer.Option(help="Elements of a query and a key.", min=1)] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Elements of a value, if not head_dim.", min=1)] = None,
    lengths: Annotated[str, typer.Option(help="The sequences, packed: 5,17,300.")] = "5,17,300",
    lengths_k: Annotated[str | None, typer.Option(help="The lengths of their keys, if others.")] = None,
    dense: Annotated[bool, typer.Option(help="A dense batch instead: all lengths must be equal.")] = False,
    causal: Annotated[bool, typer.Option(help="Causal, aligned at the end.")] = False,
    window: Annotated[str | None, typer.Option(help="LEFT,RIGHT keys seen beside the diagonal; -1: all.")] = None,
    softcap: Annotated[float, typer.Option(help="Cap of the scores, 0 for none.")] = 0.0,
    alibi: Annotated[bool, typer.Option(help="With ALiBi slopes.")] = False,
    sink: Annotated[bool, typer.Option(help="With a learnable sink a head.")] = False,
    backend: Annotated[str, typer.Option(help="emulator shows the kernel a GPU would run; or reference.")] = "emulator",
    arch: Annotated[str | None, typer.Option(help="Architecture, such as sm_90a; else CUFLASH_ARCH.")] = None,
    source: Annotated[bool, typer.Option("--source", help="Print the kernel's whole text and nothing else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say which kernel a call would launch, on which grid and why."""
    from ..questions import explain as explain_call

    arrays, keywords = made_up_call(
        dtype, heads, heads_kv or heads, head_dim, head_dim_v or head_dim, _integers("lengths", lengths),
        _integers("lengths_k", lengths_k) if lengths_k else None, dense,
    )  # fmt: skip
    keywords |= {"causal": causal, "softcap": softcap}
    if window:
        keywords["window_size"] = tuple(_integers("window", window))
    if alibi:
        keywords["alibi_slopes"] = 2.0 ** -np.linspace(1, 8, heads, dtype=np.float32)
    if sink:
        keywords["sink"] = np.zeros(heads, np.float32)

    before = config.backend, config.arch
    try:
        config.backend = backend
        config.arch = arch or config.arch
        explanation = explain_call(*arrays, **keywords)
    finally:
        config.backend, config.arch = before
    if source:
        print(explanation.source)
    elif as_json:
        print(json.dumps(asdict(explanation)))
    else:
        print(explanation)


def made_up_call(
    dtype: str,
    heads: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    lengths: list[int],
    lengths_k: list[int] | None = None,
    dense: bool = False,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
    """q, k, v of zeros and the keywords of a packed or dense call of these sizes.

    >>> (q, k, v), keywords = made_up_call("float16", 8, 2, 64, 32, [5, 17])
    >>> q.shape, k.shape, v.shape, keywords["cu_seqlens_q"]
    ((22, 8, 64), (22, 2, 64), (22, 2, 32), array([ 0,  5, 22], dtype=int32))
    """
    names = ", ".join(t.name for t in KERNEL)
    require(dtype in {t.name for t in KERNEL}, f"dtype={dtype!r} must be one of {names}")
    lengths_k = lengths if lengths_k is None else lengths_k
    require(
        len(lengths) == len(lengths_k),
        f"lengths_k={lengths_k} must name as many sequences as lengths={lengths}: one number each",
    )
    rows: tuple[tuple[int, ...], ...] = ((sum(lengths),), (sum(lengths_k),))
    keywords: dict[str, Any] = {}
    if dense:
        require(
            len({*lengths}) <= 1 and len({*lengths_k}) <= 1,
            f"lengths={lengths} must all be equal in a dense batch: leave --dense out",
        )
        rows = ((len(lengths), lengths[0]), (len(lengths), lengths_k[0]))
    else:
        keywords["cu_seqlens_q"] = packing.cu_seqlens_from(lengths=lengths)
        keywords["cu_seqlens_k"] = packing.cu_seqlens_from(lengths=lengths_k)
    element = BY_NAME[dtype].numpy
    q = np.zeros((*rows[0], heads, head_dim), element)
    k = np.zeros((*rows[1], heads_kv, head_dim), element)
    v = np.zeros((*rows[1], heads_kv, head_dim_v), element)
    return (q, k, v), keywords


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        require(False, f"--{name.replace('_', '-')} {text!r} must be whole numbers with commas between, as 5,17,300")
        raise
