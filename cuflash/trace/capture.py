"""What a mod captures, as it stands in the traced function: numbers and arrays as symbols, all else as a stand-in."""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import BY_NAME
from ..errors import TraceError
from .emit_numpy import evaluate
from .expr import Expr, scalar, walk
from .objects import (
    CallableObject,
    Elements,
    Function,
    Items,
    Library,
    Object,
    is_autograd_function,
    is_constant,
    is_library,
    is_module_of_torch,
    library_member,
    max_,
    min_,
    super_,
)
from .operands import Captured
from .reader import Script
from .symbols import Rows, Symbol


class Traceable:
    """What wraps a mod and says so: the function inside is followed."""

    function: Callable[..., Any]


class StaticInt(int):
    """Compiled into the kernel."""


class StaticFloat(float):
    """Compiled into the kernel."""


class Number(NamedTuple):
    """A captured number: `code` reads it again."""

    name: str
    kind: str
    value: int | float
    code: str


class Capture(Script):
    """What has been captured, and the reader's text that finds it again."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = False
        self.codes: set[types.CodeType] = set()
        self.wrapped: dict[str, Any] = {}
        self.seen: dict[int, tuple[Any, str, Any]] = {}
        self.captured: list[Captured] = []
        self.numbers: list[Number] = []
        self.bound: dict[int, str] = {}
        self.told: dict[str, None] = {}  # what `explain` says beside that

    # What symbols ask

    @property
    def names(self) -> dict[tuple[str, int], str]:
        found = {("load", c.slot): c.name for c in self.captured}
        return found | {("scalar", i): n.name for i, n in enumerate(self.numbers)}

    def concrete(self, x: Expr) -> Any:
        for leaf in walk(x):
            if leaf.op == "scalar":
                require_range(self.numbers[leaf.value])
                self.bound.setdefault(leaf.value, "Python needs its value (`if`, `range`, an index)")
        (value,) = evaluate([x], {}, (), [n.value if -(2**31) <= n.value < 2**31 or n.kind == "float" else 0
                                          for n in self.numbers], np.float64)  # fmt: skip
        return value.item()

    def extent(self, array: Captured, axis: int) -> Symbol:
        shape = self.read(array.variable, "{}.shape")
        variable = self.read(shape, f"{{}}[{axis}]")
        return self.wrap(int(array.array.shape[axis]), variable, f"{array.name}.shape[{axis}]")

    def same_extent(self, a: Captured, b: Captured) -> None:
        shapes = a.array.shape, b.array.shape
        if shapes[0][-1] != shapes[1][-1]:
            raise TraceError(
                f"a dot product of rows of {a.name}, {shapes[0][-1]} long, and of {b.name}, {shapes[1][-1]} long: they "
                "must be equally long"
            )
        self.unless(f"{a.variable}.shape[-1] != {b.variable}.shape[-1]")

    # Captured values

    def wrap(self, value: Any, variable: str, name: str) -> Any:
        """What stands for a captured value in the traced function; `variable` holds it in the reader."""
        if variable not in self.wrapped:
            self.wrapped[variable] = self._wrapped(value, variable, name)
        return self.wrapped[variable]

    def _wrapped(self, value: Any, variable: str, name: str) -> Any:
        kind = type(value)
        if value is None or kind is bool or value is Ellipsis or value is NotImplemented:
            self.unless(f"{variable} is not {self.constant(value)}")
            return value
        if kind in (StaticInt, StaticFloat, str, bytes, complex, slice, range):
            self.is_type(variable, value)
            if kind is StaticFloat:
                self.unless(f"{variable}.hex() != {self.constant(value.hex())}")
                return float(value)
            self.unless(f"{variable} != {self.constant(int(value) if kind is StaticInt else value)}")
            return int(value) if kind is StaticInt else value
        if isinstance(value, enum.Enum) or (isinstance(value, type) and is_library(value.__module__)):
            self.unless(f"{variable} is not {self.constant(value)}")
            return value
        if isinstance(value, int | float | np.generic):
            return self.number(value, variable, name)
        if id(value) in self.seen:
            _, first, found = self.seen[id(value)]
            self.unless(f"{variable} is not {first}")
            return found
        found = self.object(value, variable, name)
        self.seen[id(value)] = value, variable, found  # the value too: an id is its own only while it lives
        return found

    def number(self, value: Any, variable: str, name: str) -> Any:
        self.is_type(variable, value)
        code = variable
        if isinstance(value, np.generic):
            kind = value.dtype.kind
            code = f"{variable}.item()"
            if kind == "b":
                self.unless(f"{code} is not {bool(value)}")
                return bool(value)
            if kind not in "iuf" and "float" not in value.dtype.name:
                raise TraceError(f"captured {name} is a {type(value).__qualname__}: a mod knows ints, floats and bools")
            is_int = kind in "iu"
            code = code if isinstance(value.item(), int | float) else f"float({variable})"  # longdouble gives itself
        else:
            is_int = isinstance(value, int)
            code = code if type(value) in (int, float) else f"{'int' if is_int else 'float'}({variable})"
        self.numbers.append(Number(name, "int" if is_int else "float", int(value) if is_int else float(value), code))
        return Symbol(self, scalar(len(self.numbers) - 1, "int" if is_int else "float"))

    def object(self, value: Any, variable: str, name: str) -> Any:
        kind = type(value)
        if isinstance(value, Traceable):
            self.is_type(variable, value)
            return self.wrap(value.function, self.read(variable, "{}.function"), name)
        if is_array(value):
            return self.array(value, variable, name)
        if isinstance(value, types.ModuleType):
            self.unless(f"{variable} is not {self.constant(value)}") if is_library(value.__name__) else None
            self.torch |= value.__name__.partition(".")[0] == "torch"
            return Library(value) if is_library(value.__name__) else Object(self, value, variable, name)
        if isinstance(value, types.FunctionType):
            return self.function(value, variable, name)
        if isinstance(value, types.MethodType):
            return self.method(value, variable, name)
        if isinstance(value, functools.partial):
            self.is_type(variable, value)
            function = self.wrap(value.func, self.read(variable, "{}.func"), name)
            given, named = self.read(variable, "{}.args"), self.read(variable, "{}.keywords")
            self.unless(f"len({given}) != {len(value.args)}")
            self.unless(f"tuple({named}) != {self.constant(tuple(value.keywords))}")
            return functools.partial(
                function,
                *[self.wrap(x, self.read(given, f"{{}}[{i}]"), f"argument{i}") for i, x in enumerate(value.args)],
                **{key: self.wrap(x, self.read(named, f"{{}}[{key!r}]"), key) for key, x in value.keywords.items()},
            )
        if isinstance(value, Sequence):
            self.is_type(variable, value)
            if hasattr(value, "_fields"):
                elements = Elements(self, value, variable, name)
                return kind(*[elements[i] for i in range(len(value))])
            return Elements(self, value, variable, name)
        if isinstance(value, Mapping):
            self.is_type(variable, value)
            return Items(self, value, variable, name)
        if isinstance(value, set | frozenset):
            self.unless(f"{variable} != {self.constant(frozenset(value))}")
            return value
        inner = inspect.getattr_static(value, "__wrapped__", None) and getattr(value, "__wrapped__", None)
        if isinstance(inner, types.FunctionType):  # functools.cache, jax.jit
            self.is_type(variable, value)
            return self.wrap(inner, self.read(variable, "{}.__wrapped__"), name)
        owner = getattr(value, "__self__", None)
        if (
            owner is not None
            and not isinstance(owner, types.ModuleType | type)
            and isinstance(value, types.BuiltinMethodType | types.MethodWrapperType)
        ):
            self.unless(f"{variable}.__name__ != {self.constant(value.__name__)}")
            return getattr(self.wrap(owner, self.read(variable, "{}.__self__"), name), value.__name__)
        if is_library(getattr(value, "__module__", None) or kind.__module__) and not is_module_of_torch(kind):
            if callable(value) or is_constant(value):
                self.unless(f"{variable} {'is not' if callable(value) else '!='} {self.constant(value)}")
                return library_member(value, getattr(value, "__name__", name))
        return (CallableObject if callable(value) else Object)(self, value, variable, name)

    def array(self, value: Any, variable: str, name: str) -> Any:
        dtype = BY_NAME.get(str(value.dtype).rpartition(".")[2])
        if dtype is None:
            raise TraceError(f"captured {name} has dtype {value.dtype}: cast it to one of {', '.join(BY_NAME)}")
        captured = Captured(value, dtype, len(self.captured), name, variable)
        self.captured.append(captured)
        self.is_type(variable, value)
        self.torch |= type(value).__module__.partition(".")[0] == "torch"
        self.unless(f"{variable}.dtype != {self.constant(value.dtype)} or len({variable}.shape) != {captured.ndim}")
        rows = Rows(self, captured)
        return rows if captured.ndim else rows[()]

    def function(self, value: types.FunctionType, variable: str, name: str) -> Any:
        compiled = vars(value).get("_torchdynamo_orig_callable")
        if compiled is not None:  # by torch.compile
            self.is_type(variable, value)
            return self.wrap(compiled, self.read(variable, "{}._torchdynamo_orig_callable"), name)
        # A mod itself is followed wherever it was written.
        if is_library(value.__module__) and not value.__closure__ and variable not in ("s", "m"):
            self.unless(f"{variable} is not {self.constant(value)}")
            return library_member(value, value.__name__)
        return Function(self, value, variable, name)

    def method(self, value: types.MethodType, variable: str, name: str) -> Any:
        owner = value.__self__
        if is_autograd_function(owner) and value.__func__.__name__ == "apply":
            self.unless(f"{variable}.__self__ is not {self.constant(owner)}")
            return self.autograd(owner)
        if is_library(type(owner).__module__) and is_library(value.__func__.__module__):
            if not isinstance(owner, type) and not is_module_of_torch(type(owner)):  # torch.no_grad's, for one
                self.unless(f"{variable}.__func__ is not {self.constant(value.__func__)}")
                return value
        function = self.wrap(value.__func__, self.read(variable, "{}.__func__"), name)
        return functools.partial(function, self.wrap(owner, self.read(variable, "{}.__self__"), name))

    def autograd(self, owner: Any) -> Any:
        """An autograd.Function: its forward; cuflash differentiates what that computes."""
        self.told[
            f"{owner.__name__}.backward is not called: gradients are those of what {owner.__name__}.forward computes"
        ] = None
        forward = owner.forward
        if isinstance(forward, types.FunctionType):
            key = self.constant(owner)
            forward = Function(self, forward, self.read(key, "{}.forward"), owner.__name__)
        if any(
            "setup_context" in vars(base) for base in owner.__mro__[:-1] if base.__module__ != "torch.autograd.function"
        ):
            return forward
        nothing = lambda *args, **kwargs: None  # noqa: E731
        return functools.partial(
            forward,
            types.SimpleNamespace(
                save_for_backward=nothing,
                save_for_forward=nothing,
                mark_non_differentiable=nothing,
                set_materialize_grads=nothing,
                needs_input_grad=(),
            ),
        )

    def build(self, function: types.FunctionType, variable: str) -> types.FunctionType:
        """A copy of a function whose captured values are symbols."""
        code = function.__code__
        self.unless(f"{variable}.__code__ is not {self.constant(code)}")
        self.codes.update(_codes(code))
        globals_read, changed = _names(code)
        if changed:
            raise TraceError(
                f"{function.__name__} assigns to {changed[0]!r} outside of itself: a mod is called once, on symbols, "
                "so it must not change what it captures"
            )
        cells = []
        for i, (name, cell) in enumerate(zip(code.co_freevars, function.__closure__ or (), strict=True)):
            try:
                value = cell.cell_contents
            except ValueError:
                cells.append(types.CellType())
                continue
            if name == "__class__":  # what super() needs
                cells.append(cell)
                continue
            path = self.read(self.read(variable, "{}.__closure__"), f"{{}}[{i}].cell_contents")
            cells.append(types.CellType(self.wrap(value, path, name)))
        space = function.__globals__
        own: dict[str, Any] = {name: space[name] for name in ("__name__", "__package__", "__spec__") if name in space}
        own["__builtins__"] = {**vars(builtins), "min": min_, "max": max_, "super": super_, "__import__": self.imported}
        for name in globals_read:
            if name in space:
                path = self.read(self.read(variable, "{}.__globals__"), f"{{}}[{name!r}]")
                own[name] = self.wrap(space[name], path, name)
        names = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__
        if defaults:
            path = self.read(variable, "{}.__defaults__")
            self.unless(f"len({path}) != {len(defaults)}")
            first = len(names) - len(defaults)
            defaults = tuple(
                self.wrap(value, self.read(path, f"{{}}[{i}]"), names[first + i]) for i, value in enumerate(defaults)
            )
        else:
            self.unless(f"{variable}.__defaults__")
        if not function.__kwdefaults__:
            self.unless(f"{variable}.__kwdefaults__")
        copy = types.FunctionType(code, own, function.__name__, defaults, tuple(cells))
        if function.__kwdefaults__:
            path = self.read(variable, "{}.__kwdefaults__")
            copy.__kwdefaults__ = {
                name: self.wrap(value, self.read(path, f"{{}}[{name!r}]"), name)
                for name, value in function.__kwdefaults__.items()
            }
        return copy

    def imported(self, *args: Any, **kwargs: Any) -> Any:
        """What `import` gives inside of a mod."""
        module = builtins.__import__(*args, **kwargs)
        return self.wrap(module, self.constant(module), module.__name__)


def require_range(number: Number) -> None:
    """Raises TraceError for an int that kernels cannot have."""
    if number.kind == "int" and not -(2**31) <= number.value < 2**31:
        raise TraceError(
            f"captured {number.name} = {number.value} does not fit 32 bits, in which mods compute: capture "
            f"float({number.name}), or an int that fits"
        )


def is_array(x: Any) -> bool:
    """An array of any framework, as the tracer sees it: by its shape, its dtype and a protocol that gives its memory.

    >>> is_array(np.zeros(3)), is_array(np.float32(3)), is_array([3])
    (True, False, False)
    """
    kind = type(x)
    return (
        hasattr(kind, "shape")
        and hasattr(kind, "dtype")
        and not isinstance(x, np.generic | type)
        and any(
            hasattr(kind, name) for name in ("__dlpack__", "__array__", "__jax_array__", "__cuda_array_interface__")
        )
    )


@lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globals a function reads, its inner functions included, and the outer names it assigns to."""
    read: dict[str, None] = {}
    changed: dict[str, None] = {}
    for inner in _codes(code):
        for step in dis.get_instructions(inner):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read[step.argval] = None
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                changed[step.argval] = None
            elif step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars:
                changed[step.argval] = None
    return tuple(read), tuple(changed)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _codes(value)
