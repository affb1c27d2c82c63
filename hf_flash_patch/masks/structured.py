"""Patterns of blocks, documents and heads, and masks that someone else made.

Legend: q, k int64 positions, i, j block numbers, of shapes that broadcast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ..errors import MaskError
from .bits import pack_bits
from .grid import Grid, Runs, from_intervals, from_rectangles
from .pattern import Pattern
from .tokens import at_least, global_tokens

_CHUNK = 2**22  # cells that are looked at at once


@dataclass(frozen=True)
class Cells(Pattern):
    """A pattern of square blocks of `block` tokens, each seen wholly or not at all."""

    block: int

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether block i of queries sees block j of keys."""
        raise NotImplementedError

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The cell's."""
        return self.cell(q // self.block, k // self.block)

    def live(self, i: range, j: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the cells that are there, each once, among rows i and columns j."""
        columns = torch.arange(j.start, j.stop)
        step = max(1, _CHUNK // len(j))
        found = []
        for begin in range(i.start, i.stop, step):
            rows = torch.arange(begin, min(begin + step, i.stop))
            live = self.cell(rows[:, None], columns).nonzero()
            found.append(live + torch.tensor([begin, j.start]))
        row, column = torch.cat(found).unbind(1)
        return row, column

    def runs(self, grid: Grid) -> Runs:
        """Of the cells that are there."""
        i, j = (
            range(start // self.block, (start + length - 1) // self.block + 1)
            for start, length in ((grid.q_start, grid.seqlen_q), (grid.k_start, grid.seqlen_k))
        )
        row, column = (x * self.block for x in self.live(i, j))
        return from_rectangles(grid, row, row + self.block, column, column + self.block)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Where the block stands in its cells, and which of them are there."""
        across = -(-grid.block // self.block) + 1
        step = torch.arange(across)
        words = []
        for some in torch.stack((q, k)).split(max(1, _CHUNK // across**2), dim=1):
            i, j = some[..., None, None] // self.block  # (n, 1, 1)
            live = self.cell(i + step[:, None], j + step).flatten(1)
            words.append(pack_bits(pad(live, (0, -live.shape[1] % 64))).view(torch.int64))
        return [q % self.block, k % self.block, *torch.cat(words).unbind(1)]


@dataclass(frozen=True)
class Band(Cells):
    """|i - j| <= reach."""

    reach: int

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Near enough."""
        return (i - j).abs() <= self.reach

    def live(self, i: range, j: range) -> tuple[torch.Tensor, torch.Tensor]:
        """The band."""
        rows = torch.arange(i.start, i.stop)[:, None]
        return _inside(rows, rows + torch.arange(-self.reach, self.reach + 1), i, j)


@dataclass(frozen=True)
class RandomCells(Cells):
    """For each block, `count` blocks before it, drawn by a hash; and the mirror image."""

    count: int
    seed: int

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether the earlier of the two is among those drawn for the later."""

        def drawn(late: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
            among = (early == one for one in self._drawn(late).unbind(-1))
            return functools.reduce(torch.logical_or, among) & (late > early)

        return drawn(i, j) | drawn(j, i)

    def _drawn(self, late: torch.Tensor) -> torch.Tensor:
        # For rows or columns, before these broadcast: an element of a tile costs no hash.
        number = torch.arange(self.count, device=late.device)
        late = late[..., None]
        return _hash(late, self.seed, number) % late.clamp(min=1)

    def live(self, i: range, j: range) -> tuple[torch.Tensor, torch.Tensor]:
        """What was drawn, and the mirror image."""
        late = torch.arange(1, max(i.stop, j.stop, 1))
        early = self._drawn(late)
        late = late[:, None].expand_as(early)
        return _inside(torch.cat((late, early)), torch.cat((early, late)), i, j)


def _inside(
    row: torch.Tensor, column: torch.Tensor, i: range, j: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the cells, which broadcast, that lie in i x j, each once."""
    row, column = (x.flatten() for x in torch.broadcast_tensors(row, column))
    inside = (row >= i.start) & (row < i.stop) & (column >= j.start) & (column < j.stop)
    cell = ((row - i.start) * len(j) + column - j.start)[inside].unique()
    return cell // len(j) + i.start, cell % len(j) + j.start


def _hash(x: torch.Tensor, seed: int, number: torch.Tensor) -> torch.Tensor:
    """Non-negative int64 that looks random, of two rounds of multiply and shift."""
    x = x * 2654435761 + (seed * 40503 + number) * 97531 + 1
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) & 0xFFFFFFFF) * factor
    return (x ^ (x >> 16)) & 0x7FFFFFFF


@dataclass(frozen=True)
class Butterfly(Cells):
    """i == j, or i XOR j a power of two below 2 ** factors."""

    factors: int | None

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """At most one bit differs, and not too high a one."""
        differ = i ^ j
        live = (differ & (differ - 1)) == 0  # 0 or a power of two
        return live if self.factors is None else live & (differ < 2**self.factors)

    def live(self, i: range, j: range) -> tuple[torch.Tensor, torch.Tensor]:
        """The diagonal, and where one bit differs."""
        bits = max(i.stop, j.stop, 1).bit_length()
        bits = bits if self.factors is None else min(bits, self.factors)
        rows = torch.arange(max(i.start, 0), max(i.stop, 0))[:, None]
        differ = torch.tensor([0, *(2**bit for bit in range(bits))])
        return _inside(rows, rows ^ differ, i, j)


@dataclass(frozen=True)
class Layout(Cells):
    """A table of cells, (batch or 1, heads or 1, rows, columns), as hexadecimal digits."""

    shape: tuple[int, int, int, int]
    digits: str

    @property
    def batches(self) -> int:
        """Of the table."""
        return self.shape[0]

    @property
    def static_heads(self) -> int:
        """Of the table."""
        return self.shape[1]

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """The table of one sequence and head."""
        if self.shape[:2] == (1, 1):
            return self
        table = _table(self.shape, self.digits)
        one = table[sequence if len(table) > 1 else 0, head * self.shape[1] // num_heads]
        return _layout(one[None, None], self.block)

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """The table's entry."""
        rows, columns = self.shape[2:]
        table = _table(self.shape, self.digits)[0, 0].to(j.device)
        i = (i - (columns - rows)).clamp(0, rows - 1)
        return table[i, j.clamp(0, columns - 1)]

    def check(self, grid: Grid) -> None:
        """The table has to reach as far as the sequence."""
        rows, columns = self.shape[2:]
        keys, queries = grid.k_start + grid.seqlen_k, grid.q_start + grid.seqlen_q
        short = keys > columns * self.block or queries > columns * self.block
        short |= grid.q_start < (columns - rows) * self.block
        if short:
            raise MaskError(
                f"the layout has {rows} x {columns} blocks of {self.block} tokens, for seqlen_q up "
                f"to {rows * self.block} and seqlen_k up to {columns * self.block}; the call has "
                f"{grid.seqlen_q} queries from position {grid.q_start} and {keys} keys. The rows "
                "are the last of the columns' positions: make the layout for these lengths."
            )


@functools.lru_cache(maxsize=64)
def _table(shape: tuple[int, ...], digits: str) -> torch.Tensor:
    packed = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8, device="cpu")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    count = shape[0] * shape[1] * shape[2] * shape[3]
    return bits.flatten()[:count].bool().view(shape)


def _layout(table: torch.Tensor, block: int) -> Layout:
    bits = table.flatten().to("cpu", torch.uint8)
    bits = pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=1)
    rows, columns = table.shape[-2:]
    return Layout(
        block, (table.shape[0], table.shape[1], rows, columns), bytes(packed.tolist()).hex()
    )


@dataclass(frozen=True)
class Documents(Pattern):
    """Runs of tokens, (stop, document) each, one list a sequence; the same document only."""

    lists: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def batches(self) -> int:
        """Of the lists."""
        return len(self.lists)

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """One sequence's."""
        return Documents((self.lists[sequence if self.batches > 1 else 0],))

    def _stops(self, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        stops, names = zip(*self.lists[0], strict=True)
        return torch.tensor(stops, device=device), torch.tensor(names, device=device)

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The same document."""
        stops, names = self._stops(k.device)
        of_q, of_k = (
            names[torch.searchsorted(stops, p.contiguous(), right=True).clamp(max=len(names) - 1)]
            for p in (q, k)
        )
        return of_q == of_k

    def runs(self, grid: Grid) -> Runs:
        """One interval a row, unless a document comes in pieces."""
        if len({name for _, name in self.lists[0]}) < len(self.lists[0]):
            return super().runs(grid)
        stops, _ = self._stops(None)
        starts = torch.cat((stops.new_zeros(1), stops[:-1]))
        q, q_end = grid.queries()
        first, last = (torch.searchsorted(stops, p, right=True) for p in (q, q_end - 1))
        return from_intervals(grid, starts[first], stops[last], starts[last], stops[first])

    def check(self, grid: Grid) -> None:
        """The documents have to reach as far as the sequence."""
        tokens = min(runs[-1][0] for runs in self.lists)
        end = max(grid.q_start + grid.seqlen_q, grid.k_start + grid.seqlen_k)
        if end > tokens:
            raise MaskError(
                f"documents describe {tokens} tokens, the call has {grid.seqlen_q} queries and "
                f"{grid.seqlen_k} keys up to position {end}; give every token a document."
            )


@dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern of its own for each head, or group of heads."""

    patterns: tuple[Pattern, ...]

    @property
    def static_heads(self) -> int:
        """As many as there are."""
        return len(self.patterns)

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """The head's."""
        return self.patterns[head * len(self.patterns) // num_heads]

    def check(self, grid: Grid) -> None:
        """Each one's."""
        for pattern in self.patterns:
            pattern.check(grid)


@dataclass(frozen=True)
class MaskMod(Pattern):
    """A function (batch, head, q, k) -> bool, looked at element by element."""

    function: Callable[..., torch.Tensor]
    count: int = 1
    per_head: bool = False
    sequence: int = 0
    head: int = 0

    @property
    def batches(self) -> int:
        """As told."""
        return self.count

    @property
    def static_heads(self) -> int:
        """One, or any number."""
        return 0 if self.per_head else 1

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """With the sequence and the head filled in."""
        return MaskMod(self.function, 1, False, sequence, head if self.per_head else 0)

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """What the function says."""
        b, h = (
            torch.full((), x, dtype=torch.int64, device=k.device)
            for x in (self.sequence, self.head)
        )
        seen = self.function(b, h, q, k)
        if not isinstance(seen, torch.Tensor):
            raise MaskError(
                f"a mask_mod returned a {type(seen).__name__}; it has to return a bool tensor, "
                "made from its q and k, as FlexAttention's do: q >= k, say."
            )
        return seen.bool()


def bigbird(window: int, random: int, global_: int, seed: int = 0, *, block: int = 64) -> Pattern:
    """Blocks: a band `window` blocks wide, the first global_ blocks as global, random ones.

    `random` blocks before a block are drawn for it, by a hash of seed and its number, and by
    symmetry blocks after it. So the mask is the same at any length, and a decode step sees what a
    longer prefill would; the paper draws `random` of all blocks, one way.

    Raises:
        MaskError: a number is negative, or no int, or window is even.

    Source: BigBird (arXiv 2007.14062), section 2 and appendix D.
    """
    if at_least("bigbird's window", window, 1) % 2 == 0:
        raise MaskError(f"bigbird's window is {window} blocks; it has to be odd, its own included.")
    at_least("bigbird's block", block, 1)
    pattern = Band(block, window // 2) | global_tokens(
        at_least("bigbird's global_", global_, 0) * block
    )
    if at_least("bigbird's random", random, 0):
        pattern |= RandomCells(block, random, at_least("bigbird's seed", seed, 0))
    return pattern


def butterfly(block: int = 128, factors: int | None = None) -> Pattern:
    """Blocks i and j see each other if i == j or i XOR j is a power of two, of the first `factors`.

    Raises:
        MaskError: block is no int >= 1, or factors no int >= 0.

    Source: FlashAttention (arXiv 2205.14135), section 3.3; Pixelated Butterfly (arXiv 2112.00029).
    """
    at_least("butterfly's block", block, 1)
    if factors is not None:
        at_least("butterfly's factors", factors, 0)
    return Butterfly(block, factors)


def documents(ids: Any = None, *, cu_seqlens: Any = None) -> Pattern:
    """Tokens of the same document only.

    Args:
        ids: int (seqlen,) or (batch, seqlen), the number of each token's document.
        cu_seqlens: int (num_documents + 1,), 0 and then the documents' ends, instead of ids.

    Raises:
        MaskError: both or neither are given, or are malformed. Values are read on the host.
    """
    if (ids is None) == (cu_seqlens is None):
        raise MaskError("documents takes ids or cu_seqlens, one of them.")
    if cu_seqlens is not None:
        edges = torch.as_tensor(cu_seqlens).tolist()
        if not isinstance(edges, list) or len(edges) < 2 or edges[0] != 0 or edges != sorted(edges):
            raise MaskError(
                f"cu_seqlens is {edges}; it has to start at 0 and not decrease, (documents + 1,)."
            )
        stops = sorted(set(edges[1:]) - {0}) or [0]
        return Documents((tuple((stop, number) for number, stop in enumerate(stops)),))
    table = torch.as_tensor(ids).cpu()
    table = table[None] if table.dim() == 1 else table
    if table.dim() != 2 or table.is_floating_point() or table.numel() == 0:
        raise MaskError(
            f"ids has dtype {table.dtype} and shape {tuple(table.shape)}; it has to be int "
            "(seqlen,) or (batch, seqlen), with tokens."
        )
    lists = []
    for row in table:
        values, counts = row.unique_consecutive(return_counts=True)
        lists.append(tuple(zip(counts.cumsum(0).tolist(), values.tolist(), strict=True)))
    return Documents(tuple(lists))


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern a head, or a group of heads: head h of num_heads uses number h * n // num_heads.

    Args:
        patterns: num_heads of them, num_heads_k (the heads of a group share one), or any number
            that divides num_heads.

    Raises:
        MaskError: there are none, or one is no pattern, or has heads or sequences of its own.
    """
    if not patterns:
        raise MaskError("per_head got no patterns; give one a head.")
    for pattern in patterns:
        alike = isinstance(pattern, Pattern) and (pattern.static_heads, pattern.batches) == (1, 1)
        if not alike or not pattern.positional:
            raise MaskError(
                f"per_head got {pattern}; each has to be a pattern that is the same for all heads "
                "and sequences."
            )
    return PerHead(tuple(patterns))


def from_block_layout(layout: Any, block_size: int) -> Pattern:
    """A table of blocks: entry (i, j) says whether block i of queries sees block j of keys.

    Args:
        layout: bool (nq, nk), (heads, nq, nk) or (batch, heads, nq, nk); of tokens
            [0, nk * block_size), of which the queries are the last nq blocks.
        block_size: tokens a block; any number.

    Raises:
        MaskError: the layout's rank or dtype, or block_size.
    """
    table = torch.as_tensor(layout)
    if table.dtype != torch.bool or not 2 <= table.dim() <= 4 or table.numel() == 0:
        raise MaskError(
            f"layout has dtype {table.dtype} and shape {tuple(table.shape)}; it has to be bool "
            "(nq, nk), (heads, nq, nk) or (batch, heads, nq, nk)."
        )
    table = table[(None,) * (4 - table.dim())]
    if table.shape[-2] > table.shape[-1]:
        raise MaskError(
            f"layout has {table.shape[-2]} rows and {table.shape[-1]} columns; queries are the "
            "last of the keys' positions, so there are at most as many rows."
        )
    return _layout(table, at_least("block_size", block_size, 1))


def from_mask_mod(
    function: Callable[..., torch.Tensor], *, batch: int = 1, per_head: bool = False
) -> Pattern:
    """Any mask: function(batch, head, q, k) -> bool tensor, on int64 tensors that broadcast.

    Every element is looked at, once for each pair of lengths: time is quadratic in seqlen, memory
    is not.

    Args:
        function: as FlexAttention's mask_mod, but q and k are positions, aligned bottom-right.
        batch: sequences that differ; 1 if none do.
        per_head: whether heads differ.
    """
    if not callable(function):
        raise MaskError(f"from_mask_mod got a {type(function).__name__}; it takes a function.")
    return MaskMod(function, at_least("from_mask_mod's batch", batch, 1), per_head)
