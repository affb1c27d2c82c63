"""Config objects: shared ones, which transformers never copies, and its warnings about them."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .living import living
from .survey import configs_of

CONTEXT_RECORD = "context"  # key in config.hfp of what an extension of the context did


class Stored(dict):
    """What stands in config.hfp: a dict, but a process that unpickles a patched model imports this
    package by it, which registers the attention that the config names."""


def own_configs(
    root: PreTrainedModel, keeps: str, undo: contextlib.ExitStack
) -> tuple[dict[int, Any], list[str]]:
    """Give `root` configs of its own, if another living model uses one of them.

    Args:
        root: the model.
        keeps: what the other model keeps thereby, for the warning.
        undo: collects the way back.

    Returns:
        id of a shared config -> the copy that replaced it, and what to warn the user of.
    """
    owners = _other_owners(root)
    if owners:
        gc.collect()  # a model in a reference cycle that nobody can reach owns nothing
        owners = _other_owners(root)
    if not owners:
        return {}, []
    warning = (
        f"{type(root).__name__} shared its config object with {', '.join(owners)}; it has a "
        f"copy of its own now, so that the other model keeps its {keeps}. restore() gives "
        "the shared one back."
    )
    return _give_own_configs(root, undo), [warning]


def _other_owners(root: PreTrainedModel) -> list[str]:
    """Class names of living models, neither in nor around `root`, that use one of its configs."""
    configs = set(map(id, configs_of(root)))
    mine = set(map(id, root.modules()))
    names = []
    for candidate in living(PreTrainedModel):
        if id(candidate) in mine:
            continue
        if id(vars(candidate).get("config")) not in configs:
            continue
        if not any(id(module) in mine for module in candidate.modules()):
            names.append(type(candidate).__name__)
    return names


def _give_own_configs(root: PreTrainedModel, undo: contextlib.ExitStack) -> dict[int, Any]:
    """Replace every config object in `root` by a copy, nested ones consistently."""
    memo: dict[int, Any] = {}
    replacements = {id(config): copy.deepcopy(config, memo) for config in configs_of(root)}
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacements:
                undo.callback(_put_back, weakref.ref(module), name, value)
                vars(module)[name] = replacements[id(value)]
    return replacements


def _put_back(reference: weakref.ref[nn.Module], name: str, value: Any) -> None:
    module = reference()
    if module is not None:
        vars(module)[name] = value


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings about what is verified here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
