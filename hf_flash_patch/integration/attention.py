"""transformers' attention call -> one call of ops.

Shapes: transformers hands over (batch, num_heads, seqlen, head_dim), ops takes (batch, seqlen,
num_heads, head_dim);
the difference is a view. transformers' words (query, scaling, attention_mask) end here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MaskError, UnsupportedKernelError, UnsupportedModelError
from ..ops.arguments import MaskArguments
from ..ops.functional import attention
from ..ops.padding import pack_key_padding
from . import packing
from .masking import AttentionMask
from .outputs import attention_weights_wanted

# Arguments some models hand to an attention function that change its result and that are not
# served. Anything else unknown is a hint for other implementations.
REFUSED_ARGUMENTS = {
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "indices": "a learned choice of keys",
    "block_indices": "a learned choice of key blocks",
    "block_mask": "a FlexAttention block mask",
    "cache": "a paged cache (continuous batching)",
}


def hfp_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionMask | torch.Tensor | None = None,
    scaling: float | None = None,
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
        attention_mask: what `hfp_mask` made, which then decides alone who sees whom; or a tensor
            the model or the user made: (batch or 1, num_heads or 1, seqlen_q, seqlen_k) bool (True:
                may see) or float (added), or
            (batch, seqlen_k) with 1 for real keys; or None.
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
        max_length_q, max_length_k: longest document; the whole row if a tensor, which only a sync
            could read.
        deterministic: bit-identical gradients; torch.use_deterministic_algorithms' state if None.
        **kwargs: hints for other implementations; those in REFUSED_ARGUMENTS raise.

    Returns:
        (batch, seqlen_q, num_heads, head_dim of v), and None for the weights.

    Raises:
        UnsupportedModelError: what is asked for cannot be served (attention weights,
            REFUSED_ARGUMENTS).
        UnsupportedKernelError: the backend asked for cannot serve it.
        MaskError: the mask does not fit the tensors.
    """
    _refuse(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _to_compute_dtype(module, query, key, value)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    request = _Request(query.shape[0], query.shape[2], key.shape[2], query.device)
    mask, bias = request.resolve(attention_mask, is_causal, sliding_window)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias

    doc_range = None
    varlen = False
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        varlen = bias is None and _is_plain(mask) and request.batch_size == 1
        if not varlen:
            doc_range = request.documents_of(cu_seq_lens_q)
    elif position_ids is not None:
        doc_range = request.documents_in(position_ids, mask)

    settings = getattr(getattr(module, "config", None), "hfp", None) or {}
    options = {
        "causal": mask.causal,
        "window_size": mask.window_size,
        "softmax_scale": float(scaling),
        "softcap": float(softcap or 0.0),
        "alibi_slopes": None,
        "dropout_p": float(dropout),
        "deterministic": torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else deterministic,
        "backend": settings.get("backend", "auto"),
    }
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        if s_aux is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a learned position bias and sinks; not both."
            )
        return _with_learned_bias(
            query, key, value, bias, mask.materialise(doc_range), options
        ), None

    if varlen:
        arguments = _varlen_arguments(
            query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        )
        # (1, num_heads, total, head_dim) -> (total, num_heads, head_dim)
        tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    else:
        arguments = mask.arguments(doc_range)
        if bias is not None:
            arguments = _with_bias(arguments, bias)
        tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    out = _attend(tensors, arguments, options, s_aux)
    return (out[None] if varlen else out), None


class _Request:
    """Sizes of one call, and what the mask arguments of transformers mean for them."""

    def __init__(self, batch_size: int, seqlen_q: int, seqlen_k: int, device: torch.device):
        self.batch_size, self.seqlen_q, self.seqlen_k, self.device = (
            batch_size,
            seqlen_q,
            seqlen_k,
            device,
        )

    def resolve(
        self,
        attention_mask: AttentionMask | torch.Tensor | None,
        is_causal: bool,
        sliding_window: int | None,
    ) -> tuple[AttentionMask, torch.Tensor | None]:
        """The mask, and the float bias the model brought instead of one, if it did.

        The bias is (batch or 1, num_heads or 1, seqlen_q, seqlen_k).
        """
        if isinstance(attention_mask, AttentionMask):
            return self._checked(attention_mask), None
        if attention_mask is None:
            return self._structured(is_causal, sliding_window), None
        if not isinstance(attention_mask, torch.Tensor):
            raise MaskError(
                f"attention_mask is a {type(attention_mask).__name__}; allowed are a tensor, "
                "None, and what the mask "
                'function of "hfp" returns. Make the mask with attn_implementation="hfp" set.'
            )
        if attention_mask.ndim == 2:
            padding = attention_mask[:, -self.seqlen_k :].bool()
            if padding.shape[1] != self.seqlen_k:
                raise MaskError(
                    f"attention_mask {tuple(attention_mask.shape)} is shorter than the "
                    f"{self.seqlen_k} keys."
                )
            return self._structured(is_causal, sliding_window, padding), None
        if attention_mask.ndim != 4:
            raise MaskError(
                f"attention_mask has {attention_mask.ndim} dimensions; allowed are 2 (batch, "
                "seqlen_k) and 4 (batch, "
                "num_heads or 1, seqlen_q, seqlen_k)."
            )
        # Models with a static cache hand over masks wider than the keys; the eager implementations
        # cut them, too.
        bias = attention_mask[..., : self.seqlen_k]
        if bias.shape[-2] not in (1, self.seqlen_q) or bias.shape[-1] not in (1, self.seqlen_k):
            raise MaskError(
                f"attention_mask is {tuple(attention_mask.shape)}; with {self.seqlen_q} queries "
                f"and {self.seqlen_k} "
                f"keys it must end in ({self.seqlen_q} or 1, {self.seqlen_k} or 1)."
            )
        everything = self._structured(False, None)
        if bias.is_floating_point():
            return everything, bias
        return replace(everything, dense=bias.bool()), None

    def _structured(
        self, is_causal: bool, sliding_window: int | None, padding: torch.Tensor | None = None
    ) -> AttentionMask:
        if is_causal and padding is None and self.seqlen_q != 1 and self.seqlen_q != self.seqlen_k:
            raise MaskError(
                f"causal attention of {self.seqlen_q} queries to {self.seqlen_k} keys without a "
                "mask does not say "
                "which keys are older. Pass the mask that transformers' create_causal_mask returns."
            )
        left = -1 if sliding_window is None else sliding_window - 1
        key_range, key_bits = (None, None) if padding is None else pack_key_padding(padding)
        return AttentionMask(
            batch_size=self.batch_size,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            causal=is_causal,
            window_size=(left, -1 if is_causal else left),
            device=self.device,
            key_padding=padding,
            key_range=key_range,
            key_bits=key_bits,
        )

    def _checked(self, mask: AttentionMask) -> AttentionMask:
        got = (mask.batch_size, mask.seqlen_q, mask.seqlen_k)
        expected = (self.batch_size, self.seqlen_q, self.seqlen_k)
        if got != expected:
            raise MaskError(
                f"the mask was made for (batch, seqlen_q, seqlen_k) = {got}, the tensors are "
                f"{expected}. The model "
                "reuses a mask for another attention, which this implementation cannot follow."
            )
        return mask

    def documents_in(self, position_ids: torch.Tensor, mask: AttentionMask) -> torch.Tensor | None:
        """Document ranges told by position_ids; None where they cannot mean packing."""
        # With a cache or in cross-attention positions say nothing about keys. Positions of images
        # and of several axes come in other shapes or dtypes.
        if self.seqlen_q != self.seqlen_k or self.seqlen_q == 1 or mask.doc_range is not None:
            return None
        if position_ids.ndim != 2 or position_ids.is_floating_point():
            return None
        if (
            position_ids.shape[0] not in (1, self.batch_size)
            or position_ids.shape[1] != self.seqlen_q
        ):
            return None
        return mask.document_ranges(position_ids)

    def documents_of(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Document ranges told by cumulative lengths, where the mask must be obeyed as well."""
        if self.batch_size != 1 or self.seqlen_q != self.seqlen_k:
            raise MaskError(
                "cu_seq_lens describe one row of equally many queries and keys, got batch "
                f"{self.batch_size}, "
                f"{self.seqlen_q} queries and {self.seqlen_k} keys. Flatten the batch, or pass no "
                "mask with them."
            )
        return packing.ranges_from_cu_seqlens(cu_seqlens, self.seqlen_q)


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if kwargs.get("output_attentions") or attention_weights_wanted():
        raise UnsupportedModelError(
            f"output_attentions=True: {name} is to return its attention weights, which are never "
            "formed. "
            'Ask for them on a model with set_attn_implementation("eager"), or after '
            "unpatch(model)."
        )
    for argument, meaning in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(
                f"{name} passes {argument} ({meaning}) to its attention; that is not supported. "
                'Use set_attn_implementation("sdpa") for this model.'
            )


def _to_compute_dtype(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 tensors in the dtype the model computes in: autocast's, or that of the module's own
    weights.

    Norms or rotary embeddings kept in fp32 (peft, autocast) turn q, k or v to fp32 although the
    projections around them are bf16 or fp16. The rule is that of transformers' flash attention.
    """
    tensors = (query, key, value)
    if all(tensor.dtype != torch.float32 for tensor in tensors):
        return tensors
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        target = torch.get_autocast_dtype(device_type)
    else:
        target = _weight_dtype(module)
    if target is None or all(tensor.dtype == target for tensor in tensors):
        return tensors
    return query.to(target), key.to(target), value.to(target)


def _weight_dtype(module: nn.Module) -> torch.dtype | None:
    if hasattr(getattr(module, "config", None), "_is_quantized"):
        return module.config.dtype
    # GPT-2 has no Linear but Conv1D: any matrix will do.
    for parameter in module.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            return parameter.dtype
    return None


def _is_plain(mask: AttentionMask) -> bool:
    """Whether causality and the window are all there is."""
    return (
        mask.dense is None
        and mask.seqused_k is None
        and mask.key_range is None
        and mask.doc_range is None
    )


def _varlen_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor | None,
    max_seqlen_k: int | torch.Tensor | None,
) -> MaskArguments:
    def longest(given: int | torch.Tensor | None, total: int) -> int:
        return given if isinstance(given, int) else total

    return MaskArguments(
        cu_seqlens_q=cu_seqlens_q.int(),
        cu_seqlens_k=cu_seqlens_k.int(),
        max_seqlen_q=longest(max_seqlen_q, query.shape[2]),
        max_seqlen_k=longest(max_seqlen_k, key.shape[2]),
    )


def _with_bias(arguments: MaskArguments, bias: torch.Tensor) -> MaskArguments:
    if arguments.attn_bias is not None:  # a dense mask, bool
        bias = torch.where(arguments.attn_bias, bias, float("-inf"))
    return replace(arguments, attn_bias=bias)


def _attend(
    tensors: list[torch.Tensor],
    arguments: MaskArguments,
    options: dict[str, Any],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The op, with v's head_dim made q's where a kernel needs that, and sinks."""
    q, k, v = tensors
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    # Zeros change neither q.k nor the other columns of v. The torch engine takes the tensors as
    # they are.
    if head_dim != head_dim_v and q.is_cuda and options["backend"] != "torch":
        wide = max(head_dim, head_dim_v)
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    if sinks is None:
        return attention(q, k, v, mask=arguments, **options)[..., :head_dim_v]
    out, lse = attention(q, k, v, mask=arguments, **options, return_lse=True)
    # A sink adds exp(sink) to the softmax's denominator and nothing to its numerator.
    kept = torch.sigmoid(lse - sinks.reshape(-1, 1).to(lse.dtype))  # (..., num_heads, seqlen_q)
    return out[..., :head_dim_v] * kept.transpose(-1, -2).unsqueeze(-1).to(out.dtype)


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
            "softcap together with a learned position bias is not supported."
        )
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
    return out.transpose(1, 2).contiguous()
