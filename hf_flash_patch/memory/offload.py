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
from .keep import Kept, OnDevice, Stored, kept_modules
from .technique import Technique, changing

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


def offload_checkpoints(
    model: nn.Module,
    *,
    keep_attention: bool = False,
    min_bytes: int = 1 << 20,
    max_host_bytes: int | None = None,
) -> Technique:
    """Checkpoint every layer, and keep what is stored of it, its input, in pinned host memory.

    Device memory for stored hidden states becomes that of about three layers, whatever their
    number; host memory is layers x tokens x hidden_size x bytes of an element. Random numbers
    (dropout) are replayed. On a CPU it is checkpointing alone.

    Args:
        model: a model of transformers with gradient checkpointing, a PeftModel, or a module around
            one. Leave `gradient_checkpointing` of the Trainer off: it would replace this.
        keep_attention: store attention's out and lse, too, so that they are not computed again:
            about twice the host memory, and two more of such tensors on the device. The model has
            to be patched before. What is kept: see `hf_flash_patch.memory.keep_attention`, which
            does the same on the device.
        min_bytes: smaller tensors stay where they are.
        max_host_bytes: what would need more stays on the device: the last layers' inputs, which
            the backward wants first. None: there is no limit, and where host memory runs out,
            Linux kills the process. PyTorch rounds each pinned tensor up to a power of two.

    Raises:
        UnsupportedModelError: the model has no gradient checkpointing, or is compiled or sharded;
            with keep_attention, it has no attention of ours.
    """
    other = {"keep_attention": "restore() that, and pass keep_attention=True"}
    with changing(model, "offload_checkpoints", instead=other) as (root, changes):
        layers = [module for module in root.modules() if hasattr(module, _FLAGS[0])]
        if not root.supports_gradient_checkpointing or not layers:
            raise UnsupportedModelError(
                f"{type(root).__name__} has no gradient checkpointing, which offload_checkpoints "
                "builds on."
            )
        kept = kept_modules(root) if keep_attention else 0
        run = _Offload(min_bytes, max_host_bytes, keep_attention)
        for layer in layers:
            changes.undo.callback(_set_flags, layer, _flags(layer))
            _set_flags(layer, dict(zip(_FLAGS, (True, run), strict=True)))
    text = f"inputs of {len(layers)} modules"
    text += f" and results of {kept} attention modules on the host" if kept else " on the host"
    return Technique("offload_checkpoints", text, changes)


def _flags(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in _FLAGS if name in vars(layer)}


def _set_flags(layer: nn.Module, flags: dict[str, Any]) -> None:
    for name in _FLAGS:
        vars(layer).pop(name, None)
    vars(layer).update(flags)


class _Offload:
    """The checkpointing function of a model's layers."""

    def __init__(self, min_bytes: int, max_host_bytes: int | None, keep_attention: bool = False):
        self._min_bytes, self._max_host_bytes = min_bytes, max_host_bytes
        self._keep_attention = keep_attention
        self._stored: weakref.WeakSet[_Stored] = weakref.WeakSet()
        self._last: weakref.ref[_Stored] | None = None
        self._last_kept: weakref.ref[Kept] | None = None
        self._streams: dict[torch.device, Any] = {}

    def __reduce__(self) -> tuple:
        # Streams and weak references can be neither copied nor pickled.
        return _Offload, (self._min_bytes, self._max_host_bytes, self._keep_attention)

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._keep_attention and torch.is_grad_enabled():
            function = self._keeping(function)
        # The hooks see what the checkpoint itself saves, its inputs; in it, its own hooks apply.
        with saved_tensors_hooks(self._pack, _unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _keeping(self, function: Callable[..., Any]) -> Kept:
        before = None if self._last_kept is None else self._last_kept()
        kept = Kept(function, self._keep, before)
        self._last_kept = weakref.ref(kept)
        return kept

    def _keep(self, tensor: Tensor) -> Stored:
        stored = self._store(tensor)
        return OnDevice(tensor) if stored is None else stored

    def _pack(self, tensor: Tensor) -> _Stored | Tensor:
        stored = self._store(tensor)
        if stored is None:
            return tensor
        stored.before, self._last = self._last, weakref.ref(stored)
        return stored

    def _store(self, tensor: Tensor) -> _Stored | None:
        """A copy of a tensor on the host; None where it is to stay."""
        if not tensor.is_floating_point() or tensor.nbytes < max(self._min_bytes, 1):
            return None
        if self._max_host_bytes is not None:
            held = sum(stored.host_bytes for stored in self._stored)
            if held + _pinned_bytes(tensor) > self._max_host_bytes:
                return None
        stream = None
        if tensor.device.type != "cpu":
            stream = self._streams.get(tensor.device)
            if stream is None:
                stream = torch.get_device_module(tensor.device).Stream(tensor.device)
                self._streams[tensor.device] = stream
        stored = _Stored(tensor, stream)
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
        before: the input that was stored before it, which a backward wants after it.
        host_bytes: that it takes.
    """

    def __init__(self, tensor: Tensor, stream: Any):
        self.before: weakref.ref[_Stored] | None = None
        self._stream, self._device = stream, tensor.device
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
