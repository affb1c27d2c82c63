"""FlexAttention's block masks: to ours and back, exactly.

torch counts queries from 0, patterns count positions, aligned bottom-right; a mask is therefore
turned for the lengths it was made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MaskError
from .block_mask import FULL_TILE, BlockMask
from .grid import PARTIAL, Grid, Runs, everywhere
from .pattern import Pattern
from .structured import Cells


@dataclass(frozen=True, eq=False)
class Table(Cells):
    """Cells of a bool table (rows, columns), which count from 0; outside there is nothing."""

    table: torch.Tensor

    __eq__, __hash__ = object.__eq__, object.__hash__  # tensors have no equality of their own

    def cell(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """The table's entry."""
        table = self.table.to(j.device)
        rows, columns = table.shape
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        return table[i.clamp(0, rows - 1), j.clamp(0, columns - 1)] & inside


@dataclass(frozen=True, eq=False)
class Flex(Pattern):
    """What a FlexAttention mask says, for its own lengths.

    Attributes:
        block: side of a cell that all blocks of the mask are made of.
        full, partial: bool (batch or 1, heads or 1, rows, columns) of cells.
        mask_mod: (batch, head, query, key) -> bool, decides in partial cells.
        seqlen_q, seqlen_k: of the mask.
        sequence, head: which ones' cells these are.
    """

    block: int
    full: torch.Tensor
    partial: torch.Tensor
    mask_mod: Callable[..., torch.Tensor]
    seqlen_q: int
    seqlen_k: int
    sequence: int = 0
    head: int = 0

    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def batches(self) -> int:
        """Of the mask."""
        return self.full.shape[0]

    @property
    def static_heads(self) -> int:
        """Of the mask."""
        return self.full.shape[1]

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """One sequence's and head's."""
        number = head * self.static_heads // num_heads
        b = sequence if self.batches > 1 else 0
        full, partial = (x[b : b + 1, number : number + 1] for x in (self.full, self.partial))
        return Flex(
            self.block, full, partial, self.mask_mod, self.seqlen_q, self.seqlen_k, b, number
        )

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """In a full cell, or as mask_mod has it in a partial one."""
        i = q - (self.seqlen_k - self.seqlen_q)
        full, partial = self._tables()
        b, h = (
            torch.full((), x, dtype=torch.int64, device=k.device)
            for x in (self.sequence, self.head)
        )
        inside = partial.visible(i, k)
        return full.visible(i, k) | (inside & self.mask_mod(b, h, i, k))

    def runs(self, grid: Grid) -> Runs:
        """Of the full cells, and of the partial ones, which are partial at best."""
        first = grid.q_start - (self.seqlen_k - self.seqlen_q)
        own = Grid(grid.seqlen_q, grid.seqlen_k, first, grid.k_start, grid.block)
        full, partial = (table.runs(own) for table in self._tables())
        return full | (partial & everywhere(own, PARTIAL))

    def check(self, grid: Grid) -> None:
        """The mask has lengths of its own."""
        if (grid.seqlen_q, grid.seqlen_k, grid.k_start) != (self.seqlen_q, self.seqlen_k, 0):
            raise MaskError(
                f"the flex mask is for seqlen_q {self.seqlen_q} and seqlen_k {self.seqlen_k}, the "
                f"call has {grid.seqlen_q} and {grid.seqlen_k}; make one for these lengths."
            )

    def _tables(self) -> tuple[Table, Table]:
        return Table(self.block, self.full[0, 0]), Table(self.block, self.partial[0, 0])


def from_flex(mask: Any) -> Pattern:
    """The pattern of a torch.nn.attention.flex_attention.BlockMask, of any block size.

    It serves the lengths the mask was made for, and keeps the mask's mask_mod, so it is neither
    written to a config nor pickled, unless the mask_mod is.

    Raises:
        MaskError: it is no such mask.
    """
    needed = ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths")
    if not all(hasattr(mask, name) for name in needed):
        raise MaskError(
            f"from_flex got a {type(mask).__name__}; it takes the BlockMask of "
            "torch.nn.attention.flex_attention.create_block_mask."
        )
    size_q, size_k = mask.BLOCK_SIZE
    block = math.gcd(size_q, size_k)

    def cells(count: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
        if count is None or index is None:
            return torch.zeros_like(partial)
        live = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        table = torch.zeros(
            (*index.shape[:-1], index.shape[-1] + 1), dtype=torch.bool, device=index.device
        )
        # What is past the count goes to a column of its own.
        table.scatter_(-1, torch.where(live, index.long(), index.shape[-1]), True)
        table = table[..., :-1].cpu()
        return table.repeat_interleave(size_q // block, 2).repeat_interleave(size_k // block, 3)

    partial = cells(mask.kv_num_blocks, mask.kv_indices)
    full = cells(mask.full_kv_num_blocks, mask.full_kv_indices)
    return Flex(block, full, partial, mask.mask_mod, *mask.seq_lengths)


def to_flex(mask: BlockMask, num_heads: int | None = None) -> Any:
    """The same mask as a torch.nn.attention.flex_attention.BlockMask; memory grows as nq * nk.

    Args:
        mask: lists of blocks.
        num_heads: heads of the call; needed where lists are shared by groups of heads.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    size, heads = mask.block_size, mask.num_heads
    rows, columns = mask.row_offsets.shape[2] - 1, mask.column_offsets.shape[2] - 1
    none = -2
    ids = torch.full((mask.batch_size * heads * rows, columns), none, device=mask.device)
    where = mask.entry_rows()
    entries = mask.row_entries[: len(where)].long()
    ids[where, entries[:, 0]] = entries[:, 1]
    ids = ids.view(mask.batch_size, heads, rows, columns)
    if heads > 1 and num_heads is not None:
        ids = ids.repeat_interleave(num_heads // heads, dim=1)

    def listed(live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = live.int().argsort(dim=-1, descending=True, stable=True)
        return live.sum(dim=-1).int(), order.int()

    batches, heads = ids.shape[:2]
    tiles = mask.tiles
    if not len(tiles):
        tiles = tiles.new_zeros(1, size, size // 32)

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        tile = ids[b % batches, h % heads, q // size, k // size]
        word = tiles[tile.clamp(min=0), q % size, k % size // 32]
        return (tile == FULL_TILE) | ((tile >= 0) & ((word >> (k % 32)) & 1).bool())

    return FlexBlockMask.from_kv_blocks(
        *listed(ids >= 0),
        *listed(ids == FULL_TILE),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(mask.seqlen_q, mask.seqlen_k),
    )
