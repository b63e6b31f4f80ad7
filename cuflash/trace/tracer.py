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

import enum
import functools
import types
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

from ..errors import ArgumentError, TraceError
from . import text
from .capture import StaticFloat, StaticInt, Traceable
from .expr import Expr, show
from .parameters import PARAMETERS, kind_of, needed, signature_of
from .reader import Bound, Reader
from .recording import Trace
from .uncompiled import outside_of_compilers


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


class Mod(Traceable):
    """A score_mod or mask_mod that is traced: what `mod` makes. Called, it is the function it was made from.

    function   as given
    kind       "score" or "mask"
    """

    def __init__(self, function: Callable[..., Any], kind: str | None = None) -> None:
        while isinstance(function, Mod):
            function = function.function
        if not callable(function):  # which says so in words
            kind_of(function)
        if kind is not None and not (isinstance(kind, str) and kind in ("score", "mask")):
            raise ArgumentError(f'kind={kind!r} must be "score" or "mask", or None to go by the parameters')
        self.function = function
        self.kind: str = kind or kind_of(function)
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
        return StaticInt(x)
    if isinstance(x, float):
        return StaticFloat(x)
    if isinstance(x, tuple | list):
        return type(x)(static(item) for item in x)
    raise ArgumentError(
        f"static takes numbers, strings, and tuples and lists of them, got a {type(x).__qualname__}: arrays are always "
        "given at run time"
    )


def takes_score(function: Any) -> bool:
    """Whether a function is a score_mod, by its positional parameters without a default; else it is a mask_mod.

    >>> takes_score(lambda score, b, h, q_idx, kv_idx: score), takes_score(lambda b, h, q_idx, kv_idx, n=3: True)
    (True, False)
    """
    if isinstance(function, Mod):
        return function.kind == "score"
    signature = signature_of(function)
    return signature is not None and len(needed(signature)[0]) == len(PARAMETERS["score"])
