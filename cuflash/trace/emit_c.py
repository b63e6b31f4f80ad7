"""Mods as CUDA C: `struct Mods`, the text of <mods.cuh>. Stands beside `emit_numpy`, which says what it means.

A kernel asks for terms where they belong, so that nothing is computed more often than it changes: `tile` once a tile,
`q_terms` once a query, `k_terms` once a key, `score` and `keep_*` for every element, from those. It serves tiles whose
rows are queries (`bounds_q`, `keep_q`) and those whose rows are keys (`bounds_k`, `keep_k`) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from .c_text import C_TYPES, ELEMENTS, NO_WORDS, WORDS, Words, Writer
from .derive import gradients
from .expr import SCORE, ArraySlot, Expr, Mods, coordinate, leaves, walk
from .strata import split

# What kernels ask for.
__all__ = [
    "NO_MODS", "NO_WORDS", "WORDS", "Words", "has_mask", "keeps_more_than_bounds", "mods_text", "staged", "stratum",
]  # fmt: skip

TILE = "tile"
_DEAR = {
    "load", "dot", "div", "floordiv", "mod", "pow", "exp", "log", "tanh", "sigmoid", "sin", "cos", "erf", "expm1",
    "log1p", "atan", "atan2",
}  # fmt: skip


@lru_cache(maxsize=8192)
def stratum(x: Expr) -> str:
    """What an expression changes with: "tile", "q_idx", "kv_idx" or "element"."""
    own = leaves(x)
    if "score" in own or ("q_idx" in own and "kv_idx" in own):
        return "element"
    return "q_idx" if "q_idx" in own else "kv_idx" if "kv_idx" in own else TILE


class _Terms:
    """The largest sub-expressions of a stratum, each a field of a struct."""

    def __init__(self, side: str, prefix: str) -> None:
        self.side = side
        self.prefix = prefix
        self.fields: dict[Expr, str] = {}

    def collect(self, x: Expr, seen: set[Expr]) -> None:
        if x in seen:
            return
        seen.add(x)
        if stratum(x) == self.side and x.args:
            self.fields.setdefault(x, f"{self.prefix}{len(self.fields)}")
            return
        for a in x.args:
            self.collect(a, seen)

    def declarations(self) -> str:
        return "".join(f"    {C_TYPES[x.kind]} {name};\n" for x, name in self.fields.items())

    @property
    def staged(self) -> int:
        """How many fields a tile's columns share through shared memory: all, where one of them costs more than the
        way there and back; else none, and each thread computes its own."""
        dear = any(y.op in _DEAR for x in self.fields for y in walk(x))
        return len(self.fields) if dear else 0

    def given(self, variable: str) -> dict[Expr, str]:
        return {x: f"{variable}.{name}" for x, name in self.fields.items()}


_COORDINATES = {coordinate(name): f"t.{name}" for name in ("b", "h", "q_len", "kv_len")}
_Q, _K = coordinate("q_idx"), coordinate("kv_idx")


@lru_cache(maxsize=1024)
def mods_text(mods: Mods, *, backward: bool = False, wanted: tuple[int, ...] = ()) -> str:
    """The text of `struct Mods` for a call's mods.

    backward   with what the backward asks for, the derivative by the score
    wanted     slots of float arrays whose gradients it computes
    """
    words = Words(mods)
    score = mods.score
    slope, captured = None, {}
    if backward and score is not None:
        slope, captured = gradients(score, wanted)
    by_query = split(mods.mask, "kv_idx") if mods.mask is not None else None
    by_key = split(mods.mask, "q_idx") if mods.mask is not None else None
    element = [x for x in (score, slope, *captured.values()) if x is not None]
    element += [s.rest for s in (by_query, by_key) if s is not None and s.rest is not None]
    element += [i for load in captured for i in load.args]
    rows = [x for s in (by_query, by_key) if s is not None for x in (s.low, s.high) if x is not None]

    tile, q, k = _Terms(TILE, "t"), _Terms("q_idx", "q"), _Terms("kv_idx", "k")
    for terms, roots in ((tile, [*element, *rows]), (q, element), (k, element)):
        seen: set[Expr] = set()
        for x in roots:
            terms.collect(x, seen)
    in_tile = _COORDINATES | tile.given("t")
    in_element = in_tile | q.given("q") | k.given("k") | {_Q: "q.idx", _K: "k.idx", SCORE: "s"}

    def function(declaration: str, given: Mapping[Expr, str], body: Callable[[Writer], None]) -> str:
        writer = Writer(words, given)
        body(writer)
        return f"  template <class Params>\n  HW_DEVICE static {declaration} {{\n{writer.text()}  }}\n"

    def returning(x: Expr | None, otherwise: str = "true") -> Callable[[Writer], None]:
        return lambda w: w.statement(f"return {otherwise if x is None else w.value(x)};")

    def filled(terms: _Terms, name: str, first: str) -> Callable[[Writer], None]:
        def body(w: Writer) -> None:
            values = [w.value(x) for x in terms.fields]
            w.statement(f"return {{{', '.join([first, *values])}}};")

        return body

    def bounds(low: Expr | None, high: Expr | None) -> Callable[[Writer], None]:
        def body(w: Writer) -> None:
            begin = "0" if low is None else w.value(low)
            end = f"{1 << 30}" if high is None else f"{w.value(high)} + 1"
            w.statement(f"return {{{begin}, {end}}};")

        return body

    constants = {
        "kScore": score is not None,
        "kMask": mods.mask is not None,
        "kKeepQ": by_query is not None and by_query.rest is not None,
        "kKeepK": by_key is not None and by_key.rest is not None,
        "kSlope": slope is not None and not (slope.op == "const" and slope.value == 1.0),
        "kHead": any("h" in leaves(x) for x in (score, mods.mask) if x is not None),
    }
    parts = ["struct Mods {\n"]
    parts += [f"  static constexpr bool {name} = {str(value).lower()};\n" for name, value in constants.items()]
    parts.append(f"  static constexpr i32 kGradients = {len(captured)};\n")
    parts += [f"  static constexpr i32 kStaged{t.prefix.upper()} = {t.staged};\n" for t in (q, k)]
    parts.append(f"  struct Tile {{\n    i32 b, h, q_len, kv_len;\n{tile.declarations()}  }};\n")
    parts.append(f"  struct QTerms {{\n    i32 idx;\n{q.declarations()}  }};\n")
    parts.append(f"  struct KTerms {{\n    i32 idx;\n{k.declarations()}  }};\n")
    parts += [_load_text(words, slot, array) for slot, array in enumerate(mods.arrays)]
    parts += _dot_texts(words, mods, [*element, *rows])
    plain = {coordinate(name): name for name in ("b", "h", "q_len", "kv_len")}
    parts.append(
        function(
            "Tile tile(const Params& p, i32 b, i32 h, i32 q_len, i32 kv_len)",
            plain,
            filled(tile, "Tile", "b, h, q_len, kv_len"),
        )
    )
    of_row = "const Params& p, const Tile& t, i32 idx"
    parts.append(function(f"QTerms q_terms({of_row})", in_tile | {_Q: "idx"}, filled(q, "QTerms", "idx")))
    parts.append(function(f"KTerms k_terms({of_row})", in_tile | {_K: "idx"}, filled(k, "KTerms", "idx")))
    parts += [_staging_text(terms) for terms in (q, k)]
    arguments = "const Params& p, const Tile& t, const QTerms& q, const KTerms& k"
    if mods.mask is not None:
        assert by_query is not None and by_key is not None
        for side, found, row in (("q", by_query, _Q), ("k", by_key, _K)):
            parts.append(
                function(
                    f"Interval bounds_{side}({of_row})",
                    in_tile | {row: "idx"},
                    bounds(found.low, found.high),
                )
            )
            parts.append(function(f"bool keep_{side}({arguments})", in_element, returning(found.rest)))
        parts.append(_classify(mods, words))
    if score is not None:
        parts.append(function(f"float score({arguments}, float s)", in_element, returning(score)))
    if slope is not None:
        parts.append(function(f"float slope({arguments}, float s)", in_element, returning(slope)))
    if captured:
        parts.append(_gradients_text(words, mods, captured, arguments, in_element))
    parts.append("};\n")
    return "".join(parts)


def staged(text: str) -> tuple[int, int]:
    """Of the text of `struct Mods`: words of each query and of each key that a kernel keeps in shared memory."""
    q, k = (int(text.partition(f" kStaged{side} = ")[2].partition(";")[0]) for side in "QK")
    return q, k


def has_mask(text: str) -> bool:
    """Of the same: whether there is a mask_mod."""
    return " kMask = true;" in text


def keeps_more_than_bounds(text: str) -> bool:
    """Of the same: whether mask_mod is more than an interval of keys for each query."""
    return " kKeepQ = true;" in text


NO_MODS = (
    "struct Mods {\n"
    + "".join(
        f"  static constexpr bool {name} = false;\n"
        for name in ("kScore", "kMask", "kKeepQ", "kKeepK", "kSlope", "kHead")
    )
    + "".join(f"  static constexpr i32 {name} = 0;\n" for name in ("kGradients", "kStagedQ", "kStagedK"))
    + "};\n"
)
_SIDES = {TILE: 0, "q_idx": 1, "kv_idx": 2, "element": 3}  # as kernels_cu/tile/mods.cuh counts them


def _gradients_text(
    words: Words, mods: Mods, captured: Mapping[Expr, Expr], arguments: str, given: Mapping[Expr, str]
) -> str:
    """Members for the gradients of captured arrays, one for each place an array is read at: what the gradient of the
    new score is multiplied by, and to which element it is added."""
    sides, factors, places = [], [], []
    for load, factor in captured.items():
        sides.append(max((stratum(i) for i in load.args), key=_SIDES.__getitem__, default=TILE))
        if {stratum(i) for i in load.args} >= {"q_idx", "kv_idx"}:
            sides[-1] = "element"
        for x, texts in ((factor, factors), (load, places)):
            w = Writer(words, given, indent="      ")
            if x is factor:
                w.statement(f"return {w.value(factor)};")
            else:
                shape = words.arrays[load.value] + 1 + mods.arrays[load.value].ndim
                at = "0"
                for axis, i in enumerate(load.args):
                    index = w.value(i)  # before the statement that it goes into
                    extent = f"p.captured.words[{shape + axis}]"
                    offset = f"axis_offset({index}, {extent}, 1)"
                    at = offset if axis == 0 else f"({at}) * static_cast<i64>({extent}) + {offset}"
                w.statement(f"add({at}, p.captured.words[{words.gradients[load.value]}]);")
                w.statement("return;")
            texts.append(w.text())
    blocks = lambda texts: "".join(  # noqa: E731
        f"    if constexpr (kPlace == {n}) {{\n{text}    }}\n" for n, text in enumerate(texts)
    )
    cases = "".join(f"    if (place == {n}) return {_SIDES[side]};\n" for n, side in enumerate(sides))
    return (
        f"  static constexpr i32 gradient_side(i32 place) {{\n{cases}    return 0;\n  }}\n"
        f"  template <i32 kPlace, class Params>\n"
        f"  HW_DEVICE static float gradient_factor({arguments}, float s) {{\n{blocks(factors)}    return 0.0f;\n  }}\n"
        f"  template <i32 kPlace, class Params, class Add>\n"
        f"  HW_DEVICE static void gradient_place({arguments}, const Add& add) {{\n{blocks(places)}  }}\n"
    )


def _classify(mods: Mods, words: Words) -> str:
    """The member that says what is true of a whole tile."""
    from .intervals import classify_text  # which writes with this module's own names

    assert mods.mask is not None
    return classify_text(mods, words)


def _staging_text(terms: _Terms) -> str:
    """Members that put a column's terms into shared memory, field by field `stride` bytes apart, and take them out."""
    name = terms.prefix.upper() + "Terms"
    store, load = [], []
    for n, (x, field) in enumerate(terms.fields.items()):
        at = f"to + {n}u * stride" if n else "to"
        bits, back = {
            "int": ("static_cast<u32>({})", "static_cast<i32>({})"),
            "bool": ("({} ? 1u : 0u)", "({} != 0u)"),
            "float": ("hw::float_bits({})", "hw::bits_float({})"),
        }[x.kind]
        store.append(f"    hw::store_shared({at}, {bits.format(f'own.{field}')});\n")
        load.append(back.format(f"hw::load_shared<u32>({at.replace('to', 'from')})"))
    return (
        f"  HW_DEVICE static void stage(u32 to, u32 stride, const {name}& own) {{\n{''.join(store)}  }}\n"
        f"  HW_DEVICE static {name} staged_{terms.prefix}(u32 from, u32 stride, i32 idx) {{\n"
        f"    return {{{', '.join(['idx', *load])}}};\n  }}\n"
    )


def _load_text(words: Words, slot: int, array: ArraySlot) -> str:
    """The member that reads an element of a captured array."""
    word = words.arrays[slot]
    indices = "".join(f", i32 i{axis}" for axis in range(array.ndim))
    at = " + ".join(
        f"axis_offset(i{axis}, p.captured.words[{word + 1 + array.ndim + axis}], p.captured.words[{word + 1 + axis}])"
        for axis in range(array.ndim)
    )
    element = ELEMENTS[array.dtype.name]
    value = f"hw::load_global(reinterpret_cast<const {element}*>(p.captured.words[{word}]){' + ' + at if at else ''})"
    kind = C_TYPES[array.kind]
    text = {"float": f"hw::to_float({value})", "int": f"static_cast<i32>({value})", "bool": f"{value} != 0"}[array.kind]
    return (
        f"  // {array.name}: {array.dtype}, {array.ndim} axes\n"
        f"  template <class Params>\n  HW_DEVICE static {kind} load_{slot}(const Params& p{indices}) {{\n"
        f"    return {text};\n  }}\n"
    )


def _dot_texts(words: Words, mods: Mods, roots: Sequence[Expr]) -> list[str]:
    """Members that multiply rows of two captured arrays."""
    texts = []
    for x in dict.fromkeys(y.value for y in walk(*roots) if y.op == "dot"):
        a, b, split_at = x
        indices_a = [f"i{n}" for n in range(split_at)]
        indices_b = [f"i{n}" for n in range(split_at, split_at + mods.arrays[b].ndim - 1)]
        arguments = "".join(f", i32 {name}" for name in (*indices_a, *indices_b))
        extent = words.arrays[a] + 1 + 2 * mods.arrays[a].ndim - 1
        texts.append(
            f"  template <class Params>\n"
            f"  HW_DEVICE static float dot_{'_'.join(map(str, x))}(const Params& p{arguments}) {{\n"
            f"    float sum = 0.0f;\n"
            f"    HW_NO_UNROLL\n"
            f"    for (i32 c = 0; c < static_cast<i32>(p.captured.words[{extent}]); ++c) {{\n"
            f"      sum = hw::fma(load_{a}({', '.join(['p', *indices_a, 'c'])}), "
            f"load_{b}({', '.join(['p', *indices_b, 'c'])}), sum);\n"
            f"    }}\n    return sum;\n  }}\n"
        )
    return texts
