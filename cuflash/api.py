"""`attention` and `attention_backward`: their signatures, and what they promise. `call/` does the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import autograd, frameworks
from .call import number_checks, runner
from .call.arguments import Arguments, Array, Backward, IndexArray, normalised, options_of
from .call.bind import bind
from .call.mods import bind_mods, traced_before
from .call.plan import Plan
from .call.refusals import UNSUPPORTED_OPERATION
from .call.results import AttentionGrads, AttentionOutput
from .errors import ArgumentError, UnsupportedError
from .frameworks import Framework
from .keywords import with_suggestions
from .trace.tracer import Bound


@with_suggestions()
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    cu_seqlens_q: IndexArray | None = None,
    cu_seqlens_k: IndexArray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: IndexArray | None = None,
    seqused_k: IndexArray | None = None,
    page_table: IndexArray | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    offset: Any = 0,
    deterministic: bool = False,
    split_size: int | None = None,
    kernel_options: dict[str, Any] | None = None,
    out: Array | None = None,
    aux: Sequence[str] = (),
) -> Any:
    """softmax(scale * q @ k.T + ...) @ v, without ever holding the matrix of scores.

    Dense: q [batch, q_len, heads_q, d], k [batch, k_len, heads_kv, d], v [batch, k_len, heads_kv, d_v].
    Packed: q [total_q, heads_q, d], k [total_k, heads_kv, d], v [total_k, heads_kv, d_v], with `cu_seqlens_q` and
    `cu_seqlens_k`, int32 [batch + 1] from 0: sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1].

    All arrays are of one framework, float16, bfloat16 or float32 (float64 on the host alone), any strides with a
    unit last one; heads_kv divides heads_q; d and d_v from 1 to 256. The result is of the same framework and dtype, on
    the same device, ordered on the caller's current stream.

    max_seqlen_*   hints for the launch, ints or arrays of one; a wrong one costs time and never a row
    seqused_*      int32 [batch]: only the first rows of each sequence exist
    scale          multiplies q.k; None: 1 / sqrt(d)
    causal         query i sees key j iff j <= i + k_len - q_len: the last query sees the last key
    window_size    (left, right) keys seen on either side of that diagonal; -1 or None: all
    softcap        > 0: scores become softcap * tanh(score / softcap)
    alibi_slopes   float32 [heads_q] or [batch, heads_q]: adds -slope * |i + k_len - q_len - j|
    sink           [heads_q]: a score without a value, in the softmax's denominator alone
    score_mod      f(score, b, h, q_idx, kv_idx) -> score, and
    mask_mod       f(b, h, q_idx, kv_idx) -> whether key kv_idx is seen, after softcap and ALiBi: FlexAttention's
                   functions, in operators and functions of NumPy or PyTorch. h is the query head, q_idx and kv_idx
                   count within sequence b, whose lengths they get where they name q_len and kv_len. Arrays that they
                   capture, of q's framework and on its device, and numbers are read anew at every call
    block_mask     of `create_block_mask`: its mask, beside mask_mod
    dropout_p      from 0 up to 1: the share of softmax weights to drop, in steps of 1/256; those kept are multiplied by
                   1 / (1 - dropout_p). Which ones is a function of seed, offset, b, h, q_idx and kv_idx alone
    seed, offset   ints, or integer arrays of one element, of 32 or 64 bits, which the kernel reads. Needed for dropout;
                   in PyTorch seed=None draws both from the device's default generator, and in JAX seed may be a key of
                   jax.random, of which 32 bits are drawn
    deterministic  makes gradients bitwise reproducible, at the price of seven matrix products instead of five; the
                   forward is so either way
    split_size     for few queries of many keys: cut the keys of each row into pieces of so many, which several blocks
                   compute and a last kernel puts together, from float32 memory that `explain` tells. A multiple of 64
                   serves every kernel. A sequence's result has the same bits in any batch, but other ones than without.
                   Keys are dense or in pages, not packed; gradients are computed as without
    kernel_options for measuring. {"kernel": "sm_80"}: the kernel that runs on every GPU, where a chip has one of its
                   own; the result has other bits. {"persistent": True or False}: whether Hopper's computes a dense
                   batch by a block for each multiprocessor; {"pack_heads": True or False}: whether it takes the query
                   heads of a key head together; {"cluster": 2}: two blocks share what they load of keys;
                   {"order": "long" or "position"}: whether tiles with more keys are computed first
    out            where to write the result
    aux            any of "lse", "max_logit", "dropout_mask": return an `AttentionOutput` that holds them

    A row that sees no key, and a row that no sequence owns, is 0 with lse -inf (with a sink, the former's lse is the
    sink). Other `kernel_options`, and `split_size` beside dropout or packed keys, raise `UnsupportedError`, mods that
    cannot be followed `TraceError`; the message says what to use instead. Wrong arguments raise `ArgumentError`; a
    refused call has launched and written nothing.

    Gradients for q, k, v, `alibi_slopes`, `sink` and the float arrays that a score_mod captures flow through out and
    lse. In PyTorch: in autograd, torch.func's grad and vmap, torch.compile, torch.export and checkpoints; under
    autocast q, k and v are cast. Compilers take mods that `cuflash.mod` traced outside; at others torch.compile breaks
    its graph. In JAX: under jit, grad, vmap, scan, checkpoint and shard_map, and for arrays sharded by batch or heads;
    what is compiled keeps the `config.backend` it was traced with. `out=`, second and forward-mode derivatives are
    refused there.

    Two sequences, of 2 and 3 tokens, in one packed batch:

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((5, 4, 64)).astype(np.float32)
    >>> starts = np.array([0, 2, 5], np.int32)
    >>> result = attention(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, aux=("lse",))
    >>> result.out.shape, result.lse.shape
    ((5, 4, 64), (4, 5))
    >>> bool(np.allclose(result.out[2], x[2]))  # the first token of the second sequence sees itself alone
    True
    """
    given = (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale, causal,
        window_size, softcap, alibi_slopes, sink, score_mod, mask_mod, block_mask, dropout_p, seed, offset,
        deterministic, split_size, kernel_options, out, aux,
    )  # fmt: skip
    warm = runner.warm(q, k, v, given) if frameworks.of(q) is frameworks.cupy else None
    if warm is None:
        return _attention(q, k, v, Arguments._make(given))
    found = runner.found(warm)
    if found is not None and (out is None or not found.overlaps(warm.at)):
        return found.run(warm.at, out)
    call = bind(q, k, v, Arguments._make(given))
    result = call.run()
    runner.keep(warm, call)
    return result


def _attention(q: Array, k: Array, v: Array, arguments: Arguments) -> Any:
    """The same, of the record of its keywords."""
    bound = None
    framework = frameworks.of(q)
    if arguments.has_mods:
        if framework is frameworks.torch and frameworks.torch.compiling():
            bound = traced_before(q, k, arguments.score_mod, arguments.mask_mod, arguments.block_mask)
            if bound is None:
                return autograd.outside_of_graphs()(_attention, q, k, v, arguments)
        else:
            bound = bind_mods(q, k, arguments.score_mod, arguments.mask_mod, arguments.block_mask)
    captured = () if bound is None else bound.arrays
    looks_on = framework.looks_on(
        q, k, v, arguments.alibi_slopes, arguments.sink, arguments.out, *arguments.lengths, arguments.seed,
        arguments.offset, *captured,
    )  # fmt: skip
    if looks_on:
        return _by_operation(framework, q, k, v, arguments, bound)
    if arguments.deterministic is not False:
        number_checks.flag("deterministic", arguments.deterministic)
    return bind(q, k, v, arguments, bound).run()


def _by_operation(framework: Framework, q: Array, k: Array, v: Array, arguments: Arguments, bound: Bound | None) -> Any:
    """The call as one operation of a framework that looks on."""
    if arguments.page_table is not None and framework is not frameworks.torch:
        raise UnsupportedError(f"page_table: {UNSUPPORTED_OPERATION['page_table']}")
    if options_of(arguments.kernel_options):
        raise UnsupportedError(f"kernel_options: {UNSUPPORTED_OPERATION['kernel_options']}")
    if arguments.out is not None:
        raise UnsupportedError(f"out: {UNSUPPORTED_OPERATION['out']}")
    names = number_checks.aux_names(arguments.aux)
    if "dropout_mask" in names:
        raise UnsupportedError(f"dropout_mask: {UNSUPPORTED_OPERATION['dropout_mask']}")
    results = autograd.operations(framework).attention(q, k, v, normalised(arguments._replace(aux=names)), bound)
    if not names:
        return results[0]
    others: dict[str, Array] = {"lse": results[1], "max_logit": results[2]}
    return AttentionOutput(results[0], **{name: others[name] for name in names})


@with_suggestions(attention)
def plan(q: Array, k: Array, v: Array, **keywords: Any) -> Plan:
    """`attention` of these arrays made ready to run on others that look like them -> `Plan`.

    keywords  those of `attention` but `out` and `aux`

    Checks what `attention` checks and compiles; nothing runs. Raises what the call would raise.

    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 9, 4, 64)).astype(np.float32)
    >>> out = np.empty_like(q)
    >>> planned = plan(q, k, v, causal=True)
    >>> bool((planned.run(q, k, v, out) == attention(q, k, v, causal=True)).all())
    True
    """
    return Plan(q, k, v, Arguments(**keywords))


@with_suggestions()
def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    cu_seqlens_q: IndexArray | None = None,
    cu_seqlens_k: IndexArray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: IndexArray | None = None,
    seqused_k: IndexArray | None = None,
    page_table: IndexArray | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    offset: Any = 0,
    deterministic: bool = False,
    split_size: int | None = None,
    kernel_options: dict[str, Any] | None = None,
    dlse: Array | None = None,
    captured_grads: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
) -> AttentionGrads:
    """The gradients of a loss for the inputs of `attention`, from its gradient for the result: what autograd calls.

    dout           out's shape and dtype: the loss's gradient for out
    q, k, v        as `attention` got them, and so are the keywords
    out, lse       what `attention` returned with `aux=("lse",)`; lse float32 [batch, heads_q, q_len] or
                   [heads_q, total_q]
    dlse           lse's shape, float32: the loss's gradient for lse, where it uses that too
    deterministic  the same gradients to the last bit every time; else dq, summed by atomics in no order, may differ in
                   its last bits. `explain(..., backward=True)` says which way a call takes
    captured_grads also the gradients of the float arrays that mods captured, and of alibi_slopes, in `dcaptured`
    dq, dk, dv     where to write these gradients, strided as they may be: with slices of one array, packed
                   projections get a packed gradient

    The scores are computed again, a tile at a time, so memory grows with the length and not with its square; the
    weights, exp(score - lse), are right to half a unit in the last place of the float32 lse: 2^-16 of themselves at an
    lse of 300, nothing is left of that at 1e8, where they are held to at most 1. A row that sees no key has gradient 0
    whatever dout and dlse have there (a sink receives its dlse), and so has a row that no sequence owns.

    Raises `UnsupportedError` for what `attention` does not serve, and for the gradient of an array whose rows a mod
    multiplies by `dot`. Wrong arguments raise `ArgumentError`; a refused call has launched and written nothing.

    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 9, 4, 64)).astype(np.float32)
    >>> out, lse, *_ = attention(q, k, v, causal=True, aux=("lse",))
    >>> grads = attention_backward(np.ones_like(out), q, k, v, out, lse, causal=True)
    >>> grads.dq.shape, grads.dk.shape, grads.dv.shape
    ((1, 9, 4, 64), (1, 9, 4, 64), (1, 9, 4, 64))
    >>> bool(np.allclose(grads.dv.sum(axis=1), 9))  # each of 9 rows hands out weights that sum to 1
    True
    """
    given = {"dout": dout, "out": out, "lse": lse}
    for name, x in given.items():
        if x is None:
            raise ArgumentError(f"{name} is None: {_NEEDED[name]}")
    if dlse is not None:
        given["dlse"] = dlse
    targets = {name: x for name, x in (("dq", dq), ("dk", dk), ("dv", dv)) if x is not None}
    arguments = Arguments(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale, causal,
        window_size, softcap, alibi_slopes, sink, score_mod, mask_mod, block_mask, dropout_p, seed, offset,
        split_size=split_size, kernel_options=kernel_options,
    )  # fmt: skip
    bound = bind_mods(q, k, score_mod, mask_mod, block_mask) if arguments.has_mods else None
    backward = Backward(
        given, targets, number_checks.flag("deterministic", deterministic),
        number_checks.flag("captured_grads", captured_grads),
    )  # fmt: skip
    return bind(q, k, v, arguments, bound, backward).gradients()


_NEEDED = {
    "dout": "pass the gradient of the loss for out, in its shape; np.zeros_like(out) if it uses lse alone",
    "out": "pass what attention returned",
    "lse": 'gradients need it: take it from attention(..., aux=("lse",)), which returns (out, lse, ...)',
}
