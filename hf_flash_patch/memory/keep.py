"""Checkpoints that keep what attention gave, so that a recomputation need not run it again.

A layer's output of attention is as large as its hidden states, and lse is small beside it; with
long sequences making them again is most of what a recomputation costs.

Source: Li et al., DistFlashAttn (arXiv 2310.03294), which checkpoints so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..integration.survey import calls_us, survey
from ..ops.keeper import Results, current, keeping
from .technique import Technique, changing

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_SETTER = "_set_gradient_checkpointing"


def keep_attention(model: nn.Module) -> Technique:
    """Let checkpoints of layers keep attention's out and lse, on the device.

    For transformers' gradient checkpointing, of both kinds (use_reentrant), switched on before or
    after, by the Trainer for example. A checkpointed layer then holds, beside its input, tokens x
    num_heads x (head_dim x bytes of an element + 4) bytes; loss and gradients stay the same bits.
    Kept is what this package's engines compute, rings included; what PyTorch's attention does for
    them (fp32 and CPU, no mask but causal) is computed again. Compiled models run checkpointed
    layers uncompiled.

    Args:
        model: a patched model of transformers, a PeftModel, or a module around one.

    Raises:
        UnsupportedModelError: it has no gradient checkpointing or no attention of ours, is compiled
            or sharded, or is checkpointed by `offload_checkpoints`, which has an option for this.
    """
    other = {"offload_checkpoints": "it keeps attention's results with keep_attention=True"}
    with changing(model, "keep_attention", instead=other) as (root, changes):
        if not root.supports_gradient_checkpointing:
            raise UnsupportedModelError(
                f"{type(root).__name__} has no gradient checkpointing, which keep_attention builds "
                "on."
            )
        count = kept_modules(root)
        for module in root.modules():
            if isinstance(module, PreTrainedModel):
                changes.replace(module, _SETTER, _set_checkpointing)
        changes.undo.callback(_unwrap, root)
        _wrap(root)
    text = f"results of {count} attention modules, where checkpoints would compute them again"
    return Technique("keep_attention", text, changes)


def kept_modules(root: PreTrainedModel) -> int:
    """How many attention modules give results that can be kept.

    Raises:
        UnsupportedModelError: none does.
    """
    ours = [found for found in survey(root) if found.status == "served" and calls_us(found.module)]
    name = type(root).__name__
    if not ours:
        raise UnsupportedModelError(
            f"{name} has no attention of this package, whose results could be kept; call "
            "hf_flash_patch.patch(model) before."
        )
    if all((getattr(x.config, "hfp", None) or {}).get("backend") == "flash_attn" for x in ours):
        raise UnsupportedModelError(
            f'{name} is patched with backend="flash_attn", whose results cannot be kept; patch it '
            'with backend="auto", or leave keep_attention out.'
        )
    return len(ours)


def _set_checkpointing(module: Any, *args: Any, **kwargs: Any) -> None:
    getattr(type(module), _SETTER)(module, *args, **kwargs)
    _wrap(module)


def _wrap(root: nn.Module) -> None:
    for module in root.modules():
        function = vars(module).get(_FUNCTION)
        if function is not None and not isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, _Checkpoint(function))


def _unwrap(root: nn.Module) -> None:
    for module in root.modules():
        function = vars(module).get(_FUNCTION)
        if isinstance(function, _Checkpoint):
            setattr(module, _FUNCTION, function.inner)


class _Checkpoint:
    """A checkpointing function around another.

    Attributes:
        inner: the other.
    """

    def __init__(self, inner: Callable[..., Any]):
        self.inner = inner

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # else there will be no backward
            function = Kept(function)
        return self.inner(function, *args, **kwargs)


class Stored(Protocol):
    """A tensor that is kept somewhere."""

    def fetch(self) -> None:
        """Begin to bring it back."""

    def get(self) -> Tensor:
        """It, on its device."""


class OnDevice:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._version = tensor, tensor._version

    def fetch(self) -> None:
        """Nothing to do."""

    def get(self) -> Tensor:
        """The tensor; whoever gets it may give it a graph.

        Raises:
            UnsupportedModelError: the model wrote over it.
        """
        if self._tensor._version != self._version:
            raise UnsupportedModelError(
                "the model changes attention's output in place, and keep_attention has no copy of "
                "it. Leave keep_attention out."
            )
        return self._tensor.detach()


class Kept:
    """A function to be checkpointed: its first run keeps attention's results, others take them.

    One such object is one call of the checkpoint, however those of several batches interleave; what
    it keeps lives as long as the checkpoint does.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        store: Callable[[Tensor], Stored] = OnDevice,
        before: Kept | None = None,
    ):
        """
        Args:
            function: what is checkpointed.
            store: of one tensor without a graph.
            before: of the checkpoint before, which a backward wants after this one.
        """
        self._function, self._store = function, store
        self._before = None if before is None else weakref.ref(before)
        self._calls: list[_Call] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        run: _FirstRun | _Rerun
        if self._calls is None:
            self._calls = []
            run = _FirstRun(self._calls, self._store, current())
        else:
            self.fetch()
            run = _Rerun(self._calls, None if self._before is None else self._before())
        with keeping(run):
            return self._function(*args, **kwargs)

    def fetch(self) -> None:
        """Begin to bring back what is kept."""
        for call in self._calls or ():
            call.fetch()


class _Call:
    """A call of attention, and what it gave."""

    def __init__(self, call: Hashable, results: Results, store: Callable[[Tensor], Stored]):
        self.call = call
        self._stored = [None if x is None else store(x.detach()) for x in results]

    def fetch(self) -> None:
        for stored in self._stored:
            if stored is not None:
                stored.fetch()

    def get(self) -> Results:
        return tuple(None if stored is None else stored.get() for stored in self._stored)


class _FirstRun:
    """Keeps. Inside another checkpoint's run, that one is asked, and nothing is kept twice."""

    def __init__(self, calls: list[_Call], store: Callable[[Tensor], Stored], outer: Any):
        self._calls, self._store = calls, store
        self._outer = outer if isinstance(outer, (_FirstRun, _Rerun)) else None

    def __call__(self, call: Hashable, compute: Callable[[], Results]) -> Results:
        return self.find(call, compute)[1]

    def find(self, call: Hashable, compute: Callable[[], Results]) -> tuple[_Call, Results]:
        if self._outer is not None:
            found, results = self._outer.find(call, compute)
        else:
            results = compute()
            found = _Call(call, results, self._store)
        self._calls.append(found)
        return found, results


class _Rerun:
    """Gives what was kept, in its order."""

    def __init__(self, calls: list[_Call], before: Kept | None):
        self._calls, self._before, self._done = calls, before, 0

    def __call__(self, call: Hashable, compute: Callable[[], Results]) -> Results:
        return self.find(call, compute)[1]

    def find(self, call: Hashable, compute: Callable[[], Results]) -> tuple[_Call, Results]:
        found = self._calls[self._done] if self._done < len(self._calls) else None
        if found is None or found.call != call:
            first = "made no further one" if found is None else f"was {found.call}"
            raise UnsupportedModelError(
                f"call {self._done + 1} of attention in a recomputation is {call}; the forward "
                f"{first}. keep_attention takes functions that do the same in both; leave it out."
            )
        self._done += 1
        results = found.get()
        if self._before is not None:
            self._before.fetch()
        return found, results
