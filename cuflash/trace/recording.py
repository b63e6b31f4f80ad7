"""One call of a pair of mods on symbols: what they return, as expressions, and the reader of what they capture."""

from __future__ import annotations

import inspect
import linecache
from typing import Any

from ..errors import TraceError
from .capture import Capture, require_range
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
from .objects import is_library
from .operands import lift
from .parameters import PARAMETERS, called, check_parameters, expected_by
from .reader import Bound, Reader
from .symbols import Symbol


class Trace(Capture):
    """It holds what the mods capture, and is dropped when it is done."""

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
            raise TraceError(f"{kind}_mod is a {type(function).__qualname__}: pass a function of {expected_by(kind)}")
        args = [Symbol(self, SCORE if name == "score" else coordinate(name)) for name in PARAMETERS[kind]]
        try:
            named = {name: Symbol(self, coordinate(name)) for name in check_parameters(function, kind)}
            result = self.wrap(function, variable, called(function))(*args, **named)
            return self.checked(result, kind)
        except TraceError as error:
            where, line = self.place(error, function)
            raise TraceError(f"{kind}_mod {called(function)}{where}: {error}{line}") from error
        except RecursionError as error:
            raise TraceError(f"{kind}_mod {called(function)} calls itself without end") from error
        except Exception as error:
            where, line = self.place(error, function)
            raise TraceError(
                f"{kind}_mod {called(function)}{where}: {type(error).__name__}: {error}{_advice(error)}{line}"
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
                require_range(self.numbers[leaf.value])
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
        return self.compiled(f"{result[2]}({result[0]}, ({values[0]}), ({values[1]}), {result[1]})")

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


def _compares_positions(mask: Expr) -> bool:
    found = {"q_idx", "kv_idx"}
    return not leaves(mask) & {"q_len", "kv_len"} and any(
        x.op in ("lt", "le", "gt", "ge") and found <= leaves(x) and "load" not in leaves(x) for x in walk(mask)
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
