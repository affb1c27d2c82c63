"""A whole batch -> this process's tokens of it, and what its attention has to know of the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..errors import ParallelError
from ..families import family_of
from ..integration import packing
from ..integration.sharing import WholeSequence
from .agreement import Fact, check_agreement, device_of
from .groups import Groups
from .layout import Layout

IGNORED = -100
_DIVIDED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")
_LABELS = ("labels", "shift_labels")
_OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_REFUSED = {
    "past_key_values": "a cache holds whole sequences; restore() this before generate()",
    "output_router_logits": "a router's loss is a mean over a part of the tokens",
}


@dataclass(frozen=True)
class Batch:
    """What a call of the model is about.

    Attributes:
        sequence: for attention.
        shift_labels: int (batch, seqlen / n), what each of this process's tokens is to predict in a
            causal language model; None without labels.
        labels: int (batch, seqlen / n) or None.
        num_items: what the caller passed as num_items_in_batch.
        scored: the model is one of trl, whose forward takes shift_labels and scores each token.
    """

    sequence: WholeSequence
    labels: torch.Tensor | None
    shift_labels: torch.Tensor | None
    num_items: Any
    scored: bool = False


def divided(
    root: PreTrainedModel,
    groups: Groups,
    layout: Callable[[int], Layout],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: dict[str, Fact],
    problem: Exception | None,
) -> tuple[Batch, dict[str, Any]]:
    """What of a call's arguments is this process's.

    Args:
        root: the model that is called.
        groups: the processes that share the call's sequences.
        layout: of so many tokens.
        args, kwargs: of the call, whole and equal on every process.
        settings: what else has to be equal, by name.
        problem: why this process cannot make the call.

    Returns:
        what the call is about, and keyword arguments for this process.

    Raises:
        ParallelError: the processes were given different batches or settings, the length does not
            divide, or an argument cannot be divided. On every process, before anything else is
            sent; so does an exception that one of them has of its own.
    """
    try:
        kwargs = _by_name(root, args, kwargs)
    except (ParallelError, TypeError) as error:
        problem, kwargs = problem or error, {}
    tensors: dict[str, torch.Tensor] = {
        name: kwargs[name] for name in (*_DIVIDED, *_LABELS) if kwargs.get(name) is not None
    }
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    shape = (0, 0) if tokens is None else tuple(tokens.shape[:2])
    try:
        _check(root, groups, kwargs, tensors, shape)
    except ParallelError as error:
        problem = problem or error
    batches: dict[str, Fact] = {"batch size": shape[0], "length": shape[1]}
    batches["gradients wanted"] = torch.is_grad_enabled()
    compared = (*_DIVIDED, *_LABELS, *_OF_DOCUMENTS, "num_items_in_batch")
    batches |= {name: kwargs.get(name) for name in compared}
    batches["flags"] = _flags(kwargs, compared)
    device = device_of(root, groups.all)
    check_agreement(groups.all, device, {"batches": batches, "settings": settings}, problem)
    assert tokens is not None

    seqlen = shape[1]
    mask = tensors.get("attention_mask")
    real = None if mask is None else mask.bool().expand(*shape)
    padding = None if real is None or bool(real.all()) else real
    documents = _documents(kwargs, tensors.get("position_ids"), real, shape)
    if "position_ids" not in tensors:
        tensors["position_ids"] = _positions(root, tensors.get("input_ids"), tokens, padding)
    # Never None: transformers would look for documents in this process's positions.
    if mask is None:
        tensors["attention_mask"] = tokens.new_ones(shape, dtype=torch.long)
    if "labels" in tensors and "shift_labels" not in tensors:
        tensors["shift_labels"] = F.pad(tensors["labels"][:, 1:], (0, 1), value=IGNORED)
    parts = {n: groups.shard(tensor, layout=layout(seqlen)) for n, tensor in tensors.items()}

    sequence = WholeSequence(seqlen, groups.size, padding, documents)
    shift_labels = parts.pop("shift_labels", None)
    if shift_labels is not None and "labels" not in parts:
        parts["labels"] = shift_labels  # so that the model computes a loss
    scored = bool(kwargs.get("fused_lm_head")) and shift_labels is not None
    num_items = kwargs.get("num_items_in_batch")
    batch = Batch(sequence, parts.get("labels"), shift_labels, num_items, scored)
    if shift_labels is not None and scored:
        parts["shift_labels"] = shift_labels  # else it would shift labels itself
    dropped = (*_OF_DOCUMENTS, "shift_labels", "cache_position", "num_items_in_batch")
    kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
    if "use_cache" in inspect.signature(root.forward).parameters:
        kwargs["use_cache"] = False
    return batch, kwargs | parts


def _by_name(
    root: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    signature = inspect.signature(root.forward)
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.pop(parameter.name, ()):
            raise ParallelError("pass what the model is called with by name.")
    return bound


def _flags(kwargs: dict[str, Any], known: tuple[str, ...]) -> str:
    """The arguments without tensors, such as output_attentions: one process may refuse them."""
    plain = (bool, int, float, str)
    return ", ".join(
        f"{name}={value if isinstance(value, plain) else type(value).__name__}"
        for name, value in sorted(kwargs.items())
        if name not in known and value is not None and value is not False
    )


def _check(
    root: PreTrainedModel,
    groups: Groups,
    kwargs: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    shape: tuple[int, ...],
) -> None:
    name = type(root).__name__
    for argument, reason in _REFUSED.items():
        value = kwargs.get(argument)
        if value is not None and value is not False:  # an empty cache is false, too
            raise ParallelError(f"{name} was called with {argument}; {reason}.")
    known = {*_DIVIDED, *_LABELS, *_OF_DOCUMENTS, "num_items_in_batch", "cache_position"}
    for argument, value in kwargs.items():
        if isinstance(value, torch.Tensor) and argument not in known:
            raise ParallelError(
                f"{name} was called with {argument}, of which it is not known how to divide it "
                "among processes."
            )
    if kwargs.get("logits_to_keep"):
        raise ParallelError("logits_to_keep counts tokens that one process alone may have.")
    for argument, tensor in tensors.items():
        if tuple(tensor.shape[:2]) not in (shape, (1, shape[1])) or (
            tensor.ndim != (3 if argument == "inputs_embeds" else 2)
        ):
            raise ParallelError(
                f"{argument} has shape {tuple(tensor.shape)}; to be divided it has to be (batch, "
                f"seqlen) = {shape}."
            )
    if not tensors or shape[1] % groups.unit or shape[1] == 0:
        raise ParallelError(
            f"{shape[1]} tokens do not divide among {groups}; pad the batch to a multiple of "
            f"{groups.unit}."
        )


def _documents(
    kwargs: dict[str, Any],
    position_ids: torch.Tensor | None,
    real: torch.Tensor | None,
    shape: tuple[int, ...],
) -> torch.Tensor | None:
    """Ranges of packed documents, int32 (batch, seqlen, 2); None where nothing is packed.

    Args:
        kwargs, position_ids: what the model was called with.
        real: bool (batch, seqlen), its padding mask, also one that calls every token real; None
            without.
        shape: (batch, seqlen).
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        return packing.ranges_from_cu_seqlens(cu_seqlens, shape[1]).expand(shape[0], -1, -1)
    if position_ids is None:
        return None
    boundary = packing.boundaries_from_position_ids(position_ids.expand(*shape), real)
    return packing.ranges_from_boundaries(boundary) if bool(boundary.any()) else None


def _positions(
    root: PreTrainedModel,
    input_ids: torch.Tensor | None,
    tokens: torch.Tensor,
    padding: torch.Tensor | None,
) -> torch.Tensor:
    """The position_ids (batch or 1, seqlen) that the model would make of the whole batch."""
    family = family_of(root.config)
    counted = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if family is not None and family.reserved == "padding_idx":
        first = root.config.pad_token_id
        if input_ids is None:
            return counted + first + 1
        real = input_ids != first
        return real.cumsum(1) * real + first
    if family is not None and family.reserved == "offset" and padding is not None:
        return padding.cumsum(1) * padding - 1
    return counted
