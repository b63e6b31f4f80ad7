"""CUDA C text as an editor sees it: where a function stands, one function replaced, the code around a line.

No parser: braces, parentheses and names, with comments, strings and the preprocessor's lines blanked out. That is
enough for text in the style of kernels_cu, where no macro opens or closes a brace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import ArgumentError, CompileError
from ..jit import source

_BLANKED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#[^\n]*', re.DOTALL | re.MULTILINE
)
_SCOPE = re.compile(r"\b(?:struct|class|namespace)\s+(?:alignas\s*\([^)]*\)\s*)?(\w+)[^;{}()]*$")
_BODY = re.compile(  # from behind the arguments to the opening brace; in between perhaps a constructor's initialisers
    r"\s*(?:(?:const|noexcept|override|final)\b\s*)*(?:->[^;{}]+)?"
    r"(?::\s*(?:[\w:<>]+\s*(?:\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\})\s*,?\s*)+)?\{"
)
_NOT_A_FUNCTION = re.compile(r"^(?:if|for|while|switch|return|else|do|case|throw|new|using|typedef)\b")
_LABEL = re.compile(r"[A-Za-z_][\w ./-]*")


@dataclass(frozen=True)
class Function:
    """A function's definition: text[begin:end] from its return type (or `template`) to its closing brace."""

    name: str  # with its scopes, "OnlineSoftmax::update"
    begin: int
    end: int


def functions(text: str, name: str) -> list[Function]:
    """The definitions of a function, "update", or "OnlineSoftmax::update" of that struct alone.

    >>> text = "struct A {\\n  int f(int x) const { return g(x); }\\n};\\nint f();\\n"
    >>> [(f.name, text[f.begin : f.end]) for f in functions(text, "f")]
    [('A::f', 'int f(int x) const { return g(x); }')]
    """
    *wanted, last = name.split("::")
    blank = _blanked(text)
    found = []
    for match in re.finditer(rf"(?<![\w~]){re.escape(last)}\s*\(", blank):
        closing = _closing(blank, match.end() - 1, "()")
        body = _BODY.match(blank, closing + 1) if closing >= 0 else None
        if body is None:
            continue
        begin = max(blank.rfind(c, 0, match.start()) for c in ";{}") + 1
        label = re.match(r"\s*(?:public|private|protected)\s*:", blank[begin:])
        begin += label.end() if label else 0
        head = blank[begin : match.start()]
        begin += len(head) - len(head.lstrip())
        head = head.strip()
        scopes = _scopes(blank, begin)
        constructor = bool(scopes) and scopes[-1] == last
        if _NOT_A_FUNCTION.match(head) or "=" in _outside_angles(head) or head.count("(") != head.count(")"):
            continue
        if (not head and not constructor) or head.endswith((",", ".", "->", "?", "&&", "||", "+", "-")):
            continue
        if wanted and scopes[-len(wanted) :] != wanted:
            continue
        end = _closing(blank, body.end() - 1, "{}")
        if end >= 0:
            found.append(Function("::".join([*scopes, last]), begin, end + 1))
    return found


def replaced(text: str, function: Function, new: str, file: str, label: str, first_line: int = 1) -> str:
    """`text`, the content of `file`, with another definition of a function. Messages will name the new lines as those
    of `label` from `first_line` on, and the others as before."""
    end_file, end_line = where(text, function.end, file)
    before, after = text[: function.begin].rstrip(" "), text[function.end :]
    if before and not before.endswith("\n"):
        before += "\n"
    if after.startswith("\n"):
        after, end_line = after[1:], end_line + 1
    directive = f'#line {first_line} "{check_label(label)}"'
    return f'{before}{directive}\n{new.rstrip()}\n#line {end_line} "{end_file}"\n{after}'


def where(text: str, offset: int, file: str) -> tuple[str, int]:
    """(file, line) of a place in a text, whose `#line` directives are followed.

    >>> where('int a;\\n#line 7 "cell"\\nint b;\\n', 22, "x.cu")
    ('cell', 7)
    """
    *_, (found, number, _) = source.numbered(f'#line 1 "{file}"\n{text[:offset]}|')
    return found, number


def check_label(label: str) -> str:
    """A name that compilers and the emulator can print before a line's number."""
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ArgumentError(f"label={label!r} must have letters, digits, spaces, '.', '/', '-' and '_' alone")
    return label


def with_code(report: str, lines: Mapping[tuple[str, int], str], files: frozenset[str]) -> str:
    """A report, and the code around each line that it names in `files`. If it names none there, the code around the
    first two that it names, and the lines of `files` that call the functions which those are in."""
    shown = list(report.splitlines())
    places = [(*place, "") for place in sites(report, files)]
    if not places:
        others = list(dict.fromkeys(sites(report, frozenset(file for file, _ in lines))))[:2]
        places = [*callers(others, lines, files), *((*place, "") for place in others)]
    for file, number, calls in dict.fromkeys(places):
        code = source.around(lines, file, number)
        if code:
            shown += [f"{file}:{number}" + (f" calls {calls}" if calls else ""), *code]
    return "\n".join(shown)


# What CUDA C has and a text here has not -> what it has instead.
_REMEDIES = {
    "threadIdx": "hw::thread_idx() of a block, hw::lane_idx() of a warp",
    "blockIdx": "hw::block_idx_x(), _y() and _z()",
    "gridDim": "hw::grid_dim_x(), _y() and _z()",
    "blockDim": "the number in HW_KERNEL(threads)",
    "__shared__": "smem_bytes= at hw::smem_base(), read and written by hw::load_shared<T>, hw::store_shared",
    "__syncthreads": "hw::sync_threads()",
    "__syncwarp": "hw::sync_warp()",
    "__shfl_xor_sync": "hw::shfl_xor(value, mask)",
    "__shfl_sync": "hw::shfl(value, lane)",
    "__half": "hw::Half, hw::to_float",
    "half": "hw::Half, hw::to_float",
    "atomicAdd": "hw::atomic_add(pointer, value)",
    "printf": "a further array among the arguments, which the kernel writes to",
}


def with_remedies(error: CompileError) -> CompileError:
    """The same, with what to write instead of the names of CUDA C that no compiler here knows.

    >>> print(with_remedies(CompileError("cell a:3: 'threadIdx' was not declared in this scope")))
    cell a:3: 'threadIdx' was not declared in this scope
    threadIdx is not known here: hw::thread_idx() of a block, hw::lane_idx() of a warp
    """
    said = str(error)
    unknown = set(
        re.findall(r"^[^\n]*\W(\w+)\W[^\n\w]*(?:was not declared|does not name|is undefined)", said, re.MULTILINE)
    )
    remedies = [f"{name} is not known here: {instead}" for name, instead in _REMEDIES.items() if name in unknown]
    return CompileError("\n".join([said, *remedies]), log=error.log, source=error.source)


def callers(
    places: Iterable[tuple[str, int]], lines: Mapping[tuple[str, int], str], files: frozenset[str], depth: int = 3
) -> list[tuple[str, int, str]]:
    """(file, line, function) for each line of `files` that calls a function which one of the places is in, or, if none
    does, one that calls such a function, and so on.

    >>> text = ["int f(int x) {", "  return x;", "}", "int g() { return f(1); }"]
    >>> lines = {("a.cuh", n): line for n, line in enumerate(text, 1)}
    >>> lines |= {("cell", 1): "int h() {", ("cell", 2): "g(); }"}
    >>> callers([("a.cuh", 2)], lines, frozenset(["cell"]))
    [('cell', 2, 'g')]
    """
    names = {name for place in places if (name := _function_at(*place, lines))}
    for _ in range(depth):
        if not names:
            break
        call = re.compile(rf"(?<![\w])({'|'.join(map(re.escape, sorted(names)))})\s*\(")
        found = [(*place, m[1]) for place, line in lines.items() if (m := call.search(line.partition("//")[0]))]
        found = [(file, n, name) for file, n, name in found if _function_at(file, n, lines) not in (None, name)]
        mine = [x for x in found if x[0] in files]
        if mine:
            return mine
        names = {name for file, n, _ in found if (name := _function_at(file, n, lines))}
    return []


def _function_at(file: str, number: int, lines: Mapping[tuple[str, int], str]) -> str | None:
    """The name of the function that a line is in, or begins in."""
    blank = _blanked("\n".join(line for (f, n), line in lines.items() if f == file and n <= number))
    stack: list[str] = []
    start = 0
    for at, c in enumerate(blank):
        if c == "{":
            stack.append(blank[start:at])
        elif c == "}" and stack and not (at == len(blank.rstrip()) - 1):
            stack.pop()
        if c in ";{}":
            start = at + 1
    for head in reversed(stack):
        found = re.search(r"(\w+)\s*\((?:[^()]|\([^()]*\))*\)[^()]*(?::.*)?$", head.strip(), re.DOTALL)
        if found and head.count("(") == head.count(")") and not _NOT_A_FUNCTION.match(found[1]):
            if not _NOT_A_FUNCTION.match(head.strip()):
                return found[1]
    return None


def sites(report: str, files: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(file, line) for each place that a report names, of these files, in its order.

    >>> list(sites("race: the read at cell fast:12 and the write at tile/store.cuh:3", frozenset(["cell fast"])))
    [('cell fast', 12)]
    """
    names = "|".join(map(re.escape, sorted(files, key=len, reverse=True)))
    for match in re.finditer(rf"(?<![\w/.])({names}):(\d+)", report):
        yield match[1], int(match[2])


def _blanked(text: str) -> str:
    """The text with comments, literals and the preprocessor's lines as spaces; every offset stays."""
    return _BLANKED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _closing(text: str, opening: int, pair: str) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == pair[0]) - (text[at] == pair[1])
        if depth == 0:
            return at
    return -1


def _scopes(blank: str, offset: int) -> list[str]:
    """Names of the structs and namespaces around a place."""
    stack: list[str] = []
    start = 0
    for at, c in enumerate(blank[:offset]):
        if c == "{":
            scope = _SCOPE.search(_outside_angles(blank[start:at]))
            stack.append(scope[1] if scope else "")
        elif c == "}" and stack:
            stack.pop()
        if c in ";{}":
            start = at + 1
    return [name for name in stack if name]


def _outside_angles(head: str) -> str:
    """Without template arguments, whose defaults have a `=`."""
    before = ""
    while before != head:
        before, head = head, re.sub(r"<[^<>]*>", "", head)
    return head
