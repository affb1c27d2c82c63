"""Which attention modules of a model get which pattern; as settings, and as text for a report."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import masks
from ..errors import MaskError
from ..masks.pattern import Pattern
from ..masks.text import parse
from .living import undo_on
from .sparse import PATTERN_ATTRIBUTE
from .survey import AttentionModule

_CROSS = ("cross", "encoder_attn", "EncDecAttention", "encoder_decoder")


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether the keys are another sequence's, whose positions a pattern says nothing about."""
    if getattr(module, "is_cross_attention", False):
        return True
    return any(part.lower() in f"{name}.{type(module).__name__}".lower() for part in _CROSS)


@dataclass(frozen=True)
class Assigned:
    """A self-attention module and the pattern it is to have.

    Attributes:
        name: path below the model.
        layer: its layer's index.
        pattern: None for none.
    """

    name: str
    layer: int
    pattern: Pattern | None


def assign(root: PreTrainedModel, modules: list[AttentionModule], mask: Any) -> list[Assigned]:
    """Patterns for the self-attention modules of the model's text part (or only part).

    Args:
        root: the model.
        modules: its survey.
        mask: a pattern; a callable from a layer's index to one or None; or what `as_settings`
            wrote.

    Raises:
        MaskError: it is none of these, or a pattern does not fit a module's heads.
    """
    text_config = root.config.get_text_config()
    found: list[Assigned] = []
    for entry in modules:
        if entry.status != "served" or is_cross(entry.name, entry.module):
            continue
        if type(entry.config) is not type(text_config):
            continue  # the part of a model that sees or hears
        layer = getattr(entry.module, "layer_idx", None)
        layer = layer if isinstance(layer, int) else len(found)
        pattern = _of_layer(mask, layer)
        if pattern is not None and not isinstance(pattern, Pattern):
            raise MaskError(
                f"mask gave {type(pattern).__name__} for layer {layer} ({entry.name}); it has to "
                "be a pattern of hf_flash_patch.masks, or None."
            )
        heads = heads_of(entry.module)
        if heads is not None and pattern is not None:
            pattern.heads(heads)
        found.append(Assigned(entry.name, layer, pattern))
    return found


def _of_layer(mask: Any, layer: int) -> Any:
    if isinstance(mask, Pattern):
        return mask
    if isinstance(mask, str):
        return parse(mask)
    # Of JSON; a user's with layers as numbers would be looked up in vain.
    if isinstance(mask, dict) and all(isinstance(x, str) for pair in mask.items() for x in pair):
        text = mask.get(str(layer))
        return None if text is None else parse(text)
    if callable(mask):
        name = getattr(mask, "__name__", "")
        if getattr(masks, name, None) is mask:
            raise MaskError(f"mask is {name} itself, which makes patterns; call it: {name}(...).")
        return mask(layer)
    raise MaskError(
        f"mask is of type {type(mask).__name__}; it has to be a pattern of hf_flash_patch.masks, "
        "or a callable from a layer's index to a pattern or None."
    )


def heads_of(module: nn.Module) -> int | None:
    """Query heads of an attention module, as far as it says."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    return None


def as_settings(assigned: list[Assigned]) -> str | dict[str, str]:
    """The patterns as JSON: one expression for all, or one a layer's index.

    Raises:
        MaskError: a pattern is code, which no text can keep.
    """
    texts = {
        str(module.layer): str(module.pattern) for module in assigned if module.pattern is not None
    }
    alike = len({module.pattern for module in assigned}) == 1
    return next(iter(texts.values())) if alike and texts else texts


def describe(assigned: list[Assigned]) -> str:
    """What the patterns are, for a report."""
    layers: dict[str, list[int]] = {}
    for module in assigned:
        text = "none of its own" if module.pattern is None else _short(module.pattern)
        layers.setdefault(text, []).append(module.layer)
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(
        f"layers {', '.join(map(str, sorted(set(numbers))))}: {text}"
        for text, numbers in layers.items()
    )


def _short(pattern: Pattern) -> str:
    try:
        text = str(pattern)
    except MaskError:
        return f"{type(pattern).__name__} (code)"
    return text if len(text) <= 120 else f"{text[:117]}..."


def set_patterns(
    root: PreTrainedModel,
    modules: list[AttentionModule],
    assigned: list[Assigned],
    undo: contextlib.ExitStack,
) -> None:
    """Give each module its pattern, None to those that are not `assigned`, where any is; `undo`
    collects the way back."""
    if not assigned:
        return
    patterns = {entry.name: entry.pattern for entry in assigned}
    for entry in modules:
        module = root.get_submodule(entry.name)
        before = {key: vars(module)[key] for key in (PATTERN_ATTRIBUTE,) if key in vars(module)}
        undo_on(undo, module, _put_back, before)
        setattr(module, PATTERN_ATTRIBUTE, patterns.get(entry.name))


def _put_back(module: nn.Module, before: dict[str, Pattern | None]) -> None:
    """What the module had: nothing, or, in a copy of a patched model, the original's pattern."""
    vars(module).pop(PATTERN_ATTRIBUTE, None)
    vars(module).update(before)
