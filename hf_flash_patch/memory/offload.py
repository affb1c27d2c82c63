"""Activation checkpoints in host memory: copied out behind the forward, back ahead of the backward.

transformers' own `gradient_checkpointing_enable(offload=True)` copies on the compute stream, which
waits. Here a stream of its own does, and while a layer is recomputed the one before it comes back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError
from .technique import Technique, changing

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


def offload_checkpoints(
    model: nn.Module, *, min_bytes: int = 1 << 20, max_host_bytes: int | None = None
) -> Technique:
    """Checkpoint every layer, and keep what is stored of it, its input, in pinned host memory.

    Device memory for stored hidden states becomes that of about three layers, whatever their
    number; host memory is layers x tokens x hidden_size x bytes of an element. Random numbers
    (dropout) are replayed. On a CPU it is checkpointing alone.

    Args:
        model: a model of transformers with gradient checkpointing, a PeftModel, or a module around
            one. Leave `gradient_checkpointing` of the Trainer off: it would replace this.
        min_bytes: smaller tensors stay where they are.
        max_host_bytes: what would need more stays on the device: the last layers' inputs, which
            the backward wants first. None: there is no limit, and where host memory runs out,
            Linux kills the process. PyTorch rounds each pinned tensor up to a power of two.

    Raises:
        UnsupportedModelError: the model has no gradient checkpointing, or is compiled or sharded.
    """
    with changing(model, "offload_checkpoints") as (root, changes):
        layers = [module for module in root.modules() if hasattr(module, _FLAGS[0])]
        if not root.supports_gradient_checkpointing or not layers:
            raise UnsupportedModelError(
                f"{type(root).__name__} has no gradient checkpointing, which offload_checkpoints "
                "builds on."
            )
        run = _Offload(min_bytes, max_host_bytes)
        for layer in layers:
            changes.undo.callback(_set_flags, layer, _flags(layer))
            _set_flags(layer, dict(zip(_FLAGS, (True, run), strict=True)))
    return Technique("offload_checkpoints", f"inputs of {len(layers)} modules on the host", changes)


def _flags(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in _FLAGS if name in vars(layer)}


def _set_flags(layer: nn.Module, flags: dict[str, Any]) -> None:
    for name in _FLAGS:
        vars(layer).pop(name, None)
    vars(layer).update(flags)


class _Offload:
    """The checkpointing function of a model's layers."""

    def __init__(self, min_bytes: int, max_host_bytes: int | None):
        self._min_bytes, self._max_host_bytes = min_bytes, max_host_bytes
        self._stored: weakref.WeakSet[_Stored] = weakref.WeakSet()
        self._last: weakref.ref[_Stored] | None = None
        self._streams: dict[torch.device, Any] = {}

    def __deepcopy__(self, memo: dict) -> _Offload:
        return _Offload(self._min_bytes, self._max_host_bytes)  # streams cannot be copied

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        # The hooks see what the checkpoint itself saves, its inputs; in it, its own hooks apply.
        with saved_tensors_hooks(self._pack, _unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> _Stored | Tensor:
        if not tensor.is_floating_point() or tensor.nbytes < max(self._min_bytes, 1):
            return tensor
        if self._max_host_bytes is not None:
            held = sum(stored.host_bytes for stored in self._stored)
            if held + _pinned_bytes(tensor) > self._max_host_bytes:
                return tensor
        stream = None
        if tensor.device.type != "cpu":
            stream = self._streams.get(tensor.device)
            if stream is None:
                stream = torch.get_device_module(tensor.device).Stream(tensor.device)
                self._streams[tensor.device] = stream
        stored = _Stored(tensor, self._last, stream)
        self._last = weakref.ref(stored)
        self._stored.add(stored)
        return stored


def _pinned_bytes(tensor: Tensor) -> int:
    """Host memory that PyTorch's allocator takes for a pinned copy."""
    return 1 << (tensor.nbytes - 1).bit_length()


def _unpack(stored: _Stored | Tensor) -> Tensor:
    if isinstance(stored, Tensor):
        return stored
    tensor = stored.get()
    before = None if stored.before is None else stored.before()
    if before is not None:
        before.fetch()
    return tensor


class _Stored:
    """One tensor in host memory.

    Attributes:
        before: the one that was stored before it, which a backward wants after it.
        host_bytes: that it takes.
    """

    def __init__(self, tensor: Tensor, before: weakref.ref[_Stored] | None, stream: Any):
        self.before, self._stream, self._device = before, stream, tensor.device
        self.host_bytes = _pinned_bytes(tensor)
        self._back: Tensor | None = None
        self._event: Any = None
        if stream is None:
            self._host = tensor.clone()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        device = torch.get_device_module(tensor.device)
        stream.wait_stream(device.current_stream(tensor.device))
        with device.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Begin to copy it back, behind what the device has been given to do so far."""
        if self._stream is None or self._back is not None:
            return
        self._back = torch.empty_like(self._host, device=self._device)
        device = torch.get_device_module(self._device)
        self._stream.wait_stream(device.current_stream(self._device))
        with device.stream(self._stream):
            self._back.copy_(self._host, non_blocking=True)
            self._event = self._stream.record_event()
        self._back.record_stream(self._stream)

    def get(self) -> Tensor:
        """The tensor where it was; the device waits for it, the host does not."""
        if self._stream is None:
            return self._host
        self.fetch()
        device = torch.get_device_module(self._device)
        device.current_stream(self._device).wait_event(self._event)
        back, self._back = self._back, None
        assert back is not None
        return back
