"""`cuflash compile`: every kernel to cubins for named architectures, without a GPU, and what they use."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import arch as arches
from ..arch import Arch
from ..errors import ArgumentError, CompileError, UnsupportedError
from ..jit import cache, module, nvrtc, sass, variant
from ..ops import backward_sm90, forward
from ..settings import config

THREADS = 2  # NVRTC needs about 200 MB a compile
DEFAULT_ARCHES = ("sm_80", "sm_90a")


def specs(arch: Arch) -> list[module.KernelSpec]:
    """Every kernel that runs on `arch`, with representative Variants."""
    from ..ops import append, backward, decode, dropout_mask, write_kv

    tiled = (
        *(ops.representative(arch) for ops in (forward, backward, append, decode, write_kv)),
        forward.representative_sm90(arch),
        backward_sm90.representative(arch),
    )
    return [*(spec for specs in tiled for spec in specs), dropout_mask.SPEC]


def compile_kernels(
    arch: Annotated[list[str] | None, typer.Option(help="Architecture, e.g. sm_80 or sm_90a; may be repeated.")] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    out: Annotated[Path | None, typer.Option(help="A folder to put the cubins into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile every kernel and representative Variant to cubins, without a GPU, and report what they use."""
    targets = [arches.named(name) for name in arch or DEFAULT_ARCHES]
    for target in targets:
        nvrtc.require_arch(target)
    jobs = [(spec, target) for target in targets for spec in specs(target) if kernel in spec.name]
    if not jobs:
        names = sorted({spec.name for target in targets for spec in specs(target)})
        raise ArgumentError(f"--kernel {kernel}: no kernel's name contains it; there are {', '.join(names)}")
    rows = _with_progress(jobs, lambda spec, target: report(spec, target, out))
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def report(spec: module.KernelSpec, arch: Arch, out: Path | None = None) -> dict[str, Any]:
    """One kernel's row. `sass` counts its opcodes by class, `loops` those of each innermost loop with matrix products.
    Where warps have roles: `consumer_spills` and `producer_spills`, accesses to local memory; `loop_instructions`, of a
    plain tile; of a forward also `maxima_in_window`, comparisons for rows' maxima in the main loop that run under its
    products, and all, and `ex2_in_window`, the same of exponentials;
    `tensor_use`, the share of the time that the tensor cores can be busy, predicted (jit/sm_model.py), not measured.

    `error` is None, or why it did not compile; then the measurements are None.
    """
    row: dict[str, Any] = {
        "kernel": spec.name,
        "arch": arch.name,
        "variant": variant.describe(spec.variant) if spec.variant is not None else "",
        "threads": spec.threads,
        **dict.fromkeys(("registers", "spill_stores", "spill_loads", "stack_bytes", "smem_bytes", "compile_ms")),
        "cached": False,
        "warnings": [],
        "cubin": None,
        "sass": None,
        "loops": None,
        **dict.fromkeys(("consumer_spills", "producer_spills", "maxima_in_window", "ex2_in_window")),
        **dict.fromkeys(("loop_instructions", "tensor_use")),
        "error": None,
    }
    try:
        compiled = module.compile(spec, arch)
    except CompileError as error:
        row["error"] = str(error)
        return row
    used = compiled.resources
    row.update(
        registers=used.registers,
        spill_stores=used.spill_stores,
        spill_loads=used.spill_loads,
        stack_bytes=used.stack_bytes,
        smem_bytes=used.static_smem_bytes + spec.smem_bytes,
        compile_ms=round(compiled.cubin.compile_ms, 1),
        cached=compiled.cached,
        warnings=list(compiled.cubin.warnings),
    )
    code = _machine_code(compiled)
    if code is not None:
        row.update(sass=code.counts, loops=[loop.counts for loop in code.loops])
        if code.local_by_role is not None and code.loops:
            main = code.loops[0]
            row["consumer_spills"], row["producer_spills"] = code.local_by_role
            row["loop_instructions"] = main.shortest
            if isinstance(spec.variant, forward.ForwardSm90Variant):
                row.update(maxima_in_window=main.in_window("FMNMX"), ex2_in_window=main.in_window("MUFU.EX2"))
                row["tensor_use"] = round(forward.predicted(spec.variant, main).tensor_use, 3)
            elif isinstance(spec.variant, backward_sm90.BackwardSm90Variant):
                row["tensor_use"] = round(backward_sm90.predicted(spec.variant, main).tensor_use, 3)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{spec.name}.{arch.name}.{cache.key_of(compiled.text)[:10]}.cubin"
        shutil.copyfile(compiled.path, path)
        row["cubin"] = str(path)
    return row


def _machine_code(compiled: module.Compiled) -> sass.Function | None:
    """The kernel's instructions; None where they cannot be read (no nvdisasm)."""
    try:
        return sass.functions(sass.disassemble(compiled.path)).get(compiled.spec.entry)
    except (CompileError, UnsupportedError):
        return None


def _with_progress(
    jobs: list[tuple[module.KernelSpec, Arch]], work: Callable[[module.KernelSpec, Arch], dict[str, Any]]
) -> list[dict[str, Any]]:
    """`work` of every job, two at a time, in the jobs' order."""
    from rich.console import Console
    from rich.progress import Progress

    if config.on_compile == "progress":
        config.on_compile = "quiet"  # the bar below says it
    with ThreadPoolExecutor(THREADS) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=len(jobs))
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            for _ in as_completed(futures):
                progress.advance(bar)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    opcodes = ("HMMA", "HGMMA", "MUFU", "LDSM", "LDGSTS", "LDL", "STL")
    table = Table("kernel", "arch", "variant")
    for heading in ("registers", "spills", "stack", "smem KB", "ms", *opcodes):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["error"]:
            table.add_row(row["kernel"], row["arch"], row["variant"], "[red]failed[/red]")
            continue
        counts = [str(row["sass"][c]) if row["sass"] else "?" for c in opcodes]
        table.add_row(
            row["kernel"], row["arch"], row["variant"],
            str(row["registers"]), f"{row['spill_stores']}/{row['spill_loads']}", str(row["stack_bytes"]),
            f"{row['smem_bytes'] / 1024:.1f}", f"{row['compile_ms']:.0f}{' cached' if row['cached'] else ''}", *counts,
        )  # fmt: skip
    # Piped into a file the table keeps its width; on a terminal it folds.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for row in rows:
        for line in [*row["warnings"], *([row["error"]] if row["error"] else [])]:
            print(f"{row['kernel']} {row['arch']}: {line}")
    if any(row["sass"] is None and not row["error"] for row in rows):
        print("Instructions were not counted: pip install nvidia-cuda-nvdisasm")
