"""What a pattern says of whole blocks: per row of blocks, runs of empty, partial and full ones.

Memory follows the number of runs, not of blocks, and `&`, `|`, `~` of masks are min, max and 2 - x
of states. A state may say partial where a block is in truth empty or full, never the other way
round: lowering looks at every element of a partial block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

EMPTY, PARTIAL, FULL = 0, 1, 2

# States that are computed at once where a pattern has no runs of its own.
_CHUNK = 2**22


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
        begin = torch.arange(self.rows) * self.block
        end = (begin + self.block).clamp(max=self.seqlen_q)
        return begin + self.q_start, end + self.q_start

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First position of each block of keys and one past its last, int64 (columns,)."""
        begin = torch.arange(self.columns) * self.block
        end = (begin + self.block).clamp(max=self.seqlen_k)
        return begin + self.k_start, end + self.k_start


@dataclass(frozen=True, eq=False)
class Runs:
    """For each row of blocks, where a run of blocks of one state starts.

    Attributes:
        grid: what the rows and columns are.
        key: int64, row * columns + first column of a run, increasing; each row has a run at 0.
        state: uint8, of `EMPTY`, `PARTIAL`, `FULL`.
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
        key = torch.cat((self.key, other.key)).unique()
        mine, others = (
            runs.state[torch.searchsorted(runs.key, key, right=True) - 1] for runs in (self, other)
        )
        return Runs(self.grid, key, rule(mine, others))._merged()

    def _merged(self) -> Runs:
        """Without a run that only continues the one before it."""
        starts = self.key % self.grid.columns == 0
        starts[1:] |= self.state[1:] != self.state[:-1]
        return Runs(self.grid, self.key[starts], self.state[starts])

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, column (int64) and state of every block that is not empty, in order."""
        columns = self.grid.columns
        end = torch.cat((self.key[1:], self.key.new_tensor([self.grid.rows * columns])))
        alive = self.state != EMPTY
        key, state = self.key[alive], self.state[alive]
        length = end[alive] - key
        first = length.cumsum(0) - length  # where each run's blocks start in the result
        place = torch.arange(int(length.sum())) - first.repeat_interleave(length)
        block = key.repeat_interleave(length) + place
        return block // columns, block % columns, state.repeat_interleave(length)


def everywhere(grid: Grid, state: int) -> Runs:
    """One state for all blocks."""
    key = torch.arange(grid.rows) * grid.columns
    return Runs(grid, key, torch.full_like(key, state, dtype=torch.uint8))


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

    def local(position: torch.Tensor | int) -> torch.Tensor:
        position = torch.as_tensor(position, dtype=torch.int64)
        return (position - grid.k_start).clamp(0, grid.seqlen_k).expand(grid.rows)

    some, last = local(any_begin), local(any_end)
    full, end = local(all_begin), local(all_end)
    a, d = some // grid.block, -(-last // grid.block)
    d = torch.where(last > some, d, a)
    b = -(-full // grid.block)
    c = torch.where(end == grid.seqlen_k, grid.columns, end // grid.block)
    b, c = torch.where(b < c, b, a), torch.where(b < c, c, a)  # a: nothing is full
    start = torch.stack((torch.zeros_like(a), a, b, c, d), dim=1)  # (rows, 5)
    stop = torch.cat((start[:, 1:], torch.full_like(a, grid.columns)[:, None]), dim=1)
    state = torch.tensor([EMPTY, PARTIAL, FULL, PARTIAL, EMPTY], dtype=torch.uint8)
    key = torch.arange(grid.rows)[:, None] * grid.columns + start
    there = start < stop
    return Runs(grid, key[there], state.expand(grid.rows, -1)[there])._merged()


def from_rows(grid: Grid, state: torch.Tensor) -> Runs:
    """Rows of blocks of one state each, uint8 (rows,)."""
    return Runs(grid, torch.arange(grid.rows) * grid.columns, state)


def from_columns(grid: Grid, state: torch.Tensor) -> Runs:
    """Columns of blocks of one state each, uint8 (columns,)."""
    first = torch.cat((state.new_ones(1, dtype=torch.bool), state[1:] != state[:-1])).nonzero()[
        :, 0
    ]
    key = torch.arange(grid.rows)[:, None] * grid.columns + first
    return Runs(grid, key.flatten(), state[first].repeat(grid.rows))


def from_blocks(grid: Grid, row: torch.Tensor, column: torch.Tensor, state: torch.Tensor) -> Runs:
    """Some blocks, each once and in order; all others are empty."""
    key = row * grid.columns + column
    begins = torch.arange(grid.rows) * grid.columns
    after = key + 1
    after = after[after < grid.rows * grid.columns]
    every = torch.cat((begins, key, after)).unique()
    states = torch.full_like(every, EMPTY, dtype=torch.uint8)
    states[torch.searchsorted(every, key)] = state.to(torch.uint8)
    return Runs(grid, every, states)._merged()


def from_rectangles(
    grid: Grid,
    top: torch.Tensor,
    bottom: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> Runs:
    """Pairs inside of rectangles [top, bottom) x [left, right) of positions, which don't overlap.

    A block is full where rectangles cover it, together or alone.
    """
    top, bottom = ((x - grid.q_start).clamp(0, grid.seqlen_q) for x in (top, bottom))
    left, right = ((x - grid.k_start).clamp(0, grid.seqlen_k) for x in (left, right))
    there = (top < bottom) & (left < right)
    top, bottom, left, right = (x[there] for x in (top, bottom, left, right))
    size = grid.block
    rows, columns = ((b - 1) // size - a // size + 1 for a, b in ((top, bottom), (left, right)))
    blocks = rows * columns
    which = torch.arange(len(blocks)).repeat_interleave(blocks)
    place = torch.arange(len(which)) - (blocks.cumsum(0) - blocks)[which]
    row = top[which] // size + place // columns[which]
    column = left[which] // size + place % columns[which]
    height = torch.minimum(bottom[which], (row + 1) * size) - torch.maximum(top[which], row * size)
    width = torch.minimum(right[which], (column + 1) * size) - torch.maximum(
        left[which], column * size
    )
    key, inverse = (row * grid.columns + column).unique(return_inverse=True)
    covered = torch.zeros_like(key).index_add(0, inverse, height * width)
    row, column = key // grid.columns, key % grid.columns
    pairs = (grid.seqlen_q - row * size).clamp(max=size) * (grid.seqlen_k - column * size).clamp(
        max=size
    )
    return from_blocks(grid, row, column, torch.where(covered == pairs, FULL, PARTIAL))


def from_states(
    grid: Grid,
    states: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Runs:
    """Any grid, from a function of the blocks' bounds, a few rows at a time.

    Args:
        grid: the blocks.
        states: (first query, one past the last, first key, one past the last) as positions, (n, 1)
            and (1, columns), to states, (n, columns).
    """
    q_begin, q_end = grid.queries()
    k_begin, k_end = grid.keys()
    step = max(1, _CHUNK // grid.columns)
    keys, found = [], []
    for row in range(0, grid.rows, step):
        rows = slice(row, row + step)
        state = states(q_begin[rows, None], q_end[rows, None], k_begin[None], k_end[None])
        state = state.to(torch.uint8).expand(len(q_begin[rows]), grid.columns)
        starts = torch.ones_like(state, dtype=torch.bool)
        starts[:, 1:] = state[:, 1:] != state[:, :-1]
        keys.append(starts.flatten().nonzero()[:, 0] + row * grid.columns)
        found.append(state[starts])
    return Runs(grid, torch.cat(keys), torch.cat(found))
