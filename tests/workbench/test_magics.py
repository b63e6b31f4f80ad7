"""The magics in an IPython shell, without a notebook: what a cell assigns, shows, and says where it fails."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("IPython")
from IPython.core.interactiveshell import InteractiveShell

from cuflash import workbench
from cuflash.errors import ArgumentError, CompileError, EmulatorError

CELL = """\
%%cuflash_kernel twice --arguments call --reference "lambda x, y: 2 * x" --smem 4*64
struct Params {
  const float* x;
  float* y;
};
HW_KERNEL(64) twice(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));
}
"""
MOD = """\
%%cuflash_mod NAME twice twice
HW_KERNEL(64) twice(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  BODY
}
"""


@pytest.fixture(scope="module")
def shell() -> InteractiveShell:
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "cuflash.workbench")
    x = np.arange(64, dtype=np.float32)
    shell.push({"call": {"x": x, "y": 0 * x}})
    run(shell, CELL)
    return shell


def run(shell: InteractiveShell, cell: str):
    line, body = cell.split("\n", 1)
    name, arguments = line.removeprefix("%%").split(" ", 1)
    return shell.run_cell_magic(name, arguments, body)


def mod(shell: InteractiveShell, name: str, body: str):
    return run(shell, MOD.replace("NAME", name).replace("BODY", body))


def test_a_cell_becomes_a_kernel_and_shows_whether_it_is_right(shell) -> None:
    shown = run(shell, CELL)
    assert shown.check and "right" in str(shown) and "global bytes read" in str(shown)
    kernel = shell.user_ns["twice"]
    assert isinstance(kernel, workbench.Kernel) and kernel.problem.spec.smem_bytes == 256


def test_a_mod_shows_what_changed(shell) -> None:
    shown = mod(shell, "slow", "hw::sync_threads(); hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));")
    assert shown.check
    assert "barriers" in str(shown) and "+1" in str(shown) and "global bytes read" not in str(shown)
    shown = mod(shell, "wrong", "hw::store_global(p.y + i, hw::load_global(p.x + i));")
    assert not shown.check and "WRONG: 63 of 64" in str(shown)


def test_messages_point_at_the_line_of_the_cell(shell) -> None:
    with pytest.raises(CompileError, match=r"cell bad:4: ") as raised:
        mod(shell, "bad", "hw::store_global(p.y + i, z);")
    assert "  >    4 |   hw::store_global(p.y + i, z);" in str(raised.value)
    # IPython shows the message, and no traceback through this package.
    assert raised.value._render_traceback_()[0].startswith("CompileError: ")
    assert "z" in shell.user_ns["bad"].function("twice"), "it is there to be looked at"
    with pytest.raises(EmulatorError, match=r"out of bounds: .* at cell far:4") as raised:
        mod(shell, "far", "hw::store_global(p.y + i + 1, 0.0f);")
    assert "  >    4 |   hw::store_global(p.y + i + 1, 0.0f);" in str(raised.value)


def test_a_file_is_replaced_by_a_cell(shell) -> None:
    cell = f"%%cuflash_mod other twice twice.cu\n{CELL.split(chr(10), 1)[1].replace('2.0f *', '2.0f * 1.0f *')}"
    assert run(shell, cell).check
    assert "2.0f * 1.0f" in shell.user_ns["other"].function("twice")


def test_compile_only(shell) -> None:
    assert run(shell, MOD.replace("twice twice", "twice twice -c").replace("NAME", "c").replace("BODY", "")) is None


def test_a_base_that_is_no_kernel_is_refused(shell) -> None:
    with pytest.raises(ArgumentError, match="call is a dict"):
        run(shell, "%%cuflash_mod x call twice\nint y;")
    with pytest.raises(ArgumentError, match="there is no call2: name a kernel"):
        run(shell, "%%cuflash_mod x call2 twice\nint y;")


def test_an_expression_that_fails_is_a_message(shell) -> None:
    with pytest.raises(ArgumentError, match="call2: NameError: name 'call2' is not defined") as raised:
        run(shell, CELL.replace("--arguments call", "--arguments call2"))
    assert len(raised.value._render_traceback_()) == 1
