"""From a Python function to an expression: the mod is called once on symbols, and remembered.

What a mod captures is found where Python keeps it (closure cells, defaults, globals, attributes, elements of lists and
dictionaries) and stands in the traced copy of the function as a symbol. Along the way a *reader* is written: a small
Python function that walks the same paths again, checks that all the trace depended on is as it was, and collects the
arrays and numbers of today. A warm call runs the reader alone. The cache holds readers and structure, never an array.

    arrays            pointers of the kernel, by dtype and number of axes
    ints, floats      numbers of the kernel, given at run time; an int that Python needs (`range`, `if`) is a constant
    bools, strings, None, enums, `static(x)`   constants
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import BY_NAME
from ..errors import ArgumentError, TraceError
from . import text
from .emit_numpy import evaluate
from .expr import (
    OPS,
    SCORE,
    ArraySlot,
    Expr,
    Mods,
    ScalarSlot,
    cast,
    const,
    coordinate,
    dot,
    extent,
    leaves,
    load,
    make,
    scalar,
    show,
    slots_of,
    walk,
)
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
from .symbols import Captured, Rows, Symbol, lift
from .uncompiled import outside_of_compilers

PARAMETERS = {"score": ("score", "b", "h", "q_idx", "kv_idx"), "mask": ("b", "h", "q_idx", "kv_idx")}
LENGTHS = ("q_len", "kv_len")


class Bound(NamedTuple):
    """The mods of one call.

    mods     their structure: what compiled code depends on
    arrays   what the mods capture, as found, in the order of mods.arrays
    scalars  Python numbers in the order of mods.scalars
    notes    what a user may want to know, for `explain`
    """

    mods: Mods
    arrays: tuple[Any, ...] = ()
    scalars: tuple[int | float, ...] = ()
    notes: tuple[str, ...] = ()


def bind(score_mod: Any = None, mask_mod: Any = None) -> Bound:
    """Structure and present values of a score_mod(score, b, h, q_idx, kv_idx) and a mask_mod(b, h, q_idx, kv_idx).

    Either may be None, and either may also name q_len and kv_len. Raises TraceError with the line of the mod where it
    does what cannot be traced.

    >>> window = 128
    >>> bound = bind(mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window)
    >>> bound.mods.mask, bound.scalars
    (((q_idx - kv_idx) < number0), (128,))
    """
    if type(score_mod) is Mod:
        score_mod = score_mod.function
    if type(mask_mod) is Mod:
        mask_mod = mask_mod.function
    key = (
        id(score_mod.__code__) if type(score_mod) is types.FunctionType else _root(score_mod),
        id(mask_mod.__code__) if type(mask_mod) is types.FunctionType else _root(mask_mod),
    )
    readers = _readers.get(key, ())
    for read in readers:
        try:
            bound = read(score_mod, mask_mod)
        except Exception:  # what it looks for is no longer there: not this trace
            continue
        if bound is not None:
            if read not in readers[:4]:
                _remember(key, read)
            return bound
    return _traced(key, score_mod, mask_mod)


# The cache: for what is called, the readers of its traces, the last used first.
Reader = Callable[[Any, Any], Bound | None]
_readers: dict[Any, tuple[Reader, ...]] = {}
_lock = Lock()
_ROOTS, _TRACES = 4096, 256


def _root(mod: Any) -> Any:
    """What of a mod finds its traces: code, never a value. By its id, as hashing code takes microseconds: readers keep
    theirs alive, and compare."""
    if mod is None:
        return None
    if isinstance(mod, types.FunctionType):
        return id(mod.__code__)
    if isinstance(mod, functools.partial):
        return functools.partial, _root(mod.func)
    if isinstance(mod, types.MethodType):
        return types.MethodType, _root(mod.__func__)
    return type(mod)


def _traced(key: Any, score_mod: Any, mask_mod: Any) -> Bound:
    for _ in range(3):
        trace = Trace()
        read = trace.run(score_mod, mask_mod)
        bound = read(score_mod, mask_mod)
        if bound is not None:
            break
    else:
        raise TraceError(
            "what the mod captures changes while it is traced, or is another object whenever it is asked for: "
            "capture arrays and numbers by name"
        )
    _remember(key, read)
    return bound


def _remember(key: Any, read: Reader) -> None:
    """Put a reader first among those of its mods, and its mods last among those to be forgotten."""
    with _lock:
        others = [other for other in _readers.pop(key, ()) if other is not read]
        while len(_readers) >= _ROOTS:
            del _readers[next(iter(_readers))]
        _readers[key] = (read, *others)[:_TRACES]


class Mod:
    """A score_mod or mask_mod that is traced: what `mod` makes. Called, it is the function it was made from.

    function   as given
    kind       "score" or "mask"
    """

    def __init__(self, function: Callable[..., Any], kind: str | None = None) -> None:
        while isinstance(function, Mod):
            function = function.function
        if not callable(function):  # which says so in words
            _kind_of(function)
        if kind is not None and not (isinstance(kind, str) and kind in ("score", "mask")):
            raise ArgumentError(f'kind={kind!r} must be "score" or "mask", or None to go by the parameters')
        self.function = function
        self.kind: str = kind or _kind_of(function)
        self.__name__: str = getattr(function, "__name__", type(function).__name__)
        self.__wrapped__ = function
        self.__doc__ = getattr(function, "__doc__", None)
        self.made_by: Any = None  # (function, arguments, keywords) that made it, by which it is pickled
        bound = self.bind()
        # What a compiler of programs reads instead of calling bind: structure as text, values as they are now.
        self.text, self.kept_arrays, self.kept_scalars = text.dumps(bound.mods), bound.arrays, bound.scalars

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        if self.made_by is not None:
            return _made_again, self.made_by
        return Mod, (self.function, self.kind)

    def bind(self) -> Bound:
        """The traced structure, with the values that are captured now."""
        return bind(self.function) if self.kind == "score" else bind(None, self.function)

    @property
    def expr(self) -> Expr:
        """The expression: of the new score, or of whether a key is seen."""
        mods = self.bind().mods
        found = mods.score if self.kind == "score" else mods.mask
        assert found is not None
        return found

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The captured arrays."""
        return self.bind().arrays

    @property
    def scalars(self) -> tuple[int | float, ...]:
        """The captured numbers that are given at run time."""
        return self.bind().scalars

    def __repr__(self) -> str:
        names = ", ".join(PARAMETERS[self.kind])
        return f"<{self.kind}_mod {self.__name__}({names}) = {show(self.expr, self.bind().mods.names)}>"


def _made_again(make: Callable[..., Mod], args: Any, keywords: Any) -> Mod:
    return make(*args, **keywords)


@outside_of_compilers
def mod(function: Callable[..., Any], kind: str | None = None) -> Mod:
    """Trace a score_mod or mask_mod now: errors come here, and what comes back is usable under compilers.

    A graph of torch.compile or torch.export has the tensors and numbers that were captured here as its operands; what a
    variable is bound to later it does not see. Make a new mod for new ones: of the same function, it compiles nothing.

    kind: "score" or "mask"; None goes by the number of parameters, 5 or 4.

    >>> window = 128
    >>> mod(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < window))
    <mask_mod <lambda>(b, h, q_idx, kv_idx) = ((q_idx >= kv_idx) & ((q_idx - kv_idx) < window))>
    """
    return Mod(function, kind)


class _StaticInt(int):
    pass


class _StaticFloat(float):
    pass


def static(x: Any) -> Any:
    """A number that is compiled into the kernel: faster where it divides, and compiled anew for every other value.

    Usable as the number it is; what is computed from it outside of a mod is an ordinary number again.

    >>> width = static(64)
    >>> bind(mask_mod=lambda b, h, q_idx, kv_idx: q_idx // width == kv_idx // width).mods.mask
    ((q_idx // 64) == (kv_idx // 64))
    """
    if isinstance(x, np.generic):
        x = float(x) if isinstance(x, np.floating) else x.item()
    if x is None or isinstance(x, bool | str | enum.Enum):
        return x
    if isinstance(x, int):
        return _StaticInt(x)
    if isinstance(x, float):
        return _StaticFloat(x)
    if isinstance(x, tuple | list):
        return type(x)(static(item) for item in x)
    raise ArgumentError(
        f"static takes numbers, strings, and tuples and lists of them, got a {type(x).__qualname__}: arrays are always "
        "given at run time"
    )


# Parameters -------------------------------------------------------------------------------------------------------


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _needed(signature: inspect.Signature) -> tuple[list[str], bool]:
    """The positional parameters without defaults, and whether any number is taken."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = signature.parameters.values()
    names = [p.name for p in found if p.kind in positional and p.default is p.empty and p.name not in LENGTHS]
    return names, any(p.kind is p.VAR_POSITIONAL for p in found)


def _kind_of(function: Any) -> str:
    if not callable(function):
        raise TraceError(f"mod is given a {type(function).__qualname__}: pass a score_mod or a mask_mod, a function")
    signature = _signature(function)
    names, open_ended = _needed(signature) if signature else ([], True)
    if not open_ended:
        for kind, expected in PARAMETERS.items():
            if len(names) == len(expected):
                return kind
    raise TraceError(
        f"{_called(function)} takes {_listed(names, open_ended)}: a score_mod takes (score, b, h, q_idx, kv_idx) and a "
        'mask_mod (b, h, q_idx, kv_idx); say which it is with kind="score" or kind="mask"'
    )


def takes_score(function: Any) -> bool:
    """Whether a function is a score_mod, by its positional parameters without a default; else it is a mask_mod.

    >>> takes_score(lambda score, b, h, q_idx, kv_idx: score), takes_score(lambda b, h, q_idx, kv_idx, n=3: True)
    (True, False)
    """
    if isinstance(function, Mod):
        return function.kind == "score"
    signature = _signature(function)
    return signature is not None and len(_needed(signature)[0]) == len(PARAMETERS["score"])


def _called(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__qualname__


def _listed(names: list[str], open_ended: bool) -> str:
    return f"({', '.join([*names, *(['*args'] if open_ended else [])])})"


def _check_parameters(function: Any, kind: str) -> tuple[str, ...]:
    """The lengths that a mod names. Raises TraceError where it cannot take what it is given."""
    signature = _signature(function)
    if signature is None:
        return ()
    expected = PARAMETERS[kind]
    names, open_ended = _needed(signature)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    accepted = [p.name for p in signature.parameters.values() if p.kind in positional and p.name not in LENGTHS]
    if len(names) > len(expected) or (len(accepted) < len(expected) and not open_ended):
        other = "mask" if kind == "score" else "score"
        hint = f"; with {len(names)} it is a {other}_mod" if len(names) == len(PARAMETERS[other]) else ""
        raise TraceError(f"it takes {_listed(names, open_ended)} and is given {_wanted(kind)}{hint}")
    for place, name in enumerate(accepted[: len(expected)]):
        if name in PARAMETERS["score"] and name != expected[place]:
            raise TraceError(
                f"it has its parameter {name!r} where {expected[place]} is given: they come in the order "
                f"{_wanted(kind)}, under any name that is not another's"
            )
    wanted = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    unknown = [p.name for p in wanted if p.name not in LENGTHS]
    if unknown:
        raise TraceError(
            f"it needs the keyword {unknown[0]!r}, which nobody gives: bind it with "
            f"functools.partial(f, {unknown[0]}=...), or capture it. Given are {_wanted(kind)}, q_len and kv_len"
        )
    return tuple(n for n in LENGTHS if n in signature.parameters)


def _wanted(kind: str) -> str:
    return f"({', '.join(PARAMETERS[kind])})"


# The trace --------------------------------------------------------------------------------------------------------


class _Number(NamedTuple):
    """A captured number: `code` reads it again."""

    name: str
    kind: str
    value: int | float
    code: str


class Trace:
    """One call of a pair of mods on symbols. It holds what they capture, and is dropped when it is done."""

    def __init__(self) -> None:
        self.torch = False
        self.codes: set[types.CodeType] = set()
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.variables: dict[tuple[str, str], str] = {}
        self.wrapped: dict[str, Any] = {}
        self.seen: dict[int, tuple[Any, str, Any]] = {}
        self.captured: list[Captured] = []
        self.numbers: list[_Number] = []
        self.bound: dict[int, str] = {}
        self.told: dict[str, None] = {}  # what `explain` says beside that

    # The reader's text

    def read(self, parent: str, text: str) -> str:
        """The variable that holds `text` of a parent variable, "{}" in it."""
        key = parent, text
        if key not in self.variables:
            self.variables[key] = variable = f"v{len(self.variables)}"
            self.lines.append(f"{variable} = {text.format(parent)}")
        return self.variables[key]

    def unless(self, condition: str) -> None:
        """The trace holds no longer where a condition is true."""
        line = f"if {condition}: return"
        if line not in self.lines[-4:]:
            self.lines.append(line)

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def is_type(self, variable: str, value: Any) -> None:
        self.unless(f"type({variable}) is not {self.constant(type(value))}")

    # The mods

    def run(self, score_mod: Any, mask_mod: Any) -> Reader:
        """Trace both and make the reader."""
        roots: dict[str, Expr | None] = {}
        for kind, function, variable in (("score", score_mod, "s"), ("mask", mask_mod, "m")):
            if function is None:
                self.unless(f"{variable} is not None")
            roots[kind] = None if function is None else self.called(function, kind, variable)
        return self.finish(roots["score"], roots["mask"])

    def called(self, function: Any, kind: str, variable: str) -> Expr:
        if not callable(function):
            raise TraceError(f"{kind}_mod is a {type(function).__qualname__}: pass a function of {_wanted(kind)}")
        args = [Symbol(self, SCORE if name == "score" else coordinate(name)) for name in PARAMETERS[kind]]
        try:
            named = {name: Symbol(self, coordinate(name)) for name in _check_parameters(function, kind)}
            result = self.wrap(function, variable, _called(function))(*args, **named)
            return self.checked(result, kind)
        except TraceError as error:
            where, line = self.place(error, function)
            raise TraceError(f"{kind}_mod {_called(function)}{where}: {error}{line}") from error
        except RecursionError as error:
            raise TraceError(f"{kind}_mod {_called(function)} calls itself without end") from error
        except Exception as error:
            where, line = self.place(error, function)
            raise TraceError(
                f"{kind}_mod {_called(function)}{where}: {type(error).__name__}: {error}{_advice(error)}{line}"
            ) from error

    def place(self, error: Exception, function: Any) -> tuple[str, str]:
        """(", file:line", the line itself): where in the mod an error arose, else where the mod stands."""
        found, frame = None, error.__traceback__
        while frame is not None:
            code = frame.tb_frame.f_code
            if code in self.codes and not is_library(frame.tb_frame.f_globals.get("__name__")):
                found = code.co_filename, frame.tb_lineno
            frame = frame.tb_next
        if found is None:
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is None:
                return "", ""
            found = code.co_filename, code.co_firstlineno
        text = linecache.getline(*found).strip()
        return f" at {found[0]}:{found[1]}", f"\n    {text}" if text else ""

    def checked(self, result: Any, kind: str) -> Expr:
        if result is None:
            raise TraceError("it returns nothing: is a `return` missing?")
        if isinstance(result, tuple | list | dict):
            raise TraceError(f"it returns a {type(result).__name__}: return one number")
        x = lift(result)
        for leaf in walk(x):
            if leaf.op == "scalar":
                _in_range(self.numbers[leaf.value])
        if kind == "score":
            if x.kind == "bool":
                raise TraceError(
                    f"it returns a bool, {show(x)}, and a score_mod returns the new score: return where(condition, "
                    "score, -inf), or pass it as mask_mod"
                )
            return cast(x, "float")
        if x.kind == "float":
            raise TraceError(
                f"it returns a float, {show(x)}, and a mask_mod returns whether the key is seen: compare, or pass it "
                "as score_mod"
            )
        if x.kind == "int":
            raise TraceError(
                f"it returns an int, {show(x, self.names)}, and a mask_mod returns whether the key is seen: compare "
                f"it, return {show(x, self.names)} != 0"
            )
        return x

    def finish(self, score: Expr | None, mask: Expr | None) -> Reader:
        """Leave out what the expressions do not use, number the rest, and compile the reader."""
        for slot in self.bound:
            number = self.numbers[slot]
            different = f"{number.code} != {self.constant(number.value)}"
            if number.kind == "float":  # NaN is itself, and 0.0 is not -0.0
                different = f"{number.code}.hex() != {self.constant(float(number.value).hex())}"
            self.unless(different)
        roots = [x for x in (score, mask) if x is not None]
        arrays: list[int] = []
        numbers: list[int] = []
        for x in walk(*roots):
            for slot in slots_of(x):
                if slot not in arrays:
                    arrays.append(slot)
            if x.op == "scalar" and x.value not in self.bound and x.value not in numbers:
                numbers.append(x.value)
        done: dict[Expr, Expr] = {}
        for x in walk(*roots):
            args = tuple(done[a] for a in x.args)
            if x.op == "scalar":
                number = self.numbers[x.value]
                done[x] = const(number.value) if x.value in self.bound else scalar(numbers.index(x.value), number.kind)
            elif x.op == "extent":
                done[x] = extent(arrays.index(x.value[0]), x.value[1])
            elif x.op == "load":
                done[x] = load(arrays.index(x.value), x.kind, args)
            elif x.op == "dot":
                a, b, split = x.value
                done[x] = dot(arrays.index(a), args[:split], arrays.index(b), args[split:])
            else:
                done[x] = make(x.op, *args) if x.op in OPS else x
        found = [self.captured[slot] for slot in arrays]
        if len(found) > 1:
            self.unless(f"len({{{', '.join(f'id({c.variable})' for c in found)}}}) != {len(found)}")
        for slot in numbers:
            number = self.numbers[slot]
            if number.kind == "int":
                self.unless(f"not -2147483648 <= {number.code} <= 2147483647")
        mods = Mods(
            None if score is None else done[score],
            None if mask is None else done[mask],
            tuple(ArraySlot(c.name, c.dtype, c.ndim) for c in found),
            tuple(ScalarSlot(self.numbers[slot].name, self.numbers[slot].kind) for slot in numbers),
        )
        values = "".join(f"{c.variable}, " for c in found), "".join(f"{self.numbers[slot].code}, " for slot in numbers)
        result = self.constant(mods), self.constant(self.notes(mods)), self.constant(Bound)
        self.lines.append(f"return {result[2]}({result[0]}, ({values[0]}), ({values[1]}), {result[1]})")
        text = "def read(s, m):\n" + "".join(f"    {line}\n" for line in self.lines)
        space: dict[str, Any] = dict(self.constants)
        exec(compile(text, "<cuflash reader>", "exec"), space)
        return space["read"]

    def notes(self, mods: Mods) -> tuple[str, ...]:
        found = [
            f"{self.numbers[slot].name} = {self.numbers[slot].value} is a constant of the kernel, as {why}: another "
            "value is compiled anew"
            for slot, why in self.bound.items()
        ]
        found += self.told
        if mods.mask is not None and _compares_positions(mods.mask):
            found.append(
                "mask_mod compares q_idx with kv_idx: where q_len and kv_len differ, that aligns the first query with "
                "the first key, as in FlexAttention; causal=True, window_size and cuflash.mods align the last ones"
            )
        return tuple(found)

    # What symbols ask

    @property
    def names(self) -> dict[tuple[str, int], str]:
        found = {("load", c.slot): c.name for c in self.captured}
        return found | {("scalar", i): n.name for i, n in enumerate(self.numbers)}

    def concrete(self, x: Expr) -> Any:
        for leaf in walk(x):
            if leaf.op == "scalar":
                _in_range(self.numbers[leaf.value])
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
        if kind in (_StaticInt, _StaticFloat, str, bytes, complex, slice, range):
            self.is_type(variable, value)
            if kind is _StaticFloat:
                self.unless(f"{variable}.hex() != {self.constant(value.hex())}")
                return float(value)
            self.unless(f"{variable} != {self.constant(int(value) if kind is _StaticInt else value)}")
            return int(value) if kind is _StaticInt else value
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
        self.numbers.append(_Number(name, "int" if is_int else "float", int(value) if is_int else float(value), code))
        return Symbol(self, scalar(len(self.numbers) - 1, "int" if is_int else "float"))

    def object(self, value: Any, variable: str, name: str) -> Any:
        kind = type(value)
        if isinstance(value, Mod):
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


def _in_range(number: _Number) -> None:
    if number.kind == "int" and not -(2**31) <= number.value < 2**31:
        raise TraceError(
            f"captured {number.name} = {number.value} does not fit 32 bits, in which mods compute: capture "
            f"float({number.name}), or an int that fits"
        )


def _compares_positions(mask: Expr) -> bool:
    found = {"q_idx", "kv_idx"}
    return not leaves(mask) & {"q_len", "kv_len"} and any(
        x.op in ("lt", "le", "gt", "ge") and found <= leaves(x) and "load" not in leaves(x) for x in walk(mask)
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


def _advice(error: Exception) -> str:
    modules = set()
    frame = error.__traceback__
    while frame is not None:
        modules.add(frame.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.tb_next
    if "jax" in modules or "JAX" in str(error):
        return ". This function of JAX takes no symbols: use operators, or np.* (NumPy's functions)"
    if isinstance(error, TypeError) and "Symbol" in str(error):
        return ". Use operators, and functions of NumPy or torch"
    return ""


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
