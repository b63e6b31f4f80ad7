"""What stands for captured objects in a traced function: each looks like what it stands for, and says what was read.

Every stand-in knows the variable that holds its object in the reader of the trace, so that what is reached through it
(an element, an attribute, what a method captures) is read again along the same path.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import TraceError
from .expr import Expr, leaves
from .names import FUNCTIONS, name_of
from .symbols import Symbol, call, traced

_LIBRARIES = {"numpy", "torch", "jax", "jaxlib", "cupy", "ml_dtypes", *sys.stdlib_module_names} - {"__main__"}


def is_library(module: Any) -> bool:
    """Code whose values do not change: it runs as it is, and meets symbols through the frameworks' protocols."""
    name = str(module)
    return name.partition(".")[0] in _LIBRARIES or name.startswith("cuflash.trace.")


def is_constant(x: Any) -> bool:
    """An object of a library that never changes: what equals it today is it."""
    return isinstance(x, np.dtype | numbers.Number) or f"{type(x).__module__}.{type(x).__qualname__}" in _CONSTANTS


_CONSTANTS = ("torch.dtype", "torch.device", "torch.layout", "torch.memory_format", "jaxlib._jax.Device", "re.Pattern")


def is_module_of_torch(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == "torch.nn.modules.module.Module" for base in kind.__mro__)


def is_autograd_function(x: Any) -> bool:
    """Whether it is a class derived from torch.autograd.Function."""
    return any(
        f"{base.__module__}.{base.__qualname__}" == "torch.autograd.function.Function"
        for base in (x.__mro__ if isinstance(x, type) else ())
    )


class Following(Protocol):
    """What stand-ins ask of the trace they belong to. A variable is one of the reader's."""

    def read(self, parent: str, text: str) -> str:
        """The variable that holds `text` of a parent variable, "{}" in it."""
        ...

    def unless(self, condition: str) -> None:
        """The trace holds no longer where a condition is true."""
        ...

    def constant(self, value: Any) -> str:
        """The name under which the reader has a value of today."""
        ...

    def is_type(self, variable: str, value: Any) -> None:
        """The trace holds while the variable has a value of this one's type."""
        ...

    def wrap(self, value: Any, variable: str, name: str) -> Any:
        """What stands for a captured value in the traced function."""
        ...

    def build(self, function: types.FunctionType, variable: str) -> types.FunctionType:
        """A copy of a function whose captured values are symbols."""
        ...

    def concrete(self, x: Expr) -> Any:
        """The value of an expression of captured numbers alone, which become constants of this trace."""
        ...


class Library:
    """A module of NumPy, torch, JAX or Python, whose functions take symbols under the names of `FUNCTIONS`."""

    def __init__(self, module: types.ModuleType) -> None:
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, types.ModuleType):
            return Library(value) if is_library(value.__name__) else value
        return library_member(value, name)

    def __repr__(self) -> str:
        return repr(self._module)


def library_member(value: Any, name: str) -> Any:
    """A function of a library as a mod calls it; anything else as it is."""
    if not callable(value) or isinstance(value, type) or traced(value):
        return value
    known = name_of(value) if hasattr(value, "_qualified_op_name") else name
    if known in FUNCTIONS:
        return Named(value, known)
    if isinstance(value, types.FunctionType):
        return value  # it may be made of functions that are known
    return Named(value, known)


_DEFAULTS = {("jax", "gelu"): {"approximate": True}}  # where a framework's are not those of the others


class Named:
    """A library's function: what the table says where a symbol is among the arguments, else itself."""

    def __init__(self, function: Any, name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(map(traced, args)) or any(map(traced, kwargs.values())):
            module = (getattr(self._function, "__module__", None) or "torch").partition(".")[0]
            of_python = module in sys.stdlib_module_names or module == "builtins"
            if of_python and (module != "math" or all(_is_captured_number(x) for x in args)):
                return self._function(*args, **kwargs)  # it uses operators, or the values of captured numbers
            kwargs = _DEFAULTS.get((module, self._name), {}) | kwargs
            return call(self._name, args, kwargs, f"{'np' if module == 'numpy' else module}.{self._name}")
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __repr__(self) -> str:
        return repr(self._function)


def _is_captured_number(x: Any) -> bool:
    return type(x) is not Symbol or leaves(x.expr) <= {"scalar"}


def _extreme(op: str, python: Callable[..., Any]) -> Callable[..., Any]:
    """Python's min and max, which would branch."""

    def function(*args: Any, **kwargs: Any) -> Any:
        found = args if len(args) > 1 else tuple(args[0]) if args and not traced(args[0]) else args
        if kwargs or not any(traced(x) for x in found):
            return python(*args, **kwargs)
        return functools.reduce(lambda a, b: call(op, (a, b), {}, op), found)

    return function


min_, max_ = _extreme("minimum", min), _extreme("maximum", max)


class Function:
    """A captured function: its traced copy is made when it is first called."""

    def __init__(self, trace: Following, function: types.FunctionType, variable: str, name: str) -> None:
        self._trace, self._function, self._variable, self._name, self._built = trace, function, variable, name, None
        self.__name__ = function.__name__
        trace.is_type(variable, function)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._built is None:
            self._built = self._trace.build(self._function, self._variable)
        return self._built(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._function, name)
        return self._trace.wrap(value, self._trace.read(self._variable, f"{{}}.{name}"), f"{self._name}.{name}")

    def __repr__(self) -> str:
        return repr(self._function)


class Elements(Sequence):
    """A captured tuple or list."""

    def __init__(self, trace: Following, value: Any, variable: str, name: str) -> None:
        self._trace, self._value, self._variable, self._name = trace, value, variable, name

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._value)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is Symbol and not leaves(index.expr) <= {"scalar"}:
            raise TraceError(
                f"the {type(self._value).__name__} {self._name} is indexed by {index!r}, which is known only in the "
                "kernel: make it an array (np.array, torch.tensor) outside of the mod"
            )
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self._value))[index]  # IndexError as of the list itself
        i = int(index)
        path = self._trace.read(self._variable, f"{{}}[{i}]")
        return self._trace.wrap(self._value[place], path, f"{self._name}[{i}]")

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name, list)

    def __len__(self) -> int:
        self._trace.unless(f"len({self._variable}) != {len(self._value)}")
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])

    def __add__(self, other: Any) -> Any:
        return [*self, *other] if isinstance(self._value, list) else (*self, *other)

    def __radd__(self, other: Any) -> Any:
        return [*other, *self] if isinstance(self._value, list) else (*other, *self)

    def __repr__(self) -> str:
        return repr(list(self))


def _attribute(stand_in: Any, name: str, builtin: type) -> Any:
    """Of a list or a dictionary: what its own class adds is followed, what would change it is refused."""
    value, own = stand_in._value, stand_in._name
    if name.startswith("__"):
        raise AttributeError(name)
    if hasattr(builtin, name):
        raise TraceError(
            f".{name} of {own}: a mod reads what it captures and changes nothing; do this before the mod captures it"
        )
    path = stand_in._trace.read(stand_in._variable, f"{{}}.{name}")
    return stand_in._trace.wrap(getattr(value, name), path, f"{own}.{name}")


class Items(Mapping):
    """A captured dictionary."""

    def __init__(self, trace: Following, value: Any, variable: str, name: str) -> None:
        self._trace, self._value, self._variable, self._name = trace, value, variable, name

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._value)

    def _key(self, key: Any) -> tuple[Any, str]:
        if type(key) is Symbol:
            key = self._trace.concrete(key.expr) if leaves(key.expr) <= {"scalar"} else int(key)
        return key, repr(key) if type(key) in (int, str, bool, type(None)) else self._trace.constant(key)

    def __getitem__(self, key: Any) -> Any:
        key, text = self._key(key)
        if key not in self._value:
            self._trace.unless(f"{text} in {self._variable}")
            raise KeyError(key)
        text = text.replace("{", "{{").replace("}", "}}")
        return self._trace.wrap(
            self._value[key], self._trace.read(self._variable, f"{{}}[{text}]"), f"{self._name}[{key!r}]"
        )

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name, dict)

    def __len__(self) -> int:
        self._trace.unless(f"len({self._variable}) != {len(self._value)}")
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        keys = tuple(self._value)
        self._trace.unless(f"tuple({self._variable}) != {self._trace.constant(keys)}")
        return iter(keys)


class Object:
    """Any other captured object, or a user's module or class: its attributes are followed."""

    def __init__(self, trace: Following, value: Any, variable: str, name: str) -> None:
        object.__setattr__(self, "_cuflash", (trace, value, variable, name))
        if isinstance(value, type | types.ModuleType):
            trace.unless(f"{variable} is not {trace.constant(value)}")
        else:
            trace.is_type(variable, value)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(object.__getattribute__(self, "_cuflash")[1])

    def __getattr__(self, name: str) -> Any:
        trace, value, variable, own = object.__getattribute__(self, "_cuflash")
        try:
            found = getattr(value, name)
        except AttributeError:
            trace.unless(f"hasattr({variable}, {name!r})")
            raise
        path = trace.read(variable, f"{{}}.{name}" if name.isidentifier() else f"getattr({{}}, {name!r})")
        if isinstance(found, types.MethodType) and found.__self__ is value and not is_autograd_function(value):
            trace.unless(f"{path}.__self__ is not {variable}")
            function = trace.wrap(found.__func__, trace.read(path, "{}.__func__"), name)
            return functools.partial(function, self)
        return trace.wrap(found, path, f"{own}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise TraceError(f"the mod sets {self._cuflash[3]}.{name}: a mod must not change what it captures")

    def _special(self, name: str, *args: Any, **kwargs: Any) -> Any:
        trace, value, variable, own = object.__getattribute__(self, "_cuflash")
        kind = type(value)
        if name == "__call__":
            if isinstance(value, type):
                return value(*args, **kwargs)
            if is_module_of_torch(kind):  # its hooks are for tensors
                return self.forward(*args, **kwargs)
        function = getattr(kind, name, None)
        if not isinstance(function, types.FunctionType):
            raise TraceError(
                f"{own} is a {kind.__qualname__}, of which a mod can read attributes and call methods written in "
                f"Python, but not use {name}: take what is needed out of it before the mod captures it"
            )
        path = trace.read(variable, f"type({{}}).{name}")
        return trace.wrap(function, path, f"{own}.{name}")(self, *args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self._special("__getitem__", index)

    def __iter__(self) -> Any:
        return self._special("__iter__")

    def __contains__(self, item: Any) -> Any:
        return self._special("__contains__", item)

    def __len__(self) -> int:
        return self._special("__len__")

    def __bool__(self) -> bool:
        kind = type(self._cuflash[1])
        for name in ("__bool__", "__len__"):
            if hasattr(kind, name):
                return bool(self._special(name))
        return True

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._cuflash[1])

    def __repr__(self) -> str:
        return repr(self._cuflash[1])


class CallableObject(Object):
    """One that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._special("__call__", *args, **kwargs)


class _Super:
    """super(), as methods that are followed call it."""

    def __init__(self, owner: type, instance: Object) -> None:
        self._owner, self._instance = owner, instance

    def __getattr__(self, name: str) -> Any:
        trace, value, _, own = self._instance._cuflash
        order = (value if isinstance(value, type) else type(value)).__mro__
        for base in order[order.index(self._owner) + 1 :] if self._owner in order else ():
            if isinstance(found := vars(base).get(name), types.FunctionType):
                path = trace.read(trace.constant(base), f"{{}}.__dict__[{name!r}]")
                return functools.partial(trace.wrap(found, path, f"{own}.{name}"), self._instance)
        raise TraceError(f"super().{name} of {own} is not a method written in Python: call what it does by name")


def super_(*args: Any) -> Any:
    if not args:
        frame = sys._getframe(1)
        args = frame.f_locals["__class__"], frame.f_locals[frame.f_code.co_varnames[0]]
    owner, instance = args
    if type(instance) not in (Object, CallableObject):
        return super(owner, instance)
    return _Super(owner._cuflash[1] if type(owner) in (Object, CallableObject) else owner, instance)
