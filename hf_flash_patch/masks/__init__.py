"""Attention patterns: who sees whom, for any length, combined with `&`, `|` and `~`."""

from .block_mask import BlockMask
from .flex import from_flex
from .pattern import Pattern
from .structured import (
    bigbird,
    butterfly,
    documents,
    from_block_layout,
    from_mask_mod,
    per_head,
)
from .text import parse
from .tokens import (
    causal,
    dilated_window,
    fixed,
    full,
    global_tokens,
    longformer,
    shifted_groups,
    sinks,
    sliding_window,
    strided,
)
from .top_k import top_k_blocks

__all__ = [
    "BlockMask",
    "Pattern",
    "bigbird",
    "butterfly",
    "causal",
    "dilated_window",
    "documents",
    "fixed",
    "from_block_layout",
    "from_flex",
    "from_mask_mod",
    "full",
    "global_tokens",
    "longformer",
    "parse",
    "per_head",
    "shifted_groups",
    "sinks",
    "sliding_window",
    "strided",
    "top_k_blocks",
]
