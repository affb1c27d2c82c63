"""One attention call of a model whose sequence several processes share."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import MaskError, ParallelError
from ..integration.attention import attend as call_with_sinks
from ..integration.attention_mask import AttentionMask
from ..integration.sparse import under, with_pattern
from ..masks.block_mask import BlockMask
from ..masks.grid import Grid
from ..masks.lowering import lower
from ..masks.pattern import Pattern
from ..masks.structured import documents
from ..masks.tokens import sliding_window
from ..masks.top_k import TopKBlocks
from ..ops.functional import attention
from .costs import BLOCK_SIZE
from .groups import Groups
from .layout import Layout
from .ring import ring_attention
from .ulysses import own_draws, own_heads, to_heads, to_tokens


def attend(
    groups: Groups,
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern | None,
    options: dict[str, Any],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`Share.attend`, by exchanged heads, a ring, or a ring of processes that exchange heads.

    Raises:
        ParallelError: the tensors are not this process's part, or a ring cannot do this.
        MaskError: as the functions of this package.
    """
    if query.shape[2] * groups.size != mask.seqlen_q or key.shape[2] != query.shape[2]:
        raise ParallelError(
            f"attention of {query.shape[2]} queries to {key.shape[2]} keys, with a mask for "
            f"{mask.seqlen_q} tokens that {groups.size} processes share: call the model that "
            "sequence_parallel was given, not a part of it."
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    num_heads = q.shape[2]
    if groups.ulysses is not None:
        q, k, v = to_heads(q, k, v, groups.ulysses)
        if sinks is not None:
            sinks = sinks.chunk(groups.ulysses_size)[torch.distributed.get_rank(groups.ulysses)]
    if groups.ring is not None:
        call = _by_ring(groups, layout, mask, pattern, num_heads, options)
    else:
        if isinstance(pattern, TopKBlocks):  # by this process's heads, whose tokens are all here
            mask = with_pattern(mask, pattern, q.transpose(1, 2), k.transpose(1, 2))
        elif pattern is not None:
            mask = under(mask, pattern, num_heads)
            assert mask.block_mask is not None
            mask = replace(mask, block_mask=own_heads(mask.block_mask, groups.ulysses))
        sides: dict[str, Any] = {"causal": mask.causal, "window_size": mask.window_size}
        call = partial(attention, mask=mask.arguments(), **sides, **options)
    if groups.ulysses is None:
        return call_with_sinks(call, q, k, v, sinks)
    with own_draws(options["dropout_p"], q.device, groups.ulysses):
        out = call_with_sinks(call, q, k, v, sinks)
    return to_tokens(out, groups.ulysses)


def _by_ring(
    groups: Groups,
    layout: Layout,
    mask: AttentionMask,
    pattern: Pattern | None,
    num_heads: int,
    options: dict[str, Any],
) -> partial:
    if options["dropout_p"]:
        raise ParallelError(
            f"a ring has no attention dropout, and the model asks for {options['dropout_p']}; set "
            'it to 0 in the config, or use method="ulysses".'
        )
    if isinstance(pattern, TopKBlocks):
        raise ParallelError(
            'top_k_blocks compares all tokens, and a ring has only some; use method="ulysses".'
        )
    # Once a forward for all layers alike: both cost a sync or a gather.
    known = ("ring", pattern, num_heads)
    if known not in mask.combined:
        padding = mask.key_padding
        mask.combined[known] = (
            _lists(groups, mask, pattern, num_heads),
            None if padding is None else groups.ring_shard(padding, layout=layout),
        )
    lists, own_padding = mask.combined[known]
    return partial(
        ring_attention,
        group=groups.ring,
        causal=mask.causal,
        block_mask=lists,
        key_padding_mask=own_padding,
        layout=layout,
        **{name: value for name, value in options.items() if name != "dropout_p"},
    )


def _lists(
    groups: Groups, mask: AttentionMask, pattern: Pattern | None, num_heads: int
) -> BlockMask | None:
    """Everything but causality and padding, as lists of this process's heads."""
    left, right = mask.window_size
    parts = [] if pattern is None else [pattern]
    if left >= 0 or right >= 0:
        if right != (-1 if mask.causal else left):
            raise MaskError(f"a ring has no window of {left} and {right} tokens.")
        parts.append(sliding_window(left + 1))
    if mask.doc_range is not None:
        parts.append(documents(mask.doc_range[..., 0]))
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    # The last few masks are kept; those of one batch's documents would only take memory.
    grid = Grid(mask.seqlen_q, mask.seqlen_k, 0, 0, BLOCK_SIZE)
    lists = lower(whole, grid, num_heads, mask.device, keep=mask.doc_range is None)
    return lists if groups.ulysses is None else own_heads(lists, groups.ulysses)
