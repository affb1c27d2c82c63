"""The handle of a memory technique, and what the techniques share: finding, replacing, undoing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..integration.survey import pretrained_roots
from ..integration.wrappers import compiled_or_sharded

# Model -> names of the techniques on it. Weak: a technique must not keep a model alive.
_applied: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Changes:
    """What a technique has changed in a model, and the way back."""

    def __init__(self) -> None:
        self.undo = contextlib.ExitStack()
        self._replaced: list[tuple[nn.Module, str, partial]] = []

    def replace(self, owner: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Make `method` the method `name` of this one object; a copy has it as its own.

        Args:
            owner: the object.
            name: of its method.
            method: takes the object first; a function of a module, or a partial of one, so that it
                can be pickled.

        Raises:
            UnsupportedModelError: the object has a replacement already.
        """
        if name in vars(owner):
            raise UnsupportedModelError(
                f"{type(owner).__name__}.{name} has been replaced by something else (accelerate's "
                "hooks do so); apply memory techniques before that."
            )
        # No bound method: copies would share what its function holds, and pickles would lose it.
        replacement = partial(method, owner)
        setattr(owner, name, replacement)
        self._replaced.append((owner, name, replacement))

    def refuse_replicas(self, root: nn.Module, name: str) -> None:
        """Let no replica that nn.DataParallel makes of a model run: what `replace` put into it
        computes with the original's parameters, on their device.

        Args:
            root: the model.
            name: of the technique.
        """
        hook = root.register_forward_pre_hook(partial(_refuse_replica, name))
        self.undo.callback(hook.remove)

    def revert(self) -> None:
        """Undo everything.

        Raises:
            UnsupportedModelError: something else replaced the same method since; nothing is undone.
        """
        for owner, name, replacement in self._replaced:
            if vars(owner).get(name) is not replacement:
                raise UnsupportedModelError(
                    f"{type(owner).__name__}.{name} has been replaced by something else since; "
                    "undo that first."
                )
        for owner, name, _ in self._replaced:
            delattr(owner, name)
        self._replaced.clear()
        self.undo.close()


def _refuse_replica(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if getattr(module, "_is_replica", False):
        raise UnsupportedModelError(
            f"{type(module).__name__} has {name} and runs in nn.DataParallel, as Trainer has it "
            "where one process sees several GPUs. Start a process for each (torchrun, accelerate "
            "launch), let it see one (CUDA_VISIBLE_DEVICES), or restore() the technique."
        )


class Technique:
    """A memory technique on a model; made by the functions of `hf_flash_patch.memory`.

    Attributes:
        name: of the function that made it.
        text: what it does, to how many modules.
    """

    def __init__(self, name: str, text: str, changes: Changes):
        self.name, self.text, self._changes = name, text, changes

    def restore(self) -> None:
        """Give the model its exact prior state back. A second call does nothing.

        Raises:
            UnsupportedModelError: something else replaced the same method since; nothing is undone.
        """
        self._changes.revert()

    def __enter__(self) -> Technique:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"

    def __repr__(self) -> str:
        return f"Technique({self})"


@contextlib.contextmanager
def changing(
    model: nn.Module, name: str, *, instead: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[PreTrainedModel, Changes]]:
    """The transformers model in `model`, and a record of what is changed; an error reverts it.

    Args:
        model: a PreTrainedModel, a PeftModel, or any module around one.
        name: of the technique.
        instead: techniques that it does not go with, and what to do.

    Raises:
        UnsupportedModelError: it holds none or several, is compiled or sharded, or has the
            technique or one that it does not go with.
    """
    roots = pretrained_roots(model)
    if len(roots) != 1:
        raise UnsupportedModelError(
            f"{name} takes one transformers model, a PeftModel, or a module around one; "
            f"{type(model).__name__} holds {len(roots)}."
        )
    for where, what in compiled_or_sharded(model):
        raise UnsupportedModelError(f"{where} is {what}; apply {name} before that.")
    names = _applied.setdefault(roots[0], set())
    if name in names:
        raise UnsupportedModelError(
            f"{type(roots[0]).__name__} has {name} already; restore() that first."
        )
    for other in names & instead.keys():
        raise UnsupportedModelError(
            f"{type(roots[0]).__name__} has {other}, and not {name} beside it: {instead[other]}."
        )
    changes = Changes()
    try:
        yield roots[0], changes
    except BaseException:
        changes.revert()
        raise
    names.add(name)
    changes.undo.callback(names.discard, name)
