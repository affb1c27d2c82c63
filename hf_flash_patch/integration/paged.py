"""Continuous batching (`generate_batch`): the attention call with a cache of pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .attention import hfp_attention
from .attention_mask import AttentionMask
from .sparse import pattern_of


def hfp_paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    sliding_window: int | None = None,
    cache: Any = None,
    read_index: list[torch.Tensor] | None = None,
    write_index: list[torch.Tensor] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | dict[str, int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' continuous batching calls.

    Args:
        module: the attention module that calls.
        query, key, value: (1, heads, tokens, head_dim); the new tokens of all sequences in one row.
        attention_mask: unused; the lengths say all.
        sliding_window: tokens, the query's own included; counts where the module names none.
        cache: takes the new keys and values and gives all.
        read_index, write_index: for the cache.
        cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,); of the keys, one for each type of layer.
        max_seqlen_q, max_seqlen_k: tokens of the longest.
        **kwargs: as in `hfp_attention`.

    Returns:
        (1, tokens, num_heads, head_dim of v), and None for the weights.

    Raises:
        UnsupportedModelError: there is no cache, or the patch has a mask.
        And what `hfp_attention` raises.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise UnsupportedModelError(
            f'{type(module).__name__} has the attention "paged|hfp" without a paged cache; it is '
            'for generate_batch. Use set_attn_implementation("hfp") for anything else.'
        )
    if pattern_of(module) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was patched with a mask, which continuous batching does not "
            "apply. Use generate, or patch without mask."
        )
    # transformers' own looks at the module alone, and Mistral's layers pass theirs on.
    window = getattr(module, "sliding_window", None) or sliding_window
    layer_type = "sliding_attention" if window else "full_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[layer_type]
    if isinstance(max_seqlen_k, dict):
        max_seqlen_k = max_seqlen_k[layer_type]
    # (tokens, heads_k, head_dim): all that the queries see, sequence after sequence.
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=read_index,
        write_index=write_index,
    )
    mask = AttentionMask(
        batch_size=1,
        seqlen_q=query.shape[2],
        seqlen_k=len(key),
        device=query.device,
        causal=True,  # the queries are each sequence's last tokens, as `ops` aligns them
        window_size=(window - 1 if window else -1, -1),
    )
    return hfp_attention(
        module,
        query,
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        mask,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
        max_length_q=max_seqlen_q,
        max_length_k=max_seqlen_k,
        **kwargs,
    )
