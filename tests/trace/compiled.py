"""The generated text of many mods in one shared object, compiled for the host and called on arrays of points.

    library = Library([mods, ...])
    library.classify(3, world, values, q, k)
    library.score(3, world, points)

Captured arrays are read without the emulator; an index outside of its array raises.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from expressions import World

from cuflash.jit import emulated, hostcxx, source
from cuflash.trace.c_text import Words, Writer
from cuflash.trace.emit_c import mods_text
from cuflash.trace.expr import COORDINATES, SCORE, Mods, cast, coordinate

HEAD = """
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/captured.cuh>
#include <tile/arithmetic.cuh>
#include <tile/mask.cuh>
#include <tile/score.cuh>

struct Variant {
  using Element = float;
};
struct Params {
  Captured captured;
};
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT i32 outside = 0;
template <class T> HW_DEVICE T read(const T* x) { return *x; }
HW_DEVICE i64 axis_offset(i32 index, u64 extent, u64 stride) {
  if (index >= 0 && index < static_cast<i32>(extent)) return static_cast<i64>(index) * static_cast<i64>(stride);
  ++outside;
  return 0;
}
"""

CLASSIFY_TEXT = """
EXPORT void classify_{i}(const Params* p, const i32* t, i32 count, const i32* r, i32* out) {{
  using M = mods_{i}::Mods;
  const auto tile = M::tile(*p, t[0], t[1], t[2], t[3]);
  for (i32 n = 0; n < count; ++n) {{
    out[n] = M::classify(*p, tile, r[n], r[count + n], r[2 * count + n], r[3 * count + n]);
  }}
}}
"""
# c: b, h, q_idx, kv_idx, q_len, kv_len, `count` of each.
TERMS = """
  using M = mods_{i}::Mods;
  for (i32 n = 0; n < count; ++n) {{
    const i32 q_idx = c[2 * count + n], kv_idx = c[3 * count + n];
    const auto t = M::tile(*p, c[n], c[count + n], c[4 * count + n], c[5 * count + n]);
    const auto q = M::q_terms(*p, t, q_idx);
    const auto k = M::k_terms(*p, t, kv_idx);
"""
SCORE_TEXT = """
EXPORT void score_{i}(const Params* p, i32 count, const i32* c, const float* s, float* out) {{{terms}
    out[n] = M::score(*p, t, q, k, s[n]);
  }}
}}
"""
MASK_TEXT = """
EXPORT void mask_{i}(const Params* p, i32 count, const i32* c, u8* by_query, u8* by_key) {{{terms}
    const Interval columns = M::bounds_q(*p, t, q_idx), rows = M::bounds_k(*p, t, kv_idx);
    bool keep_q = kv_idx >= columns.begin && kv_idx < columns.end, keep_k = q_idx >= rows.begin && q_idx < rows.end;
    if constexpr (M::kKeepQ) keep_q &= M::keep_q(*p, t, q, k);
    if constexpr (M::kKeepK) keep_k &= M::keep_k(*p, t, q, k);
    by_query[n] = keep_q;
    by_key[n] = keep_k;
  }}
}}
"""


VALUE_TEXT = """
struct Integer_{i} : mods_{i}::Mods {{
  HW_DEVICE static i32 value(const Params& p, float score, i32 b, i32 h, i32 q_idx, i32 kv_idx, i32 q_len,
                             i32 kv_len) {{
{body}  }}
}};
EXPORT void value_{i}(const Params* p, i32 count, const i32* c, const float* s, i32* out) {{
  for (i32 n = 0; n < count; ++n) {{
    out[n] = Integer_{i}::value(*p, s[n], c[n], c[count + n], c[2 * count + n], c[3 * count + n], c[4 * count + n],
                                c[5 * count + n]);
  }}
}}
"""


class Library:
    """parts: what to compile, of "classify", "score", "mask", and "value", of the int that a score is cast from."""

    def __init__(self, mods: Sequence[Mods], parts: Sequence[str]) -> None:
        self.mods = mods
        texts = []
        for i, m in enumerate(mods):
            body = mods_text(m).replace("hw::load_global(", "read(")
            texts.append(f"namespace mods_{i} {{\n{body}}}\n")
            for part in parts:
                if part == "value":
                    texts.append(self._integer(i))
                    continue
                form = {"classify": CLASSIFY_TEXT, "score": SCORE_TEXT, "mask": MASK_TEXT}[part]
                texts.append(form.format(i=i, terms=TERMS.format(i=i)))
        emulated.runtime()  # whose functions the wrappers name
        with tempfile.TemporaryDirectory() as folder:
            head = Path(folder, "head.cuh")
            head.write_text(HEAD)
            text = source.flatten(str(head), "emu")
        flags = [flag for flag in hostcxx._KERNEL_FLAGS if flag != "-O1"]
        with mock.patch.object(hostcxx, "_KERNEL_FLAGS", ("-O0", *flags)):  # compiling takes longer than running
            self.library = ctypes.CDLL(str(hostcxx.compile(text + "".join(texts))))
        self._outside = ctypes.c_int32.in_dll(self.library, "outside")

    def _integer(self, i: int) -> str:
        score = self.mods[i].score
        assert score is not None
        x = score.args[0] if score.op == "float" else cast(score, "int")
        writer = Writer(Words(self.mods[i]), {SCORE: "score"} | {coordinate(name): name for name in COORDINATES})
        writer.statement(f"return {writer.value(x)};")
        return VALUE_TEXT.format(i=i, body=writer.text())

    def classify(
        self, i: int, world: World, values: Mapping[str, int], q: tuple[np.ndarray, ...], k: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        """What the text says of tiles; q, k: first and last of each."""
        tile = np.array([values[name] for name in ("b", "h", "q_len", "kv_len")], np.int32)
        ranges = np.array([*q, *k], np.int32)
        out = np.empty(ranges.shape[1], np.int32)
        self._call(f"classify_{i}", i, world, tile, out.size, ranges, out)
        return out

    def score(self, i: int, world: World, points: Mapping[str, np.ndarray]) -> np.ndarray:
        s = np.asarray(points["score"], np.float32)
        out = np.empty(s.size, np.float32)
        self._call(f"score_{i}", i, world, out.size, _coordinates(points), s, out)
        return out

    def value(self, i: int, world: World, points: Mapping[str, np.ndarray]) -> np.ndarray:
        s = np.asarray(points["score"], np.float32)
        out = np.empty(s.size, np.int32)
        self._call(f"value_{i}", i, world, out.size, _coordinates(points), s, out)
        return out

    def mask(self, i: int, world: World, points: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As tiles whose rows are queries find it, and as those whose rows are keys do."""
        out = np.empty((2, points["q_idx"].size), np.bool_)
        self._call(f"mask_{i}", i, world, out.shape[1], _coordinates(points), *out)
        return out[0], out[1]

    def _call(self, name: str, i: int, world: World, *args: int | np.ndarray) -> None:
        captured = [(a.ctypes.data, a.shape, [s // a.itemsize for s in a.strides]) for a in world.arrays]
        params = Words(self.mods[i]).pack(captured, world.scalars)
        self._outside.value = 0
        self.library[name](params, *(a if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in args))
        if self._outside.value:
            raise IndexError(f"{name} reads {self._outside.value} times outside of a captured array")


def _coordinates(points: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([points[name] for name in COORDINATES], np.int32)
