"""`install()` and `uninstall()`: entries of `sys.modules` under flash-attn's names, and a distribution for
`importlib.metadata`; nothing else of the process."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ArgumentError, UnsupportedError

VERSION = "2.8.3"  # of flash-attn, whose names and signatures these are

_ROOT = "flash_attn"
_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
# What each module serves: the file beside this one that has it, and the names. Parents come before what is in them; one
# without a file is a package of packages.
_SERVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "flash_attn": ("interface", _FUNCTIONS),
    "flash_attn.flash_attn_interface": (
        "interface",
        (
            *_FUNCTIONS,
            "_flash_attn_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_forward",
            "_flash_attn_varlen_backward",
        ),
    ),
    "flash_attn.bert_padding": (
        "bert_padding",
        (
            "index_first_axis",
            "index_first_axis_residual",
            "index_put_first_axis",
            "pad_input",
            "rearrange",
            "unpad_input",
            "unpad_input_for_concatenated_sequences",
        ),
    ),
    "flash_attn.layers": ("", ()),
    "flash_attn.layers.rotary": (
        "rotary",
        (
            "RotaryEmbedding",
            "apply_rotary",
            "apply_rotary_emb",
            "apply_rotary_emb_func",
            "apply_rotary_emb_kv_",
            "apply_rotary_emb_qkv_",
            "apply_rotary_emb_torch",
            "rotate_half",
        ),
    ),
    "flash_attn.modules": ("", ()),
    "flash_attn.modules.mha": ("mha", ("FlashCrossAttention", "FlashSelfAttention", "get_alibi_slopes")),
    "flash_attn.ops": ("", ()),
    "flash_attn.ops.triton": ("", ()),
    "flash_attn.ops.triton.rotary": ("rotary", ("apply_rotary",)),
}

_placed: dict[str, ModuleType] = {}  # our entries of sys.modules; empty where nothing is installed
_hidden: dict[str, Any] = {}  # the entries under flash-attn's names that were there before


def install(*, force: bool = False) -> AbstractContextManager[Any]:
    """Make `import flash_attn`, and the import of its submodules, find cuflash's functions. Imports PyTorch.

    Until `uninstall()`, or as a context manager until the block ends. A second call changes nothing, and neither does
    the end of its block. Names that other code imported stay with that code.

    `flash_attn.__version__` is "2.8.3"; `importlib.util.find_spec("flash_attn")` finds the module, and
    `importlib.metadata.version("flash_attn")` answers the same version.

    Raises `ArgumentError` where another flash_attn is installed or imported, unless `force` is True: that one is then
    hidden until `uninstall()`. Raises `UnsupportedError` without PyTorch.
    """
    if not isinstance(force, bool):
        raise ArgumentError(f"force={force!r} must be True or False: True hides another flash_attn")
    if _placed:
        return nullcontext()
    if not force and (found := _another()):
        raise ArgumentError(
            f"another flash_attn is {found}, which install() would hide: pass force=True to hide it until "
            "uninstall(), or import cuflash's functions by their own names"
        )
    modules = _made()
    before = {name: module for name, module in sys.modules.items() if _is_flash_attn(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    _hidden.update(before)
    _placed.update(modules)
    sys.meta_path.insert(0, _DISTRIBUTIONS)
    until_exit = ExitStack()
    until_exit.callback(uninstall)
    return until_exit


def uninstall() -> None:
    """Undo `install()`: the entries of `sys.modules` under flash-attn's names are again what they were before it, and
    `importlib.metadata` lists again what pip installed.

    Does nothing where nothing is installed.
    """
    if _DISTRIBUTIONS in sys.meta_path:
        sys.meta_path.remove(_DISTRIBUTIONS)
    for name, module in _placed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    sys.modules.update(_hidden)
    _placed.clear()
    _hidden.clear()


def _is_flash_attn(name: str) -> bool:
    return name == _ROOT or name.startswith(f"{_ROOT}.")


def _another() -> str:
    """Where another flash_attn is, for a message; "" where there is none."""
    imported = [module for name, module in sys.modules.items() if _is_flash_attn(name) and module is not None]
    if imported:
        module = imported[0]
        return f"imported ({module.__name__} from {getattr(module, '__file__', None) or 'memory'})"
    spec = importlib.util.find_spec(_ROOT)
    if spec is None:
        return ""
    return f"installed ({spec.origin or ', '.join(spec.submodule_search_locations or ())})"


def _made() -> dict[str, ModuleType]:
    """Fresh modules under flash-attn's names."""
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(
            "flash_attn's functions take PyTorch tensors, and PyTorch is not installed: install it, or call "
            "cuflash.flash_attn_func and its like, which take NumPy, CuPy and JAX arrays"
        )
    made: dict[str, ModuleType] = {}
    for name, (file, names) in _SERVED.items():
        ours = importlib.import_module(f".{file}", __package__) if file else None
        members = {member: getattr(ours, member) for member in names}
        if name == _ROOT:
            members["__version__"] = VERSION
        is_package = any(other.startswith(f"{name}.") for other in _SERVED)
        spec = ModuleSpec(name, _Loader(members), origin="cuflash", is_package=is_package)
        module = importlib.util.module_from_spec(spec)
        module.__doc__ = ours.__doc__ if ours else "cuflash's, under flash-attn's name."
        spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
        made[name] = module
    return made


class _Distribution(metadata.Distribution):
    """What `importlib.metadata` says of flash-attn while it is installed here: its name and version, and no files."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: {_ROOT}\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).with_name(str(path))


class _Distributions(metadata.DistributionFinder):
    """Finds that one distribution, before those of the path; modules are found in `sys.modules`."""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        asked = None if context is None else context.name
        named = asked is None or re.sub(r"[-_.]+", "_", asked).lower() == _ROOT
        return [_Distribution()] if named else []


_DISTRIBUTIONS = _Distributions()


class _Loader(importlib.abc.Loader):
    """What a module's spec needs, so that `find_spec` finds a module and not a namespace."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = members

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._members)
