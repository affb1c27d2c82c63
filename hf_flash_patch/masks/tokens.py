"""Patterns of single tokens: windows, global tokens, Sparse Transformer's, groups.

Legend: q, k int64 positions, of shapes that broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from ..errors import MaskError
from .grid import (
    FULL,
    PARTIAL,
    Grid,
    Runs,
    everywhere,
    from_intervals,
    from_lines,
    from_spans,
    states_of,
)
from .pattern import Pattern


def at_least(name: str, value: Any, least: int) -> int:
    """`value` as an int, if it is an integer (NumPy's too) of at least `least`.

    Raises:
        MaskError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise MaskError(f"{name} is {value!r}; it has to be an int >= {least}.")
    return int(value)


@dataclass(frozen=True)
class Full(Pattern):
    """Everything."""

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """True."""
        return torch.ones(
            torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool, device=k.device
        )

    def runs(self, grid: Grid) -> Runs:
        """Full."""
        return everywhere(grid, FULL)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """All alike."""
        return []


@dataclass(frozen=True)
class Causal(Pattern):
    """k <= q."""

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """k <= q."""
        return k <= q

    def runs(self, grid: Grid) -> Runs:
        """One interval a row."""
        q, q_end = grid.queries()
        return from_intervals(grid, 0, q_end, 0, q + 1)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """The distance, as far as it matters."""
        return [(q - k).clamp(-grid.block, grid.block)]


@dataclass(frozen=True)
class Window(Pattern):
    """|q - k| < size, every dilation-th of them."""

    size: int
    dilation: int = 1

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Near enough, and a multiple apart."""
        distance = (q - k).abs()
        near = distance < self.size
        return near if self.dilation == 1 else near & (distance % self.dilation == 0)

    def runs(self, grid: Grid) -> Runs:
        """One interval a row; with dilation, no block is full."""
        q, q_end = grid.queries()
        begin, end = q - (self.size - 1), q_end + (self.size - 1)
        if self.dilation > 1:
            return from_intervals(grid, begin, end, 0, 0)
        return from_intervals(grid, begin, end, q_end - self.size, q + self.size)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """The distance, as far as it matters."""
        far = self.size + grid.block
        return [(q - k).clamp(-far, far)]


@dataclass(frozen=True)
class Sinks(Pattern):
    """k < count."""

    count: int

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """k < count, for every q."""
        return (k < self.count).expand(torch.broadcast_shapes(q.shape, k.shape))

    def runs(self, grid: Grid) -> Runs:
        """The same interval in every row."""
        return from_intervals(grid, 0, self.count, 0, self.count)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Where the keys start, as far as it matters."""
        return [k.clamp(max=self.count)]


@dataclass(frozen=True)
class Global(Pattern):
    """q or k is one of the indices, which are given as sorted, disjoint ranges (start, stop)."""

    ranges: tuple[tuple[int, int], ...]

    def _among(self, position: torch.Tensor) -> torch.Tensor:
        among = torch.zeros_like(position, dtype=torch.bool)
        for start, stop in self.ranges:
            among = among | ((position >= start) & (position < stop))
        return among

    def _count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        count = torch.zeros_like(begin)
        for start, stop in self.ranges:
            count += end.clamp(start, stop) - begin.clamp(start, stop)
        return count

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Either is global."""
        return self._among(q) | self._among(k)

    def runs(self, grid: Grid) -> Runs:
        """Rows and columns."""
        rows, columns = (
            states_of(self._count(begin, end), end - begin)
            for begin, end in (grid.queries(), grid.keys())
        )
        return from_lines(grid, rows, columns)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Where rows and columns start, if anything there is global."""
        first = torch.stack((q, k))
        near = self._count(first, first + grid.block) > 0
        return list(torch.where(near, first, -grid.block))  # where none of those starts


@dataclass(frozen=True)
class Strided(Pattern):
    """|q - k| < stride, or a multiple of it."""

    stride: int

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Near, or a multiple apart."""
        distance = (q - k).abs()
        return (distance < self.stride) | (distance % self.stride == 0)

    def runs(self, grid: Grid) -> Runs:
        """A window, and the blocks that multiples of the stride cross."""
        near = Window(self.stride).runs(grid)
        if self.stride < grid.block:
            return near | everywhere(grid, PARTIAL)
        q, q_end = grid.queries()
        end = grid.k_start + grid.seqlen_k
        multiples = torch.arange(
            -(end // self.stride + 1), (grid.q_start + grid.seqlen_q) // self.stride + 2
        )
        # A row and a multiple cross keys [first, last), of two blocks at most; both rise in a row.
        shift = grid.k_start + multiples.flip(0) * self.stride
        past = grid.columns * grid.block
        first, last = ((p[:, None] - shift).clamp(0, past) for p in (q, q_end))
        row = grid.first_blocks()[:, None]
        start = (row + first // grid.block).flatten()
        stop = (row + (last + grid.block - 1) // grid.block).flatten()
        far = torch.full_like(start, PARTIAL, dtype=torch.uint8)
        return near | from_spans(grid, start, stop, far)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """The distance, modulo the stride where it is far."""
        far = self.stride + grid.block
        return [(q - k).clamp(-far, far), (q - k) % self.stride]


@dataclass(frozen=True)
class Fixed(Pattern):
    """The same block of tokens, or k is among the last `globals_` of its block."""

    block: int
    globals_: int

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same block, or a summary token."""
        return (q // self.block == k // self.block) | (k % self.block >= self.block - self.globals_)

    def _summaries(self, end: torch.Tensor) -> torch.Tensor:
        """Summary tokens before position `end`."""
        within = (end % self.block - (self.block - self.globals_)).clamp(min=0)
        return end // self.block * self.globals_ + within

    def runs(self, grid: Grid) -> Runs:
        """The token's own block, and columns."""
        k, k_end = grid.keys()
        columns = states_of(self._summaries(k_end) - self._summaries(k), k_end - k)
        rows = torch.zeros(grid.rows, dtype=torch.uint8)
        return Groups(self.block, 0).runs(grid) | from_lines(grid, rows, columns)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Where the tokens stand in their blocks, and how far these are apart."""
        far = self.block + grid.block
        return [q % self.block, k % self.block, (q - k).clamp(-far, far)]


@dataclass(frozen=True)
class Groups(Pattern):
    """(q + shift) // group == (k + shift) // group."""

    group: int
    shift: int

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same group."""
        return (q + self.shift) // self.group == (k + self.shift) // self.group

    def runs(self, grid: Grid) -> Runs:
        """One interval a row."""
        q, q_end = grid.queries()
        first, last = (
            (p + self.shift) // self.group * self.group - self.shift for p in (q, q_end - 1)
        )
        return from_intervals(grid, first, last + self.group, last, first + self.group)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Where the queries stand in their group, and the distance."""
        far = self.group + grid.block
        return [(q + self.shift) % self.group, (q - k).clamp(-far, far)]


@dataclass(frozen=True)
class ShiftedGroups(Pattern):
    """`Groups` for one half of the heads, shifted by half a group for the other."""

    group: int

    @property
    def static_heads(self) -> int:
        """Two."""
        return 2

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """Plain for the first half of the heads, shifted for the second."""
        return Groups(self.group, self.group // 2 if 2 * head >= num_heads else 0)


def full() -> Pattern:
    """Every pair."""
    return Full()


def causal() -> Pattern:
    """A token sees itself and what is before it: k <= q."""
    return Causal()


def sliding_window(size: int) -> Pattern:
    """|q - k| < size; in a causal model, which sees nothing later, 0 <= q - k < size.

    Raises:
        MaskError: size is no int >= 1.
    """
    return Window(at_least("sliding_window's size", size, 1))


def dilated_window(size: int, dilation: int) -> Pattern:
    """Every dilation-th token of a window: |q - k| < size and q - k a multiple of dilation.

    Raises:
        MaskError: size or dilation is no int >= 1.

    Source: Longformer (arXiv 2004.05150), section 3.1; there size / dilation tokens are counted.
    """
    size = at_least("dilated_window's size", size, 1)
    return Window(size, at_least("dilated_window's dilation", dilation, 1))


def global_tokens(tokens: int | Iterable[int]) -> Pattern:
    """Tokens that see all and are seen by all: the first `tokens`, or those at the given positions.

    Raises:
        MaskError: a number is negative, or no int.

    Source: Longformer (arXiv 2004.05150), section 3.1.
    """
    if not isinstance(tokens, Iterable):
        count = at_least("global_tokens' number", tokens, 0)
        return Global(((0, count),) if count else ())
    ranges: list[tuple[int, int]] = []
    for index in sorted({at_least("an index of global_tokens", i, 0) for i in tokens}):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return Global(tuple(ranges))


def sinks(n: int) -> Pattern:
    """The first n tokens are seen by all.

    Raises:
        MaskError: n is no int >= 0.

    Source: StreamingLLM (arXiv 2309.17453).
    """
    return Sinks(at_least("sinks' n", n, 0))


def strided(stride: int) -> Pattern:
    """The last `stride` tokens, and every stride-th: |q - k| < stride, or a multiple of it.

    Raises:
        MaskError: stride is no int >= 1.

    Source: Sparse Transformer (arXiv 1904.10509), section 4.3.
    """
    return Strided(at_least("strided's stride", stride, 1))


def fixed(block: int, globals_: int) -> Pattern:
    """The token's own block of `block` tokens, and the last `globals_` tokens of every block.

    Raises:
        MaskError: block is no int >= 1, or globals_ not in 0..block.

    Source: Sparse Transformer (arXiv 1904.10509), section 4.3; l and c there.
    """
    at_least("fixed's block", block, 1)
    if at_least("fixed's globals_", globals_, 0) > block:
        raise MaskError(f"fixed's globals_ is {globals_}, its block {block}; at most a block's.")
    return Fixed(block, globals_)


def longformer(window: int, global_: int) -> Pattern:
    """window // 2 tokens on either side, and the first global_ tokens as global ones.

    Raises:
        MaskError: a number is negative, or no int.

    Source: Longformer (arXiv 2004.05150).
    """
    half = at_least("longformer's window", window, 0) // 2
    return Window(half + 1) | global_tokens(at_least("longformer's global_", global_, 0))


def shifted_groups(group: int) -> Pattern:
    """Groups of `group` tokens, shifted by half a group in the second half of the heads.

    The half groups at both ends of a shifted head stay apart; LongLoRA's roll joins them, the
    sequence's first tokens with its last.

    Raises:
        MaskError: group is no even int >= 2.

    Source: LongLoRA (arXiv 2309.12307), S2-attention.
    """
    if at_least("shifted_groups' group", group, 2) % 2:
        raise MaskError(f"shifted_groups' group is {group}; it has to be even.")
    return ShiftedGroups(group)
