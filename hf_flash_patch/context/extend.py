"""extend_context(): plan, validate everything, apply, report."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ContextExtensionError
from ..families import UNBOUNDED
from ..integration.configs import own_configs
from ..integration.survey import pretrained_roots
from ..integration.wrappers import compiled_or_sharded, holders
from ..report import ContextReport, ContextRow
from . import scaling, tables
from .learned import GrownTable, TablePart, TablePlan, table_parts
from .plan import Change, Settings, refuse_shrinking, set_attribute
from .rope import RopePart, RopePlan, rope_parts
from .tokenizer import check_tokenizer, tokenizer_of

Part = TablePart | RopePart
Plan = TablePlan | RopePlan


def extend_context(
    model: nn.Module,
    max_length: int,
    *,
    rope: str | dict[str, Any] = "auto",
    positions: str = "auto",
    tokenizer: Any = None,
) -> ContextReport:
    """Extend the maximum context of a model in place; `save_pretrained` then needs nothing of ours.

    Args:
        model: a PreTrainedModel, a PeftModel, or any module around one; on any device, the meta
            device included.
        max_length: tokens to reach, special tokens included; the present maximum does nothing.
        rope: for rotary positions: "auto" (by factor; the report says why), "linear", "dynamic",
            "yarn", "longrope", "llama3", or a `rope_parameters` dict, flat or by layer type. A
            missing factor or original_max_position_embeddings in it is filled in. Extending again
            starts from what the model came with, so that twice is the same as once.
        positions: for learned absolute positions: "auto", "tile", "interpolate", "hierarchical" or
            "random". Extending again starts from the table as it is.
        tokenizer: its model_max_length follows; None: nothing happens to a tokenizer.

    Returns:
        What changed, up to which length the results stay bit for bit what they were, and what to
        know.

    Raises:
        ContextExtensionError: max_length is not a positive integer, or below the present maximum;
            a method is unknown or of the other kind of positions; a rope dict has unknown keys or
            values out of range; there is nothing to extend (ALiBi, relative positions, none); the
            tokenizer is another model's; the model is compiled, sharded, in DDP or in an optimizer.
            The model is as it was.
    """
    extension = plan_extension(
        model, max_length, rope=rope, positions=positions, tokenizer=tokenizer
    )
    with contextlib.ExitStack() as undo:
        for text in extension.apply(undo):
            warnings.warn(text, stacklevel=2)  # may be an error to the caller
        undo.pop_all()  # done: nobody is going to undo it
    return extension.report


class Extension:
    """An extension that has been validated and computed; once applied, it keeps no model alive.

    Attributes:
        report: what it does.
    """

    def __init__(
        self,
        roots: list[PreTrainedModel],
        plans: list[Plan],
        settings: Settings,
        changes: list[Change],
        tokenizer: Any,
    ):
        self._roots, self._plans, self._tokenizer = roots, plans, tokenizer
        self._grown: list[GrownTable] = []
        self._max_length = settings.max_length
        self.report = _report(roots, changes, settings, tokenizer)

    def apply(self, undo: contextlib.ExitStack) -> list[str]:
        """Change the model and the tokenizer.

        Args:
            undo: collects the way back, also when this raises.

        Returns:
            What the user should be warned of.
        """
        warnings_ = []
        for root in self._roots if self._plans else ():
            replaced, texts = own_configs(root, "context", undo)
            warnings_ += texts
            for plan in self._plans:
                plan.part.config = replaced.get(id(plan.part.config), plan.part.config)
        for plan in self._plans:
            grown = plan.apply(undo)
            if grown is not None:
                self._grown.append(grown)
        for root in self._roots if self._plans else ():
            generation = getattr(root, "generation_config", None)
            if generation is not None and generation.max_length == self.report.before:
                set_attribute(generation, "max_length", self._max_length, undo)
        if self._tokenizer is not None:
            set_attribute(self._tokenizer, "model_max_length", self._max_length, undo)
        self._roots, self._plans = [], []
        return warnings_

    def check_undo(self) -> None:
        """Whether the extension can be undone.

        Raises:
            ContextExtensionError: it cannot, and why.
        """
        for table in self._grown:  # frequencies are not trained: their way back is always open
            table.check_undo()


def plan_extension(
    model: nn.Module,
    max_length: int,
    *,
    rope: str | dict[str, Any] = "auto",
    positions: str = "auto",
    tokenizer: Any = None,
) -> Extension:
    """Validate and compute everything of `extend_context`, and touch nothing.

    Raises:
        ContextExtensionError: as `extend_context`.
    """
    _check_arguments(max_length, rope, positions)
    settings = Settings(max_length, rope, positions)
    roots = pretrained_roots(model)
    if not roots:
        raise ContextExtensionError(
            f"{type(model).__name__} is not a transformers model and holds none; extend_context "
            "takes a PreTrainedModel, a PeftModel, or a module around one."
        )
    _refuse_held(model)
    parts = [part for root in roots for part in _parts(root, settings)]
    for part in parts:
        if all(other.length >= max_length for other in parts):
            refuse_shrinking(part.where, part.length, max_length)
    plans = [part.plan(settings) for part in parts if not _is_there(part, settings)]
    untouched = [
        Change(p.where, _kind(p), "none", "", p.length, p.length, p.length)
        for p in parts
        if _is_there(p, settings)
    ]
    if tokenizer is not None:
        tokenizer = tokenizer_of(tokenizer)
        for root in roots:
            check_tokenizer(tokenizer, root)
    changes = [plan.change for plan in plans] + untouched
    return Extension(roots, plans, settings, changes, tokenizer)


def _check_arguments(max_length: Any, rope: Any, positions: Any) -> None:
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length <= 0:
        raise ContextExtensionError(
            f"max_length={max_length!r}; it has to be a positive integer, in tokens."
        )
    allowed: tuple[str, ...] = ("auto", *scaling.METHODS)
    if not isinstance(rope, dict) and rope not in allowed:
        raise ContextExtensionError(
            f"rope={rope!r}; allowed are {', '.join(map(repr, allowed))}, or a rope_parameters "
            "dict."
        )
    allowed = ("auto", *tables.METHODS)
    if positions not in allowed:
        raise ContextExtensionError(
            f"positions={positions!r}; allowed are {', '.join(map(repr, allowed))}."
        )


def _refuse_held(model: nn.Module) -> None:
    held = [f"{where} is {what}" for where, what in compiled_or_sharded(model)][:1]
    name = type(model).__name__
    held += [f"{name} is held by {holder}" for holder in holders(model)]
    if name in ("DistributedDataParallel", "DataParallel"):
        held.append(f"{name} is around the model")
    for path, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            held.append(f"{path} is a shard ({type(parameter.data).__name__})")
            break
    if held:
        raise ContextExtensionError(
            f"{'; '.join(held)}. Extend the model first; then compile, shard, wrap it or make its "
            "optimizer."
        )


def _parts(root: PreTrainedModel, settings: Settings) -> list[Part]:
    name = type(root).__name__
    learned, rotary = table_parts(root), rope_parts(root)
    if not learned and not rotary:
        raise ContextExtensionError(f"{name} {_why_nothing(root)}.")
    if settings.rope != "auto" and not rotary:
        raise ContextExtensionError(
            f"rope={settings.rope!r}: {name} has learned positions, not RoPE; allowed is positions="
            f"{', '.join(map(repr, tables.METHODS))}."
        )
    if settings.positions != "auto" and not learned:
        raise ContextExtensionError(
            f"positions={settings.positions!r}: {name} has RoPE, not learned positions; allowed is "
            f"rope={', '.join(map(repr, scaling.METHODS))}, or a rope_parameters dict."
        )
    return [*learned, *rotary]


def _why_nothing(root: PreTrainedModel) -> str:
    configs = (root.config, root.config.get_text_config())
    model_types = {getattr(config, "model_type", "") for config in configs}
    for what, members in UNBOUNDED.items():
        if model_types & set(members):
            return (
                f"has {what}: no table and no frequencies set a maximum, so there is nothing to "
                "extend"
            )
    if getattr(root.config, "alibi", False):
        return "has ALiBi: no table sets a maximum, so there is nothing to extend"
    return (
        f"(model_type {root.config.model_type!r}) has neither a position table that the families "
        "know nor rotary embeddings made from rope_parameters; nothing to extend"
    )


def _kind(part: Part) -> str:
    return "RoPE" if isinstance(part, RopePart) else "learned positions"


def _is_there(part: Part, settings: Settings) -> bool:
    """Whether a part takes what is asked for already."""
    if part.length != settings.max_length or isinstance(part, TablePart):
        return part.length >= settings.max_length
    assert isinstance(part, RopePart)
    return settings.rope in ("auto", part.method)


def _report(
    roots: list[PreTrainedModel], changes: list[Change], settings: Settings, tokenizer: Any
) -> ContextReport:
    before = min(change.before for change in changes)
    rows = tuple(
        ContextRow(**{**asdict(c), "details": tuple(c.details), "notes": tuple(c.notes)})
        for c in changes
    )
    notes = []
    if tokenizer is not None:
        old = tokenizer.model_max_length
        notes.append(f"tokenizer.model_max_length {old} -> {settings.max_length}")
    return ContextReport(
        model=", ".join(type(root).__name__ for root in roots),
        before=before,
        after=settings.max_length,
        parts=rows,
        notes=tuple(notes),
    )
