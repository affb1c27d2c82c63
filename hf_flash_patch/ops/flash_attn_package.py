"""The flash-attn package behind our signature: what it computes as we do, all else refused."""

from __future__ import annotations

import torch

from ..errors import UnsupportedKernelError
from .arguments import MaskArguments


def call_package(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: MaskArguments,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
) -> torch.Tensor:
    """Call the installed flash-attn; arguments as in `attention`.

    Raises:
        UnsupportedKernelError: for what the package does not have, or does differently.
    """
    given = {
        "dropout_p > 0 (its mask is another one)": dropout_p > 0.0,
        "return_lse (its lse is not differentiable)": return_lse,
        "a head_dim of its own for v": v.shape[-1] != q.shape[-1],
        f"dtype {q.dtype}": q.dtype not in (torch.bfloat16, torch.float16),
        f"tensors on {q.device}": not q.is_cuda,
    }
    for name in ("seqused_k", "key_range", "key_bits", "doc_range", "attn_bias", "block_mask"):
        given[name] = getattr(mask, name) is not None
    refused = [what for what, is_given in given.items() if is_given]
    if refused:
        raise UnsupportedKernelError(
            f'backend="flash_attn" does not serve {", ".join(refused)}. '
            'Use backend="auto", which does.'
        )
    import flash_attn

    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }
    if mask.varlen:
        lengths = (mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k)
        return flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **options)
    return flash_attn.flash_attn_func(q, k, v, **options)
