"""The implementations, each behind one call: cuflash, and every other attention that can be imported here.

A `Peer` says its version, or raises `Missing` with the reason; `prepare` makes calls for a case on given inputs, or
raises `NotTaken` with what it does not do. All read the same memory, in the layout [.., heads, d] of the inputs, by
views; what a peer needs in another form (padded batches, block masks, plans) is made before it is timed, and told.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import cuflash
from cuflash import mods
from cuflash.cli import machine

from .cases import RADIUS, Case, Problem, documents
from .inputs import Inputs, bits, floats, from_jax, from_torch, import_jax, starts, to_torch
from .schema import OURS
from .timing import Prepared, message

_MOST_MATRIX_BYTES = 4 << 30  # a peer that needs a matrix of masks or scores larger than that is not asked


class Missing(Exception):
    """A peer is not here; the message says why."""


class NotTaken(Exception):
    """A peer does not do this; the message says what."""


class Peer:
    """One implementation."""

    name: str
    setup_seconds = 0.3  # what preparing a case costs, about

    @property
    def slow(self) -> bool:
        """Whether it takes seconds to get ready for a case: then --quick asks it last."""
        return self.setup_seconds >= 2

    def measured_in(self, group: str) -> bool:
        """Whether it has something to say in a group."""
        return True

    def version(self) -> str:
        """Its version. Raises `Missing`."""
        raise NotImplementedError

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Calls for a case. Raises `NotTaken`, or whatever the implementation raises."""
        raise NotImplementedError


def _import(module: str, package: str) -> Any:
    """The module. Raises `Missing`: not installed, or broken here."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension built for another PyTorch raises what it likes
        where = "is not installed" if machine.installed(package) is None else "cannot be imported"
        raise Missing(f"{package} {where} ({message(error)})") from error


# --- cuflash ----------------------------------------------------------------------------------------------------------

VARIANTS = ("", "sm_80 kernel", "deterministic", "PyTorch", "PyTorch autograd", "padded", "mask_mod", "split_size 1024")


class Ours(Peer):
    """cuflash on CuPy arrays, or NumPy's where there is no GPU; the variants in which its cases are told apart:

    sm_80 kernel      the kernel of all GPUs, where this one has its own
    deterministic     gradients the same to the last bit
    PyTorch           the same arrays, as PyTorch's
    PyTorch autograd  gradients by `torch.autograd.grad`
    padded            a packed problem as a dense one, every sequence padded to the longest
    mask_mod          causal said by a Python function
    split_size 1024   decoding with a batch-invariant split
    """

    name = OURS
    setup_seconds = 2.0  # kernels compile

    def version(self) -> str:
        return cuflash.__version__

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        if case.variant not in VARIANTS:
            raise ValueError(f"variant={case.variant!r} must be one of {VARIANTS}")
        if case.variant.startswith("PyTorch"):
            return self._prepare_torch(case, inputs)
        problem = case.problem
        if problem.layout in ("cache", "pages"):
            return self._prepare_decode(case, inputs)
        if case.variant == "padded":
            return self._prepare_padded(case, inputs)
        keywords = {**lengths(inputs, inputs.shared), **features(problem, inputs, inputs.array)}
        keywords |= _variant_keywords(case)
        names = ("out",) if case.direction == "forward" else ("dq", "dk", "dv")
        calls = [_our_call(case.direction, copy, keywords) for copy in inputs.copies]

        def arrays(result: Any) -> dict[str, Any]:
            found = (result,) if case.direction == "forward" else result[:3]
            return {name: floats(inputs.clock.xp, x) for name, x in zip(names, found, strict=True)}

        return Prepared(calls, arrays, framework="numpy")

    def _prepare_decode(self, case: Case, inputs: Inputs) -> Prepared:
        keywords: dict[str, Any] = {"cache_seqlens": inputs.shared["seqused"], "causal": True}
        if "page_table" in inputs.shared:
            keywords["page_table"] = inputs.shared["page_table"]
        if case.variant:
            keywords["split_size"] = 1024
        calls = [
            functools.partial(cuflash.flash_attn_with_kvcache, c["q"], c["k"], c["v"], **keywords)
            for c in inputs.copies
        ]
        return Prepared(calls, lambda out: {"out": floats(inputs.clock.xp, out)}, framework="numpy")

    def _prepare_padded(self, case: Case, inputs: Inputs) -> Prepared:
        lens, xp = case.problem.q_lens, inputs.clock.xp

        def pad(x: Any) -> Any:
            there, rows = xp.zeros((len(lens), max(lens), *x.shape[1:]), bits(x).dtype), bits(x)
            for b, (first, n) in enumerate(zip(starts(lens), lens, strict=False)):
                there[b, :n] = rows[first : first + n]
            return there.view(x.dtype)

        dense = [{name: pad(x) for name, x in copy.items()} for copy in inputs.copies]
        used = inputs.array(np.array(lens, np.int32))
        keywords = {"causal": case.problem.mask.causal} | ({} if case.problem.mask.causal else {"seqused_k": used})
        calls = [_our_call("forward", copy, keywords) for copy in dense]

        def arrays(out: Any) -> dict[str, Any]:
            return {"out": xp.concatenate([floats(xp, out[b, :n]) for b, n in enumerate(lens)])}

        return Prepared(calls, arrays, framework="numpy")

    def _prepare_torch(self, case: Case, inputs: Inputs) -> Prepared:
        _import("torch", "torch")
        copies, shared = inputs.torch, inputs.torch_shared
        keywords = {**lengths(inputs, shared), **features(case.problem, inputs, lambda x: to_torch(inputs.array(x)))}

        def attend(q: Any, k: Any, v: Any) -> Any:
            return cuflash.attention(q, k, v, **keywords)

        return _torch_prepared(case, inputs, copies, attend, same_layout)


def _variant_keywords(case: Case) -> dict[str, Any]:
    if case.variant == "sm_80 kernel":
        return {"kernel_options": {"kernel": "sm_80"}}
    if case.variant == "deterministic":
        return {"deterministic": True}
    if case.variant == "mask_mod":
        return {"causal": False, "mask_mod": mods.causal()}
    return {}


def _our_call(direction: str, copy: dict[str, Any], keywords: dict[str, Any]) -> Callable[[], Any]:
    q, k, v = copy["q"], copy["k"], copy["v"]
    if direction == "forward":
        return functools.partial(cuflash.attention, q, k, v, **keywords)

    def forward() -> Any:
        return cuflash.attention(q, k, v, aux=("lse",), **keywords)

    if direction == "backward":
        left = forward()
        return functools.partial(cuflash.attention_backward, copy["dout"], q, k, v, left.out, left.lse, **keywords)

    def both() -> Any:
        there = forward()
        return cuflash.attention_backward(copy["dout"], q, k, v, there.out, there.lse, **keywords)

    return both


def lengths(inputs: Inputs, shared: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a packed batch."""
    p = inputs.problem
    if p.layout != "packed":
        return {}
    hints = {"max_seqlen_q": max(p.q_lens), "max_seqlen_k": max(p.k_lens)}
    return {"cu_seqlens_q": shared["cu_seqlens_q"], "cu_seqlens_k": shared["cu_seqlens_k"], **hints}


def features(problem: Problem, inputs: Inputs, array: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """cuflash's keywords for a mask; `array` makes what mods capture."""
    mask = problem.mask
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "none": dict,
        "causal": lambda: {"causal": True},
        "window": lambda: {"causal": True, "window_size": (mask.size - 1, 0)},
        "prefix": lambda: {"mask_mod": mods.prefix_lm(mask.size)},
        "document": lambda: {"causal": True, "mask_mod": mods.document(array(documents(problem.q_lens[0])))},
        "natten": lambda: {"mask_mod": mods.natten_2d(*_image(problem), mask.size)},
        "softcap": lambda: {"causal": True, "softcap": float(mask.size)},
        "alibi": lambda: {"causal": True, "alibi_slopes": array(_host(inputs.slopes))},
        "relative": lambda: {"score_mod": mods.relative_bias(array(_host(inputs.table)))},
    }
    return made[mask.kind]()


def _image(problem: Problem) -> tuple[int, int]:
    side = math.isqrt(problem.q_lens[0])
    return side, side


def _host(x: Any) -> np.ndarray:
    return x.get() if hasattr(x, "get") else x


# --- PyTorch's peers --------------------------------------------------------------------------------------------------


def same_layout(x: Any) -> Any:
    return x


def heads_first(x: Any) -> Any:
    """[batch, len, heads, d] as [batch, heads, len, d], or back: a view."""
    return x.transpose(1, 2)


def _torch_prepared(
    case: Case, inputs: Inputs, copies: list[dict[str, Any]], attend: Callable[..., Any],
    layout: Callable[[Any], Any], back: Callable[[Any], Any] | None = None, more: dict[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Calls of `attend(q, k, v)` -> out, all of them in a peer's `layout`; `back` brings a result to the problem's."""
    import torch

    back = layout if back is None else back
    wanted = ("out",) if case.direction == "forward" else ("dq", "dk", "dv")
    calls: list[Callable[[], Any]] = []
    for copy in copies:
        q, k, v = (layout(copy[name]).detach() for name in ("q", "k", "v"))
        if case.direction == "forward":
            calls.append(torch.no_grad()(functools.partial(attend, q, k, v)))
            continue
        leaves, dout = tuple(x.requires_grad_() for x in (q, k, v)), layout(copy["dout"])
        if case.direction == "backward":
            out = attend(*leaves)
            calls.append(functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True))
        else:
            calls.append(functools.partial(_torch_both, attend, leaves, dout))

    def arrays(result: Any) -> dict[str, Any]:
        found = (result,) if case.direction == "forward" else result
        return {name: from_torch(back(x), inputs.clock) for name, x in zip(wanted, found, strict=True)}

    return Prepared(calls, arrays, more=more or {})


def _torch_both(attend: Callable[..., Any], leaves: tuple[Any, ...], dout: Any) -> Any:
    import torch

    return torch.autograd.grad(attend(*leaves), leaves, dout)


def _torch(needs_gpu: bool) -> Any:
    torch = _import("torch", "torch")
    if needs_gpu and not torch.cuda.is_available():
        raise Missing("PyTorch sees no GPU here")
    return torch


class _TorchPeer(Peer):
    needs_gpu = True
    package = "torch"
    module = "torch"

    def version(self) -> str:
        _torch(self.needs_gpu or bool(machine.gpus()))
        module = _import(self.module, self.package)
        return machine.installed(self.package) or getattr(module, "__version__", "unknown")


class Sdpa(_TorchPeer):
    """torch.nn.functional.scaled_dot_product_attention, by one of its kernels; or "sdpa", by the one it chooses, which
    is what the host's time is measured of: naming a kernel takes the host longer than the call does. Packed batches are
    padded before; masks it has no word for are given as a matrix."""

    needs_gpu = False

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"torch {backend}"

    def measured_in(self, group: str) -> bool:
        return (group == "latency") == (self.backend == "sdpa")

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        torch = _torch(False)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
        backend = getattr(SDPBackend, names.get(self.backend, "MATH"))
        problem = case.problem
        copies, layout, back, more = inputs.torch, heads_first, heads_first, {}
        if problem.layout == "pages":
            raise NotTaken("no pages")
        if self.backend == "math":
            _refuse_matrix(problem, 4)
        keywords: dict[str, Any] = {"enable_gqa": True} if problem.heads != problem.heads_kv else {}
        if problem.layout == "packed":
            copies, unpad = padded(problem, copies)
            more = {"padded": True}

            def back(x: Any) -> Any:
                return unpad(heads_first(x))

            if problem.mask.kind == "none":
                used = torch.tensor(problem.k_lens, device=copies[0]["q"].device)
                seen = torch.arange(max(problem.k_lens), device=used.device)[None] < used[:, None]
                keywords["attn_mask"] = seen[:, None, None, :].expand(-1, 1, max(problem.q_lens), -1)
        if problem.layout == "cache":
            if set(problem.q_lens) != {1}:
                raise NotTaken("causal is aligned at the first key here, where a cache's is at the last")
            if len(set(problem.k_lens)) > 1:
                used = inputs.torch_shared["seqused"]
                seen = torch.arange(max(problem.k_lens), device=used.device)[None] < used[:, None]
                keywords["attn_mask"] = seen[:, None, None, :]
        elif problem.mask.kind == "causal":
            keywords["is_causal"] = True
        elif problem.mask.kind == "softcap":
            raise NotTaken("no softcap")
        elif problem.mask.kind != "none":
            keywords["attn_mask"] = matrix(problem, inputs)
            more = {"mask": "a matrix"}

        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, **keywords)

        def attend(q: Any, k: Any, v: Any) -> Any:
            if self.backend == "sdpa":
                return call(q, k, v)
            with sdpa_kernel(backend):
                return call(q, k, v)

        return _torch_prepared(case, inputs, copies, attend, layout, back, more)


def _refuse_matrix(problem: Problem, itemsize: int, heads: bool = True) -> None:
    size = (problem.batch * problem.heads if heads else 1) * max(problem.q_lens) * max(problem.k_lens) * itemsize
    if size > _MOST_MATRIX_BYTES:
        raise NotTaken(f"needs a matrix of {size / 2**30:.0f} GiB")


def matrix(problem: Problem, inputs: Inputs) -> Any:
    """The mask as bool [1, 1, len, len], or the bias beside it as [1, heads, len, len] of q's dtype."""
    import torch

    xp, n, m = inputs.clock.xp, problem.q_lens[0], problem.k_lens[0]
    biased = problem.mask.kind in ("alibi", "relative")
    _refuse_matrix(dataclasses.replace(problem, q_lens=(n,), k_lens=(m,)), 2 if biased else 1, biased)
    i, j = xp.arange(n)[:, None], xp.arange(m)[None]
    keep = to_torch(problem.mask.keep(xp, i, j, n, m).view("uint8")).bool()
    if not biased:
        return keep[None, None]
    dtype = inputs.torch[0]["q"].dtype
    bias = torch.empty(1, problem.heads, n, m, dtype=dtype, device=keep.device)
    for h in range(problem.heads):
        added = problem.mask.bias(xp, h, problem.heads, i, j, n, m)
        bias[0, h] = to_torch(added.astype("float32")).to(dtype).masked_fill(~keep, -math.inf)
    return bias


def padded(problem: Problem, copies: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Callable[[Any], Any]]:
    """Packed PyTorch arrays as dense ones of the longest length, with zeros behind each sequence; and the way back."""
    import torch

    lens = problem.q_lens
    rows = torch.cat([torch.arange(n) + b * max(lens) for b, n in enumerate(lens)]).to(copies[0]["q"].device)

    def pad(x: Any) -> Any:
        flat = x.new_zeros(len(lens) * max(lens), *x.shape[1:])
        flat[rows] = x
        return flat.view(len(lens), max(lens), *x.shape[1:])

    def unpad(x: Any) -> Any:
        return x.reshape(-1, *x.shape[2:])[rows]

    return [{name: pad(x) for name, x in copy.items()} for copy in copies], unpad


class Flex(_TorchPeer):
    """torch.nn.attention.flex_attention, compiled; a packed batch is one long row with a mask of documents."""

    name = "flex"
    module = "torch.nn.attention.flex_attention"
    setup_seconds = 8.0
    compiled = True

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        import time

        torch = _torch(self.compiled)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        problem = case.problem
        if problem.layout == "pages":
            raise NotTaken("no pages")
        one_row = problem.layout == "packed"
        device = inputs.torch[0]["q"].device
        mask_mod, score_mod = flex_mods(problem, inputs, device)
        q_len, k_len = problem.q_lens[0], max(problem.k_lens)
        if one_row:
            q_len, k_len = sum(problem.q_lens), sum(problem.k_lens)
        if self.compiled:
            torch._dynamo.reset()  # else the ninth shape would not be compiled any more
        else:
            _refuse_matrix(problem, 4)
        more: dict[str, Any] = {}
        block_mask = None
        if mask_mod is not None:
            began = time.perf_counter()
            batch = problem.batch if problem.layout == "cache" else None
            make = torch.compile(create_block_mask) if self.compiled else create_block_mask
            block_mask = make(mask_mod, batch, None, q_len, k_len, device=str(device))
            inputs.clock.wait()
            more["mask_first_ms"] = (time.perf_counter() - began) * 1e3
            began = time.perf_counter()
            make(mask_mod, batch, None, q_len, k_len, device=str(device))
            inputs.clock.wait()
            more["mask_ms"] = (time.perf_counter() - began) * 1e3
        call = torch.compile(flex_attention, dynamic=False) if self.compiled else flex_attention
        keywords = {"score_mod": score_mod, "block_mask": block_mask, "enable_gqa": problem.heads != problem.heads_kv}

        def attend(q: Any, k: Any, v: Any) -> Any:
            return call(q, k, v, **keywords)

        def rows(x: Any) -> Any:
            return x.transpose(0, 1)[None] if one_row else x.transpose(1, 2)

        def back(x: Any) -> Any:
            return x[0].transpose(0, 1) if one_row else x.transpose(1, 2)

        return _torch_prepared(case, inputs, inputs.torch, attend, rows, back, more)


class FlexEager(Flex):
    """FlexAttention without a compiler, as on a CPU: what the adapter is tested with."""

    name = "flex eager"
    needs_gpu = False
    compiled = False


def flex_mods(problem: Problem, inputs: Inputs, device: Any) -> tuple[Any, Any]:
    """(mask_mod, score_mod) as FlexAttention's users write them, or None."""
    import torch

    mask, size = problem.mask, problem.mask.size
    if problem.layout == "cache":
        used, q_len = inputs.torch_shared["seqused"], problem.q_lens[0]
        return lambda b, h, q, k: k <= q + (used[b] - q_len), None
    if problem.layout == "packed":
        ids = torch.from_numpy(np.repeat(np.arange(problem.batch, dtype=np.int32), problem.q_lens)).to(device)
        if mask.causal:
            return lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), None
        return lambda b, h, q, k: ids[q] == ids[k], None

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    if mask.kind == "document":
        ids = torch.from_numpy(documents(problem.q_lens[0])).to(device)
        return lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), None
    if mask.kind == "natten":
        rows = _image(problem)[0]

        def natten(b: Any, h: Any, q: Any, k: Any) -> Any:
            first_y = (q // rows - size // 2).clamp(0, rows - size)
            first_x = (q % rows - size // 2).clamp(0, rows - size)
            y, x = k // rows, k % rows
            return (y >= first_y) & (y < first_y + size) & (x >= first_x) & (x < first_x + size)

        return natten, None
    if mask.kind == "softcap":
        return causal, lambda s, b, h, q, k: size * torch.tanh(s / size)
    if mask.kind == "alibi":
        slopes = to_torch(inputs.slopes)
        return causal, lambda s, b, h, q, k: s - slopes[h] * (q - k).abs()
    if mask.kind == "relative":
        table = to_torch(inputs.table)
        return None, lambda s, b, h, q, k: s + table[h, (k - q).clamp(-RADIUS, RADIUS) + RADIUS]
    if mask.kind == "window":
        return lambda b, h, q, k: (q >= k) & (q - k < size), None
    if mask.kind == "prefix":
        return lambda b, h, q, k: (k < size) | (q >= k), None
    return (causal if mask.kind == "causal" else None), None


class TorchVarlen(_TorchPeer):
    """torch.nn.attention.varlen.varlen_attn."""

    name = "torch varlen"
    module = "torch.nn.attention.varlen"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        attend = self.attend(case.problem, inputs.torch_shared)
        return _torch_prepared(case, inputs, inputs.torch, attend, same_layout)

    def attend(self, problem: Problem, shared: dict[str, Any]) -> Callable[..., Any]:
        from inspect import signature

        module = _import(self.module, "torch")
        if problem.layout != "packed":
            raise NotTaken("packed batches alone")
        if problem.mask.kind not in ("none", "causal", "window"):
            raise NotTaken(f"no {problem.mask.kind}")
        taken = signature(module.varlen_attn).parameters
        keywords: dict[str, Any] = {}
        if "window_size" in taken and problem.mask.causal:  # whose second number is what says causal
            keywords["window_size"] = (problem.mask.size - 1 if problem.mask.kind == "window" else -1, 0)
        elif problem.mask.kind == "window":
            raise NotTaken("no window in this version of PyTorch")
        elif problem.mask.causal:
            keywords["is_causal"] = True
        if problem.heads != problem.heads_kv:
            if "enable_gqa" not in taken:
                raise NotTaken("no grouped queries in this version of PyTorch")
            keywords["enable_gqa"] = True
        starts_q, starts_k = shared["cu_seqlens_q"], shared["cu_seqlens_k"]
        longest = max(problem.q_lens), max(problem.k_lens)
        return lambda q, k, v: module.varlen_attn(q, k, v, starts_q, starts_k, *longest, **keywords)


# --- flash-attn -------------------------------------------------------------------------------------------------------


class FlashAttention(_TorchPeer):
    """flash-attn, of one generation. Dense and packed batches, and, in 2 and 3, caches and pages."""

    _PLACES: ClassVar = {
        2: ("flash_attn", "flash-attn"),
        3: ("flash_attn_3.flash_attn_interface", "flash-attn-3"),
        4: ("flash_attn.cute", "flash-attn-4"),
    }
    _TAKES: ClassVar = {  # beside none and causal
        2: ("window", "softcap", "alibi"),
        3: ("window", "softcap"),
        4: ("window", "softcap"),
    }

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.name = f"flash-attn {generation}"
        self.module, self.package = self._PLACES[generation]
        self.setup_seconds = 5.0 if generation == 4 else 0.3  # compiles

    def _functions(self) -> Any:
        if self.generation == 3:  # the package in a checkout's hopper/ has no namespace
            try:
                return _import("flash_attn_3.flash_attn_interface", self.package)
            except Missing:
                return _import("flash_attn_interface", self.package)
        return _import(self.module, self.package)

    def version(self) -> str:
        _torch(True)
        functions = self._functions()
        if self.generation == 2 and not hasattr(functions, "flash_attn_with_kvcache"):
            raise Missing("flash_attn here is not generation 2")  # flash-attn-4 alone brings a bare flash_attn
        return machine.installed(self.package) or getattr(functions, "__version__", "unknown")

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        problem = case.problem
        functions = self._functions()
        if problem.dtype == "float32":
            raise NotTaken("no float32")
        if problem.mask.kind not in ("none", "causal", *self._TAKES[self.generation]):
            raise NotTaken(f"no {problem.mask.kind}")
        shared = inputs.torch_shared
        if problem.layout in ("cache", "pages"):
            return _torch_prepared(case, inputs, inputs.torch, self._decode(functions, problem, shared), same_layout)
        keywords: dict[str, Any] = {"causal": problem.mask.causal}
        if problem.mask.kind == "window":
            keywords["window_size"] = (problem.mask.size - 1, 0)
        if problem.mask.kind == "softcap":
            keywords["softcap"] = float(problem.mask.size)
        if problem.mask.kind == "alibi":
            keywords["alibi_slopes"] = to_torch(inputs.slopes)
        if problem.layout == "packed":
            call = functions.flash_attn_varlen_func
            keywords |= {"cu_seqlens_q": shared["cu_seqlens_q"], "cu_seqlens_k": shared["cu_seqlens_k"]}
            keywords |= {"max_seqlen_q": max(problem.q_lens), "max_seqlen_k": max(problem.k_lens)}
        else:
            call = functions.flash_attn_func

        def attend(q: Any, k: Any, v: Any) -> Any:
            return _first(call(q, k, v, **keywords))

        return _torch_prepared(case, inputs, inputs.torch, attend, same_layout)

    def _decode(self, functions: Any, problem: Problem, shared: dict[str, Any]) -> Callable[..., Any]:
        if self.generation == 4:
            raise NotTaken("no cache")
        if self.generation == 2 and problem.layout == "pages" and problem.page_size % 256:
            raise NotTaken(f"pages of {problem.page_size}: multiples of 256 alone")
        keywords: dict[str, Any] = {"cache_seqlens": shared["seqused"], "causal": True}
        if problem.layout == "pages":
            keywords["block_table" if self.generation == 2 else "page_table"] = shared["page_table"]
        return lambda q, k, v: _first(functions.flash_attn_with_kvcache(q, k, v, **keywords))


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


# --- FlashInfer, xformers ---------------------------------------------------------------------------------------------


class FlashInfer(_TorchPeer):
    """FlashInfer's wrappers, planned before they are timed. Inference only. A cache is read as pages that lie in
    order."""

    name = "flashinfer"
    module, package = "flashinfer", "flashinfer-python"
    setup_seconds = 5.0  # compiles
    _WORKSPACE = 256 << 20

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        import torch

        flashinfer = _import(self.module, self.package)
        problem = case.problem
        if case.direction != "forward":
            raise NotTaken("no gradients")
        if problem.dtype == "float32":
            raise NotTaken("no float32")
        dtype, device = inputs.torch[0]["q"].dtype, inputs.torch[0]["q"].device
        workspace = torch.empty(self._WORKSPACE, dtype=torch.uint8, device=device)
        types = {"q_data_type": dtype, "kv_data_type": dtype}
        if problem.layout in ("cache", "pages"):
            return self._prepare_decode(flashinfer, case, inputs, workspace, types)
        keywords: dict[str, Any] = {"causal": problem.mask.causal}
        if problem.mask.kind == "window":
            keywords["window_left"] = problem.mask.size - 1
        elif problem.mask.kind == "softcap":
            keywords["logits_soft_cap"] = float(problem.mask.size)
        elif problem.mask.kind == "alibi":
            if problem.heads & (problem.heads - 1):
                raise NotTaken("ALiBi's slopes are its own, which agree with the paper's for powers of two alone")
            keywords["pos_encoding_mode"] = "ALIBI"
        elif problem.mask.kind not in ("none", "causal"):
            raise NotTaken(f"no {problem.mask.kind}")
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        ends = [torch.from_numpy(starts(lens)).to(device) for lens in (problem.q_lens, problem.k_lens)]
        wrapper.plan(*ends, problem.heads, problem.heads_kv, problem.head_dim, **keywords, **types)

        def flat(x: Any) -> Any:
            return x if problem.layout == "packed" else x.flatten(0, 1)

        def back(x: Any) -> Any:
            return x.view(problem.q_shape)

        return _torch_prepared(case, inputs, inputs.torch, wrapper.run, flat, back)

    def _prepare_decode(
        self, flashinfer: Any, case: Case, inputs: Inputs, workspace: Any, types: dict[str, Any]
    ) -> Prepared:
        import torch

        problem = case.problem
        if set(problem.q_lens) != {1}:
            raise NotTaken("one query a sequence here")
        size, room = problem.page_size, max(problem.k_lens)
        if problem.layout == "cache":
            size = math.gcd(16, room)
            table = np.arange(problem.batch * (room // size), dtype=np.int32).reshape(problem.batch, -1)
        else:
            table = _host(inputs.shared["page_table"])
        counts = [-(-n // size) for n in problem.k_lens]
        indices = np.concatenate([row[:n] for row, n in zip(table, counts, strict=True)])
        last = np.array([n - (c - 1) * size for n, c in zip(problem.k_lens, counts, strict=True)], np.int32)
        device = inputs.torch[0]["q"].device
        plan = [torch.from_numpy(x).to(device) for x in (starts(tuple(counts)), indices, last)]
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=problem.heads > problem.heads_kv
        )
        wrapper.plan(*plan, problem.heads, problem.heads_kv, problem.head_dim, size, **types)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return wrapper.run(q[:, 0], tuple(x.view(-1, size, *x.shape[2:]) for x in (k, v)))

        return _torch_prepared(case, inputs, inputs.torch, attend, same_layout, lambda out: out[:, None])


class Xformers(_TorchPeer):
    """xformers.ops.memory_efficient_attention; grouped queries by its five dimensions, keys repeated by strides."""

    name = "xformers"
    module, package = "xformers.ops", "xformers"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        ops = _import("xformers.ops", self.package)
        biases = _import("xformers.ops.fmha.attn_bias", self.package)
        problem = case.problem
        if problem.layout in ("cache", "pages"):
            raise NotTaken("no cache here")
        if problem.mask.kind not in ("none", "causal"):
            raise NotTaken(f"no {problem.mask.kind} here")
        if problem.layout == "packed":
            kind = biases.BlockDiagonalCausalMask if problem.mask.causal else biases.BlockDiagonalMask
            bias = kind.from_seqlens(list(problem.q_lens))
        else:
            bias = biases.LowerTriangularMask() if problem.mask.causal else None
        group = problem.heads // problem.heads_kv

        def layout(x: Any) -> Any:
            return x[None] if problem.layout == "packed" else x

        def back(x: Any) -> Any:
            return x[0] if problem.layout == "packed" else x

        def attend(q: Any, k: Any, v: Any) -> Any:
            if group > 1:
                q = q.unflatten(2, (problem.heads_kv, group))
                k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
            out = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
            return out.flatten(2, 3) if group > 1 else out

        return _torch_prepared(case, inputs, inputs.torch, attend, layout, back)


# --- JAX --------------------------------------------------------------------------------------------------------------


class Jax(Peer):
    """jax.nn.dot_product_attention under jit, by XLA or cuDNN. It runs on streams of its own, so the host's clock times
    bursts of it."""

    setup_seconds = 2.0

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"jax {implementation}"

    def version(self) -> str:
        try:
            jax = import_jax()
        except Exception as error:
            raise Missing(f"jax cannot be imported ({message(error)})") from error
        if (self.implementation == "cudnn" or machine.gpus()) and jax.default_backend() != "gpu":
            raise Missing("JAX sees no GPU here")
        return jax.__version__

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        jax = import_jax()
        attend = self.attend(case.problem, inputs)
        copies = inputs.jax
        names: tuple[str, ...] = ("out",) if case.direction == "forward" else ("dq", "dk", "dv")
        if case.direction == "forward":
            call = jax.jit(attend)
            calls = [functools.partial(call, c["q"], c["k"], c["v"]) for c in copies]
        elif case.direction == "both":
            call = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
            calls = [functools.partial(call, c["q"], c["k"], c["v"], c["dout"]) for c in copies]
        else:
            forward, call = jax.jit(functools.partial(jax.vjp, attend)), jax.jit(lambda pull, dout: pull(dout))
            calls = [functools.partial(call, forward(c["q"], c["k"], c["v"])[1], c["dout"]) for c in copies]

        def arrays(result: Any) -> dict[str, Any]:
            found = (result,) if case.direction == "forward" else result
            return {name: from_jax(x, inputs.clock) for name, x in zip(names, found, strict=True)}

        return Prepared(calls, arrays, finish=jax.block_until_ready, framework="jax", more={"clock": "host"})

    def attend(self, problem: Problem, inputs: Inputs) -> Callable[..., Any]:
        jax = import_jax()
        keywords: dict[str, Any] = {"implementation": self.implementation}
        if problem.layout in ("packed", "pages"):
            raise NotTaken(f"no {'packed batches' if problem.layout == 'packed' else 'pages'}")
        if self.implementation == "xla":
            _refuse_matrix(problem, 4)
        elif problem.dtype == "float32":
            raise NotTaken("no float32")
        if problem.layout == "cache":
            if set(problem.q_lens) != {1}:
                raise NotTaken("causal is aligned at the first key here, where a cache's is at the last")
            keywords["key_value_seq_lengths"] = jax.numpy.asarray(np.array(problem.k_lens, np.int32))
        elif problem.mask.kind == "causal":
            keywords["is_causal"] = True
        elif problem.mask.kind == "window":
            keywords |= {"is_causal": True, "local_window_size": (problem.mask.size - 1, 0)}
        elif problem.mask.kind != "none":
            raise NotTaken(f"no {problem.mask.kind} but as a matrix")
        return functools.partial(jax.nn.dot_product_attention, **keywords)


# --- all of them ------------------------------------------------------------------------------------------------------


def peers() -> list[Peer]:
    """Everyone but cuflash, in the order of tables."""
    sdpa = [Sdpa(backend) for backend in ("cudnn", "flash", "efficient", "math", "sdpa")]
    flash = [FlashAttention(generation) for generation in (2, 3, 4)]
    return [*sdpa, Flex(), TorchVarlen(), *flash, FlashInfer(), Xformers(), Jax("xla"), Jax("cudnn")]


def present(wanted: list[str] | None, candidates: list[Peer]) -> tuple[list[Peer], dict[str, str], dict[str, str]]:
    """(those that are here, {name: version} of them, {name: why not} of the others). `wanted` names some, by the
    beginnings of names; None: all. Raises ValueError for a beginning that none has."""
    for word in wanted or ():
        if not any(peer.name.startswith(word) for peer in candidates):
            names = ", ".join(peer.name for peer in candidates)
            raise ValueError(f"peers={word!r} must begin the name of one of: {names}")
    found, versions, skipped = [], {}, {}
    for peer in candidates:
        if wanted is not None and not any(peer.name.startswith(word) for word in wanted):
            continue
        try:
            versions[peer.name] = peer.version()
            found.append(peer)
        except Missing as missing:
            skipped[peer.name] = str(missing)
        except Exception as error:  # a framework whose GPU side does not start costs its own numbers, not the others'
            skipped[peer.name] = f"does not start here ({message(error)})"
    return found, versions, skipped
