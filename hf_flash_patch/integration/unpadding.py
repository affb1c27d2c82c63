"""Encoders that run on a batch's real tokens alone: packed before the first layer, unpacked behind
the last."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..families import encoder_of
from ..masks.top_k import TopKBlocks
from .masking import AttentionMask
from .outputs import wanted
from .sparse import pattern_of


def padded_encoders(root: PreTrainedModel) -> list[nn.Module]:
    """The modules that run all layers of the model's encoder.

    Raises:
        UnsupportedModelError: there is none whose layers may run on packed tokens.
    """
    name = type(root).__name__
    owners = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, nn.Module] = {}
    for owner in owners:
        path = encoder_of(owner.config)
        encoder = getattr(owner, path, None) if path else None
        if isinstance(encoder, nn.Module) and not getattr(owner.config, "is_decoder", False):
            if getattr(owner.config, "chunk_size_feed_forward", 0):
                raise UnsupportedModelError(
                    f"{name} has config.chunk_size_feed_forward, which divides padded sequences; "
                    "set it to 0 before the model is made, or leave remove_padding out."
                )
            found[id(encoder)] = encoder
    if not found:
        raise UnsupportedModelError(
            f"{name} has no encoder whose padding can be removed; remove_padding is for encoders "
            "like BERT, RoBERTa, ELECTRA, ALBERT and DistilBERT."
        )
    return list(found.values())


def remove_padding(encoder: nn.Module, undo: contextlib.ExitStack) -> None:
    """Let the encoder's layers see real tokens only; `undo` collects the way back."""
    hooks = _Unpadding()
    undo.callback(encoder.register_forward_pre_hook(hooks.pack, with_kwargs=True).remove)
    undo.callback(encoder.register_forward_hook(hooks.unpack, always_call=True).remove)


class _Unpadding:
    """Hooks on an encoder."""

    def __init__(self) -> None:
        self._place: torch.Tensor | None = None  # of each packed token in the padded batch
        self._shape = (0, 0)

    @torch.compiler.disable
    def pack(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with hidden states (1, total, hidden_size) and a mask of as many tokens.

        None, and so the call as it is, where there is no padding, where the mask says more than
        padding and windows, where hidden states of each layer are asked for, and where patterns
        count positions from real tokens that do not come first.
        """
        self._place = None
        bound = inspect.signature(encoder.forward).bind(*args, **kwargs)
        hidden = bound.arguments["hidden_states"]
        mask = bound.arguments.get("attention_mask")
        if not isinstance(mask, AttentionMask) or not _says_padding_only(mask, hidden):
            return None
        if wanted("hidden_states"):
            return None
        padding = mask.key_padding
        assert padding is not None
        last = (torch.arange(padding.shape[1], device=padding.device) * padding).amax(dim=1)
        lengths = padding.sum(dim=1)
        # The one synchronisation of a forward: how many tokens there are decides shapes.
        counts, ends = torch.stack((lengths, last + 1)).tolist()
        total = sum(counts)
        if total in (0, padding.numel()):
            return None
        patterns = [pattern_of(module) for module in encoder.modules()]
        if any(isinstance(pattern, TopKBlocks) for pattern in patterns):
            return None
        if any(pattern is not None for pattern in patterns) and counts != ends:
            return None
        self._place = torch.nonzero_static(padding.flatten(), size=total)[:, 0]
        self._shape = (padding.shape[0], padding.shape[1])
        bound.arguments["hidden_states"] = hidden.flatten(0, 1).index_select(0, self._place)[None]
        bound.arguments["attention_mask"] = replace(
            mask,
            tokens=total,
            longest=max(counts),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
            key_padding=None,
            key_range=None,
            key_bits=None,
            combined={},
            _packed={},
        )
        kwargs = {k: v for k, v in bound.kwargs.items() if k != "position_ids"}
        return bound.args, kwargs

    @torch.compiler.disable
    def unpack(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output with hidden states (batch, seqlen, hidden_size), 0 where there was padding."""
        place, self._place = self._place, None
        if place is None or output is None:
            return None
        batch_size, seqlen = self._shape
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        padded = hidden.new_zeros(batch_size * seqlen, hidden.shape[-1])
        padded = padded.index_copy(0, place, hidden[0]).view(batch_size, seqlen, -1)
        if isinstance(output, tuple):
            return (padded, *output[1:])
        output.last_hidden_state = padded
        return output


def _says_padding_only(mask: AttentionMask, hidden: torch.Tensor) -> bool:
    others = (mask.seqused_k, mask.doc_range, mask.dense, mask.block_mask, mask.cu_seqlens)
    square = (mask.batch_size, mask.seqlen_q, mask.seqlen_k) == (*hidden.shape[:2], hidden.shape[1])
    padded = mask.key_padding is not None and not mask.causal
    return square and padded and all(rule is None for rule in others)
