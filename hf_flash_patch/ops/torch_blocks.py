"""Block lists for the torch engine: which blocks of keys a tile meets, and the bits of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ..masks.bits import unpack_bits
from ..masks.block_mask import FULL_TILE, BlockMask, lines_of

NO_TILE = -2  # of a block in which no pair sees each other


@dataclass(frozen=True, eq=False)
class ListedBlocks:
    """The part of a `BlockMask` that a forward or backward in tiles needs.

    Attributes:
        block_size: tokens a block.
        offsets, entries, tiles: row_offsets, row_entries and tiles of the `BlockMask`.
        host_offsets, host_entries: the first two where the host can read them, or None.
        num_heads: query heads of the call.
        first_sequence: which sequence of the mask the first one of the call is.
    """

    block_size: int
    offsets: torch.Tensor
    entries: torch.Tensor
    tiles: torch.Tensor
    host_offsets: torch.Tensor | None
    host_entries: torch.Tensor | None
    num_heads: int
    first_sequence: int = 0

    @property
    def per_sequence(self) -> bool:
        """Whether sequences differ."""
        return self.offsets.shape[0] > 1

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return self.offsets.shape[1] > 1

    def spans(
        self, batches: slice, heads: slice, rows: slice, end: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Keys [begin, stop) of neighbouring live blocks, and whether bits have to be asked.

        Args:
            batches, heads, rows: sequences, query heads and queries of a tile.
            end: keys of the call.
        """
        size = self.block_size
        first, last = rows.start // size, -(-rows.stop // size)
        if self.host_offsets is None or self.host_entries is None:
            yield 0, end, True
            return
        parts = []
        for b in self._sequences(batches):
            for h in sorted(set(self._heads(heads))):
                offsets = self.host_offsets[b, h]
                parts.append(self.host_entries[int(offsets[first]) : int(offsets[last])])
        entries = torch.cat(parts).long()
        columns = -(-end // size)
        entries = entries[entries[:, 0] < columns]
        met = torch.bincount(entries[:, 0], minlength=columns) > 0
        whole = entries[entries[:, 1] == FULL_TILE, 0]
        whole = torch.bincount(whole, minlength=columns) == len(parts) * (last - first)
        kind = torch.where(whole, 2, met.long())  # 0 nobody, 1 some, 2 all of the tile's pairs
        kinds, lengths = kind.unique_consecutive(return_counts=True)
        stop = 0
        for state, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            begin, stop = stop, stop + length
            if state:
                yield begin * size, min(stop * size, end), state == 1

    def visible(
        self, batches: slice, heads: slice, rows: slice, begin: int, stop: int
    ) -> torch.Tensor:
        """bool (batches or 1, heads or 1, rows, stop - begin): who sees whom."""
        size, device = self.block_size, self.offsets.device
        r = torch.arange(rows.start // size, -(-rows.stop // size), device=device)
        c = torch.arange(begin // size, -(-stop // size), device=device)
        sequences, lists = self._sequences(batches), self.offsets.shape[1]
        b = torch.arange(sequences.start, sequences.stop, device=device)
        h = torch.zeros(1, dtype=torch.int64, device=device)
        if self.per_head:
            h = torch.arange(heads.start, heads.stop, device=device) * lists // self.num_heads
        nq = self.offsets.shape[2] - 1
        row = (b[:, None, None] * self.offsets.shape[1] + h[:, None]) * nq + r  # b h r
        tile = self._tile(row[..., None], c)  # b h r c
        bits = self._bits(tile).transpose(3, 4)  # b h r size c size
        top, left = rows.start // size * size, begin // size * size
        seen = bits.flatten(4, 5).flatten(2, 3)
        return seen[:, :, rows.start - top : rows.stop - top, begin - left : stop - left]

    def _sequences(self, batches: slice) -> range:
        """The mask's sequences that a tile reads."""
        if not self.per_sequence:
            return range(1)
        return range(batches.start + self.first_sequence, batches.stop + self.first_sequence)

    def _heads(self, heads: slice) -> list[int]:
        """The mask's head that each query head reads; one for all where heads do not differ."""
        if not self.per_head:
            return [0]
        lists = self.offsets.shape[1]
        return [head * lists // self.num_heads for head in range(heads.start, heads.stop)]

    def _tile(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The tile of each block, FULL_TILE or NO_TILE; row counts over all lists."""
        wanted = (row << 32) + column
        keys, tiles = self._sorted
        if not len(keys):
            return torch.full_like(wanted, NO_TILE)
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[place] == wanted, tiles[place], NO_TILE)

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key, row << 32 | column, and tile of all entries; by rising key, as far as they count."""
        column, tile = self.entries.long().unbind(1)
        return (lines_of(self.offsets, len(tile)) << 32) + column, tile

    def _bits(self, tile: torch.Tensor) -> torch.Tensor:
        """bool (*tile.shape, block_size, block_size)."""
        full = (tile == FULL_TILE)[..., None, None]
        if not len(self.tiles):
            return full.expand(*tile.shape, self.block_size, self.block_size)
        bits = unpack_bits(self.tiles[tile.clamp(min=0)])
        return (bits & (tile >= 0)[..., None, None]) | full


def listed_blocks(
    tensors: tuple[torch.Tensor | None, ...], num_heads: int, first_sequence: int
) -> ListedBlocks | None:
    """From the operators' tensors of a `BlockMask`, or None if there is none.

    Args:
        tensors: `BlockMask.tensors()`, then what `host_lists` gives, or None for all.
        num_heads, first_sequence: as in `ListedBlocks`.
    """
    offsets, entries, _, _, tiles, _, host_offsets, host_entries = tensors
    if offsets is None or entries is None or tiles is None:
        return None
    return ListedBlocks(
        tiles.shape[1],
        offsets,
        entries,
        tiles,
        host_offsets,
        host_entries,
        num_heads,
        first_sequence if offsets.shape[0] > 1 else 0,
    )


def tensors_of(mask: BlockMask | None) -> tuple[torch.Tensor | None, ...]:
    """What `listed_blocks` takes."""
    if mask is None:
        return (None,) * 8
    return (*mask.tensors(), *(mask.host_lists() or (None, None)))
