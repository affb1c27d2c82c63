"""`BlockMask`: a mask as lists of blocks, what the kernels and the torch engine read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import MaskError
from .bits import WORD_BITS, pack_bits, transpose_tiles, unpack_bits

FULL_TILE = -1  # an entry's tile where every pair of the block sees each other

_TENSORS = ("row_offsets", "row_entries", "column_offsets", "column_entries", "tiles", "tiles_t")
_CHUNK = 2**24  # elements that `from_rows` works on at once


@dataclass(eq=False)  # immutable all the same; torch.compile makes no frozen ones
class BlockMask:
    """Who sees whom, as lists of blocks of `block_size` queries and as many keys.

    Query i and key j count from 0 within their sequence; nq = ceil(seqlen_q / block_size), nk =
    ceil(seqlen_k / block_size), n is the number of entries, t that of tiles. Of H query heads,
    head h uses list h * num_heads // H; sequence b uses list b, or 0 where there is but one. All
    tensors are int32 and contiguous.

    Attributes:
        seqlen_q, seqlen_k: queries and keys. Of shorter sequences (variable length) the lists are
            right, too, up to their last blocks, whose numbers still count all that is there.
        block_size: 128, or 64; a multiple of 32.
        batch_size, num_heads: sequences and heads with lists of their own; 1 if all share one.
        row_offsets: (batch_size, num_heads, nq + 1); the live blocks of query block r are the
            entries row_offsets[b, h, r] to row_offsets[b, h, r + 1], one past the last.
        row_entries: (n, 2), pairs (key block, tile), in each row by rising key block, each block
            at most once. Tile -1: all pairs of the block see each other, as far as the sequences
            go: a reader cuts the last block of keys itself. Entries from the last offset on mean
            nothing, where lists were made without asking their length from the device.
        column_offsets: (batch_size, num_heads, nk + 1), the same lists by key block, for
            backward.
        column_entries: (n, 2), pairs (query block, tile), in each column by rising query block.
        tiles: (t, block_size, block_size / 32); bit j % 32 of word [i, j // 32] of an entry's tile
            is 1 where query i of the block sees key j of the block. Bits past a sequence's end are
            0. Tiles are shared: by rows and columns, heads and sequences.
        tiles_t: the same tiles transposed: bit i % 32 of word [j, i // 32].
        host: row_offsets and row_entries in host memory, for whoever has to leave out blocks on
            the host; None where that would take a synchronisation.
    """

    seqlen_q: int
    seqlen_k: int
    block_size: int
    batch_size: int
    num_heads: int
    row_offsets: torch.Tensor
    row_entries: torch.Tensor
    column_offsets: torch.Tensor
    column_entries: torch.Tensor
    tiles: torch.Tensor
    tiles_t: torch.Tensor
    host: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.row_offsets.device

    def to(self, device: torch.device | str) -> BlockMask:
        """The same lists on `device`."""
        device = torch.device(device)
        if device == self.device:
            return self
        host = self.host
        if host is None and self.device.type == "cpu":
            host = (self.row_offsets, self.row_entries)
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, host=None if device.type == "cpu" else host, **moved)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The six tensors, in the order of the operators' schema."""
        return tuple(getattr(self, name) for name in _TENSORS)

    def host_lists(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """row_offsets and row_entries in host memory, or None."""
        if self.device.type == "cpu":
            return self.row_offsets, self.row_entries
        return self.host

    def density(self) -> float:
        """Part of all pairs that see each other, 0 to 1, over lists; reads the device."""
        seen = self.block_pairs()[3].sum().item()
        pairs = self.batch_size * self.num_heads * self.seqlen_q * self.seqlen_k
        return seen / pairs if pairs else 0.0

    def block_pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """List b * heads + h, query block, key block and number of pairs seen, of each entry."""
        rows = self.row_offsets.shape[2] - 1
        where = self.entry_rows()
        entries = self.row_entries[: len(where)]
        row, column, tile = where % max(rows, 1), entries[:, 0].long(), entries[:, 1].long()
        height = (self.seqlen_q - row * self.block_size).clamp(max=self.block_size)
        width = (self.seqlen_k - column * self.block_size).clamp(max=self.block_size)
        seen = height * width
        if len(self.tiles):
            count = unpack_bits(self.tiles).sum(dim=(1, 2))
            seen = torch.where(tile == FULL_TILE, seen, count[tile.clamp(min=0)])
        return where // max(rows, 1), row, column, seen

    def entry_rows(self) -> torch.Tensor:
        """int64 (n,): (b * heads + h) * nq + r of each entry that means something; reads the
        device."""
        lengths = (self.row_offsets[..., 1:] - self.row_offsets[..., :-1]).flatten().long()
        return torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)

    def dense(self) -> torch.Tensor:
        """The mask as bool (batch or 1, heads or 1, seqlen_q, seqlen_k); quadratic memory. Reads
        nothing."""
        lists, size = self.batch_size * self.num_heads, self.block_size
        rows, columns = -(-self.seqlen_q // size), -(-self.seqlen_k // size)
        column, tile = self.row_entries.long().unbind(1)
        seen = (tile == FULL_TILE)[:, None, None]
        if len(self.tiles):
            seen = seen | unpack_bits(self.tiles)[tile.clamp(min=0)]
        grid = seen.new_zeros(lists * rows + 1, columns, size, size)
        grid[lines_of(self.row_offsets, len(tile)), column] = seen
        grid = grid[:-1].view(self.batch_size, self.num_heads, rows, columns, size, size)
        grid = grid.transpose(3, 4).reshape(
            self.batch_size, self.num_heads, rows * size, columns * size
        )
        return grid[:, :, : self.seqlen_q, : self.seqlen_k]

    @staticmethod
    def from_dense(mask: torch.Tensor, block_size: int = 128) -> BlockMask:
        """The lists of a bool (batch or 1, heads or 1, seqlen_q, seqlen_k) mask, without a sync.

        Every block has a tile of its own, used or not, so memory is an eighth of the mask's.

        Raises:
            MaskError: mask is not bool, or not of rank 4, or block_size no multiple of 32.
        """
        check_block_size(block_size)
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise MaskError(
                f"the mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; it has to be bool "
                "(batch or 1, heads or 1, seqlen_q, seqlen_k)."
            )
        return BlockMask.from_rows(
            lambda rows: mask[:, :, rows], mask.shape, mask.device, block_size
        )

    @staticmethod
    def from_rows(
        rows_of: Callable[[slice], torch.Tensor],
        shape: Sequence[int],
        device: torch.device | str,
        block_size: int = 128,
    ) -> BlockMask:
        """`from_dense` of a mask that is made a few rows at a time.

        Args:
            rows_of: from rows to a bool (batch or 1, heads or 1, rows, seqlen_k) on `device`.
            shape: (batch or 1, heads or 1, seqlen_q, seqlen_k).
            device: where the lists are to be.
            block_size: tokens a block, a multiple of 32.
        """
        batch, heads, seqlen_q, seqlen_k = shape
        if torch.compiler.is_compiling():
            lists = _lists_of(rows_of(slice(0, seqlen_q)), block_size)
            return BlockMask(seqlen_q, seqlen_k, block_size, batch, heads, *lists)
        rows, columns = -(-seqlen_q // block_size), -(-seqlen_k // block_size)
        if 0 in (batch, heads, rows, columns):
            return _nothing(batch, heads, seqlen_q, seqlen_k, block_size, torch.device(device))
        width = (seqlen_k - torch.arange(columns, device=device) * block_size).clamp(max=block_size)
        step = max(1, _CHUNK // max(1, batch * heads * columns * block_size**2))
        tiles, live, full = [], [], []
        for first in range(0, rows, step):
            some = slice(first * block_size, min((first + step) * block_size, seqlen_q))
            part = rows_of(some)
            count = -(-(some.stop - some.start) // block_size)
            padded = part.new_zeros(batch, heads, count * block_size, columns * block_size)
            padded[:, :, : some.stop - some.start, :seqlen_k] = part
            blocks = padded.unflatten(3, (columns, block_size)).unflatten(2, (count, block_size))
            blocks = blocks.transpose(3, 4)  # batch, head, row, column, query, key
            seen = blocks.sum(dim=(4, 5))
            height = seqlen_q - torch.arange(first, first + count, device=device) * block_size
            pairs = height.clamp(max=block_size)[:, None] * width
            live.append(seen > 0)
            full.append(seen == pairs)
            tiles.append(pack_bits(blocks))
        number = torch.arange(batch * heads * rows * columns, device=device)
        grid = torch.cat(live, dim=2)
        tile = torch.where(torch.cat(full, dim=2), FULL_TILE, number.view(grid.shape))
        bits = torch.cat(tiles, dim=2).flatten(0, 3)
        return from_grid(grid, tile, bits, seqlen_q, seqlen_k, block_size)

    @staticmethod
    def stack(masks: Sequence[BlockMask]) -> BlockMask:
        """One mask for a batch of variable length, sequence b as masks[b] has it.

        Raises:
            MaskError: they differ in heads or block size, or there are none, or one is of a batch.
        """
        kinds = {(mask.batch_size, mask.num_heads, mask.block_size) for mask in masks}
        if len(kinds) != 1 or next(iter(kinds))[0] != 1:
            raise MaskError(
                f"masks of (batch, heads, block_size) = {sorted(kinds)} are stacked; all have to "
                "be of one sequence, and alike."
            )
        seqlen_q = max(mask.seqlen_q for mask in masks)
        seqlen_k = max(mask.seqlen_k for mask in masks)
        size = masks[0].block_size
        tiles = [0]
        for mask in masks:
            tiles.append(tiles[-1] + len(mask.tiles))

        def joined(name: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
            offsets, edges = [], -(-length // size) + 1
            joint = torch.cat([getattr(mask, f"{name}_entries") for mask in masks])
            first = joint.new_zeros(())  # of the mask's entries
            for mask, first_tile in zip(masks, tiles[:-1], strict=True):
                offset = getattr(mask, f"{name}_offsets")
                entry = getattr(mask, f"{name}_entries").clone()
                entry[:, 1] += (entry[:, 1] != FULL_TILE).int() * first_tile
                # Those that mean nothing are written over by the next mask's.
                joint[first + torch.arange(len(entry), device=joint.device)] = entry
                last = offset[..., -1:].expand(-1, -1, edges - offset.shape[2])
                offsets.append(torch.cat((offset, last), dim=2) + first)
                first = first + offset[-1, -1, -1]
            return torch.cat(offsets), joint

        rows, columns = joined("row", seqlen_q), joined("column", seqlen_k)
        shared, turned = (torch.cat([getattr(mask, n) for mask in masks]) for n in _TENSORS[4:])
        return BlockMask(
            seqlen_q,
            seqlen_k,
            size,
            len(masks),
            masks[0].num_heads,
            *rows,
            *columns,
            shared,
            turned,
        )

    def verify(self) -> None:
        """Check lists of one's own making, values included; reads the device.

        Raises:
            MaskError: a tensor's shape, dtype or device; offsets, blocks or tiles out of range;
                blocks out of order or twice; lists by row and by column that differ.
        """
        from .verify import verify

        verify(self)

    def to_flex(self, num_heads: int | None = None) -> Any:
        """The same mask for torch's flex_attention; num_heads is needed where groups of heads share
        lists. See `flex.to_flex`."""
        from .flex import to_flex

        return to_flex(self, num_heads)

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch={self.batch_size}, heads={self.num_heads}, seqlen_q={self.seqlen_q}, "
            f"seqlen_k={self.seqlen_k}, block_size={self.block_size}, "
            f"entries={len(self.row_entries)}, tiles={len(self.tiles)}, device={self.device})"
        )


def lines_of(offsets: torch.Tensor, entries: int) -> torch.Tensor:
    """int64 (entries,): the row of each entry, counted over all lists, and one past the last row
    for entries that mean nothing; reads nothing.

    Args:
        offsets: row_offsets or, for columns, column_offsets.
        entries: how many there are.
    """
    number = torch.arange(entries, device=offsets.device)
    starts = offsets[..., :-1].flatten().long()
    line = torch.searchsorted(starts, number, right=True) - 1
    return torch.where(number < offsets.flatten()[-1:], line, len(starts))


def check_block_size(block_size: int) -> None:
    """Refuse block sizes that tiles of whole words cannot have.

    Raises:
        MaskError: block_size is no positive multiple of 32.
    """
    if block_size < WORD_BITS or block_size % WORD_BITS:
        raise MaskError(
            f"block_size is {block_size}; it has to be a multiple of {WORD_BITS}. Patterns of "
            "other blocks (from_block_layout, butterfly, ...) are lowered to it exactly."
        )


_SixTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


# An operator, since torch.compile takes a minute to trace it under symbolic lengths.
@torch.library.custom_op("hf_flash_patch::block_lists", mutates_args=())
def _lists_of(mask: torch.Tensor, block_size: int) -> _SixTensors:
    return BlockMask.from_dense(mask, block_size).tensors()  # type: ignore[return-value]


@_lists_of.register_fake
def _(mask: torch.Tensor, block_size: int) -> _SixTensors:
    batch, heads, seqlen_q, seqlen_k = mask.shape
    rows, columns = -(-seqlen_q // block_size), -(-seqlen_k // block_size)

    def empty(*shape: int) -> torch.Tensor:
        return mask.new_empty(shape, dtype=torch.int32)

    blocks, words = batch * heads * rows * columns, block_size // 32
    lists = [
        tensor
        for length in (rows, columns)
        for tensor in (empty(batch, heads, length + 1), empty(blocks, 2))
    ]
    tiles = [empty(blocks, block_size, words) for _ in range(2)]
    return (*lists, *tiles)  # type: ignore[return-value]


def _nothing(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, block_size: int, device: torch.device
) -> BlockMask:
    """Of no queries, keys, sequences or heads."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    rows, columns = (
        (zeros(batch, heads, -(-length // block_size) + 1), zeros(0, 2))
        for length in (seqlen_q, seqlen_k)
    )
    tiles = zeros(0, block_size, block_size // 32)
    return BlockMask(
        seqlen_q, seqlen_k, block_size, batch, heads, *rows, *columns, tiles, tiles.clone()
    )


def from_grid(
    live: torch.Tensor,
    tile: torch.Tensor,
    tiles: torch.Tensor,
    seqlen_q: int,
    seqlen_k: int,
    block_size: int,
    capacity: int | None = None,
) -> BlockMask:
    """Lists from a grid of blocks, on its device and without a sync; memory as the grid's.

    Args:
        live: bool (batch or 1, heads or 1, nq, nk).
        tile: int, of live's shape.
        tiles: (t, block_size, block_size / 32).
        seqlen_q, seqlen_k, block_size: of the mask.
        capacity: entries to reserve; as many as blocks if None. At most so many may be live.
    """
    shape = live.shape
    if 0 in shape:
        return _nothing(shape[0], shape[1], seqlen_q, seqlen_k, block_size, live.device)
    capacity = live.numel() if capacity is None else capacity

    def lists(live: torch.Tensor, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, width = live.flatten(), live.shape[-1]
        place = blocks.cumsum(0)  # one past each live block's
        ends = place.view(shape[0], shape[1], -1, width)[..., -1]
        first = torch.cat((ends.new_zeros(1), ends[..., -1].flatten()[:-1])).view(*shape[:2], 1)
        offsets = torch.cat((first, ends), dim=2)
        # Blocks that are not live go to a place of their own, past the end.
        place = torch.where(blocks, place - 1, capacity)
        column = torch.arange(width, device=live.device).expand(live.shape).flatten()
        pairs = torch.stack((column, tile.flatten()), dim=1).int()
        entries = pairs.new_zeros(capacity + 1, 2)
        entries[place] = pairs
        return offsets.int(), entries[:capacity].contiguous()

    rows = lists(live, tile)
    columns = lists(live.transpose(2, 3).contiguous(), tile.transpose(2, 3))
    return BlockMask(
        seqlen_q,
        seqlen_k,
        block_size,
        shape[0],
        shape[1],
        *rows,
        *columns,
        tiles,
        transpose_tiles(tiles),
    )
