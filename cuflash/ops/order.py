"""In which order the blocks of a grid compute its tiles: the host half of kernels_cu/tile/schedule.cuh.

A grid starts its blocks one after the other, as multiprocessors become free. So the longest tiles go first: what is
left at the end is short, and no multiprocessor waits long for the last one. Tiles of one length are left as the grid
counts them: all of one head, which read the same keys, follow each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..arch import Arch
from ..errors import UnsupportedError
from ..jit import layout

Grid = tuple[int, int, int]
ORDERS = ("long", "position")
MAX_BLOCKS = 2**31 - 1  # of a grid whose blocks compute their rank
_SHARE_OF_L2 = 2  # one half: the other is for what else passes through
# A group has at least so many blocks for each place on the multiprocessors, whatever the cache: so many run at one time
# that fewer pairs would not read less, and the last group's long tiles would be left for the end.
_BLOCKS_A_PLACE = 4


@dataclass(frozen=True, slots=True)
class Order:
    """Groups of (sequence, head) pairs: of each group all first tiles are computed, then all second ones.

    pairs, full  of a full group, and of all of those together; pairs 0: there are no groups
    rest         of each group behind the full ones
    heads        that the grid counts of a sequence
    from_begin   whether a sequence's tiles are computed from its first to its last
    """

    pairs: int = 0
    full: int = 0
    rest: int = 0
    heads: int = 1
    from_begin: bool = False

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - an order is a value
    def packed(self) -> bytes:
        """As kernels read it: `Order` of kernels_cu/params/order.cuh."""
        names = ("pairs", "full", "rest", "from_begin")
        values = {name: int(getattr(self, name)) for name in names}
        for name in ("pairs", "rest", "heads"):
            values[f"{name}_multiplier"], values[f"{name}_shift"] = divisor(getattr(self, name))
        return layout.load("Order").pack(**values)

    def places(self, grid: Grid) -> Iterator[tuple[int, int, int]]:
        """(tile, head, sequence) of each block of a grid, in the order in which they start.

        >>> list(Order(pairs=2, full=2, rest=1, heads=3).places((2, 3, 1)))
        [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0)]
        """
        tiles, lines = grid[0], grid[1] * grid[2]
        begin = 0
        while begin < lines:
            size = (self.pairs if begin < self.full else self.rest) if self.pairs else 1
            for tile in range(tiles):
                for pair in range(begin, begin + size):
                    yield tile, pair % self.heads, pair // self.heads
            begin += size

    def __str__(self) -> str:
        if self.pairs == 0:
            return "tiles in the grid's order"
        sizes = f"{self.pairs}" if self.rest == 0 else f"{self.pairs} or {self.rest}"
        end = "begin" if self.from_begin else "end"
        return f"long tiles first: from each sequence's {end}, over groups of {sizes} (sequence, head) pairs"


def divisor(n: int) -> tuple[int, int]:
    """Multiplier and shift by which kernels divide a number below 2^31 by n (`quotient` of schedule.cuh).

    >>> multiplier, shift = divisor(48)
    >>> (1000 * multiplier >> 31 + shift) == 1000 // 48
    True
    """
    shift = max(n - 1, 0).bit_length()
    return -(-(2 ** (31 + shift)) // max(n, 1)), shift


def places(arch: Arch, threads: int) -> int:
    """How many blocks run at one time: two on a multiprocessor where their registers fit, all that a thread may have.

    >>> places(Arch("sm_80", (8, 0), 0, 108), 128)
    216
    """
    return arch.multiprocessors * max(256 // threads, 1)


def begins_long(window: tuple[int, int]) -> bool:
    """Whether the first rows of a sequence, which see what is right of them, meet more than the last.

    window  (left, right) of the rows that tiles are of; -1: no limit

    >>> begins_long((-1, 0)), begins_long((0, -1)), begins_long((0, 512)), begins_long((-1, -1))
    (False, True, True, False)
    """
    left, right = (math.inf if n < 0 else n for n in window)
    return right > left


def rows_together(rows: int, window: tuple[int, int], block: int) -> int:
    """How many of `rows` rows the tiles of a sequence read that are computed at one time: all, or a window of them.

    >>> rows_together(4096, (512, 0), 128), rows_together(4096, (-1, 0), 128)
    (768, 4096)
    """
    return min(rows, sum(window) + 2 * block) if min(window) >= 0 else rows


def choose(
    grid: Grid,
    arch: Arch,
    *,
    wanted: str | None,
    alike: bool,
    masked: bool,
    cluster: int = 1,
    window: tuple[int, int],
    heads_together: int,
    bytes_together: int,
    threads: int,
) -> Order:
    """The order of a grid (tile, head, sequence).

    wanted          "long", "position", or None: long tiles first where tiles differ in length by rules the host knows
    alike           all tiles meet the same rows
    masked          a mask_mod decides which they meet
    heads_together  how many heads of the grid read the same rows, those of a key head
    bytes_together  how many bytes those are, of a sequence of average length: `rows_together`
    threads         of a block
    """
    blocks, pairs = math.prod(grid), grid[1] * grid[2]
    can = cluster == 1 and blocks <= MAX_BLOCKS
    if wanted == "long" and not can:
        raise UnsupportedError(
            f"kernel_options: order='long' is for grids of at most {MAX_BLOCKS} blocks without clusters, and this one "
            f"has {blocks}, in clusters of {cluster}: leave it None"
        )
    heads = max(grid[1], 1)
    if not can or not blocks or wanted == "position" or (wanted is None and (alike or masked)):
        return Order(heads=heads)
    fitting = arch.l2_bytes // _SHARE_OF_L2 // max(bytes_together, 1) * heads_together
    wide = max(fitting, -(-_BLOCKS_A_PLACE * places(arch, threads) // grid[0]), heads_together)
    units = -(-pairs // heads_together)  # of heads that read the same rows
    groups = -(-units // max(wide // heads_together, 1))
    size, longer = divmod(units, groups)
    rest = size * heads_together
    if longer == 0:
        return Order(rest, pairs, 0, heads, begins_long(window))
    return Order(rest + heads_together, longer * (rest + heads_together), rest, heads, begins_long(window))
