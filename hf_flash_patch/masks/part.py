"""A part of a `BlockMask`: some heads, some rows and columns of blocks."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from ..errors import MaskError
from .block_mask import FULL_TILE, BlockMask, from_grid

_ALL = slice(None)
_kept: WeakKeyDictionary[BlockMask, dict[tuple[object, ...], BlockMask]] = WeakKeyDictionary()


def part_of(
    mask: BlockMask, *, heads: slice = _ALL, rows: slice = _ALL, keys: slice = _ALL
) -> BlockMask:
    """Who sees whom among some queries and keys; kept for as long as the mask is.

    Args:
        mask: lists of blocks.
        heads: of the mask's own heads.
        rows, keys: of tokens, from a block's start to a block's start or the end.

    Raises:
        MaskError: rows or keys do not lie on blocks.
    """
    name = tuple((s.start, s.stop) for s in (heads, rows, keys))
    parts = _kept.setdefault(mask, {})
    if name not in parts:
        with torch.inference_mode(False):  # what is kept has to do for training, too
            parts[name] = _part(mask, heads, rows, keys)
    return parts[name]


def _part(mask: BlockMask, heads: slice, rows: slice, keys: slice) -> BlockMask:
    height, i = _blocks("rows", rows, mask.seqlen_q, mask.block_size)
    width, j = _blocks("keys", keys, mask.seqlen_k, mask.block_size)
    grid_rows, grid_columns = mask.row_offsets.shape[2] - 1, mask.column_offsets.shape[2] - 1
    nothing = -2
    grid = torch.full(
        (mask.batch_size * mask.num_heads * grid_rows, grid_columns),
        nothing,
        dtype=torch.int32,
        device=mask.device,
    )
    where = mask.entry_rows()
    entries = mask.row_entries[: len(where)]
    grid[where, entries[:, 0].long()] = entries[:, 1]
    grid = grid.view(mask.batch_size, mask.num_heads, grid_rows, grid_columns)
    grid = grid[:, heads, i, j]
    live = grid != nothing
    tile = torch.where(live, grid, FULL_TILE)
    return from_grid(live, tile, mask.tiles, height, width, mask.block_size)


def _blocks(name: str, tokens: slice, seqlen: int, size: int) -> tuple[int, slice]:
    start, stop, _ = tokens.indices(seqlen)
    if start % size or (stop % size and stop != seqlen):
        raise MaskError(
            f"{name} {start} to {stop} do not lie on blocks of {size}; pad the sequence, so that "
            f"each process's chunks are multiples of {size}."
        )
    return stop - start, slice(start // size, -(-stop // size))
