"""Key padding as the kernels read it: a range of keys per sequence, and one bit per key."""

from __future__ import annotations

import torch

from ..errors import MaskError

WORD_BITS = 32


def pack_key_padding(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Range and bits of a key padding mask, made on the mask's device without a host sync.

    Args:
        mask: bool (batch, seqlen_k); True where the key is real.

    Returns:
        key_range: int32 (batch, 2), first real key and one past the last; (0, 0) where no key is
            real.
        key_bits: int32 (batch, ceil(seqlen_k / 32)); bit j % 32 of word j // 32 is key j. Bits
            outside the range are 1: where padding has no holes every word is full, and the kernels,
            whose test of a range is the cheaper one, test no key's bit.

    Raises:
        MaskError: if `mask` is not bool or not of rank 2.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise MaskError(
            f"key_padding_mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; it has to be "
            "bool (batch, seqlen_k), True where the key is real. Use mask.bool() for a 0/1 mask."
        )
    batch, seqlen_k = mask.shape
    if seqlen_k == 0:
        empty = mask.new_empty((batch, 0), dtype=torch.int32)
        return mask.new_zeros((batch, 2), dtype=torch.int32), empty

    index = torch.arange(seqlen_k, device=mask.device)
    stop = torch.where(mask, index + 1, 0).amax(dim=1)
    start = torch.minimum(torch.where(mask, index, seqlen_k).amin(dim=1), stop)
    key_range = torch.stack((start, stop), dim=1).int()

    count = -(-seqlen_k // WORD_BITS)
    seen = mask | (index < start[:, None]) | (index >= stop[:, None])
    padded = torch.nn.functional.pad(seen, (0, count * WORD_BITS - seqlen_k), value=True)
    bit = torch.arange(WORD_BITS, device=mask.device)
    words = (padded.view(batch, count, WORD_BITS).long() << bit).sum(dim=2)
    # Two's complement: the word's 32 bits, read as a signed number.
    words = torch.where(words >= 2**31, words - 2**32, words)
    return key_range, words.int()


def unpack_key_bits(key_bits: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """The bool (batch, seqlen_k) mask held by int32 words (batch, ceil(seqlen_k / 32))."""
    bit = torch.arange(WORD_BITS, dtype=torch.int32, device=key_bits.device)
    bits = (key_bits[:, :, None] >> bit) & 1
    return bits.flatten(1)[:, :seqlen_k].bool()
