"""`%%cuflash_kernel` and `%%cuflash_mod`: a cell of CUDA C becomes a kernel, compiled, checked and counted at once.

    %load_ext cuflash.workbench

    %%cuflash_kernel NAME --arguments EXPRESSION [--grid EXPRESSION] [--smem EXPRESSION] [--reference EXPRESSION]
        `workbench.kernel` of the cell's text, as the variable NAME

    %%cuflash_mod NAME BASE TARGET
        the kernel in the variable BASE, in which TARGET, a file ("tile/softmax.cuh") or a function
        ("OnlineSoftmax::update"), has the cell's text, as the variable NAME

NAME is assigned before anything is compiled, so that it may be looked at where it fails. A message that concerns the
cell calls it "cell NAME", with the cell's own line numbers, the magic being line 1.
"""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from ..errors import ArgumentError, CuflashError
from . import report
from .given import SECONDS
from .kernel import Kernel, kernel

_FIRST_LINE = 2  # of a cell's text: the magic stands in the first


@magics_class
class Workbench(Magics):
    """The magics, registered by `%load_ext cuflash.workbench`."""

    @magic_arguments()
    @argument("name", help="variable that receives the kernel")
    @argument("--arguments", "-a", required=True, help="expression of a dict: a value for each field of the params")
    @argument("--grid", "-g", default="1", help="expression: blocks, (x, y, z) or fewer")
    @argument("--smem", "-s", default="0", help="expression: bytes of dynamic shared memory of a block")
    @argument("--reference", "-r", default="None", help="expression of a function of the arguments: the right result")
    @argument("--tolerance", "-t", default="None", help="expression: largest error, as a share of the largest result")
    @argument("--compile-only", "-c", action="store_true", help="do not run it")
    @argument("--seconds", type=float, default=SECONDS, help="that compiling or running may take")
    @cell_magic
    def cuflash_kernel(self, line: str, cell: str) -> report.Report | None:
        """A kernel of your own, compiled, checked and counted. The cell is its text; see `workbench.kernel`."""
        given = parse_argstring(self.cuflash_kernel, line)

        def make() -> Kernel:
            return kernel(
                cell,
                self._value(given.arguments),
                grid=self._value(given.grid),
                smem_bytes=self._value(given.smem),
                reference=self._value(given.reference),
                tolerance=self._value(given.tolerance),
                label=f"cell {given.name}",
                first_line=_FIRST_LINE,
            )

        return self._shown(given, make, None)

    @magic_arguments()
    @argument("name", help="variable that receives the kernel")
    @argument("base", help="variable that holds the kernel to start from")
    @argument("target", help='what the cell replaces: a file, "tile/softmax.cuh", or a function, "Softmax::update"')
    @argument("--compile-only", "-c", action="store_true", help="do not run it")
    @argument("--seconds", type=float, default=SECONDS, help="that compiling or running may take")
    @cell_magic
    def cuflash_mod(self, line: str, cell: str) -> report.Report | None:
        """A kernel with one file or function replaced by the cell, compiled, checked, and what it costs beside BASE."""
        given = parse_argstring(self.cuflash_mod, line)
        assert self.shell is not None
        names = self.shell.user_ns
        base = names.get(given.base)

        def make() -> Kernel:
            if given.base not in names:
                raise ArgumentError(f"there is no {given.base}: name a kernel, of workbench.load say")
            if not isinstance(base, Kernel):
                raise ArgumentError(f"{given.base} is a {type(base).__name__}: name a kernel, of workbench.load say")
            change = base.replace if given.target in base.files else base.replace_function
            return change(given.target, cell, label=f"cell {given.name}", first_line=_FIRST_LINE)

        return self._shown(given, make, base)

    def _value(self, expression: str) -> Any:
        assert self.shell is not None
        try:
            return self.shell.ev(expression.strip("\"'") if expression[:1] in "\"'" else expression)
        except Exception as error:
            raise ArgumentError(f"{expression}: {type(error).__name__}: {error}") from error

    def _shown(self, given: Any, make: Any, base: Kernel | None) -> report.Report | None:
        assert self.shell is not None
        try:
            made: Kernel = make()
            self.shell.push({given.name: made})
            if given.compile_only:
                made.compile(seconds=given.seconds)
                return None
            check, counts = made.measure(seconds=given.seconds)
            before = None if base is None else _counted(base, given.seconds)
            return Tried(check, counts, before)
        except CuflashError as error:
            # What IPython shows instead of a traceback through this package.
            said = f"{type(error).__name__}: {error}"
            error._render_traceback_ = lambda: said.splitlines()  # type: ignore[attr-defined]
            raise


def _counted(base: Kernel, seconds: float) -> report.Counts | None:
    """What the version before costs; nothing where that one fails."""
    try:
        return base.counters(seconds=seconds)
    except CuflashError:
        return None


class Tried(report.Report):
    """What a cell with a kernel shows: right or wrong, and its costs, beside those of the version before."""

    def __init__(self, check: report.Check | None, counts: report.Counts, before: report.Counts | None) -> None:
        self.check = check
        self.counts = counts
        self.before = before

    def __rich__(self) -> Any:
        from rich.console import Group

        parts: list[Any] = [] if self.check is None else [self.check]
        if self.before is None:
            parts.append(self.counts)
        else:
            parts.append(report.Diff("", report.pairs(self.before.totals, self.counts.totals)))
        return Group(*parts)


def register(shell: Any) -> None:
    """Makes the magics known to an IPython shell."""
    shell.register_magics(Workbench)
