"""What becomes of a caller's own bool mask: made once, though every layer brings the mask."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .attention_mask import AttentionMask

# By mask, while it lives: its version and what it is for, and what was made of it.
_made = WeakTensorKeyDictionary()


def made_once(
    mask: torch.Tensor, purpose: Hashable, make: Callable[[], AttentionMask]
) -> AttentionMask:
    """`make()`, or what it returned before, unless the mask has changed since.

    Args:
        mask: the caller's; what is made must not refer to it, which would keep it alive.
        purpose: all else that `make` depends on.
        make: called without arguments.
    """
    if not _tells_changes(mask):
        return make()
    of = (mask._version, purpose)
    known = _made.get(mask)
    if known is None or known[0] != of:
        with torch.inference_mode(False):  # what is kept has to do for training, too
            known = _made[mask] = (of, make())
    return known[1]


def _tells_changes(mask: torch.Tensor) -> bool:
    """Whether results may be kept: not where a graph has to hold their making, and not of inference
    tensors, which do not count their changes."""
    if torch.compiler.is_compiling() or mask.is_inference():
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
