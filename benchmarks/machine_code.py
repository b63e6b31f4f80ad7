"""What the machine code of the kernels says of their speed, with no GPU asked: `cuflash bench code`.

For each kernel, architecture and class of head dims one Variant of 16-bit elements, rows of 16 bytes:

    instructions   that a warp issues in one trip round the main loop, the shortest way: nothing masked
    products       of these: HMMA or HGMMA
    shared/matrix  clocks of shared memory over clocks of the tensor cores
    blocks         that run on one SM at the same time
    tensor use     the share of the time that the tensor cores can be busy at most: jit/sm_model.py simulates the wgmma
                   kernels, jit/mma_model.py adds up what the others need of each unit
    bound          the unit that is busy longest

These are models. `benchmarks/results/static-*.json` holds the rows of a commit, and a test compares the code with it.
To renew it, from the root of a checkout:

    python3 -m benchmarks.machine_code [--because "what got worse, and why"]

Where a row got worse the reason must be given, and must stand in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cuflash import arch, dtypes
from cuflash.arch import Arch
from cuflash.cli import compile as compile_command
from cuflash.jit import mma_model, module, sass
from cuflash.ops import backward_sm90, forward

from . import schema
from .schema import CHECKOUT, OURS, RESULTS, STATIC, Results, Row

ARCHES = ("sm_80", "sm_89", "sm_90a", "sm_120a")
# What may differ before a row counts as worse: fractions, lower or higher.
_MARGIN = 0.01
# Rows of benchmarks/README.md; those of the backward are its fast way, with dq added by atomics.
_SHOWN = re.compile(
    r"(forward_sm80|forward_sm90|backward_sm90|backward_sm80(?=.*accumulate)), (sm_80|sm_90a), "
    r"d (64|128|256)(, keys held, accumulate dq)?"
)
COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("tile", lambda r: r.more["tile"]),
    ("instructions", lambda r: str(r.more["instructions"])),
    ("products", lambda r: str(r.more["products"])),
    ("shared/matrix", lambda r: f"{r.more['shared_over_matrix']:.2f}"),
    ("blocks", lambda r: str(r.more["blocks"])),
    ("tensor use", lambda r: f"{r.more['tensor_use']:.0%}"),
    ("bound", lambda r: r.more["bound"]),
]


def specs(target: Arch) -> list[tuple[str, module.KernelSpec]]:
    """(case, kernel) of every row of an architecture."""
    found: dict[str, module.KernelSpec] = {}
    for spec in compile_command.specs(target):
        v: Any = spec.variant
        if getattr(v, "element", None) not in (dtypes.bfloat16, dtypes.float16) or not hasattr(v, "tile"):
            continue
        if getattr(v, "load_bytes", 16) != 16:
            continue
        found.setdefault(_case(spec, target), spec)
    return list(found.items())


def _case(spec: module.KernelSpec, target: Arch) -> str:
    v: Any = spec.variant
    dims = f"d {v.head_dim}" if v.head_dim == v.head_dim_v else f"d {v.head_dim} and {v.head_dim_v}"
    words = [spec.name, target.name, dims]
    flags = ("dropout", "paged", "keys_held", "accumulate_dq", "fixed_sums")
    words += [name.replace("_", " ") for name in flags if getattr(v, name, False)]
    words += [f"cluster {v.cluster}"] if getattr(v, "cluster", 1) > 1 else []
    return ", ".join(words)


def row(case: str, spec: module.KernelSpec, target: Arch) -> Row | None:
    """None for a kernel without a loop of matrix products."""
    compiled = module.compile(spec, target)
    function = sass.functions(sass.disassemble(compiled.path))[spec.entry]
    if function.main is None:
        return None
    used = compiled.resources
    v, loop = spec.variant, function.main
    if isinstance(v, forward.ForwardSm90Variant | backward_sm90.BackwardSm90Variant):
        loop = function.loops[0]
        is_forward = isinstance(v, forward.ForwardSm90Variant)
        tile = forward.predicted(v, loop) if is_forward else backward_sm90.predicted(v, loop)
        shared, bound, use = tile.shared / tile.tensor, _bound_sm90(tile), tile.tensor_use
    else:
        of_warp = mma_model.predict(loop.path, target)
        shared, bound, use = of_warp.shared / of_warp.matrix, of_warp.bound, of_warp.tensor_use
    more = {
        "tile": _tile(spec.variant),
        "instructions": loop.shortest,
        "products": sum("MMA" in sass.opcode(x) for x in loop.path),
        "shared_over_matrix": round(shared, 3),
        "blocks": mma_model.blocks_per_sm(
            target,
            threads=spec.threads,
            registers=used.registers,
            smem_bytes=spec.smem_bytes + used.static_smem_bytes,
        ),
        "registers": used.registers,
        "spills": used.spill_stores + used.spill_loads,
        "tensor_use": round(use, 3),
        "bound": bound,
    }
    return Row("code", case, OURS, more=more)


def _bound_sm90(tile: Any) -> str:
    if tile.tensor_use > 1 - _MARGIN:
        return "matrix"
    return "waits" if tile.simulated > max(tile.shared, tile.mufu, tile.issue) else "shared"


def _tile(variant: Any) -> str:
    return " x ".join(str(getattr(variant.tile, field.name)) for field in dataclasses.fields(variant.tile))


def rows(names: Sequence[str] = ARCHES) -> Iterator[Row]:
    for name in names:
        target = arch.named(name)
        for case, spec in specs(target):
            if (found := row(case, spec, target)) is not None:
                yield found


def worse(before: Row, after: Row) -> list[str]:
    """What got worse from one row to another of the same case, in words.

    >>> old = Row("code", "a kernel", OURS, more=dict(instructions=500, products=100, shared_over_matrix=1.0, blocks=2,
    ...     spills=0, tensor_use=0.9))
    >>> new = Row("code", "a kernel", OURS, more={**old.more, "instructions": 550, "spills": 8})
    >>> worse(old, new)
    ['instructions a product: 5.00 to 5.50', 'spills: 0 to 8']
    >>> worse(old, old)
    []
    """
    a, b = before.more, after.more
    per_product = [x["instructions"] / x["products"] for x in (a, b)]
    found = []
    if per_product[1] > per_product[0] * (1 + _MARGIN):
        found.append(f"instructions a product: {per_product[0]:.2f} to {per_product[1]:.2f}")
    if b["shared_over_matrix"] > a["shared_over_matrix"] * (1 + _MARGIN):
        found.append(f"shared over matrix: {a['shared_over_matrix']} to {b['shared_over_matrix']}")
    if b["tensor_use"] < a["tensor_use"] * (1 - _MARGIN):
        found.append(f"tensor use: {a['tensor_use']} to {b['tensor_use']}")
    if b["blocks"] < a["blocks"]:
        found.append(f"blocks an SM: {a['blocks']} to {b['blocks']}")
    if b["spills"] > a["spills"]:
        found.append(f"spills: {a['spills']} to {b['spills']}")
    return found


def committed(folder: Path = RESULTS) -> tuple[Path, Results] | None:
    """The newest file of machine code."""
    found = [(path, results) for path, results in schema.read_all(folder) if results.gpu == STATIC]
    return found[-1] if found else None


def compared(before: Results, after: Sequence[Row]) -> list[str]:
    """Every line of what got worse; a row that is gone counts."""
    now = {row.case: row for row in after}
    lines = []
    for old in before.rows:
        new = now.get(old.case)
        lines += [f"{old.case}: gone"] if new is None else [f"{old.case}: {text}" for text in worse(old, new)]
    return lines


def page(results: Results) -> str:
    """For benchmarks/README.md: a row for each kernel with nothing unusual, d 64, 128 and 256."""
    head = ["", *(name for name, _ in COLUMNS)]
    shown = [row for row in results.rows if _SHOWN.fullmatch(row.case)]
    lines = [[row.case, *(show(row) for _, show in COLUMNS)] for row in shown]
    said = f"Worked out from machine code at commit {results.commit} by NVRTC {results.versions['nvrtc']}, with no GPU"
    said += " asked. These are models and no measurements; `cuflash bench code` prints all rows."
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    return f"{said}\n\n{table}"


def renew(folder: Path, because: str) -> int:
    """Write the file anew -> exit status: 1 where a row got worse and CHANGELOG.md does not say why."""
    results = schema.describe(STATIC)
    results.notes.append("worked out from machine code, with no GPU asked: no row is a speed; see machine_code.py")
    for found in rows():
        print(found.case, found.more["tile"], found.more["tensor_use"], file=sys.stderr)
        results.rows.append(found)
    before = committed(folder)
    lines = [] if before is None else compared(before[1], results.rows)
    if lines:
        print(*lines, sep="\n")
        if not because or because not in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"):
            print("worse than the file: give --because a reason that stands in CHANGELOG.md", file=sys.stderr)
            return 1
        results.more["worse_because"] = because
    path = schema.write(results, folder / f"static-{results.date[:10]}-{results.commit}.json")
    if before is not None and before[0] != path:
        before[0].unlink()
    print(f"written to {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write benchmarks/results/static-*.json anew.")
    parser.add_argument("--because", default="", help="Why a row got worse, as CHANGELOG.md says it.")
    return renew(RESULTS, parser.parse_args(arguments).because)


if __name__ == "__main__":
    raise SystemExit(main())
