"""The loss of a whole batch, of which each process has its tokens' part."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..errors import ParallelError
from ..families import family_of
from ..integration.living import undo_on
from .batch import IGNORED, Batch
from .groups import Groups

_BY_TOKEN = [LOSS_MAPPING[name] for name in ("ForMaskedLM", "ForTokenClassification")]


class Loss:
    """Makes a model's own loss that of all processes' tokens.

    transformers' loss functions take the labels already shifted and the number of tokens that
    count: this hands both to them. A loss that a model computes itself is a mean over tokens.
    """

    def __init__(self, root: PreTrainedModel, groups: Groups):
        self._groups = groups
        self._batch: Batch | None = None
        self._called = False
        family = family_of(root.config)
        self._causal = family is not None and family.causal
        self._name = type(root).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        return self  # it hangs on the model, and holds process groups

    def take_over(self, root: PreTrainedModel, undo: contextlib.ExitStack) -> None:
        """Put this in the place of the model's loss function; `undo` collects the way back."""
        self._function = root.loss_function
        before = vars(root).get("_loss_function")
        vars(root)["_loss_function"] = self._of_part
        undo_on(undo, root, _put_back, before)

    def begin(self, batch: Batch) -> None:
        """A call of the model starts."""
        self._batch, self._called = batch, False

    def finish(self, output: Any) -> Any:
        """The model's output with the loss of the whole batch."""
        batch, self._batch = self._batch, None
        if batch is None or batch.labels is None or output is None:
            return output
        loss = output[0] if isinstance(output, tuple) else output.loss
        if not self._called:
            if self._causal and not batch.scored:
                raise ParallelError(
                    f"{self._name} computes a loss of its own, of neighbours that may be another "
                    "process's; only losses of transformers' loss_function can be shared."
                )
            labels = batch.shift_labels if batch.scored else batch.labels
            assert labels is not None
            items = (labels != IGNORED).sum()
            whole = batch.num_items
            whole = self._groups.reduce(items.clone()) if whole is None else whole
            loss = torch.where(items > 0, loss * (items / whole), 0.0)
        if batch.num_items is None:
            loss = cast(torch.Tensor, _Total.apply(loss, self._groups))
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output

    def _of_part(self, logits: torch.Tensor, labels: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self._batch
        if batch is None:
            return self._function(logits, labels, *args, **kwargs)
        self._called = True
        labels = batch.labels
        if self._function is LOSS_MAPPING["ForCausalLM"]:
            labels = kwargs["shift_labels"] = batch.shift_labels
        elif self._function not in _BY_TOKEN:
            raise ParallelError(f"{self._name} has a loss_function that is not transformers' own.")
        items = batch.num_items
        if items is None:
            assert labels is not None
            items = self._groups.reduce((labels != IGNORED).sum())
        return self._function(logits, labels, *args, **kwargs | {"num_items_in_batch": items})


def _put_back(root: nn.Module, before: Any) -> None:
    vars(root).pop("_loss_function", None)
    if before is not None:
        vars(root)["_loss_function"] = before


class _Total(torch.autograd.Function):
    """The sum over processes. Their gradients are averaged later, so each is scaled up here."""

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, groups: Groups) -> torch.Tensor:
        ctx.size = groups.size
        return groups.reduce(share.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.size, None
