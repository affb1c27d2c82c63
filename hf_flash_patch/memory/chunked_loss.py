"""A model's own loss, with logits that are never whole: the output layer hands over a promise."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .linear_loss import CHUNK, Step, linear_cross_entropy, uses_liger
from .technique import Technique, changing


def chunked_loss(model: nn.Module, *, chunk: int = CHUNK, backend: str = "auto") -> Technique:
    """Compute the loss of a language model chunk by chunk, wherever it is called with labels.

    Memory for the logits and their gradient no longer grows with the sequence. The model's own
    code runs: what it does to the logits (scaling, caps) is kept, and if it, or someone with the
    output's `logits`, does more with them than take the cross-entropy, they are computed whole,
    with a warning where that costs a gradient's memory.

    Args:
        model: a decoder or encoder with a language modelling head, a PeftModel, or a module around
            one.
        chunk: tokens at a time.
        backend: as in `linear_cross_entropy`.

    Raises:
        UnsupportedModelError: there is no linear output layer, it has adapters, or the model is
            compiled or sharded.
        UnsupportedKernelError: the backend is unknown or not installed.
    """
    uses_liger(backend, torch.device("cuda"))  # raises now if it never could
    with changing(model, "chunked_loss") as (root, changes):
        heads = _heads(root)
        changes.refuse_replicas(root, "chunked_loss")
        asked = _Asked(list(inspect.signature(root.forward).parameters))
        options = {"chunk": chunk, "backend": backend}
        for head in heads:
            changes.replace(head, "forward", partial(_promise, asked, options))
        before = root.register_forward_pre_hook(asked.enter, with_kwargs=True)
        after = root.register_forward_hook(asked.leave, always_call=True)
        changes.undo.callback(before.remove)
        changes.undo.callback(after.remove)
    text = f"cross-entropy of {heads[0].out_features} words, {chunk} tokens at a time"
    return Technique("chunked_loss", text, changes)


def _heads(root: Any) -> list[nn.Linear]:
    """The linear layers that make the logits; peft keeps copies of one that it trains."""
    name = type(root).__name__
    with contextlib.suppress(NotImplementedError):
        head = root.get_output_embeddings()
        if hasattr(head, "base_layer"):
            raise UnsupportedModelError(
                f"{name}'s output layer has adapters; chunked_loss takes a linear layer alone. "
                "Leave it out of target_modules; modules_to_save may have it."
            )
        copies = getattr(head, "modules_to_save", None)
        heads = [head] if copies is None else [head.original_module, *copies.values()]
        if all(isinstance(head, nn.Linear) for head in heads):
            return heads
    raise UnsupportedModelError(
        f"{name} has no linear output layer that makes logits; chunked_loss takes models with a "
        "language modelling head, such as AutoModelForCausalLM and AutoModelForMaskedLM."
    )


class _Asked:
    """Whether the call that runs asked for a loss, and whether it got a promise of logits."""

    def __init__(self, arguments: list[str]):
        """
        Args:
            arguments: names of what the model takes by position.
        """
        self._arguments = arguments
        self.inside = self.loss = self.promised = self._warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Asked:
        return self  # peft copies an output layer alone; the model's hooks go on telling this

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        self.loss = any(given.get(name) is not None for name in ("labels", "shift_labels"))
        self.inside, self.promised = True, False

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        # None: it raised.
        if self.loss and not self.promised and output is not None:
            warnings.warn(
                f"chunked_loss has no effect on {type(module).__name__}: the output layer that it "
                "was applied to did not run (resize_token_embeddings makes another). restore() it "
                "and apply it again.",
                stacklevel=2,
            )
        self.inside = self.loss = False

    def warn_outside(self) -> None:
        """Says once that the output layer runs, to learn from, where nothing tells of labels."""
        if self.inside or self._warned or not torch.is_grad_enabled():
            return
        self._warned = True
        warnings.warn(
            "chunked_loss has no effect where model.forward(...) is called directly, which runs no "
            "hooks of the model: so do peft before 0.21, and AdaLoRA and adaption prompts of later "
            "ones. Call the model itself.",
            stacklevel=3,
        )


def _promise(asked: _Asked, options: dict[str, Any], head: nn.Linear, hidden: Tensor) -> Tensor:
    """The output layer's forward."""
    if not asked.loss:
        asked.warn_outside()
        return type(head).forward(head, hidden)
    asked.promised = True
    return LazyLogits.of(hidden, head, len(head.weight), (), options)


class LazyLogits(Tensor):
    """Logits that are not there yet: (..., vocab_size), from hidden states and an output layer.

    Cross-entropy takes them in chunks. Steps that change each element by itself, and the shape
    before the last dimension, leave them as they are; anything else computes them.
    """

    _hidden: Tensor  # (..., hidden_size)
    _head: nn.Linear
    _steps: tuple[Step, ...]
    _options: dict[str, Any]

    @staticmethod
    @torch.compiler.disable
    def of(
        hidden: Tensor,
        head: nn.Linear,
        vocab_size: int,
        steps: tuple[Step, ...],
        options: dict[str, Any],
    ) -> LazyLogits:
        """Logits of hidden states (..., hidden_size), to be put through steps."""
        device = hidden.device
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        outline = _through(steps, torch.empty(0, dtype=dtype, device=device))
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits,
            (*hidden.shape[:-1], vocab_size),
            dtype=outline.dtype,
            device=outline.device,
        )
        made._hidden, made._head = hidden, head
        made._steps, made._options = steps, options
        return made

    # Not traced: a graph for any length would take what one function does for another's.
    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cross-entropy in chunks, lazy where it can be, else computed."""
        kwargs = {} if kwargs is None else kwargs
        logits = args[0] if args else None
        if _is_metadata(function):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(logits, LazyLogits):
                if function is F.cross_entropy and logits._reduces(*args[1:], **kwargs):
                    return logits._cross_entropy(*args[1:], **kwargs)
                if function in _ELEMENTWISE and not _has_tensors(args[1:], kwargs):
                    return logits._then(partial(_call, function, args[1:], kwargs), function)
                if function in _SHAPES:
                    shape = tuple(function(_outline(logits), *args[1:], **kwargs).shape)
                    if shape[-1:] == logits.shape[-1:]:
                        hidden = logits._hidden
                        return logits._over(hidden.reshape(*shape[:-1], hidden.shape[-1]))
                if function is Tensor.detach and hasattr(logits._head.weight, "ds_id"):
                    return logits._over(logits._hidden)  # ZeRO-3 does so to what a module returns
                if function is Tensor.__getitem__ and _spares_last(args[1], logits.ndim):
                    return logits._over(logits._hidden[args[1]])
            name = getattr(function, "__name__", str(function))
            if name in ("__setitem__", "copy_") or (name.endswith("_") and name[-2] != "_"):
                raise UnsupportedModelError(
                    f"{name} would change logits in place, which chunked_loss never makes whole; "
                    "restore() it for this model."
                )
            if torch.is_grad_enabled():
                shape = tuple(next(_lazy((args, kwargs))).shape)
                warnings.warn(
                    f"{name} needs all logits: {shape} are computed, in spite of chunked_loss.",
                    stacklevel=2,
                )
            args, kwargs = _map(_computed, args), _map(_computed, kwargs)
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what comes from below Python: there is no storage, so the logits are computed."""
        return function(*_map(_computed, args), **_map(_computed, kwargs or {}))

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({tuple(self.shape)}, {self.dtype})"

    def _over(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits.of(hidden, self._head, self.shape[-1], self._steps, self._options)

    def _then(self, step: Step, function: Step) -> LazyLogits:
        # `float` by itself, so that linear_cross_entropy knows it.
        steps = (*self._steps, function if function is Tensor.float else step)
        return LazyLogits.of(self._hidden, self._head, self.shape[-1], steps, self._options)

    def _reduces(self, *args: Any, reduction: str = "mean", **kwargs: Any) -> bool:
        """Whether cross-entropy gives a scalar, of targets that are classes, by keyword."""
        known = {"target", "weight", "ignore_index", "label_smoothing"}
        given = {name for name, value in kwargs.items() if value is not None}
        target = args[0] if args else kwargs.get("target")
        is_plain = len(args) <= 1 and given <= known and self.ndim == 2
        is_class = isinstance(target, Tensor) and not target.is_floating_point()
        return is_plain and is_class and reduction != "none"

    def _cross_entropy(self, target: Tensor, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
        w, b = _weights(self._head)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("size_average", "reduce")}
        kwargs |= {"class_weight": weight, "steps": self._steps}
        return linear_cross_entropy(self._hidden, w, target, b, **kwargs, **self._options)


_ELEMENTWISE = {
    Tensor.float,
    Tensor.to,
    Tensor.contiguous,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.div,
    Tensor.__truediv__,
    Tensor.tanh,
    torch.mul,
    torch.div,
    torch.tanh,
}
_SHAPES = {Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze}
_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__hash__}
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that are tensors


def _is_metadata(function: Any) -> bool:
    attribute = getattr(getattr(function, "__self__", None), "__name__", "")
    return function in _METADATA or (
        getattr(function, "__name__", "") == "__get__" and attribute not in _VALUES
    )


def _call(function: Any, args: tuple, kwargs: dict[str, Any], logits: Tensor) -> Tensor:
    return function(logits, *args, **kwargs)


def _has_tensors(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether there is more than scalars: an element's fate may then depend on its place."""
    values = (*args, *kwargs.values())
    return any(isinstance(value, Tensor) and value.ndim > 0 for value in values)


def _weights(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, after the output layer has run.

    ZeRO-3 has freed them, and gathers them again for whoever takes them from the module. FSDP frees
    those of a module that it shards by itself, and does not.
    """
    weight, bias = head.weight, head.bias
    if type(weight).__name__ == "DTensor" or weight.untyped_storage().nbytes() < weight.nbytes:
        raise UnsupportedModelError(
            "chunked_loss: the output layer is sharded by itself, and its weight is gone before "
            "the loss. Shard it with the whole model, as accelerate's TRANSFORMER_BASED_WRAP does."
        )
    return weight, bias


def _spares_last(index: Any, ndim: int) -> bool:
    """Whether an index of slices, as of logits[:, :-1], takes the last dimension whole."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is ... or isinstance(item, slice) for item in index):
        return False
    return index[-1] == slice(None) or index[-1] is ... or (... not in index and len(index) < ndim)


def _outline(logits: LazyLogits) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device="meta")


def _through(steps: tuple[Step, ...], logits: Tensor) -> Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def _computed(value: Any) -> Any:
    if not isinstance(value, LazyLogits):
        return value
    return _through(value._steps, F.linear(value._hidden, *_weights(value._head)))


def _lazy(values: Any) -> Iterator[LazyLogits]:
    """Those in what a function was called with: cat and stack have them in a list."""
    if isinstance(values, LazyLogits):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _lazy(value)


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_map(function, value) for value in values)
    if isinstance(values, dict):
        return {name: _map(function, value) for name, value in values.items()}
    return function(values)
