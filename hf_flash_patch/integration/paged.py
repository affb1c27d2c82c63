"""Continuous batching (`generate_batch`): the attention call with a cache of pages."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..ops.arguments import MaskArguments
from ..ops.functional import attention
from .attention import attend
from .dtypes import to_compute_dtype
from .sparse import pattern_of


def hfp_paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    *,
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
        scaling, softcap, s_aux: as in `hfp_attention`.
        sliding_window: tokens, the query's own included; counts where the module names none.
        cache: takes the new keys and gives all that the queries see, sequence after sequence.
        read_index, write_index: for the cache.
        cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,); of the keys, one for each type of layer.
        max_seqlen_q, max_seqlen_k: tokens of the longest.
        **kwargs: hints for other implementations.

    Returns:
        (1, tokens, num_heads, head_dim of v), and None for the weights.

    Raises:
        UnsupportedModelError: there is no cache, or the patch has a mask.
        UnsupportedKernelError: the backend asked for cannot serve it.
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
    window = getattr(module, "sliding_window", None) or sliding_window or 0
    layer_type = "sliding_attention" if window else "full_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[layer_type]
    if isinstance(max_seqlen_k, dict):
        max_seqlen_k = max_seqlen_k[layer_type]
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=read_index,
        write_index=write_index,
    )
    query, key, value = to_compute_dtype(module, query[0].transpose(0, 1), key, value)
    settings = getattr(module.config, "hfp", None) or {}
    mask = MaskArguments(
        cu_seqlens_q=cu_seq_lens_q.int(),
        cu_seqlens_k=cu_seq_lens_k.int(),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    call = partial(
        attention,
        mask=mask,
        causal=True,  # the queries are each sequence's last tokens, as `ops` aligns them
        window_size=(window - 1, -1),
        softmax_scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        backend=settings.get("backend", "auto"),
    )
    return attend(call, query, key, value, s_aux)[None], None
