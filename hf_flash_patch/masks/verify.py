"""Whether lists of blocks are what `BlockMask` says; for lists that someone else made."""

from __future__ import annotations

import torch

from ..errors import MaskError
from .bits import transpose_tiles, unpack_bits
from .block_mask import BlockMask, check_block_size


def verify(mask: BlockMask) -> None:
    """`BlockMask.verify`."""
    check_block_size(mask.block_size)
    _check_tensors(mask)
    size = mask.block_size
    rows, columns = -(-mask.seqlen_q // size), -(-mask.seqlen_k // size)
    by_row = _blocks(mask, "row", rows, columns)
    by_column = _blocks(mask, "column", columns, rows)[:, [0, 2, 1, 3]]
    order = ((by_column[:, 0] * rows + by_column[:, 1]) * columns + by_column[:, 2]).argsort()
    if not torch.equal(by_column[order], by_row):
        raise MaskError(
            f"row_entries list {len(by_row)} blocks, column_entries {len(by_column)}, and they are "
            "not the same ones with the same tiles; both have to list every live block."
        )
    if not torch.equal(transpose_tiles(mask.tiles), mask.tiles_t):
        raise MaskError("tiles_t are not the transposed tiles; see masks.bits.transpose_tiles.")
    tiled = by_row[by_row[:, 3] >= 0]
    bits = unpack_bits(mask.tiles)
    for axis, first, length in ((1, 1, mask.seqlen_q), (2, 2, mask.seqlen_k)):
        past = length - tiled[:, first] * size
        index = torch.arange(size, device=mask.device)
        used = bits.any(dim=3 - axis)[tiled[:, 3]]
        if (used & (index >= past[:, None])).any():
            raise MaskError(
                f"a tile has bits past the end of a sequence of {length} tokens; they have to be 0."
            )


def _check_tensors(mask: BlockMask) -> None:
    size, lists = mask.block_size, (mask.batch_size, mask.num_heads)
    rows, columns = -(-mask.seqlen_q // size), -(-mask.seqlen_k // size)
    for name, shape in (
        ("row_offsets", (*lists, rows + 1)),
        ("row_entries", (-1, 2)),
        ("column_offsets", (*lists, columns + 1)),
        ("column_entries", (-1, 2)),
        ("tiles", (-1, size, size // 32)),
        ("tiles_t", (len(mask.tiles), size, size // 32)),
    ):
        tensor = getattr(mask, name)
        fits = tensor.dim() == len(shape) and all(
            wanted in (-1, given) for given, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise MaskError(
                f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; it has to be "
                f"int32 {shape}, contiguous (-1: any)."
            )
        if tensor.device != mask.device:
            raise MaskError(f"{name} is on {tensor.device}, row_offsets on {mask.device}.")


def _blocks(mask: BlockMask, name: str, majors: int, minors: int) -> torch.Tensor:
    """int64 (live, 4): list, major, minor and tile of each entry, checked."""
    offsets = getattr(mask, f"{name}_offsets").long()
    entries = getattr(mask, f"{name}_entries").long()
    flat, ends = offsets[..., :-1].flatten(), offsets[..., 1:].flatten()
    # Each row starts where the one before it ends.
    starts = torch.cat((flat.new_zeros(1), ends))[:-1]
    if not torch.equal(flat, starts) or (ends < flat).any() or (offsets > len(entries)).any():
        raise MaskError(
            f"{name}_offsets has to start at 0, go on from list to list, never decrease, and stay "
            f"within the {len(entries)} entries."
        )
    where = torch.arange(len(ends), device=offsets.device).repeat_interleave(ends - flat)
    minor, tile = entries[: len(where)].unbind(1)
    if ((minor < 0) | (minor >= minors)).any():
        raise MaskError(
            f"{name}_entries names block {int(minor.max())} (least {int(minor.min())}); there are "
            f"{minors}."
        )
    if ((tile < -1) | (tile >= len(mask.tiles))).any():
        raise MaskError(
            f"{name}_entries names tile {int(tile.max())} (least {int(tile.min())}); there are "
            f"{len(mask.tiles)}, and -1 for all pairs."
        )
    key = where * minors + minor
    if (key[1:] <= key[:-1]).any():
        raise MaskError(
            f"{name}_entries has a {name} whose blocks do not rise, or one block twice; sort them, "
            "and join tiles of one block."
        )
    return torch.stack((where // majors, where % majors, minor, tile), dim=1)
