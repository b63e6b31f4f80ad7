"""What a launch on the driver stand-in runs: of cuflash's kernels the emulator's twin, of CuPy's what NumPy has.

A launch is known by its function's cubin: `module.compile` made it from a KernelSpec, of which the emulator compiles
the twin, and runs it over the same addresses. CuPy's own kernels (a fill, a copy, a comparison) are not compiled:
their text is read for name and arguments, and `host_kernels` does what they say.
"""

from __future__ import annotations

import contextlib
import ctypes
import traceback
from typing import Any

from . import host_kernels, stand_in

_SUCCESS = 0
_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED

errors: list[BaseException] = []  # what kernels failed with since somebody last looked
_compiled: dict[str, Any] = {}  # by the cubin's path


def install() -> None:
    from cuflash.jit import module

    compile = module.compile

    def remembered(*arguments: Any, **keywords: Any) -> Any:
        compiled = compile(*arguments, **keywords)
        _compiled[str(compiled.path)] = compiled
        return compiled

    module.compile = remembered
    host_kernels.install()
    stand_in.on_launch(_run)


def _run(
    path: bytes, name: bytes, device: int, shape: Any, arguments: int, size: int, stream: int, status: Any
) -> None:
    """Ctrl-C is not the kernel's fault: the status stays as it is, and the driver sees to it that Python raises it."""
    with contextlib.suppress(KeyboardInterrupt):
        try:
            if (module := path.decode()).startswith(host_kernels.PATH):
                host_kernels.run(module, arguments)
            else:
                _emulate(module, name.decode(), tuple(shape[:7]), ctypes.string_at(arguments, size))
            status[0] = _SUCCESS
        except Exception as error:  # nothing may be raised through C
            traceback.print_exc()
            errors.append(error)
            status[0] = _FAILED


def _emulate(path: str, name: str, shape: tuple[int, ...], params: bytes) -> None:
    from cuflash import emulator
    from cuflash.jit import layout, module

    compiled = _compiled[path]
    x, y, z, *block, shared = shape
    assert block == [compiled.spec.threads, 1, 1], f"{name} was launched with blocks of {block}"
    kernel = module.load(compiled.spec, compiled.arch, "emulator")
    expected = layout.parse(kernel.text, compiled.spec.params).size
    assert len(params) == expected, f"{name} has {len(params)} bytes of arguments, its twin {expected}"
    memory = [module.Buffer(f"memory at {begin:#x}", begin, size, True) for begin, size in stand_in.blocks()]
    emulator.launch(kernel.path, name, (x, y, z), block[0], shared, params, memory, text=kernel.text)
