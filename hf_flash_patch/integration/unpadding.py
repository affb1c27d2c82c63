"""Padding taken out once for all layers of an encoder, and put back behind them.

Two hooks around the module that runs the layers. Before it, (batch, seqlen, hidden) becomes
(1, total, hidden), the real tokens of all rows one after the other, and the mask what keeps the
rows apart; behind it, the rows are put back, zero where padding was. Positions are in the hidden
states by then. The hooks keep no state, so that copies and pickles of a model have them, too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from ..errors import UnsupportedModelError
from ..families import FAMILIES, family_of
from . import packing
from .masking import AttentionMask, Padding
from .outputs import hidden_states_wanted
from .request import Request
from .survey import AttentionModule

_FIRST = ("hidden_states", "attention_mask")  # as every encoder calls its first arguments
_KNOWN = (*_FIRST, "position_ids")


@dataclass(frozen=True)
class Encoders:
    """Which modules of a model are to run without padding.

    Attributes:
        names: paths of the modules that run the layers, below the model.
        others: why other parts of the model keep their padding.
    """

    names: tuple[str, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        text = f"removed for the layers of {', '.join(self.names)}"
        return "; ".join([text, *(f"{other}, which keeps its padding" for other in self.others)])


def find_encoders(root: PreTrainedModel, modules: list[AttentionModule]) -> Encoders:
    """The BERT-like encoders in `root`.

    Args:
        root: the model.
        modules: its survey.

    Raises:
        UnsupportedModelError: there is none that can run without padding.
    """
    own = [entry.name for entry in modules if entry.status == "unsupported"]
    names, others = [], []
    for prefix, model in root.named_modules():
        family = family_of(model.config) if isinstance(model, PreTrainedModel) else None
        if family is None or not _has(model, family.encoder):
            continue
        name = f"{prefix}.{family.encoder}".lstrip(".")
        config, kind = model.config, type(model).__name__
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            others.append(f"{kind} is a decoder")
        elif getattr(config, "chunk_size_feed_forward", 0):
            chunk = config.chunk_size_feed_forward
            others.append(f"{kind} has chunk_size_feed_forward={chunk} (set it to 0)")
        elif any(path.startswith(f"{name}.") for path in own):
            others.append(f"{kind} keeps attention of its own")
        else:
            names.append(name)
    if not names:
        known = ", ".join(family.name for family in FAMILIES if family.encoder)
        why = f"has no BERT-like encoder (families: {known})"
        if others:
            why = f"cannot run without padding: {'; '.join(others)}"
        raise UnsupportedModelError(
            f"remove_padding=True: {type(root).__name__} {why}. Padding is skipped in its "
            "attention in any case; leave remove_padding out."
        )
    return Encoders(tuple(names), tuple(others))


def _has(model: nn.Module, path: str) -> bool:
    return bool(path) and path in vars(model)["_modules"]


def unpad_encoders(root: PreTrainedModel, encoders: Encoders, undo: contextlib.ExitStack) -> None:
    """Make the encoders run without padding; `undo` collects the way back."""
    for name in encoders.names:
        module = root.get_submodule(name)
        _forget(module)  # a copy of a patched model has them
        before = module.register_forward_pre_hook(_enter, with_kwargs=True)
        undo.callback(before.remove)
        after = module.register_forward_hook(_leave, with_kwargs=True)
        undo.callback(after.remove)


def _forget(module: nn.Module) -> None:
    for hooks, kept in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key], kept[key]


def _enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The call on real tokens only, or None to leave it as it is.

    What a forward asks for that needs rows (hidden states of every layer, other tensors by token)
    or forbids to wait for the device (tracing, a CUDA graph's capture) runs padded: as exact.
    """
    given = dict(zip(_FIRST, args, strict=False)) | kwargs
    mask: Any = given.get("attention_mask")
    if len(args) > len(_FIRST) or not _is_padding(mask):
        return None
    if any(not _is_plain(value) for name, value in given.items() if name not in _KNOWN):
        return None
    if given.get("output_hidden_states") or hidden_states_wanted() or torch.compiler.is_exporting():
        return None
    hidden, position_ids = given["hidden_states"], given.get("position_ids")
    if hidden.shape[:2] != (mask.batch_size, mask.seqlen_k):
        return None
    if not torch.compiler.is_compiling() and is_tracing(hidden):
        return None
    packed = _packed(mask, position_ids)
    if packed is mask:
        return None
    given["attention_mask"] = packed
    if packed.padding is not None:
        given["hidden_states"] = _take(hidden, packed.padding.real)
        if position_ids is not None:
            given["position_ids"] = None  # the mask has what they say
    # hidden_states by position: reentrant checkpointing looks there
    return (given.pop("hidden_states"),), given


def _leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """The output with rows again, if `_enter` took them apart."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, AttentionMask) or mask.padding is None:
        return None
    if isinstance(output, torch.Tensor):
        return _put_back(output, mask.padding)
    if isinstance(output, tuple):
        return (_put_back(output[0], mask.padding), *output[1:])
    output["last_hidden_state"] = _put_back(output["last_hidden_state"], mask.padding)
    return output


def _is_padding(mask: Any) -> bool:
    """Whether the mask says which tokens are real, and nothing else."""
    if not isinstance(mask, AttentionMask) or mask.key_padding is None or mask.seqlen_q < 2:
        return False
    others = (mask.seqused_k, mask.doc_range, mask.dense, mask.block_mask, mask.padding)
    unlimited = not mask.causal and mask.window_size == (-1, -1)
    return unlimited and mask.seqlen_q == mask.seqlen_k and all(rule is None for rule in others)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


@torch.compiler.disable(
    reason="hfp.patch(remove_padding=True) counts the real tokens of a padded batch on the host; "
    "compile without fullgraph=True, or leave remove_padding out."
)
def _packed(mask: AttentionMask, position_ids: torch.Tensor | None) -> AttentionMask:
    """The mask of the real tokens in one row; without any padding, the same mask without it."""
    assert mask.key_padding is not None
    batch_size, seqlen = mask.batch_size, mask.seqlen_k
    real = mask.key_padding.flatten().nonzero()[:, 0]  # waits for the device
    total = real.numel()
    if total == 0:
        return mask
    if total == batch_size * seqlen:
        if position_ids is not None:  # which say other things where nothing is padded
            return mask
        return replace(mask, key_padding=None, key_range=None, key_bits=None, combined={})
    ranges = None
    if position_ids is not None:
        request = Request(batch_size, seqlen, seqlen, mask.device)
        ranges = request.documents_in(position_ids, mask)
    packed = AttentionMask(
        batch_size=1,
        seqlen_q=total,
        seqlen_k=total,
        causal=False,
        window_size=(-1, -1),
        device=mask.device,
        padding=Padding(batch_size, seqlen, real),
    )
    if ranges is not None:
        row = torch.arange(batch_size, device=mask.device)[:, None] * seqlen
        first = (ranges[..., 0] + row).flatten()[real]  # tells all documents of the batch apart
        boundary = packing.boundaries_from_ids(first[None])
        return replace(packed, doc_range=packing.ranges_from_boundaries(boundary))
    cu_seqlens = F.pad(mask.key_padding.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    return replace(packed, cu_seqlens=cu_seqlens)


def _take(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, hidden) -> (1, total, hidden)."""
    return hidden.flatten(0, 1).index_select(0, real)[None]


def _put_back(hidden: torch.Tensor, padding: Padding) -> torch.Tensor:
    """(1, total, hidden) -> (batch, seqlen, hidden), zero at padding."""
    rows = hidden.new_zeros((padding.batch_size * padding.seqlen, hidden.shape[-1]))
    real = padding.real.to(hidden.device)
    rows = rows.index_copy(0, real, hidden[0])
    return rows.unflatten(0, (padding.batch_size, padding.seqlen))
