"""A caller's own bool mask as lists of blocks: made once, though every layer brings the mask."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..masks.block_mask import BlockMask

# By mask, while it lives: its version and sizes, and the lists.
_made = WeakTensorKeyDictionary()


def lists_of(mask: torch.Tensor, seqlen_q: int, seqlen_k: int) -> BlockMask:
    """The lists of `mask`, on its device and without a sync, in an eighth of a bool mask's memory.

    Args:
        mask: bool or int (batch or 1, num_heads or 1, seqlen_q or 1, at least seqlen_k or 1).
        seqlen_q, seqlen_k: of the call; a mask that is wider is cut.
    """
    visible = mask[..., :seqlen_k].bool().expand(-1, -1, seqlen_q, seqlen_k)
    if not _tells_changes(mask):
        return BlockMask.from_dense(visible)
    of = (mask._version, seqlen_q, seqlen_k)
    known = _made.get(mask)
    if known is None or known[0] != of:
        known = _made[mask] = (of, BlockMask.from_dense(visible))
    return known[1]


def _tells_changes(mask: torch.Tensor) -> bool:
    """Whether lists may be kept: not where a graph has to hold their making, and not of inference
    tensors, which do not count their changes."""
    if torch.compiler.is_compiling() or mask.is_inference():
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
