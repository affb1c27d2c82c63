"""The specification: attention as a dense formula in fp64, differentiated by autograd.

Everything `attention` promises, written to be read: quadratic memory, loops over sequences, host
reads. Evaluated in bf16 or fp16 (`dtype`), the same formula is what eager attention computes, and
its error is the yardstick of tolerance.py.

Legend: b batch, h query heads, g key heads, i queries, j keys, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops.arguments import MaskArguments
from ..ops.dropout import dropout_keep_mask, keep_scale


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: MaskArguments | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse by the dense formula; arguments as in `ops.functional.attention`.

    Args:
        rng_state: int64 (2,), seed and offset; needed if dropout_p > 0.
        dtype: in which to compute; q, k and v are converted, differentiably.

    Returns:
        (out, lse), both of `dtype`, in the layout of q; lse (batch, num_heads, seqlen_q) or
        (num_heads, total_q).
    """
    mask = MaskArguments() if mask is None else mask
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window_size,
        "softmax_scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }
    q, k, v = (x.to(dtype) for x in (q, k, v))
    num_heads = q.shape[-2]

    def slopes_of(b: int) -> torch.Tensor | None:
        if alibi_slopes is None or alibi_slopes.dim() == 1:
            return alibi_slopes
        return alibi_slopes[b]

    def keep_of(b: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
        if dropout_p == 0.0:
            return None
        assert rng_state is not None, "dropout_p > 0 needs rng_state"
        keep = dropout_keep_mask(rng_state, dropout_p, b + 1, num_heads, seqlen_q, seqlen_k)
        return keep[b]

    results = []
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        edges_q, edges_k = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
        for b in range(len(edges_q) - 1):
            q_b, k_b, v_b = (
                q[edges_q[b] : edges_q[b + 1]],
                k[edges_k[b] : edges_k[b + 1]],
                v[edges_k[b] : edges_k[b + 1]],
            )
            seen = visible(
                len(q_b),
                len(k_b),
                len(k_b),
                causal=causal,
                window_size=window_size,
                device=q.device,
            )
            seen = seen & listed(mask, b, num_heads, q.device)[:, : len(q_b), : len(k_b)]
            keep = keep_of(b, len(q_b), len(k_b))
            results.append(
                _one_sequence(q_b, k_b, v_b, seen, None, slopes_of(b), keep, len(k_b), **options)
            )
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses, dim=-1)

    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    for b in range(batch):
        used = seqlen_k if mask.seqused_k is None else int(mask.seqused_k[b])
        seen = visible(
            seqlen_q, seqlen_k, used, causal=causal, window_size=window_size, device=q.device
        )
        j = torch.arange(seqlen_k, device=q.device)
        if mask.key_range is not None:
            seen = seen & (j >= mask.key_range[b, 0]) & (j < mask.key_range[b, 1])
        if mask.key_bits is not None:
            seen = seen & ((mask.key_bits[b, j // 32] >> (j % 32)) & 1).bool()
        if mask.doc_range is not None:
            seen = seen & (j >= mask.doc_range[b, :, 0, None]) & (j < mask.doc_range[b, :, 1, None])
        seen = seen & listed(mask, b, num_heads, q.device)
        bias = None
        if mask.attn_bias is not None:
            bias = mask.attn_bias.expand(batch, num_heads, seqlen_q, seqlen_k)[b]
            if bias.dtype == torch.bool:
                seen, bias = seen & bias, None
        keep = keep_of(b, seqlen_q, seqlen_k)
        results.append(
            _one_sequence(q[b], k[b], v[b], seen, bias, slopes_of(b), keep, used, **options)
        )
    outs, lses = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(lses)


def listed(mask: MaskArguments, b: int, num_heads: int, device: torch.device) -> torch.Tensor:
    """bool (num_heads, seqlen_q, seqlen_k) of sequence b's block lists; (1, 1, 1) for none."""
    if mask.block_mask is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    dense = mask.block_mask.dense()
    dense = dense[b if len(dense) > 1 else 0]
    return dense.repeat_interleave(num_heads // len(dense), dim=0)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    used: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """bool (seqlen_q, seqlen_k): causal and window, aligned bottom-right to `used` keys."""
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    diagonal = i + used - seqlen_q
    seen = (j < used).expand(seqlen_q, seqlen_k)
    left, right = window_size
    if causal:
        seen = seen & (j <= diagonal)
    if left >= 0:
        seen = seen & (j >= diagonal - left)
    if right >= 0:
        seen = seen & (j <= diagonal + right)
    return seen


def _one_sequence(
    q: torch.Tensor,  # i h d
    k: torch.Tensor,  # j g d
    v: torch.Tensor,  # j g d
    seen: torch.Tensor,  # i j, or h i j
    bias: torch.Tensor | None,  # h i j
    slopes: torch.Tensor | None,  # h
    keep: torch.Tensor | None,  # h i j
    used: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # j h d
    logits = torch.einsum("ihd,jhd->hij", q, k) * softmax_scale
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        i = torch.arange(q.shape[0], device=q.device)[:, None]
        j = torch.arange(k.shape[0], device=q.device)[None, :]
        distance = (i + used - q.shape[0] - j).abs()
        logits = logits - (slopes.to(logits.dtype)[:, None, None] * distance)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
        seen = seen & (bias > float("-inf"))

    # A row that sees nothing is computed over zeros and overwritten, so that no NaN enters
    # autograd.
    seen = seen.expand(logits.shape)
    some = seen.any(dim=-1, keepdim=True)  # h i 1
    logits = torch.where(seen, logits, float("-inf"))
    logits = torch.where(some, logits, 0.0)
    probabilities = torch.softmax(logits, dim=-1) * some
    lse = torch.where(some[..., 0], torch.logsumexp(logits, dim=-1), float("-inf"))  # h i
    if keep is not None:
        probabilities = probabilities * keep * keep_scale(dropout_p)
    return torch.einsum("hij,jhd->ihd", probabilities, v), lse
