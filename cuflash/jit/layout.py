"""The launch parameters: where each field of a params struct lies, read from the struct's own text.

The `.cuh` file is the one definition; Python applies the rules of the C ABI (each field at a multiple of its alignment,
the size a multiple of the largest), and the size is asserted when the kernel compiles.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, CompileError
from . import source

# C name -> struct code. Sizes are those codes' standard sizes, which every 64-bit CUDA host shares.
_SCALARS = {
    "bool": "?", "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q",
    "int": "i", "float": "f", "double": "d",
}  # fmt: skip

_FIELD = re.compile(
    r"(?:alignas\s*\(\s*(?P<align>\d+)\s*\)\s*)?(?P<const>const\s+)?(?P<type>\w+)(?:\s+const)?"
    r"(?P<pointer>(?:\s*\*\s*(?:const\b|__restrict__)?)*)\s*(?P<name>\b[A-Za-z_]\w*)\s*(?P<dims>(?:\[\s*\w+\s*\]\s*)*)"
)


@dataclass(frozen=True)
class Field:
    """One member: `offset` and `size` in bytes, `ctype` as written, `count` elements (None: not an array), whether it
    is `const`: of a pointer, that nothing is written there."""

    name: str
    ctype: str
    offset: int
    size: int
    count: int | None
    comment: str
    code: str  # struct code of one element, or "<size>s" for a struct inside
    const: bool = False

    @property
    def is_pointer(self) -> bool:
        return self.ctype.endswith("*")


@dataclass(frozen=True)
class Layout:
    """A params struct: its fields in order, their offsets, its size.

    >>> layout = parse("struct P { float* x;  // [n]\\n i32 n; float c[2]; };", "P")
    >>> layout.size, [(f.name, f.offset) for f in layout.fields]
    (24, [('x', 0), ('n', 8), ('c', 12)])
    >>> layout.unpack(layout.pack(x=4096, n=3, c=(0.5, 2.0)))
    {'x': 4096, 'n': 3, 'c': (0.5, 2.0)}
    """

    name: str
    size: int
    align: int
    fields: tuple[Field, ...]

    def __hash__(self) -> int:
        return hash((self.name, self.size))

    def __getitem__(self, name: str) -> Field:
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Field]:
        return {f.name: f for f in self.fields}

    @functools.cached_property
    def _struct(self) -> struct.Struct:
        form, at = "<", 0
        for f in self.fields:
            form += f"{f.offset - at}x" + (f.code if f.count is None else f.code * f.count)
            at = f.offset + f.size
        return struct.Struct(form + f"{self.size - at}x")

    def pack(self, **values: Any) -> bytes:
        """The struct's bytes. A pointer is an int (None: null), an array a sequence, a struct inside its bytes.

        Raises ArgumentError for a field that is missing, unknown, or out of its type's range.
        """
        self._check_names(values)
        return self._pack([values[f.name] for f in self.fields])

    def packer(self, *names: str) -> Callable[..., bytes]:
        """A function of the fields' values in the order of `names` (all of them), for the warm path.

        >>> parse("struct P { i32 a; i32 b; };", "P").packer("b", "a")(2, 1)
        b'\\x01\\x00\\x00\\x00\\x02\\x00\\x00\\x00'
        """
        self._check_names(names)
        order = [names.index(f.name) for f in self.fields]
        if any(f.count is not None for f in self.fields):
            return lambda *values: self._pack([values[i] for i in order])
        raw = self._struct.pack
        in_order = order == list(range(len(order)))

        def pack(*values: Any) -> bytes:
            try:
                return raw(*values) if in_order else raw(*[values[i] for i in order])
            except (struct.error, OverflowError, IndexError):
                if len(values) != len(order):
                    raise ArgumentError(f"{self.name}: {len(values)} values for {len(order)} fields") from None
                return self._pack([values[i] for i in order])  # a null pointer, or the error with the field's name

        return pack

    def unpack(self, data: bytes) -> dict[str, Any]:
        """The fields' values: numbers, tuples for arrays, bytes for structs inside."""
        if len(data) != self.size:
            raise ArgumentError(f"{self.name} has {self.size} bytes, got {len(data)}")
        flat = iter(self._struct.unpack(data))
        take = lambda f: next(flat) if f.count is None else tuple(next(flat) for _ in range(f.count))  # noqa: E731
        return {f.name: take(f) for f in self.fields}

    def _check_names(self, given: Any) -> None:
        unknown = [n for n in given if n not in self._by_name]
        missing = [f.name for f in self.fields if f.name not in given]
        if unknown or missing or len(given) != len(self.fields):
            what = [f"{w} {', '.join(names)}" for w, names in (("unknown", unknown), ("missing", missing)) if names]
            raise ArgumentError(f"{self.name}: fields {'; '.join(what) or 'named twice'}")

    def _pack(self, values: list[Any]) -> bytes:
        flat: list[Any] = []
        for f, value in zip(self.fields, values, strict=True):
            item: Any = 0 if f.is_pointer and value is None else value
            items = [item] if f.count is None else list(item)
            if f.count is not None and len(items) != f.count:
                raise ArgumentError(f"{self.name}.{f.name} holds {f.count} elements, got {len(items)}")
            for item in items:
                self._check_value(f, item)
            flat += items
        return self._struct.pack(*flat)

    def _check_value(self, f: Field, value: Any) -> None:
        try:
            data = struct.pack("<" + f.code, value)
            fits = data == value if f.code.endswith("s") else True  # "s" would pad or cut silently
        except (struct.error, OverflowError, TypeError):
            fits = False
        if not fits:
            raise ArgumentError(f"{self.name}.{f.name}={value!r} does not fit its type {f.ctype}")


@functools.cache
def _load(name: str, generation: int) -> Layout:
    for path in sorted((source.folder() / "params").glob("*.cuh")):
        if re.search(_opening(name), source.read(path)):
            return parse(source.flatten(path, "cuda"), name)
    raise CompileError(f"no file in {source.folder() / 'params'} defines struct {name}")


def load(name: str) -> Layout:
    """The layout of a struct of kernels_cu/params/, by name.

    >>> load("ForwardParams")["q"].offset
    0
    """
    return _load(name, source.generation())


def parse(text: str, name: str) -> Layout:
    """The layout of `struct name` as `text` defines it; structs and constants it uses must be in the text too.

    >>> text = "struct A { i32 a; u64 b; }; struct B : A { i32 c; };"
    >>> [(f.name, f.offset) for f in parse(text, "B").fields]
    [('a', 0), ('b', 8), ('c', 16)]
    """
    found = re.search(_opening(name) + r"(.*?)\n?\}\s*;", text, re.S)
    if found is None:
        raise CompileError(f"struct {name} is not defined in the text")
    base = parse(text, found[2]) if found[2] else Layout("", 0, 1, ())
    align = max(int(found[1] or 1), base.align)
    at = base.size
    fields = [*base.fields]
    for statement, comment in _statements(found[3]):
        if statement.startswith("static "):
            continue
        m = _FIELD.fullmatch(statement)
        if m is None:
            raise CompileError(f"struct {name}: `{statement}` is not `type name`, `type* name` or `type name[count]`")
        code, item_align = _element(m["type"], "*" in m["pointer"], text, f"struct {name}: `{statement}`")
        item_align = max(item_align, int(m["align"] or 1))
        dims = re.findall(r"\[\s*(\w+)\s*\]", m["dims"])
        count = functools.reduce(int.__mul__, (_constant(d, text, name) for d in dims)) if dims else None
        size = struct.calcsize("<" + code) * (1 if count is None else count)
        at = -(-at // item_align) * item_align
        ctype = m["type"] + ("*" if "*" in m["pointer"] else "")
        fields.append(Field(m["name"], ctype, at, size, count, comment, code, bool(m["const"])))
        at += size
        align = max(align, item_align)
    if not fields:
        raise CompileError(f"struct {name} has no fields")
    return Layout(name, -(-at // align) * align, align, tuple(fields))


def asserted(text: str, name: str) -> str:
    """A kernel's text, at whose end the compiler holds the size of `struct name` against what Python computes."""
    size = parse(text, name).size
    return text + (
        f"static_assert(sizeof({name}) == {size}, \"{name}: the compiler's size differs from the {size} bytes "
        f"{source.ASSERTED}\n"
    )


def _opening(name: str) -> str:
    """The pattern of `struct name {` or `struct name : base {`; its groups are the alignas and the base, if any."""
    return rf"\bstruct\s+(?:alignas\s*\(\s*(\d+)\s*\)\s*)?{re.escape(name)}\s*(?::\s*(\w+)\s*)?\{{"


def _statements(body: str) -> list[tuple[str, str]]:
    """(declaration, comment on its line) for each `;` of a struct's body."""
    out = []
    for line in re.sub(r"/\*.*?\*/", " ", body, flags=re.S).splitlines():
        code, _, comment = line.partition("//")
        out += [(" ".join(part.split()), comment.strip()) for part in code.split(";") if part.strip()]
        if code.strip() and not code.rstrip().endswith(";"):
            raise CompileError(f"`{code.strip()}`: a params struct has one field a line, ended by `;`")
    return out


def _element(ctype: str, pointer: bool, text: str, where: str) -> tuple[str, int]:
    """(struct code, alignment) of one element."""
    if pointer:
        return "Q", 8
    code = _SCALARS.get(ctype)
    if code is not None:
        return code, struct.calcsize("<" + code)
    if not re.search(_opening(ctype), text):
        known = ", ".join(_SCALARS)
        raise CompileError(f"{where}: type {ctype} is none of {known}, a pointer, or a struct of the text")
    inner = parse(text, ctype)
    return f"{inner.size}s", inner.align


def _constant(word: str, text: str, name: str) -> int:
    if word.isdigit():
        return int(word)
    found = re.search(rf"\bconstexpr\s+(?:i32|u32|int)\s+{re.escape(word)}\s*=\s*(\d+)\s*;", text)
    if found is None:
        raise CompileError(f"struct {name}: array length {word} is neither a number nor a `constexpr i32` of the text")
    return int(found[1])
