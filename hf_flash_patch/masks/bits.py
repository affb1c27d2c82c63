"""Blocks of bools as words of 32 bits, and back."""

from __future__ import annotations

import torch

WORD_BITS = 32
_CHUNK = 1024  # tiles that are unpacked at once


def pack_bits(blocks: torch.Tensor) -> torch.Tensor:
    """int32 (..., m / 32) of bool (..., m): bit j % 32 of word j // 32 is element j."""
    bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    octets = blocks.unflatten(-1, (-1, 8)).view(torch.uint8) << bit
    octets = octets.sum(dim=-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)  # little-endian, as every device of torch is


def unpack_bits(words: torch.Tensor) -> torch.Tensor:
    """bool (..., 32 * w) of int32 (..., w)."""
    bit = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bit) & 1).bool().flatten(-2)


def transpose_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """int32 (t, size, size / 32) tiles with rows for columns."""
    if not len(tiles):
        return tiles.clone()
    parts = (pack_bits(unpack_bits(part).transpose(1, 2)) for part in tiles.split(_CHUNK))
    return torch.cat(list(parts))
