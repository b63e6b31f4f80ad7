"""What device-check runs in processes of their own, `python -m cuflash.cli.on_device WHAT`, since a kernel may hang or
ruin a process for good:

    hopper   Hopper's forward against the kernel that runs everywhere: the same calls, the result and the time of both
    tune     the tiles that a kernel could have: the time of each
    small    a call of every kernel, for compute-sanitizer to look at; with --ahead all at once, to compile them

The first two say what they do item by item, a line of JSON before an item and one behind it, on standard output; with
--skip N they begin behind the first N items. A process that an item may have ruined ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np

from .. import api, arch, dtypes, frameworks, mods, questions
from ..call import runner
from ..errors import CuflashError
from ..jit import module
from ..ops import forward
from ..settings import config
from .bench import benchmarks

Item = tuple[str, Callable[[], dict[str, Any]]]
RUINED = 3  # exit status of a process that ended for an item's sake


class Wrong(Exception):
    """A result that is not right; the process is as sound as before."""


# --- Hopper's kernel against the other --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compared:
    """A call: lengths of the sequences (packed if more than one), heads, head dims, and what else it is given.
    With a page_size the keys of the one sequence lie in pages, the last first."""

    what: str
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (64, 64)
    dtype: str = "float16"
    keywords: tuple[tuple[str, Any], ...] = ()
    page_size: int = 0

    @property
    def pages(self) -> int:
        return -(-self.k_lens[0] // self.page_size)

    def given(self) -> dict[str, Any]:
        """Everything that the call is given beside q, k and v."""
        given: dict[str, Any] = dict(self.keywords)
        if len(self.q_lens) > 1:
            for name, lens in (("cu_seqlens_q", self.q_lens), ("cu_seqlens_k", self.k_lens)):
                given[name] = np.cumsum([0, *lens]).astype(np.int32)
        if self.page_size:
            given["page_table"] = np.arange(self.pages, dtype=np.int32)[None, ::-1].copy()
            given["seqused_k"] = np.array(self.k_lens, np.int32)
        return given

    def arrays(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(0)
        shapes = (
            (sum(self.q_lens), self.heads[0], self.dims[0]),
            (sum(self.k_lens), self.heads[1], self.dims[0]),
            (sum(self.k_lens), self.heads[1], self.dims[1]),
        )
        element = dtypes.BY_NAME[self.dtype].numpy
        q, *kv = (rng.standard_normal(shape).astype(element) for shape in shapes)
        if len(self.q_lens) > 1:
            return q, *kv
        if not self.page_size:
            return q[None], *(x[None] for x in kv)
        rows = self.pages * self.page_size
        padded = (np.concatenate([x, np.full((rows - len(x), *x.shape[1:]), np.nan, element)]) for x in kv)
        return q[None], *(x.reshape(self.pages, self.page_size, *x.shape[1:])[::-1].copy() for x in padded)


def compared() -> list[Compared]:
    """From the least that can go wrong to the most: what fails first is where to look."""
    one = Compared("one tile", (64,), (128,))
    slopes = np.array([0.5, 0.1], np.float32)
    return [
        one,
        dataclasses.replace(one, what="two key tiles", k_lens=(256,)),
        dataclasses.replace(one, what="key tiles round the ring", k_lens=(1024,)),
        dataclasses.replace(one, what="a tail of keys", k_lens=(300,)),
        dataclasses.replace(one, what="every consumer, a tail of queries", q_lens=(500,), k_lens=(500,)),
        *(
            dataclasses.replace(one, what=f"head dim {d}", q_lens=(500,), k_lens=(500,), dims=(d, d))
            for d in (128, 96, 192, 256, 40)
        ),
        Compared("head dims 192 and 128", (500,), (500,), dims=(192, 128)),
        Compared("bfloat16", (500,), (500,), dims=(128, 128), dtype="bfloat16"),
        Compared("causal", (500,), (700,), (4, 4), (128, 128), keywords=(("causal", True),)),
        Compared("many tiles for each block", (5000,), (260,), (8, 8), (128, 128)),
        Compared("grouped heads", (500,), (500,), (8, 2), (128, 128), keywords=(("causal", True),)),
        Compared("grouped heads in one tile", (5,), (500,), (8, 2), (128, 128), keywords=(("causal", True),)),
        Compared("packed", (70, 0, 513, 1), (70, 5, 600, 300), (4, 2), (128, 128), keywords=(("causal", True),)),
        Compared("window", (500,), (700,), (2, 2), (128, 128), keywords=(("window_size", (100, 20)),)),
        Compared("softcap", (500,), (500,), (2, 2), (128, 128), keywords=(("softcap", 20.0),)),
        Compared("ALiBi", (500,), (500,), (2, 2), (128, 128), keywords=(("alibi_slopes", slopes),)),
        Compared("sink", (500,), (500,), (2, 2), (128, 128), keywords=(("sink", np.array([1, 3], np.float32)),)),
        Compared("lengths on the device", (500,), (500,), (2, 2), keywords=(("seqused_k", np.array([333], np.int32)),)),
        Compared("pages of 64", (200,), (500,), (2, 2), (128, 128), page_size=64),
        Compared("pages of 12, gathered", (200,), (500,), (2, 2), (128, 128), page_size=12),
        Compared("mask_mod of bounds", (500,), (500,), (2, 2), keywords=(("mask_mod", mods.sliding_window(99)),)),
        Compared("mask_mod of more", (500,), (500,), (2, 2), keywords=(("mask_mod", _every_other_block),)),
        Compared("score_mod", (500,), (500,), (2, 2), (128, 128), keywords=(("score_mod", _distance),)),
        Compared(
            "dropout", (500,), (500,), (2, 2), (128, 128), keywords=(("dropout_p", 0.2), ("seed", 5), ("offset", 1))
        ),
        Compared("clusters of two", (768,), (500,), (2, 2), (128, 128), keywords=(("kernel_options", {"cluster": 2}),)),
    ]  # fmt: skip


def _every_other_block(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx // 64) % 2 == (q_idx // 64) % 2


def _distance(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + 0.01 * (kv_idx - q_idx)


def compare(case: Compared, move: Callable[[np.ndarray], Any] = lambda x: x) -> dict[str, Any]:
    """The errors of both kernels against attention in float64. Raises Wrong if Hopper's is off by more than twice what
    the other is and a little, or gives other bits the second time, or was not asked at all.

    move   a host array to where kernels run
    """
    host, keywords = case.arrays(), case.given()
    device = [move(x) for x in host]
    asked = keywords.pop("kernel_options", None)
    given = {name: move(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    explained = questions.explain(*device, **given)
    if explained.kernel != "forward_sm90":
        raise Wrong(f"{explained.kernel} was asked, not forward_sm90")
    found = {}
    for name, options in (("forward_sm90", asked), ("again", asked), ("forward_sm80", {"kernel": "sm_80"})):
        result = api.attention(*device, **given, aux=("lse",), kernel_options=options)
        found[name] = [to_host(x).astype(np.float64) for x in (result.out, result.lse)]
    right = [x.astype(np.float64) for x in _right(host, keywords)]
    errors = {}
    for at, what in enumerate(("out", "lse")):
        ours, other = (_error(found[name][at], right[at]) for name in ("forward_sm90", "forward_sm80"))
        errors[what] = {"forward_sm90": ours, "forward_sm80": other}
        if not ours <= 2 * other + 1e-3:
            raise Wrong(f"{what} is off by {ours:.3g}; that of forward_sm80 by {other:.3g}")
        if not np.array_equal(found["forward_sm90"][at], found["again"][at], equal_nan=True):
            raise Wrong(f"{what} has other bits the second time")
    return {"error": errors}


def _right(host: Sequence[np.ndarray], keywords: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """out and lse in float64, by the reference that every test compares with."""
    before = config.backend
    config.backend = "reference"
    try:
        wide = [x.astype(np.float64) for x in host]
        result = api.attention(*wide, **keywords, aux=("lse",))
    finally:
        config.backend = before
    return result.out, result.lse


def _error(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference; infinite where one of them is finite and the other is not."""
    if not np.array_equal(np.isfinite(found), np.isfinite(right)):
        return float("inf")
    finite = np.isfinite(right)
    return float(np.abs(found[finite] - right[finite]).max(initial=0.0))


def to_host(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


LENGTH, BATCH, DIMS = 4096, 4, (128, 64, 256)  # of what is timed
WIDTH = 2048  # heads times head dim
SECONDS = 0.2  # of timing, for each contestant


def time_both(d: int, causal: bool) -> dict[str, Any]:
    """TFLOP/s of both kernels, in turns, and how many times as fast Hopper's is."""
    contestants = {
        name: lambda q, k, v, options=options: api.attention(q, k, v, causal=causal, kernel_options=options)
        for name, options in (("forward_sm90", None), ("forward_sm80", {"kernel": "sm_80"}))
    }
    found = _tflops(contestants, d, causal)
    rounded = {name: round(tflops, 1) for name, tflops in found.items()}
    return {"tflops": rounded, "ratio": round(found["forward_sm90"] / found["forward_sm80"], 3)}


def _tflops(contestants: dict[str, Callable[..., Any]], d: int, causal: bool) -> dict[str, float]:
    """Of calls of q, k, v in bfloat16."""
    timing = benchmarks("timing")
    clock = timing.CudaClock()
    random = clock.xp.random.default_rng(0)
    heads = WIDTH // d
    copies = [tuple(_normal(clock.xp, random, (3, BATCH, LENGTH, heads, d))) for _ in range(3)]
    calls = {
        name: timing.Prepared([lambda x=x, call=call: call(*x) for x in copies], dict)
        for name, call in contestants.items()
    }
    pairs = LENGTH * (LENGTH + 1) // 2 if causal else LENGTH**2
    result = {}
    for name, found in timing.take_turns(calls, clock, SECONDS).items():
        if isinstance(found, str):
            raise Wrong(f"{name}: {found}")
        result[name] = 4 * BATCH * heads * d * pairs / found.ms / 1e9
    return result


def _normal(xp: Any, random: Any, shape: tuple[int, ...]) -> Any:
    """Normal draws in bfloat16, rounded by their bits."""
    bits = random.standard_normal(shape, dtype=xp.float32).view(xp.uint32)
    return ((bits + 0x8000) >> 16).astype(xp.uint16).view(dtypes.bfloat16.numpy)


def compile_ahead(specs: Sequence[module.KernelSpec], target: arch.Arch) -> dict[str, Any]:
    """Compile many kernels at once; those who ask for one later find it on the disk."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda spec: module.compile(spec, target), specs):
            print(".", flush=True)  # it goes on
    return {"kernels": len(specs)}


def specs_of(cases: Sequence[Compared], target: arch.Arch) -> list[module.KernelSpec]:
    """Both kernels of each."""
    found: dict[module.KernelSpec, None] = {}
    for case in cases:
        keywords = dict(case.keywords)
        traced, _ = questions.mods_of_features({name: keywords.get(name) for name in ("score_mod", "mask_mod")})
        given: dict[str, Any] = {"dropout": "dropout_p" in keywords, "mods": traced, "paged": case.page_size > 0}
        element = dtypes.BY_NAME[case.dtype]
        for variant in (
            forward.choose_sm90_variant(element, *case.dims, **given),
            forward.choose_variant(element, *case.dims, 16, target, **given),
        ):
            found[forward.kernel_spec(variant)] = None
    return list(found)


def hopper() -> Iterator[Item]:
    target = arch.named("sm_90a")
    timed = [Compared("", (), (), dims=(d, d), dtype="bfloat16") for d in DIMS]
    yield "compiling", lambda: compile_ahead(specs_of([*compared(), *timed], target), target)
    for case in compared():
        yield case.what, lambda case=case: compare(case, _upload)
    for d in DIMS:
        for causal in (False, True):
            name = f"time, {BATCH} x {LENGTH}, d {d}{', causal' if causal else ''}"
            yield name, lambda d=d, causal=causal: time_both(d, causal)


def _upload(x: np.ndarray) -> Any:
    import cupy

    if x.dtype == dtypes.bfloat16.numpy:  # travels as what any version knows
        return cupy.asarray(x.view(np.uint16)).view(x.dtype)
    return cupy.asarray(x)


# --- tiles ------------------------------------------------------------------------------------------------------------

Tile = forward.Tile

# Head-dim class -> tiles that fit into shared memory and, by the compiler, into registers or nearly; of the kernel for
# every GPU also flash-attn's, which spill a little.
SM90_CANDIDATES: dict[int, tuple[Tile, ...]] = {
    64: (Tile(192, 128, 16), Tile(192, 112, 16), Tile(192, 96, 16), Tile(128, 128, 12), Tile(128, 192, 12)),
    96: (Tile(128, 160, 12), Tile(128, 144, 12), Tile(128, 128, 12), Tile(192, 96, 16)),
    128: (Tile(128, 128, 12), Tile(128, 144, 12), Tile(128, 160, 12), Tile(128, 176, 12), Tile(192, 80, 16)),
    192: (Tile(128, 96, 12), Tile(128, 112, 12), Tile(128, 80, 12)),
    256: (Tile(128, 80, 12), Tile(128, 64, 12)),
}
SM80_CANDIDATES: dict[int, tuple[Tile, ...]] = {
    64: (Tile(128, 64, 4), Tile(128, 64, 8), Tile(64, 64, 4), Tile(128, 128, 8), Tile(128, 128, 4)),
    96: (Tile(128, 32, 4), Tile(128, 64, 8), Tile(128, 64, 4), Tile(64, 64, 4), Tile(128, 32, 8)),
    128: (
        Tile(128, 32, 4), Tile(128, 32, 8), Tile(128, 64, 4), Tile(128, 64, 8), Tile(128, 128, 8), Tile(64, 64, 4),
        Tile(64, 32, 4),
    ),
    192: (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 32, 4)),
    256: (Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 64, 4), Tile(64, 32, 4), Tile(128, 16, 8)),
}  # fmt: skip


def candidates(target: arch.Arch) -> list[tuple[int, Tile, Tile]]:
    """(head-dim class, tile, the tile that the kernel has now) of the kernel that runs on `target`."""
    hopper = target.name == "sm_90a"
    found = []
    for d, tiles in (SM90_CANDIDATES if hopper else SM80_CANDIDATES).items():
        now = _variant(target, d).tile
        for tile in dict.fromkeys((now, *tiles)):
            if dataclasses.replace(_variant(target, d), tile=tile).smem_bytes <= target.smem_bytes:
                found.append((d, tile, now))
    return found


def _variant(target: arch.Arch, d: int) -> Any:
    if target.name == "sm_90a":
        return forward.choose_sm90_variant(dtypes.bfloat16, d, d)
    return forward.choose_variant(dtypes.bfloat16, d, d, 16, target)


@contextlib.contextmanager
def tile_of(target: arch.Arch, d: int, tile: Tile) -> Iterator[None]:
    """Calls of head-dim class d take `tile` while this lasts."""
    hopper = target.name == "sm_90a"
    table: Any = forward.SM90_TILES if hopper else forward.TILES
    with mock.patch.dict(table, {d: tile} if hopper else {(2, d): forward.both(tile)}):
        _forget_plans()
        try:
            yield
        finally:
            _forget_plans()


def _forget_plans() -> None:
    forward.plan.cache_clear()
    runner.forget()


def time_tile(
    target: arch.Arch, d: int, tile: Tile, now: Tile, causal: bool, options: dict[str, Any] | None
) -> dict[str, Any]:
    """TFLOP/s of a tile, with kernel_options; and that its result is that of the tile in use."""
    xp = benchmarks("timing").CudaClock().xp
    length = 2 * tile.block_q if options and "cluster" in options else 500  # pairs of tiles, or one with a tail
    q, k, v = _normal(xp, xp.random.default_rng(1), (3, 1, length, 2, d))
    expected = to_host(api.attention(q, k, v, causal=causal)).astype(np.float32)
    with tile_of(target, d, tile):
        found = to_host(api.attention(q, k, v, causal=causal, kernel_options=options)).astype(np.float32)
        if not np.allclose(found, expected, atol=2e-2):
            raise Wrong(f"off by {np.abs(found - expected).max():.3g} from the tile in use")
        calls = {"tile": lambda q, k, v: api.attention(q, k, v, causal=causal, kernel_options=options)}
        tflops = _tflops(calls, d, causal)["tile"]
    return {"d": d, "causal": causal, "tile": str(tile), "now": tile == now, "tflops": round(tflops, 1)}


def tune() -> Iterator[Item]:
    target = frameworks.cupy.arch_of(frameworks.cupy.current_device())
    tried = [dataclasses.replace(_variant(target, d), tile=tile) for d, tile, _ in candidates(target)]
    if target.name == "sm_90a":
        tried += [
            dataclasses.replace(_variant(target, d), cluster=2) for d, tile, now in candidates(target) if tile == now
        ]
    yield "compiling", lambda: compile_ahead([forward.kernel_spec(variant) for variant in tried], target)
    for d, tile, now in candidates(target):
        for causal in (False, True):
            name = f"d {d}{', causal' if causal else ''}: {tile.block_q} x {tile.block_k}, {tile.warps} warps"
            ways: dict[str, dict[str, Any] | None] = {"": None}
            if causal and tile == now:
                ways[", tiles by position"] = {"order": "position"}
            if target.name == "sm_90a" and tile == now:
                ways |= {", persistent": {"persistent": True}, ", a block a tile": {"persistent": False}}
                del ways[""]
                if not causal and -(-LENGTH // tile.block_q) % 2 == 0:
                    ways[", clusters of two"] = {"cluster": 2}
            for what, options in ways.items():
                yield name + what, lambda *a, x=(target, d, tile, now, causal, options): time_tile(*x)


# --- for compute-sanitizer --------------------------------------------------------------------------------------------


def small(move: Callable[[np.ndarray], Any] | None = None, ahead: bool = False) -> None:
    """A call of each kernel that a GPU would run, on lengths that leave tails.

    ahead   side by side: for the sake of what is compiled
    """
    from ..kvcache import flash_attn_with_kvcache

    move = move or _upload
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return move(rng.standard_normal(shape).astype(np.float16))

    starts, lengths = (move(np.array(x, np.int32)) for x in ([0, 70, 200], [17, 250]))
    q, k, v, dout = draw(200, 4, 64), draw(200, 2, 64), draw(200, 2, 64), draw(200, 4, 64)
    one, cache, values = draw(1, 130, 1, 64), draw(2, 300, 2, 64), draw(2, 300, 2, 64)
    step, new = draw(2, 1, 4, 64), draw(2, 1, 2, 64)
    wide = [draw(1, 130, 1, d) for d in (128, 256)]
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True}

    def both_ways() -> None:
        result = api.attention(q, k, v, **packed, aux=("lse",), kernel_options={"kernel": "sm_80"})
        api.attention_backward(dout, q, k, v, result.out, result.lse, **packed)

    calls: list[Callable[[], Any]] = [
        lambda: api.attention(q, k, v, **packed, aux=("lse",)),
        both_ways,
        *(lambda x=x: api.attention(x, x, x) for x in wide),
        lambda: api.attention(one, one, one, mask_mod=_every_other_block, score_mod=_distance),
        lambda: flash_attn_with_kvcache(step, cache, values, k=new, v=new, cache_seqlens=lengths, causal=True),
    ]
    with ThreadPoolExecutor(len(calls) if ahead else 1) as pool:
        for _ in pool.map(lambda call: call(), calls):
            pass


# --- a process --------------------------------------------------------------------------------------------------------


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def work(items: Iterator[Item], skip: int) -> int:
    """Do the items behind the first `skip`; the exit status."""
    for n, (name, do) in enumerate(items):
        if n < skip:
            continue
        say({"item": n, "name": name})
        try:
            say({"item": n, "name": name, "ok": True, **do()})
        except (Wrong, CuflashError) as error:
            say({"item": n, "name": name, "ok": False, "message": str(error)})
        except Exception as error:  # of the driver, for one: nothing works in this process any more
            say({"item": n, "name": name, "ok": False, "message": f"{type(error).__name__}: {error}"})
            return RUINED
    return 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("hopper", "tune", "small"))
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--ahead", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.what == "small":
        import cupy

        cupy.cuda.set_allocator(None)  # each array apart, so that memcheck sees where it ends
        small(ahead=asked.ahead)
        _upload(np.zeros(1)).device.synchronize()  # what went wrong on the GPU is said here at the latest
        return 0
    return work(hopper() if asked.what == "hopper" else tune(), asked.skip)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
