"""The command line: `cuflash` or `python -m cuflash`. Each command is the function of a file beside this one."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ..errors import ArgumentError, CuflashError
from ..settings import config


def app() -> typer.Typer:
    """The typer application with every command.

    >>> sorted(command.name for command in app().registered_commands)
    ['bench', 'bench-compare', 'bench-report', 'cache', 'compile', 'demo', 'device-check', 'doctor', 'explain']
    """
    from .bench import bench, bench_compare, bench_report
    from .cache import cache
    from .compile import compile_kernels
    from .demo import demo
    from .device_check import device_check
    from .doctor import doctor
    from .explain import explain

    application = typer.Typer(
        name="cuflash",
        help="FlashAttention as a CuPy raw-kernel runtime library.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    application.callback()(_common)
    application.command("demo")(demo)
    application.command("doctor")(doctor)
    application.command("explain")(explain)
    application.command("compile")(compile_kernels)
    application.command("cache")(cache)
    application.command("bench")(bench)
    application.command("bench-report")(bench_report)
    application.command("bench-compare")(bench_compare)
    application.command("device-check")(device_check)
    return application


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cuflash {sys.modules['cuflash'].__version__}")  # the package is above the command line
        raise typer.Exit()


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """FlashAttention as a CuPy raw-kernel runtime library."""


def main() -> None:
    """Run the command line. An error of cuflash's own is a line on stderr and no traceback; the exit status is 2 for a
    wrong argument, 1 for everything else that fails."""
    if not os.environ.get("CUFLASH_ON_COMPILE"):
        config.on_compile = "quiet"  # a command shows by itself how far it is
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a pipe, too: whoever reads there sees each line at once
    try:
        app()(prog_name="cuflash")
    except CuflashError as error:
        print(f"cuflash: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
