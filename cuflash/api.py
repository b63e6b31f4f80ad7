"""`attention`, `attention_backward`, and the questions one may ask: `explain`, `supports`, `warmup`.

A call goes through three steps. *Bind* views the arrays and asks for a `_Prepared` by the call's metadata: shapes,
strides, dtypes, devices, numbers. Only where that metadata is new is it *checked* (`cuflash/validate.py`) and planned;
nothing about the values of device arrays is ever looked at. *Run* allocates the results and launches.
"""

from __future__ import annotations

import html
import inspect
import math
import numbers
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from . import arch as arch_table
from . import dtypes, frameworks, philox, validate
from .arch import Arch
from .array import Device, TensorView, contiguous_strides, of_numpy
from .dtypes import DType
from .errors import ArgumentError, CuflashError, DeviceMemoryError, UnsupportedError, require
from .frameworks import Framework
from .settings import config
from .trace import tracer
from .trace.derive import gradients
from .trace.expr import Mods, walk
from .trace.fold import fold
from .trace.fold import numbers as folded_numbers
from .trace.tracer import Bound

Array = Any  # of NumPy, CuPy, PyTorch, JAX or any other producer of DLPack
IndexArray = Any  # int32 [n] of the same framework, or a list, tuple or NumPy array


class AttentionOutput(NamedTuple):
    """What `attention` returns when `aux` names something; what was not named is None.

    out        as without aux
    lse        float32 [batch, heads_q, q_len] or [heads_q, total_q]: natural logarithm of the softmax denominator
    max_logit  float32, lse's shape: the row's largest score before the sink
    dropout_mask  bool [batch, heads_q, q_len, k_len], or [batch, heads_q, max_seqlen_q, max_seqlen_k] of packed
                  arrays (of keys in pages as many as those hold): whether dropout keeps a weight; False for rows and
                  keys that a sequence lacks
    """

    out: Array
    lse: Array = None
    max_logit: Array = None
    dropout_mask: Array = None


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
    bound = None
    framework = frameworks.of(q)
    if score_mod is not None or mask_mod is not None or block_mask is not None:
        if framework is frameworks.torch and frameworks.torch.compiling():
            bound = _traced_before(q, k, score_mod, mask_mod, block_mask)
            if bound is None:
                from .frameworks import torch_autograd

                return torch_autograd.uncompiled(
                    attention, q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                    max_seqlen_k=max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k, page_table=page_table,
                    scale=scale, causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
                    sink=sink, score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask, dropout_p=dropout_p,
                    seed=seed, offset=offset, deterministic=deterministic, split_size=split_size,
                    kernel_options=kernel_options, out=out, aux=aux,
                )  # fmt: skip
        else:
            bound = bind_mods(q, k, score_mod, mask_mod, block_mask)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table
    captured = () if bound is None else bound.arrays
    operation = framework.operation(q, k, v, alibi_slopes, sink, out, *lengths, seed, offset, *captured)
    if operation is not None:
        if page_table is not None and framework is not frameworks.torch:
            raise UnsupportedError(f"page_table: {_UNSUPPORTED_OPERATION['page_table']}")
        if _options_of(kernel_options):
            raise UnsupportedError(f"kernel_options: {_UNSUPPORTED_OPERATION['kernel_options']}")
        if out is not None:
            raise UnsupportedError(f"out: {_UNSUPPORTED_OPERATION['out']}")
        names = validate.aux_names(aux)
        if "dropout_mask" in names:
            raise UnsupportedError(f"dropout_mask: {_UNSUPPORTED_OPERATION['dropout_mask']}")
        results = operation(
            q, k, v,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=validate.hint("max_seqlen_q", max_seqlen_q),
            max_seqlen_k=validate.hint("max_seqlen_k", max_seqlen_k),
            seqused_q=seqused_q, seqused_k=seqused_k, page_table=page_table,
            scale=None if scale is None else validate.number("scale", scale),
            window_size=validate.window(window_size, causal), softcap=validate.number("softcap", softcap),
            alibi_slopes=alibi_slopes, sink=sink, dropout_p=validate.dropout_p(dropout_p), seed=seed, offset=offset,
            deterministic=validate.flag("deterministic", deterministic), split_size=validate.split_size(split_size),
            aux=names, bound=bound,
        )  # fmt: skip
        if not names:
            return results[0]
        others: dict[str, Array] = {"lse": results[1], "max_logit": results[2]}
        return AttentionOutput(results[0], **{name: others[name] for name in names})
    if deterministic is not False:
        validate.flag("deterministic", deterministic)
    return _bind(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale,
        causal, window_size, softcap, alibi_slopes, sink, bound, dropout_p, seed, offset, split_size, kernel_options,
        out, aux,
    ).run()  # fmt: skip


def _attention_below(q: Array, k: Array, v: Array, *, aux: tuple[str, ...], **keywords: Any) -> AttentionOutput:
    """`attention` below a framework's operation: on arrays the framework has finished with."""
    unused = dict.fromkeys(("kernel_options", "out"))
    return _bind(q, k, v, causal=False, aux=aux, **unused, **{"bound": None, **keywords}).run()


frameworks.calls["attention"] = _attention_below


class AttentionGrads(NamedTuple):
    """What `attention_backward` returns: gradients in the shapes and dtypes of what they are for.

    dq, dk, dv  of q, k and v
    dsink       of the sink; None without one
    dcaptured   with `captured_grads`, those of the float arrays in `explain(...).captured`, in its order: what the
                mods captured, then `alibi_slopes`; None for one that only a mask reads
    """

    dq: Array
    dk: Array
    dv: Array
    dsink: Array = None
    dcaptured: tuple[Array, ...] = ()


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
    bound = None
    if score_mod is not None or mask_mod is not None or block_mask is not None:
        bound = bind_mods(q, k, score_mod, mask_mod, block_mask)
    return _bind(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale,
        causal, window_size, softcap, alibi_slopes, sink, bound, dropout_p, seed, offset, split_size, kernel_options,
        None, (), _Backward(
            given, targets, validate.flag("deterministic", deterministic),
            validate.flag("captured_grads", captured_grads),
        ),
    ).gradients()  # fmt: skip


def _backward_below(
    q: Array,
    k: Array,
    v: Array,
    *,
    given: dict[str, Array],
    deterministic: bool,
    grads: tuple[str, ...],
    **keywords: Any,
) -> AttentionGrads:
    """`attention_backward` below a framework's operation. `grads`: the arrays beside q, k, v and sink that want one."""
    unused = dict.fromkeys(("kernel_options", "out"))
    backward = _Backward(given, {}, deterministic, grads)
    return _bind(
        q, k, v, causal=False, aux=(), backward=backward, **unused, **{"bound": None, **keywords}
    ).gradients()  # fmt: skip


frameworks.calls["attention_backward"] = _backward_below


_NEEDED = {
    "dout": "pass the gradient of the loss for out, in its shape; np.zeros_like(out) if it uses lse alone",
    "out": "pass what attention returned",
    "lse": 'gradients need it: take it from attention(..., aux=("lse",)), which returns (out, lse, ...)',
}


# Bind -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Backward:
    """What a call to `attention_backward` has beside the arguments of `attention`."""

    given: dict[str, Array]  # dout, out, lse, dlse
    targets: dict[str, Array]  # of dq, dk and dv those that the caller has memory for
    deterministic: bool
    captured_grads: bool | tuple[str, ...]  # whether of all, or of which: views' names


@dataclass(slots=True)
class _Call:
    """One call, bound: its arrays and what was prepared for their metadata."""

    framework: Framework
    views: dict[str, TensorView]
    uploads: dict[str, np.ndarray]  # host values a device kernel needs
    prepared: _Prepared
    targets: dict[str, Array]  # arrays of the caller's that results are written to, by name
    scalars: tuple[int | float, ...]  # numbers that mods captured
    random: dict[str, Any]  # ints: seed and offset of dropout, where `views` has no arrays for them

    def run(self) -> Any:
        """attention"""
        self._execute()
        out, aux = self._result("out"), self.prepared.aux
        if not aux:
            return out
        named: dict[str, Any] = {name: self._result(name) for name in aux}
        return AttentionOutput(out, **named)

    def gradients(self) -> AttentionGrads:
        """attention_backward"""
        self._execute()
        found = {name: self._result(name) for name, _, _ in self.prepared.results}
        dcaptured = tuple(found.pop(name, None) for name in self.prepared.dcaptured)
        return AttentionGrads(**found, dcaptured=dcaptured)

    def _result(self, name: str) -> Array:
        x = self.targets.get(name)
        if x is None:
            return self.framework.wrap(self.views[name])
        self.framework.written(x)
        return x

    def _execute(self) -> None:
        prepared, framework, views = self.prepared, self.framework, self.views
        device = prepared.device
        upload_all(framework, self.uploads, views, device)
        for name, shape, dtype in prepared.results:
            if name not in views:
                views[name] = framework.empty(shape, dtype, device)
        take_workspace(framework, prepared.workspace(), views, device)
        plan = prepared.plan
        if plan is None:
            self._run_reference()
            return
        numbers = self.random
        if prepared.mods is not None:
            if prepared.slopes_folded:
                views[f"captured{len(prepared.mods.arrays) - 1}"] = views.pop("alibi_slopes")
            numbers = {**numbers, "scalars": self.scalars}
        prepared.compile()
        on_device = device[0] == "cuda"
        where: dict[str, Any] = {"backend": "emulator"}
        if on_device:
            where = {"backend": "cuda", "device": device[1], "stream": framework.stream(device[1])}
        plan.launch(views, **where, **numbers)
        if "dropout_mask" in prepared.aux:
            from .ops import dropout_mask

            dropout_mask.run(plan.problem, views, **{"arch": plan.arch, **where, **self.random})
        if on_device:
            framework.retain(views.values(), device[1])

    def _run_reference(self) -> None:
        from . import reference

        arrays: dict[str, Any] = {name: view.as_numpy() for name, view in self.views.items()}
        targets = {name: arrays.pop(name) for name, _, _ in self.prepared.results}
        prepared = self.prepared
        arrays |= {"scale": prepared.scale, "window_size": prepared.window, "softcap": prepared.softcap}
        arrays |= {"dropout_p": prepared.dropout_p, **self.random}
        mods = None
        if prepared.mods is not None:
            from .trace.host import HostMods

            captured = [arrays.pop(name) for name in _captured_names(prepared.mods, arrays)]
            wanted = [i for i in range(len(captured)) if f"dcaptured{i}" in targets]
            mods = HostMods(prepared.mods, captured, self.scalars, wanted)
            arrays |= mods.functions
        arrays |= {name: int(arrays[name].item()) for name in ("seed", "offset") if name in self.views}
        mask = targets.pop("dropout_mask", None)
        if mask is not None:
            reference.dropout_mask(mask, **arrays)
        if "dout" in arrays:
            results = [*zip(_GRADIENTS, reference.attention_backward(**arrays), strict=True)]
            if mods is not None:
                results += [(f"dcaptured{slot}", values) for slot, values in mods.gradients.items()]
        else:
            results = [*zip(("out", "lse", "max_logit"), reference.attention(**arrays), strict=True)]
        with np.errstate(all="ignore"):  # what overflows in a 16-bit result is infinite there
            for name, values in results:
                if name in targets:
                    targets[name][...] = values


def upload_all(
    framework: Framework, uploads: dict[str, np.ndarray], views: dict[str, TensorView], device: Device
) -> None:
    """Copies host values to the device, one that goes by several names once."""
    copies: dict[int, TensorView] = {}
    for name, values in uploads.items():
        if id(values) not in copies:
            try:
                copies[id(values)] = framework.upload(values, device)
            except DeviceMemoryError as error:
                raise DeviceMemoryError(f"{name} in host memory is copied to the GPU: {error}") from error
        views[name] = copies[id(values)]


def take_workspace(
    framework: Framework, workspace: Mapping[str, tuple[tuple[int, ...], DType]], views: dict[str, TensorView],
    device: Device,
) -> None:  # fmt: skip
    """Allocates what kernels need beside arguments and results: (shape, dtype) by name."""
    missing = [(name, *what) for name, what in workspace.items() if name not in views]
    taken = {name: framework.empty(shape, dtype, device) for name, shape, dtype in missing}
    if taken:
        views |= taken
        if device[0] == "cuda":
            framework.keep_recorded(taken.values(), device[1])


_GRADIENTS = ("dq", "dk", "dv", "dsink", "dslopes")  # as reference.attention_backward returns them


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """What one kind of call needs, whatever its pointers: checked once, then found by the call's metadata."""

    backend: str  # "cuda", "emulator" or "reference"
    device: Device
    plan: Any  # ops.forward.ForwardPlan or ops.backward.BackwardPlan; None on the reference
    results: tuple[tuple[str, tuple[int, ...], DType], ...]  # (name, shape, dtype)
    aux: tuple[str, ...]
    scale: float
    window: tuple[int, int]  # causal folded in
    softcap: float
    dropout_p: float
    mods: Mods | None  # softcap and ALiBi folded in where there is a score_mod
    slopes_folded: bool
    dcaptured: tuple[str, ...]  # in the order of `AttentionGrads.dcaptured` names of results, if there is one

    def workspace(self) -> dict[str, tuple[tuple[int, ...], DType]]:
        """Scratch arrays that a run on a GPU needs: (shape, dtype) by name."""
        return getattr(self.plan, "workspace", {})

    def compile(self) -> None:
        """Before the first launch of several: what does not compile refuses a call that has written nothing yet."""
        if self in _compiled:
            return
        from .jit import module

        index = self.device[1] if self.device[0] == "cuda" else None
        specs = list(self.plan.specs)
        if "dropout_mask" in self.aux:
            from .ops import dropout_mask

            specs.append(dropout_mask.spec(next(shape for name, shape, _ in self.results if name == "dropout_mask")))
        for spec in specs:
            module.load(spec, self.plan.arch, "emulator" if index is None else "cuda", index)
        if len(_compiled) >= _PREPARED_LIMIT:
            _compiled.clear()
        _compiled.add(self)

    def load(self, device: int) -> None:
        """Compiles and loads the kernels on a GPU."""
        from .jit import module

        for spec in self.plan.specs:
            module.load(spec, self.plan.arch, "cuda", device).prepare()


_prepared: dict[tuple[Any, ...], _Prepared] = {}
_compiled: set[_Prepared] = set()
_PREPARED_LIMIT = 4096  # then the table starts afresh: preparing again costs microseconds and compiles nothing


def _bind(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any,
    seqused_k: Any,
    page_table: Any,
    scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    sink: Any,
    bound: Bound | None,
    dropout_p: Any,
    seed: Any,
    offset: Any,
    split_size: Any,
    kernel_options: Any,
    out: Any,
    aux: Any,
    backward: _Backward | None = None,
) -> _Call:
    options = _options_of(kernel_options)
    split_size = validate.split_size(split_size)
    if not (max_seqlen_q is max_seqlen_k is None):  # arrays of one number enter the key below by their value
        max_seqlen_q = validate.hint("max_seqlen_q", max_seqlen_q)
        max_seqlen_k = validate.hint("max_seqlen_k", max_seqlen_k)
    framework = frameworks.of(q)
    floats = {"q": q, "k": k, "v": v}
    if alibi_slopes is not None:
        floats["alibi_slopes"] = alibi_slopes
    if sink is not None:
        floats["sink"] = sink
    targets: dict[str, Array] = {}
    if backward is not None:
        targets = backward.targets
        floats |= backward.given
    elif out is not None:
        targets["out"] = out
    floats |= targets
    views = _views(framework, floats)
    mods: Mods | None = None
    scalars: tuple[int | float, ...] = ()
    if bound is not None:
        if bound.arrays:
            views |= _captured_views(framework, bound)
        if type(softcap) is not float or softcap:
            softcap = validate.softcap(softcap)
        mods, scalars, softcap = _folded(bound, views, softcap)
        if backward is not None:
            named = zip(bound.mods.arrays, bound.arrays, strict=True)
            floats |= {slot.name: x for slot, x in named if frameworks.of(x) is framework}
    if backward is not None:
        framework.refuse_transformed(floats)

    host_values: dict[str, np.ndarray] = {}  # lengths whose values the host knows
    plain: list[str] = []  # those given as a list, tuple or NumPy array, which may lie beside device arrays
    if not (cu_seqlens_q is cu_seqlens_k is seqused_q is seqused_k is page_table is None):
        for name, x in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("cu_seqlens_k", cu_seqlens_k),
            ("seqused_q", seqused_q),
            ("seqused_k", seqused_k),
            ("page_table", page_table),
        ):
            if x is not None:
                same = name == "cu_seqlens_k" and x is cu_seqlens_q
                view = views[name] = views["cu_seqlens_q"] if same else _lengths_view(framework, x, name)
                if view.device[0] == "cpu":
                    host_values[name] = host_values["cu_seqlens_q"] if same else view.as_numpy()
                if isinstance(x, (list, tuple, np.ndarray)):
                    plain.append(name)
        if max_seqlen_q is None and "cu_seqlens_q" in host_values:
            max_seqlen_q = _longest(host_values["cu_seqlens_q"])
        if backward is not None and max_seqlen_k is None and "cu_seqlens_k" in host_values:
            max_seqlen_k = _longest(host_values["cu_seqlens_k"])

    random: dict[str, int] = {}
    if type(dropout_p) is not float:
        dropout_p = validate.dropout_p(dropout_p)
    if dropout_p:
        dropout_p = validate.dropout_p(dropout_p)
        if seed is None:
            if backward is not None:
                raise ArgumentError("seed is None: pass the seed and offset that attention had, or was given")
            seed, offset = framework.draw_seed(views["q"].device)
        seed = framework.seed(seed)
        for name, x in (("seed", seed), ("offset", offset)):
            value = _random_number(name, x, framework)
            if value is None:
                views |= _views(framework, {name: x})
            else:
                random[name] = value

    vq, vk, vv = views["q"], views["k"], views["v"]
    alignment = vq.ptr | vk.ptr | vv.ptr
    for name in targets:
        alignment |= views[name].ptr
    if backward is not None:
        alignment |= views["dout"].ptr | views["out"].ptr
    alignment &= 15
    if isinstance(window_size, list):
        window_size = tuple(window_size)
    if type(aux) is not tuple:
        aux = validate.aux_names(aux)
    if aux and max_seqlen_k is None and "cu_seqlens_k" in host_values and "dropout_mask" in validate.aux_names(aux):
        max_seqlen_k = _longest(host_values["cu_seqlens_k"])
    key = (
        framework.NAME, config.version, alignment,
        vq.shape, vq.strides, vq.dtype.name, vq.device,
        vk.shape, vk.strides, vk.dtype.name, vk.device,
        vv.shape, vv.strides, vv.dtype.name, vv.device,
        scale, causal, window_size, softcap, max_seqlen_q, max_seqlen_k, aux, dropout_p, split_size, mods, options,
    )  # fmt: skip
    if len(views) > 3:
        others = islice(views.items(), 3, None)  # behind q, k and v
        key += (*plain, *[(n, x.shape, x.strides, x.dtype.name, x.device, x.readonly) for n, x in others])
    if backward is not None:
        key += (backward.deterministic, backward.captured_grads)
    try:
        prepared = _prepared.get(key)
    except TypeError:  # something no key can hold, such as an array for the scale: the checks will name it
        prepared, key = None, None
    if prepared is None:
        prepared = _prepare(
            framework, views, plain, alignment, scale, causal, window_size, softcap, max_seqlen_q,
            max_seqlen_k, aux, mods, dropout_p, (*targets,), backward, split_size=split_size, options=options,
        )  # fmt: skip
        if key is not None:
            if len(_prepared) >= _PREPARED_LIMIT:
                _prepared.clear()
            _prepared[key] = prepared
    elif targets:
        validate.no_overlap(views, targets)

    uploads: dict[str, np.ndarray] = {}
    on_device = prepared.device[0] == "cuda"
    # Reading back waits for the device, which nothing may under capture.
    checking = config.check and on_device and not framework.capturing(prepared.device[1])
    if checking:
        host_values = {**_read_back(framework, views, prepared.device), **host_values}
    if host_values:
        _check_lengths(views, host_values)
        if on_device:
            uploads = {n: x for n, x in host_values.items() if views[n].device[0] == "cpu"}
            if uploads and framework.capturing(prepared.device[1]):
                raise ArgumentError(
                    f"{', '.join(uploads)} in host memory cannot enter a CUDA graph, which would replay these very "
                    f"values: copy to the device before the capture and pass that array"
                )
    if on_device and bound is not None and bound.mods.has_single_numbers:
        uploads |= _captured_uploads(framework, bound, views, prepared.device)
    if checking and prepared.mods is not None:
        _check_indices(
            prepared.mods, scalars, views, host_values, lambda names: _download(framework, views, names),
            prepared.window, prepared.scale,
        )  # fmt: skip
    return _Call(framework, views, uploads, prepared, targets, scalars, random)


def _views(framework: Framework, arrays: dict[str, Any]) -> dict[str, TensorView]:
    """Views of arrays that must all be of one framework."""
    views: dict[str, TensorView] = {}
    known: type | None = None
    for name, x in arrays.items():
        if type(x) is not known:
            other = frameworks.of(x, name)
            if other is not framework:
                raise ArgumentError(
                    f"{name} is a {other.NAME} array and q a {framework.NAME} array: all arrays must be of one "
                    "framework; convert with from_dlpack, which copies nothing"
                )
            known = type(x)
        try:
            views[name] = framework.view(x)
        except CuflashError as error:
            raise type(error)(f"{name}: {error}") from error
    return views


def _lengths_view(framework: Framework, x: Any, name: str) -> TensorView:
    """View of cu_seqlens, seqused or page_table: of the framework of q, or plain host values."""
    if isinstance(x, (list, tuple)):
        require(name != "page_table", f"page_table is a {type(x).__name__}: pass an int32 array [batch, max_pages]")
        return of_numpy(host_lengths(name, x))
    if isinstance(x, np.ndarray):
        own = frameworks.of(x)
        # Beside arrays of another framework it may have to be copied to a device, as it lies.
        x, framework = x if own is framework else np.ascontiguousarray(x), own
    return _views(framework, {name: x})[name]


def host_lengths(name: str, x: Sequence[Any]) -> np.ndarray:
    """cu_seqlens or seqused given as a list or tuple, int32."""
    for i, value in enumerate(x):
        if not isinstance(value, (int, np.integer)) or not -(2**31) <= value < 2**31:
            raise ArgumentError(f"{name}[{i}]={value!r} must be an int of 32 bits")
    return np.array(x, np.int32)


def _random_number(name: str, x: Any, framework: Framework) -> int | None:
    """The value of a seed or offset that the host knows, None for an array of the framework's."""
    if isinstance(x, np.ndarray) and x.size == 1 and x.dtype.kind in "iu" and frameworks.of(x) is not framework:
        x = x.item()
    if isinstance(x, (int, np.integer)):
        return int(x)
    if x is None or isinstance(x, (float, list, tuple, str)):
        raise ArgumentError(f"{name}={x!r} must be an int, or an integer array of one element: pass int({name})")
    return None


def _longest(starts: np.ndarray) -> int | None:
    """The longest sequence, for a hint; `starts` are not checked yet."""
    known = starts.dtype == np.int32 and starts.ndim == 1 and starts.size > 1 and starts.flags.c_contiguous
    return max(int(np.diff(starts).max()), 0) if known else None


def _check_lengths(views: dict[str, TensorView], values: dict[str, np.ndarray]) -> None:
    for side in "qk":
        rows = views[side].shape[-3]
        starts, used = values.get(f"cu_seqlens_{side}"), values.get(f"seqused_{side}")
        if side == "k" and "page_table" in views:
            pages, table = views["page_table"].shape[1], values.get("page_table")
            if used is not None:
                validate.paged_lengths("seqused_k", used, pages, rows)
                if table is not None:
                    validate.page_ids(table, used, views["k"].shape[0], rows)
            continue
        if starts is not None:
            validate.cu_seqlens(f"cu_seqlens_{side}", starts, rows)
        if used is not None:
            # Lengths the host does not know are at most the array's.
            validate.seqused(f"seqused_{side}", used, np.diff(starts) if starts is not None else np.array([rows]))


def _read_back(framework: Framework, views: dict[str, TensorView], device: Device) -> dict[str, np.ndarray]:
    """The values of device lengths, for `config.check`."""
    names = [n for n in (*_LENGTHS, "page_table") if n in views and views[n].device[0] == "cuda"]
    return _download(framework, views, names)


def _download(framework: Framework, views: dict[str, TensorView], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a call copied to the host, for `config.check`. Waits for the device."""
    from .frameworks import cupy

    return {
        name: x.as_numpy() if x.device[0] == "cpu" else cupy.download(x, framework.stream(x.device[1]))
        for name, x in ((name, views[name]) for name in names)
    }


def _check_indices(
    mods: Mods,
    scalars: tuple[int | float, ...],
    views: dict[str, TensorView],
    lengths: dict[str, np.ndarray],
    fetch: Callable[[Sequence[str]], dict[str, np.ndarray]],
    window: tuple[int, int],
    scale: float | None,
) -> None:
    """Refuses mods that read outside of an array they captured, where kernels would read at its end, for
    `config.check`. `lengths` are those among the views, `fetch` copies others to the host."""
    from .trace.host import HostMods

    host = HostMods(mods, [*fetch(_captured_names(mods, views)).values()], scalars)
    if host.reads_by_score:
        from . import reference

        arrays: dict[str, Any] = {**fetch(["q", "k", "v"]), **lengths, **host.functions}
        reference.attention(**arrays, window_size=window, scale=scale)
        return
    sides = []
    for side in "qk":
        starts, used = lengths.get(f"cu_seqlens_{side}"), lengths.get(f"seqused_{side}")
        rows = views[side].shape
        whole = np.full(rows[0], rows[1]) if starts is None else np.diff(starts)
        sides.append((whole if used is None else used).tolist())
    host.check_indices([*zip(*sides, strict=True)], views["q"].shape[-2], window)


# Mods -------------------------------------------------------------------------------------------------------------


def bind_mods(q: Array, k: Array, score_mod: Any, mask_mod: Any, block_mask: Any) -> Bound:
    """What a call's mods compute and captured: a `tracer.Bound`. At least one is given."""
    for name, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is not None and not callable(mod):
            raise ArgumentError(f"{name}={mod!r} must be a function")
    if block_mask is not None:
        own = _mask_of(q, k, block_mask)
        if mask_mod is None:
            mask_mod = own
        else:
            from .mods import and_masks

            mask_mod = and_masks(mask_mod, own)
    return tracer.bind(score_mod, mask_mod)


def _traced_before(q: Array, k: Array, score_mod: Any, mask_mod: Any, block_mask: Any) -> Bound | None:
    """The same where a compiler of PyTorch follows and nothing can be traced: of mods that `cuflash.mod` traced
    outside, by their attributes, `Bound.mods` being text. None for others."""
    mods = [score_mod, mask_mod]
    if block_mask is not None:
        mods.append(_mask_of(q, k, block_mask))
    text, arrays, scalars = "", (), ()
    for kind, mod in zip(("score", "mask", "mask"), mods, strict=False):
        if mod is not None:
            if type(mod) is not tracer.Mod:
                return None
            require(mod.kind == kind, f"{kind}_mod is traced as a {mod.kind}_mod: pass it as that")
            text += ("\n" if text else "") + mod.text
            arrays, scalars = (*arrays, *mod.kept_arrays), (*scalars, *mod.kept_scalars)
    return Bound(text, arrays, scalars)  # type: ignore[arg-type]


def _mask_of(q: Array, k: Array, block_mask: Any) -> Any:
    """The mask_mod that a block mask is, once it is known to be for this call."""
    if not hasattr(block_mask, "as_mask_mod"):
        raise ArgumentError(
            f"block_mask is a {type(block_mask).__qualname__}: pass what cuflash.create_block_mask returned, "
            "or a function as mask_mod="
        )
    shape: Any = tuple(getattr(q, "shape", ()))
    keys: Any = tuple(getattr(k, "shape", ()))
    if len(shape) == len(keys) == 4:  # packed sequences have lengths of their own
        block_mask.require_fits(shape[0], shape[2], shape[1], keys[1])
    return block_mask.as_mask_mod(q)


def _captured_views(framework: Framework, bound: Bound) -> dict[str, TensorView]:
    """Views of captured arrays, "captured0" and so on: of the framework of q, or of one element in host memory."""
    views = {}
    known: type | None = None
    for name, slot, x in zip(_numbered(len(bound.arrays)), bound.mods.arrays, bound.arrays, strict=True):
        other = framework if type(x) is known else frameworks.of(x, slot.name)
        if other is framework:
            known = type(x)
        elif not (slot.ndim == 0 and other is frameworks.numpy):
            raise ArgumentError(
                f"{slot.name}, which a mod captured, is a {other.NAME} array and q a {framework.NAME} array: all "
                "arrays must be of one framework; convert with from_dlpack, which copies nothing"
            )
        try:
            views[name] = other.view(x)
        except CuflashError as error:
            raise type(error)(f"{slot.name}, which a mod captured: {error}") from error
    return views


@lru_cache
def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"captured{i}" for i in range(count))


def _captured_names(mods: Mods, views: Container[str]) -> list[str]:
    """The names of the views of captured arrays, in slot order: the slopes of ALiBi keep theirs."""
    return [name if name in views else "alibi_slopes" for name in _numbered(len(mods.arrays))]


def _folded(bound: Bound, views: dict[str, TensorView], softcap: float) -> tuple[Mods, tuple[int | float, ...], float]:
    """Beside a score_mod, softcap and ALiBi become part of it -> mods, their numbers, the softcap that is left."""
    mods, scalars = bound.mods, bound.scalars
    slopes = views.get("alibi_slopes")
    if mods.score is None or not (softcap or slopes is not None):
        return mods, scalars, softcap
    alibi = None if slopes is None else "head" if slopes.ndim == 1 else "batch"
    return fold(mods, softcap > 0, alibi), folded_numbers(mods, scalars, softcap), 0.0


def _captured_uploads(
    framework: Framework, bound: Bound, views: dict[str, TensorView], device: Device
) -> dict[str, np.ndarray]:
    """Captured arrays of one element in host memory, which a device kernel cannot read there."""
    found = {}
    for i, slot in enumerate(bound.mods.arrays):
        if slot.ndim == 0 and (view := views[f"captured{i}"]).device[0] == "cpu":
            found[f"captured{i}"] = view.as_numpy()
            if framework.capturing(device[1]):
                raise ArgumentError(
                    f"{slot.name}, which a mod captured, lies in host memory and cannot enter a CUDA graph, which "
                    "would replay this very value: copy it to the device before the capture"
                )
    return found


def _options_of(kernel_options: Any) -> tuple[tuple[str, Any], ...]:
    """Checked, and as part of a key."""
    if kernel_options is None:
        return ()
    if not isinstance(kernel_options, dict):
        raise ArgumentError(f"kernel_options is a {type(kernel_options).__qualname__} and must be a dict, or None")
    either = (None, True, False)
    allowed = {"kernel": (None, "sm_80"), "persistent": either, "pack_heads": either, "cluster": (None, 1, 2)}
    allowed["order"] = (None, "long", "position")
    plain = all(value is None or isinstance(value, (str, int, np.bool_)) for value in kernel_options.values())
    if not plain or not all(name in allowed and value in allowed[name] for name, value in kernel_options.items()):
        raise UnsupportedError(f"kernel_options={kernel_options!r}: {_UNSUPPORTED['kernel_options']}")
    return tuple(sorted(kernel_options.items()))


def _refuse_pages(backward: bool) -> None:
    """The one place that says where keys in pages are not served."""
    if backward:
        raise UnsupportedError(f"page_table: {_PAGES_WITHOUT_GRADIENTS}")


_PAGES_WITHOUT_GRADIENTS = (
    "keys in pages have no gradients: gather the pages of each sequence, k[page_table].reshape(batch, -1, heads, d), "
    "and pass seqused_k to attention and attention_backward"
)


# What no kernel here does, and what to use instead: said by `attention` and by `supports`.
_UNSUPPORTED = {
    "kernel_options": "tiles and stages follow from the problem and the device; there is {'kernel': 'sm_80'}, and "
    "'persistent' and 'pack_heads', True or False, 'cluster', 1 or 2, and 'order', 'long' or 'position', to choose: "
    "leave it None",
}

_MODS = ("score_mod", "mask_mod", "block_mask")

# What no operation of a framework does: where a call is differentiated, traced or vectorised.
_UNSUPPORTED_OPERATION = {
    "page_table": (
        "JAX has keys in pages in host memory and outside of its transformations alone: gather the pages of each "
        "sequence, k[page_table].reshape(batch, -1, heads, d), and pass seqused_k"
    ),
    "dropout_mask": (
        "it is no result to differentiate: call attention once more without gradients, in PyTorch under "
        "torch.no_grad(), with the same seed and offset"
    ),
    "out": (
        "a result that autograd, torch.func or a compiler follows is always a new array: leave out= away, or call "
        "outside of them, in PyTorch under torch.no_grad(), in JAX "
        "outside of jit and grad"
    ),
    "kernel_options": (
        "what autograd, torch.func or a compiler follows runs the kernel that is best: leave it None, or call outside "
        "of them"
    ),
}


# Prepare ----------------------------------------------------------------------------------------------------------


def _prepare(
    framework: Framework,
    views: dict[str, TensorView],
    plain: Sequence[str],
    alignment: int,
    scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    aux: tuple[str, ...],
    mods: Mods | None,
    dropout_p: float,
    targets: Sequence[str],
    backward: _Backward | None,
    backend: str | None = None,
    split_size: int | None = None,
    options: tuple[tuple[str, Any], ...] = (),
) -> _Prepared:
    """Check everything that does not depend on pointers and values, choose the backend, describe the problem."""
    q, k, v = views["q"], views["k"], views["v"]
    if "page_table" in views:
        _refuse_pages(backward is not None)
    packed = validate.layout(views)
    validate.same_device(views, plain)
    backend = _backend(q.device, framework, backend or config.backend)
    validate.element_types(views, backend, framework)
    validate.shapes(views, packed)
    validate.strides(views, framework)
    batch = validate.index_arrays(views, packed, framework)
    validate.head_arrays(views, batch, framework)
    validate.random_numbers(views, framework)

    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    heads_q, heads_kv, q_rows, k_rows = q.shape[-2], k.shape[-2], q.shape[-3], k.shape[-3]
    if "page_table" in views:
        k_rows *= views["page_table"].shape[1]  # what a sequence has room for
    scale = head_dim**-0.5 if scale is None else validate.number("scale", scale)
    softcap = validate.softcap(softcap)
    left, right = validate.window(window_size, causal)
    max_seqlen_q = validate.hint("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = validate.hint("max_seqlen_k", max_seqlen_k)
    dropout_p = validate.dropout_p(dropout_p)
    aux = validate.aux_names(aux)
    if mods is not None:
        validate.captured([views[name] for name in _captured_names(mods, views)], mods, q.device, backend, framework)

    dcaptured: dict[str, TensorView | None] = {}
    out_shape = (*q.shape[:-1], head_dim_v)
    lse_shape = (heads_q, q_rows) if packed else (batch, heads_q, q_rows)
    if backward is None:
        results = [("out", out_shape, q.dtype)]
        results += [(name, lse_shape, dtypes.float32) for name in ("lse", "max_logit") if name in aux]
        if "dropout_mask" in aux:
            rows, keys = (max_seqlen_q, max_seqlen_k) if packed else (q_rows, k_rows)
            keys = k_rows if "page_table" in views else keys
            if rows is None or keys is None:
                raise ArgumentError(
                    "dropout_mask of packed arrays is [batch, heads_q, max_seqlen_q, max_seqlen_k], and "
                    f"max_seqlen_q={rows}, max_seqlen_k={keys}: pass both as ints"
                )
            results.append(("dropout_mask", (batch, heads_q, rows, keys), dtypes.bool_))
    else:
        validate.gradients(views, out_shape, lse_shape, framework)
        results = [("dq", q.shape, q.dtype), ("dk", k.shape, q.dtype), ("dv", v.shape, q.dtype)]
        if "sink" in views:
            results.append(("dsink", (heads_q,), views["sink"].dtype))
        dcaptured = _captured_gradients(views, mods, backward.captured_grads)
        results += [(name, x.shape, x.dtype) for name, x in dcaptured.items() if x is not None]
    validate.outputs(views, {name: shape for name, shape, _ in results if name in targets}, framework)

    plan = None
    if backend != "reference":
        if backend == "cuda":
            arch = frameworks.cupy.arch_of(q.device[1], framework.cuda_version())
        else:
            arch = arch_table.named(config.arch)
        plan = _plan(views, results, arch, alignment, dict(
            dtype=q.dtype,
            batch=batch,
            packed=packed,
            q_rows=q_rows,
            k_rows=k_rows,
            max_seqlen_q=max_seqlen_q if packed else None,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            scale=scale,
            window=(left, right),
            softcap=softcap,
            dropout_p=dropout_p,
        ), max_seqlen_k, backward, mods, split_size, options)  # fmt: skip
    folded = mods is not None and "alibi_slopes" in _captured_names(mods, views)
    return _Prepared(
        backend, q.device, plan, tuple(results), aux, scale, (left, right), softcap, dropout_p, mods, folded,
        (*dcaptured,),
    )  # fmt: skip


def _captured_gradients(
    views: dict[str, TensorView], mods: Mods | None, wanted: bool | tuple[str, ...]
) -> dict[str, TensorView | None]:
    """The results that hold gradients of arrays beside q, k, v and sink, by name: the array each is for, or None where
    scores are not made with it."""
    if wanted is False:
        return {}
    read = set() if mods is None or mods.score is None else {
        slot for x in walk(mods.score) if x.op in ("load", "dot") and x.kind == "float"
        for slot in ((x.value,) if x.op == "load" else x.value[:2])
    }  # fmt: skip
    names = [] if mods is None else _captured_names(mods, views)
    found: dict[str, TensorView | None] = {}
    for slot, name in enumerate(names):
        if views[name].dtype.is_float and (wanted is True or name in wanted):
            found[f"dcaptured{slot}"] = views[name] if slot in read else None
    if "alibi_slopes" in views and "alibi_slopes" not in names and (wanted is True or "alibi_slopes" in wanted):
        found["dslopes"] = views["alibi_slopes"]
    if mods is not None and mods.score is not None:  # what has no derivative is refused here
        gradients(mods.score, [slot for slot in range(len(names)) if found.get(f"dcaptured{slot}") is not None])
    return found


def _plan(
    views: dict[str, TensorView],
    results: Sequence[tuple[str, tuple[int, ...], DType]],
    arch: Arch,
    alignment: int,
    fields: dict[str, Any],
    max_seqlen_k: int | None,
    backward: _Backward | None,
    mods: Mods | None,
    split_size: int | None,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    """The plan of a checked call: `fields` are those of both problems that do not follow from the views."""
    names = ["q", "k", "v", "out"] + ([] if backward is None else ["dout", "dq", "dk", "dv"])
    shapes = {name: shape for name, shape, _ in results}
    strides = {n: views[n].strides if n in views else contiguous_strides(shapes[n]) for n in names}
    packed, itemsize = fields["packed"], views["q"].dtype.itemsize
    slopes, sink = views.get("alibi_slopes"), views.get("sink")
    if mods is not None:
        slopes = None if "alibi_slopes" in _captured_names(mods, views) else slopes
        fields["mods"] = mods
    pages = views.get("page_table")
    fields |= {
        f"{name}_strides": _problem_strides(steps, packed and (pages is None or name not in "kv"))
        for name, steps in strides.items()
    }
    fields |= {
        "load_bytes": _load_bytes(alignment, itemsize, [*strides.values()], [views[n].shape[-1] for n in "qv"]),
        "seqused_q": "seqused_q" in views,
        "seqused_k": "seqused_k" in views,
        "alibi": None if slopes is None else ("head" if slopes.ndim == 1 else "batch"),
        "sink": None if sink is None else ("float32" if sink.dtype is dtypes.float32 else "element"),
        "seed": views["seed"].dtype if "seed" in views else None,
    }
    if backward is None:
        ops = _forward()
        if pages is not None:
            num_pages, page_size = views["k"].shape[:2]
            fields |= {"page_size": page_size, "num_pages": num_pages, "max_pages": pages.shape[1]}
            fields["page_table_stride"] = pages.strides[0]
        fields["options"] = ops.Options(**dict(options))
        problem = ops.ForwardProblem(**fields, lse="lse" in shapes, max_logit="max_logit" in shapes)
        return ops.plan(problem, arch) if split_size is None else _decode().DecodePlan(problem, arch, split_size)
    ops = _backward()
    fields |= {name: name in shapes for name in ("dsink", "dslopes")}
    fields |= {"max_seqlen_k": max_seqlen_k if packed else None, "dlse": "dlse" in views}
    dcaptured = [(int(n.removeprefix("dcaptured")), math.prod(s)) for n, s in shapes.items() if "dcaptured" in n]
    fields["dcaptured"] = tuple(dcaptured)
    return ops.plan(ops.BackwardProblem(**fields, deterministic=backward.deterministic), arch)


def _backend(device: Device, framework: Framework, wanted: str) -> str:
    """The backend for arrays on `device` where `config.backend` is `wanted`."""
    host = device[0] == "cpu"
    if wanted == "auto":
        return "reference" if host else "cuda"
    if host and wanted == "cuda":
        raise ArgumentError(
            f"q is in host memory and config.backend='cuda' runs on a GPU: pass {framework.advise('device', 'q')} "
            "(k and v likewise), or set config.backend='auto'"
        )
    if not host and wanted != "cuda":
        raise ArgumentError(
            f"q is on {device[0]}:{device[1]} and config.backend={wanted!r} runs on the host: copy the arrays there, "
            "or set config.backend='auto'"
        )
    return wanted


def _problem_strides(strides: tuple[int, ...], packed: bool) -> tuple[int, int, int]:
    """(batch, row, head) in elements."""
    return (0, strides[0], strides[1]) if packed else (strides[0], strides[1], strides[2])


def _load_bytes(alignment: int, itemsize: int, strides: Sequence[tuple[int, ...]], head_dims: Sequence[int]) -> int:
    """The widest load, 16, 4 or 2 bytes, that every row of every array is aligned to, and a whole number of.

    `alignment` has the low bits of the pointers or-ed together; `strides` and `head_dims` are in elements.
    """
    bits = alignment
    for step in (*head_dims, *(step for steps in strides for step in steps[:-1])):
        bits |= step * itemsize
    return 16 if bits % 16 == 0 else 4 if bits % 4 == 0 else 2


def _forward() -> Any:
    from .ops import forward

    return forward


def _backward() -> Any:
    from .ops import backward

    return backward


def _decode() -> Any:
    from .ops import decode

    return decode


# Traced -----------------------------------------------------------------------------------------------------------

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")

# A framework that compiles programs knows shapes when it traces a call, and memory when it runs one.


def _prepare_traced(
    framework: Framework,
    views: dict[str, TensorView],
    *,
    backend: str,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    aux: tuple[str, ...],
    deterministic: bool,
    grads: tuple[str, ...],
    mods: Mods | None,
    split_size: int | None,
) -> _Prepared:
    """Checks and plans a call (with `dout` among the views: its backward) by views without memory, aligned to 16."""
    backward = _Backward({}, {}, deterministic, grads) if "dout" in views else None
    if mods is not None:
        mods, _, softcap = _folded(Bound(mods), views, softcap)
    return _prepare(
        framework, views, (), 0, scale, False, window_size, softcap, max_seqlen_q, max_seqlen_k, aux, mods,
        dropout_p, (), backward, backend, split_size,
    )  # fmt: skip


def _execute_traced(
    framework: Framework, views: dict[str, TensorView], prepared: _Prepared, scalars: tuple[int | float, ...]
) -> None:
    """Runs it. The views hold results, and workspace on a GPU, too."""
    if prepared.device[0] == "cpu":
        _check_lengths(views, {name: x.as_numpy() for name, x in views.items() if name in _LENGTHS})
    _Call(framework, views, uploads={}, prepared=prepared, targets={}, scalars=scalars, random={})._execute()


def _known_lengths(views: dict[str, TensorView], given: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks lengths whose values are known beside q and k, which need no memory -> NumPy arrays."""
    known = {name: _lengths_view(frameworks.numpy, x, name).as_numpy() for name, x in given.items()}
    if all(x.ndim == 1 and x.size and x.dtype == np.int32 for x in known.values()):  # else `_prepare` refuses them
        _check_lengths(views, known)
    return known


def _check_known(
    bound: Bound,
    views: dict[str, TensorView],
    arrays: dict[str, np.ndarray],
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
) -> None:
    """`_check_indices` of a call whose arrays are at hand; its views need no memory."""
    mods, scalars, _ = _folded(bound, views, softcap)
    lengths = {name: arrays[name] for name in _LENGTHS if name in arrays}
    _check_indices(mods, scalars, views, lengths, lambda names: {n: arrays[n] for n in names}, window_size, scale)


frameworks.calls |= {
    "prepare": _prepare_traced,
    "execute": _execute_traced,
    "known_lengths": _known_lengths,
    "check_known": _check_known,
}


# Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What a call would do, and why. Prints as text; notebooks show a table.

    backend          "cuda", "emulator" or "reference"
    kernel           its name, e.g. "forward_sm80"
    why              reasons for the choices made, a sentence each
    grid             blocks launched, (x, y, z)
    variant          the compile-time choices, in one line
    source           the CUDA C text: `cupy.RawModule(code=source, options=options)` compiles it too, with -ftz=true
                     added by CuPy: denormal floats that a mod compares or rounds are 0 then
    options          of NVRTC
    shared_bytes     shared memory of a block
    workspace_bytes  device memory needed besides the arrays
    captured         what scores and masks are made with beside q and k: "name dtype[shape]" of each array, those that
                     mods captured in the order they were met, then alibi_slopes; "name" of each number
    fallback         why no kernel runs; "" where one does
    """

    backend: str
    kernel: str
    why: tuple[str, ...] = ()
    grid: tuple[int, int, int] = (0, 0, 0)
    variant: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    shared_bytes: int = 0
    workspace_bytes: int = 0
    captured: tuple[str, ...] = ()
    fallback: str = ""

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("backend", self.backend), ("kernel", self.kernel)]
        if not self.fallback:
            x, y, z = self.grid
            rows += [
                ("grid", f"{x} x {y} x {z} blocks"),
                ("variant", self.variant),
                ("source", f"{self.source.count(chr(10))} lines"),
                ("options", " ".join(self.options)),
                ("shared memory", f"{self.shared_bytes:,} bytes a block"),
                ("workspace", f"{self.workspace_bytes:,} bytes"),
            ]
        if self.captured:
            rows.append(("captured", ", ".join(self.captured)))
        if self.fallback:
            rows.append(("fallback", self.fallback))
        return rows + [("why", reason) for reason in self.why]

    def __str__(self) -> str:
        return "\n".join(f"{name:<14}{value}" for name, value in self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{html.escape(n)}</th><td {left}>{html.escape(v)}</td></tr>" for n, v in self._rows()
        )
        if not self.source:
            return f"<table>{rows}</table>"
        source = f"<pre>{html.escape(self.source)}</pre>"
        return f"<table>{rows}</table><details><summary>source</summary>{source}</details>"


def explain(q: Array, k: Array, v: Array, *, backward: bool = False, **keywords: Any) -> Explanation:
    """What `attention` would do with the same arguments, without doing it: nothing is compiled, launched or written.

    With `backward`, what `attention_backward` would do, for contiguous dout and out; `captured_grads` may be given too.
    Several kernels run then: grid, variant and source are those of the one that computes dk and dv, `why` has them all.

    Raises what the call would raise.

    >>> import numpy as np
    >>> q = np.zeros((1, 4, 2, 64), np.float16)
    >>> explain(q, q, q, causal=True).backend
    'reference'
    """
    backward = validate.flag("backward", backward)
    captured_grads = backward and validate.flag("captured_grads", keywords.pop("captured_grads", False))
    bound = inspect.signature(attention).bind(q, k, v, **keywords)
    bound.apply_defaults()
    deterministic = validate.flag("deterministic", bound.arguments["deterministic"])
    named = {name: value for name, value in bound.arguments.items() if name != "deterministic"}
    if named["seed"] is None and frameworks.of(q) is frameworks.torch:
        named["seed"] = 0  # any will do: a draw would move the generator on
    mods = [named.pop(name) for name in ("score_mod", "mask_mod", "block_mask")]
    traced = None if all(mod is None for mod in mods) else bind_mods(q, k, *mods)
    call = _bind(**named, bound=traced)
    captured, notes = _described_mods(call.views, traced), () if traced is None else traced.notes
    prepared = call.prepared
    if backward:
        gradients = _Backward({}, {}, deterministic, captured_grads)
        prepared = _prepare_backward_of(call, named, gradients)
    plan = prepared.plan
    if plan is None:
        return Explanation(
            backend="reference",
            kernel="reference",
            why=notes,
            captured=captured,
            fallback="arrays in host memory run in NumPy; cuflash.config.backend = 'emulator' runs the kernel on them, "
            "arrays on a GPU run it there",
        )
    from .jit import nvrtc, variant

    spec, grid, why = plan.described()
    return Explanation(
        backend=prepared.backend,
        kernel=spec.source.removesuffix(".cu"),
        why=(*why, *_reasons(plan.problem), *notes, *_where(prepared)),
        grid=grid,
        variant=variant.describe(spec.variant),
        source=spec.text("cuda"),
        options=nvrtc.options(),
        shared_bytes=spec.smem_bytes,
        workspace_bytes=plan.workspace_bytes,
        captured=captured,
    )


def _described_mods(views: dict[str, TensorView], bound: Bound | None) -> tuple[str, ...]:
    """For `Explanation.captured`."""
    named = [] if bound is None else [(slot.name, views[f"captured{i}"]) for i, slot in enumerate(bound.mods.arrays)]
    if "alibi_slopes" in views:
        named.append(("alibi_slopes", views["alibi_slopes"]))
    arrays = [f"{name} {x.dtype}{list(x.shape)}" for name, x in named]
    return (*arrays, *(() if bound is None else (slot.name for slot in bound.mods.scalars)))


def _prepare_backward_of(call: _Call, named: dict[str, Any], gradients: _Backward) -> _Prepared:
    """The backward of a bound forward call whose arguments are `named`."""
    views = {name: view for name, view in call.views.items() if name != "out"}
    q, v = views["q"], views["v"]
    out = (*q.shape[:-1], v.shape[-1])
    lse = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    for name, shape, dtype in (("dout", out, q.dtype), ("out", out, q.dtype), ("lse", lse, dtypes.float32)):
        views[name] = TensorView(0, shape, contiguous_strides(shape), dtype, q.device, False, None)
    longest = {}
    for side in "qk":
        starts = views.get(f"cu_seqlens_{side}")
        given = named[f"max_seqlen_{side}"]
        known = given is None and starts is not None and starts.device[0] == "cpu"
        longest[side] = _longest(starts.as_numpy()) if known and starts is not None else given
    return _prepare(
        call.framework, views, _LENGTHS, (q.ptr | views["k"].ptr | v.ptr) & 15, named["scale"], named["causal"],
        named["window_size"], call.prepared.softcap, longest["q"], longest["k"], (), call.prepared.mods,
        named["dropout_p"], (),
        gradients,
    )  # fmt: skip


def _where(prepared: _Prepared) -> list[str]:
    """The GPU that a call would run on, as its driver calls it."""
    if prepared.backend != "cuda":
        return []
    index = prepared.device[1]
    return [f"runs on GPU {index}: {frameworks.cupy.device_name(index)}"]


def _reasons(problem: Any) -> list[str]:
    """What else is worth knowing of a problem, forward or backward."""
    reasons = []
    p = problem.dropout_p
    if p:
        kept = philox.keep_threshold(p)
        reasons.append(
            f"dropout: {kept} of 256 weights are kept, dropout_p={p} rounded to {1 - kept / 256:.6g}; those kept are "
            f"multiplied by 1 / (1 - {p})"
        )
    width = problem.load_bytes
    if width < 16:
        reasons.append(
            f"loads of {width} bytes: an address, stride or row of q, k, v or out is no multiple of 16; head dims "
            "that are multiples of 8 (float32: 4) in contiguous arrays load faster"
        )
    return reasons


@dataclass(frozen=True)
class Support:
    """True or false, and why not.

    >>> bool(Support("")), bool(Support("no"))
    (True, False)
    """

    reason: str

    def __bool__(self) -> bool:
        return not self.reason

    def __repr__(self) -> str:
        return f"Support(False, reason={self.reason!r})" if self.reason else "Support(True)"


# Keywords and outputs of `attention` that every kernel serves.
_SERVED = (
    "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "scale",
    "causal", "window_size", "softcap", "alibi_slopes", "sink", "dropout_p", "seed", "offset", "deterministic", "out",
    "lse", "max_logit", "dropout_mask", "page_table", "split_size", *_MODS,
)  # fmt: skip


# Every feature `supports` knows, served or not.
FEATURES = (*_SERVED, *_UNSUPPORTED)


def supports(
    *,
    dtype: Any,
    head_dim: int,
    head_dim_v: int | None = None,
    arch: str | Arch | None = None,
    backward: bool = False,
    **features: Any,
) -> Support:
    """Whether kernels serve such a call (with `backward`: and its gradients), and if not, what to use instead.

    `dtype` by name or as any framework's; `arch` such as "sm_90a" (None: every GPU from sm_80); features are the
    keywords and outputs of `attention`, each true where it is used.

    >>> supports(dtype="bfloat16", head_dim=128, causal=True, lse=True)
    Support(True)
    >>> supports(dtype="bfloat16", head_dim=512).reason
    'head_dim=512: head dims go from 1 to 256'
    """
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim if head_dim_v is None else head_dim_v)):
        plain = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(plain and value > 0, f"{name}={value!r} must be a positive int")
        if value > validate.MAX_HEAD_DIM:
            return Support(f"{name}={value}: head dims go from 1 to {validate.MAX_HEAD_DIM}")
    element = _dtype_named(dtype)
    if element not in dtypes.KERNEL:
        return Support(
            f"dtype={element}: kernels compute in {', '.join(t.name for t in dtypes.KERNEL)}"
            + ("; float64 runs on the NumPy reference, for host arrays" if element is dtypes.float64 else "")
        )
    if arch is not None and not isinstance(arch, Arch):
        try:
            arch_table.named(arch)
        except UnsupportedError as error:
            return Support(str(error))
    used = {name for name, x in features.items() if _is_used(x)}
    backward = validate.flag("backward", backward)
    for name in features:
        if name in _SERVED and not (backward and name == "page_table"):
            continue
        require(
            name in FEATURES,
            f"feature {name!r} is not a keyword or output of attention: use one of {', '.join(FEATURES)}",
        )
        if name in used:
            return Support(f"{name}: {_UNSUPPORTED.get(name, _PAGES_WITHOUT_GRADIENTS)}")
    if "split_size" in used:
        if "dropout_p" in used:
            return Support(f"split_size: {_decode().NO_DROPOUT}")
        if used & {"cu_seqlens", "cu_seqlens_k"} and "page_table" not in used:
            return Support(f"split_size: {_decode().NO_PACKED_KEYS}")
    return Support("")


def _is_used(feature: Any) -> bool:
    """Whether a keyword of `supports` and `warmup` says that calls use it: a number or flag by its value, and arrays,
    functions and the like by being there."""
    return not (feature is None or (isinstance(feature, (numbers.Number, np.bool_)) and not feature))


def warmup(
    *,
    dtype: Any,
    head_dim: int,
    head_dim_v: int | None = None,
    arch: str | Arch | None = None,
    backward: bool = False,
    device: int | None = None,
    **features: Any,
) -> None:
    """Compile and load the kernels such calls need, so that none of them waits: the keywords of `supports`.

    Shapes, lengths, head counts and numbers are no part of it; arrays are taken as contiguous (others may load in
    narrower steps, by a kernel of their own). On a GPU the kernel is loaded on `device` (None: the
    current one). With `arch` the kernel is only compiled, which needs no GPU. Under `config.backend = "emulator"` the
    emulator's is compiled. score_mod, mask_mod and block_mask are given as to `attention`: their code is part of a
    kernel, what they capture is not, but for which of it requires a gradient.

    Raises `UnsupportedError` with the reason of `supports`, or that no GPU is there.
    """
    support = supports(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, arch=arch, backward=backward, **features)
    if not support:
        raise UnsupportedError(support.reason)
    if config.backend == "reference":
        return
    if device is not None:
        device = validate.count("device", device, least=0)
    element, head_dim = _dtype_named(dtype), int(head_dim)
    head_dim_v = head_dim if head_dim_v is None else int(head_dim_v)
    load_bytes = _load_bytes(0, element.itemsize, [], [head_dim, head_dim_v])
    rows, values = (head_dim, head_dim, head_dim), (head_dim_v, head_dim_v, head_dim_v)
    mods, wanted = _mods_of_features(features)
    fields = dict(
        dtype=element,
        batch=1,
        packed=False,
        q_rows=1,
        k_rows=1,
        max_seqlen_q=None,
        heads_q=1,
        heads_kv=1,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        q_strides=rows,
        k_strides=rows,
        v_strides=values,
        out_strides=values,
        load_bytes=load_bytes,
        scale=1.0,
        dropout_p=0.5 if _is_used(features.get("dropout_p")) else 0.0,
        mods=mods,
    )
    paged = _is_used(features.get("page_table"))
    splits = _is_used(features.get("split_size"))
    make = _forward().plan if not splits else lambda *given: _decode().DecodePlan(*given, 64)  # any size will do
    problems: list[tuple[Any, Any]] = [(make, _forward().ForwardProblem(**fields, page_size=int(paged)))]
    if backward:
        gradients = dict(dout_strides=values, dq_strides=rows, dk_strides=rows, dv_strides=values, max_seqlen_k=None)
        sums = dict(dsink=_is_used(features.get("sink")), dcaptured=wanted)
        sums["dslopes"] = _is_used(features.get("alibi_slopes")) and (mods is None or mods.score is None)
        problems.append((_backward().plan, _backward().BackwardProblem(**fields, **gradients, **sums)))
    from .jit import module

    if config.backend == "emulator":
        where, target, index = "emulator", arch_table.named(config.arch), None
    elif arch is not None:
        where, target, index = "", arch if isinstance(arch, Arch) else arch_table.named(arch), None
    else:
        index = frameworks.cupy.current_device() if device is None else device
        where, target = "cuda", frameworks.cupy.arch_of(index)
    for make, problem in problems:
        for spec in make(problem, target).specs:
            if where:
                module.load(spec, target, where, index).prepare()
            else:
                module.compile(spec, target)


def _mods_of_features(features: dict[str, Any]) -> tuple[Mods | None, tuple[tuple[int, int], ...]]:
    """The mods among the features of `warmup`, with what is folded into a score_mod, and (slot, size) of the arrays
    that want a gradient: slopes, and tensors that require one."""
    given = [mod if _is_used(mod) else None for mod in map(features.get, _MODS)]
    if all(mod is None for mod in given):
        return None, ()
    for name, mod in zip(_MODS, given, strict=True):
        require(mod is not True, f"{name}=True: a kernel is made for one function; pass the function itself")
    bound = bind_mods(None, None, *given)
    mods = bound.mods
    if mods.score is None:
        return mods, ()
    wanted = tuple((i, 1) for i, x in enumerate(bound.arrays) if getattr(x, "requires_grad", False))
    slopes = features.get("alibi_slopes")
    by_sequence = len(getattr(slopes, "shape", ())) == 2
    alibi = None if not _is_used(slopes) else "batch" if by_sequence else "head"
    if alibi is not None:
        wanted += ((len(mods.arrays), 1),)
    return fold(mods, _is_used(features.get("softcap")), alibi), wanted


def _dtype_named(dtype: Any) -> DType:
    """A DType from a name or from any framework's dtype object."""
    if isinstance(dtype, DType):
        return dtype
    name = dtype if isinstance(dtype, str) else str(dtype).rpartition(".")[2]
    found = dtypes.BY_NAME.get(name)
    if found is None:
        try:
            found = None if isinstance(dtype, np.generic) else dtypes.BY_NUMPY.get(np.dtype(dtype))
        except Exception:  # NumPy has several for what is no dtype
            found = None
    if found is None:
        raise ArgumentError(f"dtype={dtype!r} must be one of {', '.join(dtypes.BY_NAME)}")
    return found
