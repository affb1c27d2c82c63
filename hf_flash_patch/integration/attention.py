"""transformers' attention call -> one call of ops.

transformers hands over (batch, num_heads, seqlen, head_dim), ops takes (batch, seqlen, num_heads,
head_dim); the difference is a view. transformers' words (query, scaling, attention_mask) end here.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ParallelError, UnsupportedKernelError, UnsupportedModelError
from ..families import TIME_AXIS_ATTENTION
from ..ops.arguments import MaskArguments
from ..ops.functional import attention
from ..ops.keeper import current
from .attention_mask import AttentionMask
from .dtypes import to_compute_dtype
from .outputs import wanted
from .request import Request
from .sharing import own_attribute, share_of
from .sparse import PATTERN_ATTRIBUTE, pattern_of, with_pattern

# Arguments some models hand to an attention function that change its result and that are not
# served. Anything else unknown is a hint for other implementations.
REFUSED_ARGUMENTS = {
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "indices": "a learned choice of keys",
    "block_indices": "a learned choice of key blocks",
    "block_mask": "a FlexAttention block mask",
}


def hfp_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionMask | torch.Tensor | None = None,
    scaling: float | torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers.

    Args:
        module: the attention module that calls.
        query: (batch, num_heads, seqlen_q, head_dim).
        key: (batch, num_heads_k, seqlen_k, head_dim), position-embedded and taken from the cache.
        value: (batch, num_heads_k, seqlen_k, head_dim of v).
        attention_mask: what `hfp_mask` made, which then decides alone who sees whom; or None; or a
            tensor of the model's or the user's: (batch or 1, num_heads or 1, seqlen_q, seqlen_k),
            bool (True: may see) or float (added), or (batch, seqlen_k), 1 for real keys.
        scaling: factor on q.k; head_dim ** -0.5 if None.
        dropout: probability.
        is_causal: overrides module.is_causal; both count only where the mask does not say.
        sliding_window: tokens; counts only where attention_mask is None or (batch, seqlen_k).
        softcap: cap * tanh(logit / cap) before the mask; None or 0 for none.
        s_aux: (num_heads,) learned logit of a key that has no value ("sink").
        position_bias: (batch or 1, num_heads or 1, seqlen_q, seqlen_k), added to the logits.
        position_ids: int (batch or 1, seqlen_q); where they start anew, so does a document, if
            seqlen_q == seqlen_k.
        cu_seq_lens_q, cu_seq_lens_k: int (num_documents + 1,) for a batch of one row.
        max_length_q, max_length_k: tokens of the longest document; the whole row's where it is a
            tensor, which only a sync could read.
        deterministic: bit-identical gradients; torch.use_deterministic_algorithms' state if None.
        **kwargs: hints for other implementations; those in REFUSED_ARGUMENTS raise.

    Returns:
        (batch, seqlen_q, num_heads, head_dim of v), and None for the weights.

    Raises:
        UnsupportedModelError: attention weights or one of REFUSED_ARGUMENTS are asked for.
        UnsupportedKernelError: the backend asked for cannot serve it.
        MaskError: the mask does not fit the tensors.
        ParallelError: processes share the sequence, and cannot share this.
    """
    _refuse(module, kwargs)
    query, key, value = to_compute_dtype(module, query, key, value)
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:  # out of a convolution
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if isinstance(scaling, torch.Tensor):  # a learned scale must keep its gradient
        query, scaling = query * scaling.to(query.dtype), 1.0
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
        if attention_mask is None and query.shape[2] != key.shape[2]:
            # Kosmos-2 has an image projection of its decoder's class; no decoder, it says.
            is_causal = is_causal and getattr(module, "is_decoder", None) is not False
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()

    settings = getattr(getattr(module, "config", None), "hfp", None) or {}
    options: dict[str, Any] = {
        "softmax_scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        "softcap": float(softcap or 0.0),
        "dropout_p": float(dropout),
        "deterministic": deterministic,
        "backend": settings.get("backend", "auto"),
    }
    share = share_of(module)
    if share is not None:
        mask = _of_whole_sequence(module, attention_mask, position_bias)
        return share.attend(query, key, value, mask, pattern_of(module), options, s_aux), None
    _refuse_context_parallel(module)

    request = Request(query.shape[0], query.shape[2], key.shape[2], query.device)
    mask, bias = request.resolve(attention_mask, is_causal, sliding_window)
    pattern = pattern_of(module)
    if pattern is not None:
        mask = with_pattern(mask, pattern, query, key)
    elif "mask" in settings and not hasattr(module, PATTERN_ATTRIBUTE):
        _warn_of_mask(module, settings["mask"])
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias

    varlen: MaskArguments | None = None
    doc_range = None
    if mask.cu_seqlens is not None:
        if bias is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a position bias, of padded sequences; "
                "remove_padding cannot serve it."
            )
        varlen = mask.arguments()
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if bias is None and mask.is_plain and request.batch_size == 1:
            varlen = MaskArguments(
                cu_seqlens_q=cu_seq_lens_q.int(),
                cu_seqlens_k=cu_seq_lens_k.int(),
                max_seqlen_q=max_length_q if isinstance(max_length_q, int) else request.seqlen_q,
                max_seqlen_k=max_length_k if isinstance(max_length_k, int) else request.seqlen_k,
            )
        else:
            doc_range = request.documents_of(cu_seq_lens_q)
    elif position_ids is not None and not _is_dense(attention_mask) and _counts_tokens(module):
        doc_range = request.documents_in(position_ids, mask)

    options |= {"causal": mask.causal, "window_size": mask.window_size}
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        if current() is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a learned position bias, with which PyTorch's "
                "attention computes; its results cannot be kept. Leave keep_attention out."
            )
        if s_aux is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a learned position bias and sinks; not both."
            )
        visible = mask.materialise(doc_range)
        if visible.shape[1] > 1:  # heads differ; what is one for all stays one
            visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
        return _with_learned_bias(query, key, value, bias, visible, options), None

    if varlen is not None:
        # (1, num_heads, total, head_dim) -> (total, num_heads, head_dim)
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return attend(partial(attention, mask=varlen, **options), q, k, v, s_aux)[None], None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    arguments = _with_bias(mask.arguments(doc_range), bias)
    return attend(partial(attention, mask=arguments, **options), q, k, v, s_aux), None


def _of_whole_sequence(
    module: nn.Module, mask: Any, position_bias: torch.Tensor | None
) -> AttentionMask:
    """The mask that `hfp_mask` made of a sequence that several processes share."""
    if isinstance(mask, AttentionMask) and position_bias is None:
        return mask
    what = "a position bias" if position_bias is not None else "a mask of its own making"
    raise ParallelError(
        f"{type(module).__name__} passes {what} to its attention, which is of this process's "
        "tokens only; its sequences cannot be shared among processes."
    )


def _refuse_context_parallel(module: nn.Module) -> None:
    """Inside torch's `context_parallel` a process has a part of the tokens, and torch's SDPA alone,
    which it replaces, knows of the others."""
    if not torch.compiler.is_compiling() and "context_parallel" in str(
        getattr(F.scaled_dot_product_attention, "__module__", None)
    ):
        raise ParallelError(
            f"{type(module).__name__} runs inside torch's context_parallel (accelerate's cp_size), "
            "which is for SDPA alone: every process would see its own tokens only. Call "
            "hf_flash_patch.parallel.share_in_trainer or share_in_accelerator, before prepare()."
        )


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if kwargs.get("output_attentions") or wanted("attentions"):
        raise UnsupportedModelError(
            f"output_attentions=True: {name} is to return its attention weights, which are never "
            'formed. Ask for them on a model with set_attn_implementation("eager"), or after '
            "unpatch(model)."
        )
    for argument, meaning in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(
                f"{name} passes {argument} ({meaning}) to its attention; that is not supported. "
                'Use set_attn_implementation("sdpa") for this model.'
            )


def _is_dense(attention_mask: Any) -> bool:
    """Whether the caller's own 4-D mask decides alone: a tree of drafts repeats positions, too."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4


def _counts_tokens(module: nn.Module) -> bool:
    """Whether position_ids count the keys, too: not where those are another sequence's, as BERT's
    cross-attention has it, nor along an axis of time."""
    name = type(module).__name__
    cross = own_attribute(module, "is_cross_attention") or "Cross" in name
    return not cross and name not in TIME_AXIS_ATTENTION


def _warn_of_mask(module: nn.Module, mask: Any) -> None:
    """Of a model that was saved with a mask and loaded with the attention's name alone."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__}: config.hfp keeps the mask {mask}, which "
            'attn_implementation="hfp" alone does not apply. Call hf_flash_patch.patch(model), or '
            "take it out of config.hfp.",
            stacklevel=2,
        )


def _with_bias(arguments: MaskArguments, bias: torch.Tensor | None) -> MaskArguments:
    if bias is None:
        return arguments
    if arguments.attn_bias is not None:  # a dense mask, bool
        bias = torch.where(arguments.attn_bias, bias, float("-inf"))
    return replace(arguments, attn_bias=bias)


def attend(
    call: partial,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A call of ops, with the head_dim of v made that of q where a kernel needs it, and sinks.

    Args:
        call: of q, k, v and return_lse, its backend among its keywords.
        q, k, v: as in `ops`.
        sinks: (num_heads,) or None.
    """
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    if head_dim != head_dim_v and q.is_cuda and call.keywords["backend"] != "torch":
        # Zeros change neither q.k nor the other columns of v. The torch engine needs none.
        wide = max(head_dim, head_dim_v)
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
        return attend(call, q, k, v, sinks)[..., :head_dim_v]
    if sinks is None:
        return call(q, k, v)
    out, lse = call(q, k, v, return_lse=True)
    # A sink adds exp(sink) to the softmax's denominator and nothing to its numerator.
    kept = torch.sigmoid(lse - sinks.reshape(-1, 1).to(lse.dtype))  # (..., num_heads, seqlen_q)
    return out * kept.transpose(-1, -2).unsqueeze(-1).to(out.dtype)


def _with_learned_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    visible: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention whose float bias is trained (T5): SDPA, since ops have no gradient for a bias.

    The bias, and so its gradient, is quadratic in the sequence in any case.
    """
    if options["backend"] not in ("auto", "torch"):
        raise UnsupportedKernelError(
            f'backend="{options["backend"]}" has no gradient for a learned position bias; use '
            'backend="auto" or "torch".'
        )
    if options["softcap"]:
        raise UnsupportedKernelError(
            f"softcap={options['softcap']} together with a learned position bias is not supported."
        )
    visible = visible & (bias > float("-inf"))
    # The most negative finite value: a row that sees nothing must not become NaN.
    bias = torch.where(visible, bias.to(query.dtype), torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=options["dropout_p"],
        scale=options["softmax_scale"],
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)  # else an average
    return out.transpose(1, 2).contiguous()
