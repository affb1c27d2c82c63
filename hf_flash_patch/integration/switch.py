"""Switches a model's attention modules to ours, config by config, and back."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .configs import CONTEXT_RECORD, Stored, own_configs, quiet_transformers
from .registry import ATTENTION_NAME
from .survey import AttentionModule, calls_us, configs_of


def switch(
    root: PreTrainedModel,
    modules: list[AttentionModule],
    settings: dict[str, Any],
    undo: contextlib.ExitStack,
) -> list[str]:
    """Make the served modules of `root` call us, and verify that they do.

    Args:
        root: the model.
        modules: its survey.
        settings: what to store in the configs as `hfp` (JSON).
        undo: collects the way back, also when this raises.

    Returns:
        What the user should be warned of.

    Raises:
        UnsupportedModelError: a module would not call us in spite of its config.
    """
    _, warnings = own_configs(root, "attention", undo)

    # From here on the modules' configs are the final ones.
    states = {id(config): (config, dict(vars(config))) for config in configs_of(root)}
    for config, state in states.values():
        undo.callback(_set_state, config, state)
    foreign = {id(module.config) for module in modules if module.status == "unsupported"}
    served = [module for module in modules if module.status == "served"]
    if served:
        with quiet_transformers():
            root.set_attn_implementation(ATTENTION_NAME)
    for key, (config, state) in states.items():
        # transformers' own marker, which it leaves behind on nested configs.
        vars(config).pop("_attn_was_changed", None)
        if key in foreign:
            _set_state(config, state)
    for module in served:
        # set_attn_implementation misses configs that a model copied for a part of itself, such as
        # T5's encoder.
        if module.implementation != ATTENTION_NAME:
            module.config._attn_implementation_internal = ATTENTION_NAME
    for config in (root.config, *(module.config for module in served)):
        config.hfp = Stored({**settings, **_record(config)})
    for module in served:
        if not calls_us(module.module):
            raise UnsupportedModelError(
                f"{type(root).__name__}: {module.name} ({module.class_name}) does not call the "
                "attention that was set; the model is as it was."
            )
    return warnings


def _set_state(config: PreTrainedConfig, state: dict[str, Any]) -> None:
    """Put back what a switch may change in a config, and nothing else."""
    for name in ("_attn_implementation_internal", "_attn_was_changed"):
        if name in state:
            vars(config)[name] = state[name]
        else:
            vars(config).pop(name, None)
    record, before = _record(config), state.get("hfp")
    vars(config).pop("hfp", None)
    if before is not None or record:
        others = {k: v for k, v in (before or {}).items() if k != CONTEXT_RECORD}
        vars(config)["hfp"] = {**others, **record}


def _record(config: PreTrainedConfig) -> dict[str, Any]:
    """What an extension of the context keeps in `hfp`: its to write, and to take back."""
    settings = getattr(config, "hfp", None) or {}
    return {k: v for k, v in settings.items() if k == CONTEXT_RECORD}
