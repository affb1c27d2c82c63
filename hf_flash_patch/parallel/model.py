"""Models whose sequences several processes share: a call's tokens are divided, its loss is not."""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..errors import MaskError, ParallelError
from ..families import family_of
from ..integration.assignment import heads_of, is_cross
from ..integration.attention_mask import AttentionMask
from ..integration.living import undo_on
from ..integration.sharing import SHARE_ATTRIBUTE, set_whole_sequence, share_of
from ..integration.sparse import pattern_of
from ..integration.survey import calls_us, pretrained_roots, survey
from ..integration.wrappers import compiled_or_sharded
from ..masks.pattern import Pattern
from .agreement import Fact, check_agreement, device_of
from .attend import attend
from .batch import divided
from .costs import BLOCK_SIZE, Costs
from .groups import Group, Groups, groups_of, members
from .layout import Layout, balanced
from .loss import Loss


def sequence_parallel(
    model: nn.Module, group: Group = None, *, method: str = "auto"
) -> SequenceParallel:
    """Let processes share a patched model's sequences; exact, undone by `restore()`.

    Every process of a group then calls the model with the same whole batch, and computes its own
    tokens of it: 1 / n of the activations, the attention together with the others. The loss is that
    of the whole batch, weighted by tokens, on every process; gradients are right once they are
    averaged over all processes, as DDP and FSDP do. Called with num_items_in_batch, as Trainer
    does, the loss is this process's share of the sum, as in transformers' data parallelism. Other
    outputs (logits, hidden states) are of this process's tokens; `unshard` puts them together.

    Args:
        model: patched; a PreTrainedModel, a PeftModel, or a module around one. DDP and FSDP may
            wrap it before or after.
        group: the processes that share a sequence, None for all; or a `DeviceMesh` of one
            dimension, such as accelerate's mesh["cp"], or of two: the ring's, and that of exchanged
            heads. Every process of the job makes this call.
        method: "ring" (keys and values go round), "ulysses" (heads are exchanged), "both", or
            "auto": as many exchange heads as the heads allow, the rest is a ring.

    Returns:
        A handle: shard, unshard, restore, and a context manager that restores.

    Raises:
        ParallelError: the model is not patched as a whole, mixes tokens in other ways than
            attention, or its heads do not divide; or this, or what was given, is so on other
            processes. The model is as it was.
    """
    found, problem = None, None
    about: dict[str, Fact] = {"method": method, "model": None, "masks": None}
    try:
        root, modules = found = _shareable(model)
        about |= {"model": _name(root, modules), "masks": _masks([pattern_of(m) for m in modules])}
    except ParallelError as error:
        if not dist.is_initialized():
            raise
        problem = error
    every = members(group)
    check_agreement(every, device_of(model, every), {"settings": about}, problem)
    assert found is not None
    root, modules = found
    heads, heads_k = _heads(root, modules)
    return SequenceParallel(root, modules, groups_of(group, method, heads, heads_k))


def _shareable(model: nn.Module) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The transformers model in a model, and its attention modules."""
    roots = pretrained_roots(model)
    if len(roots) != 1:
        raise ParallelError(
            f"sequence_parallel takes one transformers model; {type(model).__name__} holds "
            f"{len(roots)}."
        )
    for where, what in compiled_or_sharded(model):
        if what == "compiled":
            raise ParallelError(f"{where} is compiled; share its sequences before that.")
    return roots[0], _attention_of(roots[0])


def _heads(root: PreTrainedModel, modules: list[nn.Module]) -> tuple[int, int]:
    config = root.config.get_text_config()
    heads = heads_of(modules[0]) or config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _name(root: PreTrainedModel, modules: list[nn.Module]) -> str:
    """What processes have to have in common for their calls to fit together."""
    return f"{type(root).__name__}, {len(modules)} layers of {_heads(root, modules)} heads"


def _masks(patterns: list[Pattern | None]) -> str:
    """Likewise; patterns that are code are all the same to this."""
    texts: dict[Pattern, str] = {}
    for pattern in patterns:
        if pattern is not None and pattern not in texts:
            try:
                texts[pattern] = str(pattern)
            except MaskError:
                texts[pattern] = type(pattern).__name__
    return "; ".join("none" if pattern is None else texts[pattern] for pattern in patterns)


def _attention_of(root: PreTrainedModel) -> list[nn.Module]:
    """The model's attention modules, all of which can be shared."""
    name = type(root).__name__
    if any(share_of(module) is not None for module in root.modules()):
        raise ParallelError(f"{name}'s sequences are shared already; restore() that first.")
    family = family_of(root.config)
    if family is None or root.config.is_encoder_decoder:
        raise ParallelError(
            f"{name} is not known to mix tokens in self-attention alone; sequences of the models "
            "in hf_flash_patch.families, but encoder-decoders, can be shared."
        )
    if re.search("For(Seq|Mult|Next|Quest|PreTrain)|DoubleHeads", name):
        raise ParallelError(f"{name} looks at single tokens, which one process alone has.")
    if "position_ids" not in inspect.signature(root.forward).parameters:
        raise ParallelError(f"{name} takes no position_ids, and would count each part from 0.")
    if (getattr(root.config, "hfp", None) or {}).get("remove_padding"):
        raise ParallelError(f"{name} was patched with remove_padding; patch it without.")
    entries = survey(root)
    for entry in entries:
        if entry.status == "kept":
            continue
        if not calls_us(entry.module):
            raise ParallelError(f"{entry.name} does not call us; patch(model) first.")
        if is_cross(entry.name, entry.module):
            raise ParallelError(f"{entry.name} attends to another sequence.")
    return [entry.module for entry in entries if entry.status == "served"]


class SequenceParallel:
    """A model whose sequences are shared; made by `sequence_parallel`.

    Attributes:
        groups: the processes.
        multiple: tokens; a batch whose length is a multiple of this always divides. A ring can do
            with less where there is no mask but causality and padding: groups.unit.
    """

    def __init__(self, root: PreTrainedModel, modules: list[nn.Module], groups: Groups):
        self.groups = groups
        self.multiple = groups.unit * (1 if groups.ring is None else BLOCK_SIZE)
        self._root, self._modules = weakref.ref(root), [weakref.ref(m) for m in modules]
        self._costs = Costs(root, modules)
        self._layouts: dict[int, Layout] = {}
        self._patterns: list[Pattern | None] = []
        self._masks = ""
        self._loss = Loss(root, groups)
        with contextlib.ExitStack() as undo:
            for module in modules:
                setattr(module, SHARE_ATTRIBUTE, self)
                undo_on(undo, module, _forget)
            undo.callback(root.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            undo.callback(root.register_forward_hook(self._leave, always_call=True).remove)
            self._loss.take_over(root, undo)
            undo.callback(set_whole_sequence, None)  # hooks don't run after a KeyboardInterrupt
            self._undo = undo.pop_all()

    def restore(self) -> None:
        """Give the model its exact prior state back. A second call does nothing."""
        self._undo.close()

    def shard(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This process's tokens of a tensor that every process has whole.

        Args:
            tensor: any, with the sequence along `dim`.
            dim: of the sequence.

        Raises:
            ParallelError: the sequence does not divide.
        """
        return self.groups.shard(tensor, dim, self._layout(tensor.shape[dim]))

    def unshard(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole of what each process has its tokens of (logits, say), without a gradient.

        Args:
            tensor: this process's, of one shape everywhere.
            dim: of the sequence.
        """
        layout = self._layout(tensor.shape[dim] * self.groups.size)
        return self.groups.unshard(tensor, dim, layout)

    def _layout(self, seqlen: int) -> Layout:
        """Which tokens a process has: where patterns make costs uneven, by these."""
        if seqlen not in self._layouts:
            chunks = 2 * self.groups.ring_size
            layout: Layout = "zigzag"
            if self.groups.ring is not None and seqlen % (chunks * BLOCK_SIZE) == 0:
                cost = self._costs.of_chunks(seqlen, chunks)
                layout = "zigzag" if cost is None else balanced(cost, self.groups.ring_size)
            self._layouts[seqlen] = layout
        return self._layouts[seqlen]

    @torch.compiler.disable
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        pattern: Pattern | None,
        options: dict[str, Any],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of this process's query, key and value under mask and pattern of the whole
        sequence, with options and sinks; see `integration.sharing.Share`."""
        layout = self._layout(mask.seqlen_q)
        return attend(self.groups, layout, query, key, value, mask, pattern, options, sinks)

    @torch.compiler.disable
    def _enter(
        self, root: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        living = (reference() for reference in self._modules)
        modules = [module for module in living if module is not None]
        problem = None
        for module in modules:
            if not calls_us(module):
                problem = ParallelError(
                    f"{type(module).__name__} no longer calls us, and would see a part of the "
                    "sequence only: restore() this before the patch."
                )
        settings = self._settings(root, [pattern_of(module) for module in modules])
        batch, kwargs = divided(root, self.groups, self._layout, args, kwargs, settings, problem)
        self._loss.begin(batch)
        set_whole_sequence(batch.sequence)
        return (), kwargs

    def _settings(self, root: PreTrainedModel, patterns: list[Pattern | None]) -> dict[str, Fact]:
        """What processes may differ in, and then wait for each other for ever."""
        same = len(patterns) == len(self._patterns)
        if not same or any(a is not b for a, b in zip(patterns, self._patterns, strict=True)):
            self._patterns, self._masks = patterns, _masks(patterns)  # texts of documents are long
        kind = root.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return {
            "training mode": root.training,
            "dtype": f"{root.dtype}, autocast {cast}",
            "masks": self._masks,
        }

    @torch.compiler.disable
    def _leave(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        set_whole_sequence(None)
        return self._loss.finish(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self  # a copy of a model shares sequences with the same processes

    def __enter__(self) -> SequenceParallel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        root = self._root()
        name = "a model" if root is None else type(root).__name__
        return f"sequences of {name}: {self.groups}"

    def __repr__(self) -> str:
        return f"SequenceParallel({self})"


def _forget(module: nn.Module) -> None:
    vars(module).pop(SHARE_ATTRIBUTE, None)
