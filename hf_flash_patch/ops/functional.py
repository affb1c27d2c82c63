"""The public functions: arguments checked, backend chosen, one operator called.

Layout (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) for variable length;
any strides with a contiguous head_dim. Causal and windows are aligned bottom-right. A query that
sees no key gives out 0, lse -inf and no gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import MaskError, UnsupportedKernelError
from ..masks.block_mask import BlockMask
from ..masks.pattern import Pattern
from ..masks.top_k import TopKBlocks
from .arguments import MaskArguments, check_is_tensor, check_options, check_tensors
from .backends import resolve_backend
from .dropout import new_rng_state
from .library import call_attention, call_backward
from .padding import pack_key_padding
from .torch_blocks import tensors_of
from .torch_mask import host_readable

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_NO_MASK = MaskArguments()


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    *,
    block_mask: Pattern | BlockMask | None = None,
    key_padding_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> Output:
    """Exact attention, softmax(softmax_scale * q k^T + bias) v, in memory linear in seqlen.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bf16, fp16, fp32 or fp64; head_dim 1 to 256, or
            any in the torch engine.
        k, v: (batch, seqlen_k, num_heads_k, head_dim); num_heads is a multiple of num_heads_k (GQA,
            MQA).
        dropout_p: probability of dropping an attention probability, rounded to a multiple of 1/256.
        softmax_scale: factor on q.k; None means head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), how many keys on either side of that diagonal are seen; -1 for
            no limit.
        softcap: a logit x becomes softcap * tanh(x / softcap); 0 for none.
        alibi_slopes: fp32 (num_heads,) or (batch, num_heads); adds -slope * |i + seqlen_k -
            seqlen_q - j|.
        deterministic: gradients are bit-identical from run to run.
        return_lse: also return lse, which is differentiable.
        block_mask: a pattern of `hf_flash_patch.masks`, lowered for these lengths and kept, or a
            `BlockMask` on q's device; what it hides costs nothing, block by block.
        key_padding_mask: bool (batch, seqlen_k), True where the key is real.
        backend: "auto", "cuda", "torch" or "flash_attn"; see `resolve_backend`.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim); with return_lse, (out, lse), lse fp32 (batch,
        num_heads, seqlen_q), the natural logarithm of the softmax's denominator, without dropout.

    Raises:
        UnsupportedKernelError: q, k, v or a number is not supported, or the backend cannot serve
            the call.
        MaskError: a mask argument is malformed.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), whose argument order this is.
    """
    mask = _padding_arguments(key_padding_mask, k)
    if block_mask is not None:
        check_tensors(q, k, v, varlen=False)
        if isinstance(block_mask, TopKBlocks):
            lowered = block_mask.select(q, k, causal=causal, key_padding=key_padding_mask)
        else:
            lowered = _lowered(block_mask, q.shape[1], k.shape[1], q)
        mask = replace(mask or _NO_MASK, block_mask=lowered)
    return attention(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        backend=backend,
        return_lse=return_lse,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    *,
    block_mask: Pattern | BlockMask | None = None,
    key_padding_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> Output:
    """`flash_attn_func` for sequences of different lengths, one after the other without padding.

    Args:
        q: (total_q, num_heads, head_dim).
        k, v: (total_k, num_heads_k, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,) on q's device; 0, then the running sum of the
            lengths. A length may be 0.
        max_seqlen_q, max_seqlen_k: the longest sequence, in tokens, or any larger number.
        key_padding_mask: refused; leave padded keys out instead.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_lse, block_mask, backend: as in `flash_attn_func`, for each sequence by itself.
            On a GPU a pattern needs one cu_seqlens for both, since positions then do not depend on
            lengths, which only a synchronisation could read.

    Returns:
        out (total_q, num_heads, head_dim); with return_lse, (out, lse), lse fp32 (num_heads,
        total_q).

    Raises:
        UnsupportedKernelError, MaskError: as in `flash_attn_func`. The values
            of cu_seqlens are checked on the CPU; on a GPU that would cost a synchronisation.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), whose argument order this is.
    """
    if key_padding_mask is not None:
        raise MaskError(
            "key_padding_mask is given together with cu_seqlens; leave padded keys out of k, v and "
            "cu_seqlens_k instead."
        )
    mask = MaskArguments(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    if block_mask is not None:
        check_tensors(q, k, v, varlen=True)
        mask.validate(q, k)
        mask = replace(mask, block_mask=_lowered_varlen(block_mask, mask, q))
    return attention(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        backend=backend,
        return_lse=return_lse,
    )


def attention(
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
    deterministic: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Output:
    """Attention under any mask that `MaskArguments` can say; both public functions end here.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) if the mask has
            cu_seqlens. v may have a head_dim of its own in the torch backend.
        mask: None for nothing beyond causal and window.
        causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p, deterministic,
            backend, return_lse: as in `flash_attn_func`.

    Returns:
        out, or (out, lse) with return_lse; as in the public functions.

    Raises:
        UnsupportedKernelError: q, k, v or a number is not supported, or the backend cannot serve
            the call.
        MaskError: a mask argument is malformed.
    """
    mask = _NO_MASK if mask is None else mask
    varlen = mask.varlen
    check_tensors(q, k, v, varlen=varlen)
    if mask is not _NO_MASK:
        mask.validate(q, k)
    head_dim = q.shape[-1]
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    check_options(
        q,
        mask,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
    )
    engine, _ = resolve_backend(
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=head_dim,
        head_dim_v=v.shape[-1],
        attn_bias=mask.attn_bias is not None,
        block_size=None if mask.block_mask is None else mask.block_mask.block_size,
    )
    if engine == "flash_attn":
        from .flash_attn_package import call_package

        return call_package(
            q,
            k,
            v,
            mask=mask,
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            deterministic=deterministic,
            return_lse=return_lse,
        )
    plain = not (return_lse or softcap or dropout_p or alibi_slopes is not None)
    if engine == "torch" and plain and mask.empty and not (deterministic and q.is_cuda):
        is_causal = _sdpa_causality(q, k, v, causal, window_size)
        if is_causal is not None:
            return _sdpa(q, k, v, is_causal, softmax_scale)

    out, lse = call_attention(
        q,
        k,
        v,
        *_operands(
            q,
            k,
            mask=mask,
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            deterministic=deterministic,
            engine=engine,
        ),
    )
    return (out, lse) if return_lse else out


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    mask: MaskArguments | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention` over a part of the keys, for those who put it together of parts.

    Args:
        dout, dlse: gradients of out and lse; dlse may be None.
        q, k, v: queries, and the part of the keys, as in `attention`.
        out, lse: of these queries over all keys.
        mask, causal, softmax_scale, softcap, deterministic, backend: as `attention` was given them
            for this part; no dropout.

    Returns:
        This part's share of q's gradient, and the gradients of k and v; in their dtypes.

    Raises:
        UnsupportedKernelError, MaskError: as in `attention`; also where the backend is the
            flash-attn package.
    """
    mask = _NO_MASK if mask is None else mask
    engine, _ = resolve_backend(
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        attn_bias=mask.attn_bias is not None,
        block_size=None if mask.block_mask is None else mask.block_mask.block_size,
    )
    if engine == "flash_attn":
        raise UnsupportedKernelError(
            "the flash-attn package has no backward for a part of the keys; use backend='auto'."
        )
    rest = _operands(
        q,
        k,
        mask=mask,
        causal=causal,
        window_size=(-1, -1),
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
        alibi_slopes=None,
        dropout_p=0.0,
        deterministic=deterministic,
        engine=engine,
    )
    with torch.no_grad():
        return call_backward(dout, dlse, q, k, v, out, lse, *rest)


def _operands(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    mask: MaskArguments,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    dropout_p: float,
    deterministic: bool,
    engine: str,
) -> tuple[Any, ...]:
    """What the operator is given after q, k and v."""
    return (
        _contiguous(mask.cu_seqlens_q),
        _contiguous(mask.cu_seqlens_k),
        mask.max_seqlen_q if mask.varlen else q.shape[1],
        mask.max_seqlen_k if mask.varlen else k.shape[1],
        _contiguous(mask.seqused_k),
        _contiguous(mask.key_range),
        _contiguous(mask.key_bits),
        _contiguous(mask.doc_range),
        _contiguous(alibi_slopes),
        new_rng_state(q.device) if dropout_p > 0.0 else None,
        mask.attn_bias,
        *tensors_of(mask.block_mask),
        float(softmax_scale),
        causal,
        window_size[0],
        window_size[1],
        float(softcap),
        float(dropout_p),
        deterministic,
        engine,
    )


def _sdpa_causality(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window_size: tuple[int, int]
) -> bool | None:
    """SDPA's is_causal if it says exactly the same in linear memory; None if it does not.

    SDPA aligns causal top-left, so only equal lengths agree; its fused kernels want equal head
    dims, no fp64, and on a GPU head_dim in multiples of 8, else it falls back to the quadratic
    formula.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if 0 in (q.shape[0], seqlen_q, seqlen_k, q.shape[2]) or v.shape[-1] != q.shape[-1]:
        return None
    if q.dtype == torch.float64 or q.device.type not in ("cpu", "cuda"):
        return None
    if q.is_cuda and q.shape[-1] % 8 != 0:
        return None
    left, right = window_size[0], 0 if causal else window_size[1]
    if 0 <= left < seqlen_k - 1:
        return None
    if right < 0 or right >= seqlen_q - 1:
        return False
    return True if right == 0 and seqlen_q == seqlen_k else None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float
) -> torch.Tensor:
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        # SDPA's enable_gqa leads to the quadratic formula on the CPU.
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, num_heads, seqlen, head_dim)
    if torch.is_autocast_enabled(q.device.type):
        # Autocast would round fp32 inputs to its own dtype.
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padding_arguments(
    key_padding_mask: torch.Tensor | None, k: torch.Tensor
) -> MaskArguments | None:
    if key_padding_mask is None:
        return None
    check_is_tensor("key_padding_mask", key_padding_mask)
    if tuple(key_padding_mask.shape) != tuple(k.shape[:2]):
        raise MaskError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it has to be (batch, "
            f"seqlen_k) = {tuple(k.shape[:2])}, True where the key is real."
        )
    if key_padding_mask.device != k.device:
        raise MaskError(
            f"key_padding_mask is on {key_padding_mask.device}, k on {k.device}; move it once."
        )
    key_range, key_bits = pack_key_padding(key_padding_mask)
    return MaskArguments(key_range=key_range, key_bits=key_bits)


def _lowered(
    block_mask: Pattern | BlockMask, seqlen_q: int, seqlen_k: int, q: torch.Tensor
) -> BlockMask:
    if isinstance(block_mask, BlockMask):
        return block_mask
    if isinstance(block_mask, Pattern):
        return block_mask.block_mask(seqlen_q, seqlen_k, q.shape[-2], q.device)
    raise MaskError(
        f"block_mask is of type {type(block_mask).__name__}; it has to be a pattern of "
        "hf_flash_patch.masks or a BlockMask. A dense mask becomes one by BlockMask.from_dense, "
        "FlexAttention's by masks.from_flex."
    )


def _lowered_varlen(
    block_mask: Pattern | BlockMask, mask: MaskArguments, q: torch.Tensor
) -> BlockMask:
    """One list for all sequences where positions count from each one's start, else one each."""
    assert mask.max_seqlen_q is not None and mask.max_seqlen_k is not None
    assert mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None
    if isinstance(block_mask, TopKBlocks):
        raise MaskError(
            f"{block_mask} is for the dense layout; with cu_seqlens, call flash_attn_func for each "
            "sequence, or use a pattern of positions."
        )
    longest = max(mask.max_seqlen_q, mask.max_seqlen_k)
    one_each = isinstance(block_mask, Pattern) and block_mask.batches > 1
    if isinstance(block_mask, BlockMask) or mask.cu_seqlens_q is mask.cu_seqlens_k:
        return _lowered(block_mask, longest, longest, q)
    if not host_readable(q.device):
        raise MaskError(
            "block_mask is a pattern, cu_seqlens_q and cu_seqlens_k are two tensors: where a "
            "sequence's queries start is known on the device only. Pass one tensor for both, or "
            "BlockMask.stack of each sequence's block_mask(seqlen_q, seqlen_k, ...)."
        )
    if one_each:
        raise MaskError(
            f"the pattern is for {block_mask.batches} sequences; with cu_seqlens_q and "
            "cu_seqlens_k of their own, pass BlockMask.stack of one mask a sequence."
        )
    lengths = zip(mask.cu_seqlens_q.diff().tolist(), mask.cu_seqlens_k.diff().tolist(), strict=True)
    return BlockMask.stack([_lowered(block_mask, a, b, q) for a, b in lengths])
