"""Config objects: shared ones, which transformers never copies, and its warnings about them."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .living import living, undo_on
from .survey import configs_of

CONTEXT_RECORD = "context"  # key in config.hfp of what an extension of the context did


@dataclass(eq=False)
class _Loan:
    """Shared configs that a model gets back; there as long as the way back is.

    Attributes:
        root: the model.
        configs: which nobody may change meanwhile.
    """

    root: weakref.ref[PreTrainedModel]
    configs: list[Any]


_loans: weakref.WeakSet[_Loan] = weakref.WeakSet()


class Stored(dict):
    """What stands in config.hfp: a dict, but a process that unpickles a patched model imports this
    package by it, which registers the attention that the config names."""


def own_configs(
    root: PreTrainedModel, keeps: str, undo: contextlib.ExitStack
) -> tuple[dict[int, Any], list[str]]:
    """Give `root` configs of its own, if another living model uses one of them or gets it back.

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
    """Class names of living models, neither in nor around `root`, that use one of its configs, or
    get it back when their patch is undone."""
    configs = set(map(id, configs_of(root)))
    mine = set(map(id, root.modules()))
    names = []
    for loan in _loans:
        other = loan.root()
        if other is not None and id(other) not in mine and configs & set(map(id, loan.configs)):
            names.append(type(other).__name__)
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
    shared = configs_of(root)
    replacements = {id(config): copy.deepcopy(config, memo) for config in shared}
    loan = _Loan(weakref.ref(root), shared)
    _loans.add(loan)
    undo.callback(_loans.discard, loan)
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacements:
                undo_on(undo, module, _set, name, value)
                vars(module)[name] = replacements[id(value)]
    return replacements


def _set(module: nn.Module, name: str, value: Any) -> None:
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
