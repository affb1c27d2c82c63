"""What a pattern says of whole blocks: per row of blocks, runs of empty, partial and full ones.

Memory follows the number of runs, not of blocks, and `&`, `|`, `~` of masks are min, max and 2 - x
of states. A state may say partial where a block is in truth empty or full, never the other way
round: lowering looks at every element of a partial block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Grid:
    """A rectangle of pairs cut into square blocks; the last row and column may be cut short.

    Attributes:
        seqlen_q, seqlen_k: queries and keys.
        q_start, k_start: position of the first query and of the first key.
        block: rows and columns of a block.
    """

    seqlen_q: int
    seqlen_k: int
    q_start: int
    k_start: int
    block: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.seqlen_q // self.block)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.seqlen_k // self.block)

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First position of each block of queries and one past its last, int64 (rows,)."""
        return self._bounds(self.q_start, self.q_start + self.seqlen_q)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First position of each block of keys and one past its last, int64 (columns,)."""
        return self._bounds(self.k_start, self.k_start + self.seqlen_k)

    def first_blocks(self) -> torch.Tensor:
        """int64 (rows,), row * columns: the number of each row's first block."""
        return torch.arange(0, self.rows * self.columns, self.columns)

    def _bounds(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = torch.arange(start, stop, self.block)
        return begin, (begin + self.block).clamp(max=stop)


@dataclass(frozen=True, eq=False)
class Runs:
    """Where runs of blocks of one state start, the grid's rows one after the other.

    A run ends where the next one starts, in its row or below. Where runs start at one block, the
    last of them counts and the others have no blocks: to leave them out would take a
    synchronisation, and they cost less.

    Attributes:
        grid: what the rows and columns are.
        key: int64 (n,), row * columns + column of a run's first block, not falling, from 0.
        state: uint8 (n,), of `EMPTY`, `PARTIAL`, `FULL`.
    """

    grid: Grid
    key: torch.Tensor
    state: torch.Tensor

    def __and__(self, other: Runs) -> Runs:
        return self._combine(other, torch.minimum)

    def __or__(self, other: Runs) -> Runs:
        return self._combine(other, torch.maximum)

    def __invert__(self) -> Runs:
        return Runs(self.grid, self.key, FULL - self.state)

    def _combine(
        self, other: Runs, rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Runs:
        key = torch.cat((self.key, other.key)).sort()[0]
        mine, others = (
            runs.state[torch.searchsorted(runs.key, key, right=True) - 1] for runs in (self, other)
        )
        return Runs(self.grid, key, rule(mine, others))

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, column (int32) and state of every block that is not empty, in order."""
        blocks = self.grid.rows * self.grid.columns
        length = pad(self.key, (0, 1), value=blocks).diff() * (self.state != EMPTY)
        end = length.cumsum(0)  # of each run's blocks in the result
        count = int(end[-1])
        run = torch.repeat_interleave(length, output_size=count)
        # A window of 4096 has ten times as many blocks as runs; int32 halves their bytes.
        dtype = torch.int32 if blocks < 2**31 else torch.int64
        block = torch.arange(count, dtype=dtype) + (self.key + length - end).to(dtype)[run]
        columns = self.grid.columns
        return (block // columns).int(), (block % columns).int(), self.state[run]


def states_of(count: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """uint8 states of what has `size` elements > 0, of which `count` are seen."""
    return (count > 0).view(torch.uint8) + (count == size)


def everywhere(grid: Grid, state: int) -> Runs:
    """One state for all blocks."""
    return Runs(grid, torch.zeros(1, dtype=torch.int64), torch.full((1,), state, dtype=torch.uint8))


def from_intervals(
    grid: Grid,
    any_begin: torch.Tensor | int,
    any_end: torch.Tensor | int,
    all_begin: torch.Tensor | int,
    all_end: torch.Tensor | int,
) -> Runs:
    """Rows of blocks whose queries each see one interval of keys.

    Args:
        grid: the blocks.
        any_begin, any_end: positions, (rows,) or one for all; no query of the row sees a key
            outside.
        all_begin, all_end: every query of the row sees every key inside.
    """
    bounds = [
        x if isinstance(x, torch.Tensor) else torch.full((grid.rows,), x)
        for x in (any_begin, any_end, all_begin, all_end)
    ]
    key = torch.stack(bounds) - grid.k_start  # (4, rows)
    # The last block may be cut short, and is full all the same where the rest of it is.
    key = key.clamp(min=0).masked_fill(key >= grid.seqlen_k, grid.columns * grid.block)
    down, up = key // grid.block, (key + (grid.block - 1)) // grid.block
    a = down[0]
    d = torch.where(key[1] > key[0], up[1], a)
    b = up[2].clamp(a, d)
    c = down[3].clamp(b, d)  # b where nothing is full
    start = torch.stack((torch.zeros_like(a), a, b, c, d), dim=1)
    state = torch.full((grid.rows, 5), EMPTY, dtype=torch.uint8)
    state[:, 1:4].fill_(PARTIAL)
    state[:, 2].fill_(FULL)
    return Runs(grid, (grid.first_blocks()[:, None] + start).flatten(), state.flatten())


def from_lines(grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> Runs:
    """Lines of blocks that have a state, uint8 (rows,) and (columns,); where two cross, the larger
    counts."""
    first = pad((columns[1:] != columns[:-1]).nonzero()[:, 0] + 1, (1, 0))
    key = grid.first_blocks()[:, None] + first
    return Runs(grid, key.flatten(), torch.maximum(rows[:, None], columns[first]).flatten())


def from_spans(grid: Grid, start: torch.Tensor, stop: torch.Tensor, state: torch.Tensor) -> Runs:
    """Blocks numbered row * columns + column in spans of one state; all others are empty.

    Args:
        grid: the blocks.
        start, stop: int64 (n,), neither falling; where spans overlap, the earlier one counts.
        state: uint8 (n,).
    """
    start = torch.cat((start[:1], torch.maximum(start[1:], stop[:-1])))
    key = pad(torch.stack((start, stop), dim=1).flatten(), (1, 0))
    states = pad(torch.stack((state, torch.full_like(state, EMPTY)), dim=1).flatten(), (1, 0))
    return Runs(grid, key, states)


def from_rectangles(
    grid: Grid,
    top: torch.Tensor,
    bottom: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> Runs:
    """Pairs inside of rectangles [top, bottom) x [left, right) of positions, which don't overlap.

    Each has pairs of the grid inside. A block is full where rectangles cover it, together or alone.
    """
    size = grid.block
    low = torch.stack((top - grid.q_start, left - grid.k_start)).clamp(min=0)
    high = torch.stack(
        (
            (bottom - grid.q_start).clamp(max=grid.seqlen_q),
            (right - grid.k_start).clamp(max=grid.seqlen_k),
        )
    )
    first = low // size
    lines = (high - 1) // size - first + 1  # rows and columns of blocks
    blocks = lines[0] * lines[1]
    count = int(blocks.sum())
    which = torch.repeat_interleave(blocks, output_size=count)
    place = torch.arange(count) - (blocks.cumsum(0) - blocks)[which]
    across = lines[1, which]
    block = first[:, which] + torch.stack((place // across, place % across))
    begin = block * size
    covers = torch.minimum(high[:, which], begin + size) - torch.maximum(low[:, which], begin)
    key, inverse = (block[0] * grid.columns + block[1]).unique(return_inverse=True)
    covered = torch.zeros_like(key).index_add(0, inverse, covers.prod(dim=0))
    row, column = key // grid.columns, key % grid.columns
    pairs = (grid.seqlen_q - row * size).clamp(max=size) * (grid.seqlen_k - column * size).clamp(
        max=size
    )
    return from_spans(grid, key, key + 1, states_of(covered, pairs))
