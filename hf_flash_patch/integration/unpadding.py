"""Encoders that run on a batch's real tokens alone: packed before the first layer, unpacked behind
the last.

Two hooks on the module that runs the layers. What the second needs to know is in the mask that the
first one gave: the hooks keep no state, which threads (DataParallel) and copies would share.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from ..errors import UnsupportedModelError
from ..families import encoder_of
from ..masks.top_k import TopKBlocks
from .attention_mask import AttentionMask
from .outputs import wanted
from .request import Request
from .sparse import pattern_of

_FIRST = ("hidden_states", "attention_mask")  # what every encoder calls its first arguments
_TOLD = {*_FIRST, "position_ids"}  # what is known of tokens


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


def remove_padding(
    root: PreTrainedModel, encoders: list[nn.Module], undo: contextlib.ExitStack
) -> None:
    """Let the encoders' layers see real tokens only; `undo` collects the way back."""
    for module in root.modules():
        _forget(module)  # a copy of a patched model has them
    for encoder in encoders:
        undo.callback(encoder.register_forward_pre_hook(_pack, with_kwargs=True).remove)
        undo.callback(encoder.register_forward_hook(_unpack, with_kwargs=True).remove)


def _forget(module: nn.Module) -> None:
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number in [n for n, hook in hooks.items() if hook in (_pack, _unpack)]:
            del hooks[number], with_kwargs[number]


def _pack(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with hidden states (1, total, hidden_size) and a mask of as many tokens.

    None, and so the call as it is, where there is no padding; where the mask says more than padding
    and windows, or other tensors come along (lengths of documents); where hidden states of each
    layer are asked for; where the host may not read how many tokens are real (export, tracing, the
    capture of a CUDA graph); and where patterns count positions from real tokens that do not come
    first, or over documents.
    """
    given = dict(zip(_FIRST, args, strict=False)) | kwargs
    hidden, mask = given.get("hidden_states"), given.get("attention_mask")
    if not isinstance(mask, AttentionMask) or not isinstance(hidden, torch.Tensor):
        return None
    if any(isinstance(given[name], torch.Tensor) for name in given.keys() - _TOLD):
        return None
    if len(args) > len(_FIRST) or not _says_padding_only(mask, hidden) or wanted("hidden_states"):
        return None
    if _exporting() or (not torch.compiler.is_compiling() and is_tracing(hidden)):
        return None
    packed = _without_padding(mask, encoder, given.get("position_ids"))
    if packed is None or packed.place is None:
        return None
    given["attention_mask"] = packed
    if given.get("position_ids") is not None:
        given["position_ids"] = None  # the mask has what they say of documents
    del given["hidden_states"]
    # By position, as models call it: hooks of others may look there.
    return (hidden.flatten(0, 1).index_select(0, packed.place)[None],), given


def _unpack(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output with hidden states (batch, seqlen, hidden_size), 0 where there was padding."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, AttentionMask) or mask.place is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
    padded = hidden.new_zeros(mask.batch_size * mask.seqlen_q, hidden.shape[-1])
    padded = padded.index_copy(0, mask.place.to(hidden.device), hidden.squeeze(0))
    padded = padded.view(mask.batch_size, mask.seqlen_q, -1)
    if isinstance(output, tuple):
        return (padded, *output[1:])
    output.last_hidden_state = padded
    return output


def _exporting() -> bool:
    # What torch.compiler.is_exporting() returns; asked itself, it says yes to torch.compile too, in
    # torch 2.11 at least.
    return bool(torch.compiler._is_exporting_flag)


@torch.compiler.disable(
    reason="hfp.patch(remove_padding=True) reads on the host how many tokens of a batch are real; "
    "compile without fullgraph=True, or patch without remove_padding."
)
def _without_padding(
    mask: AttentionMask, encoder: nn.Module, position_ids: torch.Tensor | None
) -> AttentionMask | None:
    """The mask of the real tokens in one row; None where they should stay in theirs."""
    padding = mask.key_padding
    assert padding is not None
    batch_size, seqlen = padding.shape
    # Where sequences start, and the documents that positions tell apart.
    lengths = padding.sum(dim=1)
    starts = padding & (padding.cumsum(dim=1) == 1)
    sequences = (lengths > 0).sum()
    if position_ids is not None:
        ranges = Request(batch_size, seqlen, seqlen, mask.device).documents_in(position_ids, mask)
        if ranges is not None:
            index = torch.arange(seqlen, device=mask.device)
            starts = starts | (padding & (ranges[..., 0] == index))
    last = (torch.arange(seqlen, device=mask.device) * padding).amax(dim=1)
    # The one synchronisation of a forward: how many tokens there are decides shapes.
    numbers = torch.cat((lengths, last + 1, torch.stack((sequences, starts.sum()))))
    *ends, rows, documents = numbers.tolist()
    counts, ends = ends[:batch_size], ends[batch_size:]
    total = sum(counts)
    if total in (0, padding.numel()):
        return None
    patterns = [pattern_of(module) for module in encoder.modules()]
    if any(isinstance(pattern, TopKBlocks) for pattern in patterns):
        return None
    if any(p is not None for p in patterns) and (counts != ends or documents != rows):
        return None
    place = torch.nonzero_static(padding.flatten(), size=total)[:, 0]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    if documents != rows:
        first = torch.nonzero_static(starts.flatten()[place], size=documents)[:, 0]
        cu_seqlens = F.pad(first, (0, 1), value=total)
    return replace(
        mask,
        tokens=total,
        longest=max(counts),
        cu_seqlens=cu_seqlens.int(),
        place=place,
        key_padding=None,
        key_range=None,
        key_bits=None,
        combined={},
        _packed={},
    )


def _says_padding_only(mask: AttentionMask, hidden: torch.Tensor) -> bool:
    others = (mask.seqused_k, mask.doc_range, mask.dense, mask.block_mask, mask.cu_seqlens)
    square = (mask.batch_size, mask.seqlen_q, mask.seqlen_k) == (*hidden.shape[:2], hidden.shape[1])
    padded = mask.key_padding is not None and not mask.causal
    return square and padded and all(rule is None for rule in others)
