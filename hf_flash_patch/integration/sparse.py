"""A pattern on top of a call's own mask.

Positions are rows of the key tensor, counted over dropped ones: the same token has the same
position in prefill and in every decode step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from ..masks.block_mask import BlockMask
from ..masks.pattern import Pattern
from ..masks.top_k import TopKBlocks
from ..ops.padding import pack_key_padding
from . import packing
from .attention_mask import AttentionMask
from .sharing import own_attribute

PATTERN_ATTRIBUTE = "_hfp_mask"  # of an attention module


def pattern_of(module: nn.Module) -> Pattern | None:
    """The pattern that patch() gave the module."""
    return own_attribute(module, PATTERN_ATTRIBUTE)


def with_pattern(
    mask: AttentionMask, pattern: Pattern, query: torch.Tensor, key: torch.Tensor
) -> AttentionMask:
    """What both a call's mask and a pattern let through; once a forward for all layers alike.

    Args:
        mask: the call's.
        pattern: of positions, or chosen by query and key.
        query, key: (batch, heads, seqlen, head_dim).

    Raises:
        MaskError: the pattern was made for another length or number of heads.
    """
    if isinstance(pattern, TopKBlocks):
        return _choose(mask, pattern, query, key)
    return under(mask, pattern, query.shape[1])


def under(mask: AttentionMask, pattern: Pattern, num_heads: int) -> AttentionMask:
    """`with_pattern`, for a pattern of positions."""
    if torch.compiler.is_compiling():
        return _combine(mask, pattern, num_heads)
    known = (pattern, num_heads)
    if known not in mask.combined:
        mask.combined[known] = _combine(mask, pattern, num_heads)
    return mask.combined[known]


def _choose(
    mask: AttentionMask, pattern: TopKBlocks, query: torch.Tensor, key: torch.Tensor
) -> AttentionMask:
    if mask.seqlen_q == 1:
        return mask
    chosen = pattern.select(
        query.transpose(1, 2),
        key.transpose(1, 2),
        causal=mask.causal,
        q_start=mask.q_start,
        k_start=mask.k_start,
        key_padding=mask.key_padding,
    )
    if mask.block_mask is not None:
        seen, other = _same_heads(chosen.dense(), mask.block_mask.dense())
        chosen = BlockMask.from_dense(seen & other)
    return replace(mask, block_mask=chosen, combined={})


def _combine(mask: AttentionMask, pattern: Pattern, num_heads: int) -> AttentionMask:
    seqlen_q, seqlen_k, device = mask.seqlen_q, mask.seqlen_k, mask.device
    q_start = mask.k_start + seqlen_k - seqlen_q if mask.q_start is None else mask.q_start
    if isinstance(q_start, int) and seqlen_q > 1 and mask.block_mask is None:
        lowered = pattern.block_mask(
            seqlen_q, seqlen_k, num_heads, device, q_start=q_start, k_start=mask.k_start
        )
        return replace(mask, block_mask=lowered, combined={})
    # A few queries of a decode step, or positions that only the device knows.
    seen = pattern.dense(
        seqlen_q, seqlen_k, num_heads, q_start=q_start, k_start=mask.k_start, device=device
    )
    if mask.block_mask is not None:
        seen, other = _same_heads(seen, mask.block_mask.dense())
        return replace(mask, block_mask=BlockMask.from_dense(seen & other), combined={})
    if seqlen_q == 1 and seen.shape[1] == 1:
        visible = seen[:, 0, 0].expand(mask.batch_size, -1)
        if mask.key_padding is not None:
            visible = visible & mask.key_padding
        seen_range, key_bits = pack_key_padding(visible)
        key_range = packing.intersect(mask.key_range, seen_range)
        return replace(
            mask, key_padding=visible, key_range=key_range, key_bits=key_bits, combined={}
        )
    seen = seen.repeat_interleave(num_heads // seen.shape[1], dim=1)
    return replace(mask, dense=seen if mask.dense is None else seen & mask.dense, combined={})


def _same_heads(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks (batch or 1, heads, ...) with as many heads, each list for as many as before."""
    heads = math.lcm(a.shape[1], b.shape[1])
    a, b = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (a, b))
    return a, b
