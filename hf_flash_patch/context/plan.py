"""What the parts of an extension share.

A part (`TablePart`, `RopePart`) is one thing that limits the context. Its plan(settings) validates
and computes everything and touches nothing; the plan's apply(undo) changes the model. What that
leaves behind refers to the model weakly: a patch must not keep it alive.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import ContextExtensionError
from ..integration.configs import CONTEXT_RECORD
from ..integration.living import undo_on
from ..integration.survey import configs_of


@dataclass(frozen=True)
class Settings:
    """The arguments of an extension.

    Attributes:
        max_length: tokens to reach.
        rope: how RoPE models get there.
        positions: how learned position tables get there.
    """

    max_length: int
    rope: str | dict[str, Any]
    positions: str


@dataclass
class Change:
    """What happened to one position table or to the frequencies of one config.

    Attributes:
        where: path below the model.
        kind: "learned positions" or "RoPE".
        method: as in `extend_context`; "none" if nothing was to do.
        why: why "auto" took it; empty if it was asked for.
        before, after: maximum in tokens.
        exact_up_to: tokens up to which the model computes bit for bit what it did.
        details: what else changed, in words.
        notes: what the user should know.
    """

    where: str
    kind: str
    method: str
    why: str
    before: int
    after: int
    exact_up_to: int
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def record_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What an earlier extension wrote into a config; empty if there was none."""
    return (getattr(config, "hfp", None) or {}).get(CONTEXT_RECORD, {})


def set_record(
    config: PreTrainedConfig, record: dict[str, Any], undo: contextlib.ExitStack
) -> None:
    """Write what was done into a config, where later extensions find it."""
    undo_on(undo, config, _put_record, record_of(config))
    _put_record(config, record)


def _put_record(config: Any, record: dict[str, Any]) -> None:
    settings = {
        k: v for k, v in (getattr(config, "hfp", None) or {}).items() if k != CONTEXT_RECORD
    }
    if record:
        settings[CONTEXT_RECORD] = record
    if settings:
        config.hfp = settings
    else:
        vars(config).pop("hfp", None)


def copies_of(root: nn.Module, config: Any, *names: str) -> list[Any]:
    """`config` and its copies in `root`: composite models keep one to save and one to compute by.

    Args:
        root: the model.
        config: what a part of it reads.
        names: attributes that a copy has in common with it.
    """

    def key(other: Any) -> list[Any]:
        return [other.model_type, *(getattr(other, name, None) for name in names)]

    wanted = key(config)
    return [other for other in configs_of(root) if other is config or key(other) == wanted]


def set_attribute(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute of a config, tokenizer or module."""
    undo_on(undo, owner, setattr, name, getattr(owner, name))
    setattr(owner, name, value)


def set_buffer(module: nn.Module, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set a buffer and leave it as persistent, or not, as it was."""
    undo_on(undo, module, _put_buffer, name, module._buffers[name])
    _put_buffer(module, name, value)


def _put_buffer(module: nn.Module, name: str, value: Any) -> None:
    module._buffers[name] = value


def refuse_shrinking(where: str, length: int, max_length: int) -> None:
    """Raises:
    ContextExtensionError: `max_length` is below `length`.
    """
    if max_length < length:
        raise ContextExtensionError(
            f"max_length={max_length} is below the {length} tokens that {where} takes already; "
            f"an extension never shrinks. Allowed are {length} (nothing to do) and more."
        )
