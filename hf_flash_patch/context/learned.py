"""Extends learned absolute positions: the table, its buffers, and the config."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ContextExtensionError
from ..families import Family, family_of
from ..integration.living import undo_on
from ..integration.wrappers import holders
from . import tables
from .plan import Change, Settings, copies_of, record_of, set_attribute, set_buffer, set_record

# The best without training on a pretrained encoder; the figures are in docs/context.md.
AUTO = "tile"


@dataclass
class TablePart:
    """A position table and what goes with it.

    Attributes:
        where: path of the table.
        root: the model.
        owner: the module that the family's paths start from.
        tables: the embedding; with peft's modules_to_save, its copies, too.
        family: its row.
        config: what states its length.
    """

    where: str
    root: PreTrainedModel
    owner: nn.Module
    tables: list[nn.Embedding]
    family: Family
    config: Any

    @property
    def reserved(self) -> int:
        """Rows before position 0."""
        first: Any = self.tables[0]
        if self.family.reserved == "padding_idx":
            return first.padding_idx + 1
        return first.offset if self.family.reserved == "offset" else 0

    @property
    def length(self) -> int:
        """Tokens the model takes now."""
        return len(self.tables[0].weight) - self.reserved

    def plan(self, settings: Settings) -> TablePlan:
        """What it takes to reach `settings.max_length`.

        Raises:
            ContextExtensionError: it cannot be reached as asked.
        """
        new, old, method = settings.max_length, self.length, settings.positions
        why = ""
        if method == "auto":
            method, why = AUTO, "the best without training on a pretrained encoder"
        self._refuse_odd()
        grown: dict[int, Tensor] = {}
        for table in self.tables:
            if id(table.weight) not in grown:
                grown[id(table.weight)] = tables.grow(table.weight, self.reserved, new, method)
        stated = new + (self.reserved if self.family.reserved == "padding_idx" else 0)
        exact = old if method in tables.KEEP_OLD_LENGTHS else 0
        change = Change(self.where, "learned positions", method, why, old, new, exact)
        rows, width = grown[id(self.tables[0].weight)].shape
        change.details = [
            f"{self.where}.weight ({self.reserved + old}, {width}) -> ({rows}, {width})",
            f"{self.family.length} {getattr(self.config, self.family.length)} -> {stated}",
        ]
        if self.reserved:
            change.details.append(f"the {self.reserved} reserved rows stay")
        change.notes = ["the new rows are not trained: fine-tune for the longer inputs."]
        return TablePlan(self, grown, self._buffers(stated), stated, change)

    def _refuse_odd(self) -> None:
        for table in self.tables:
            weight, hook = table.weight, getattr(table, "_hf_hook", None)
            if getattr(hook, "offload", False):
                raise ContextExtensionError(
                    f"{self.where} is offloaded by accelerate; load the model without offloading "
                    "(or extend the checkpoint: hfp extend), then dispatch the extended one."
                )
            if any("lora_" in name for name, _ in table.named_parameters()):
                raise ContextExtensionError(
                    f"{self.where} carries an adapter of its length; extend the base model first, "
                    "then add the adapter."
                )
            if not weight.is_floating_point() or type(weight).__name__ == "Params4bit":
                raise ContextExtensionError(
                    f"{self.where} is quantised ({weight.dtype}); extend the model before "
                    "quantising it, or leave its embeddings in floating point."
                )

    def _buffers(self, stated: int) -> list[tuple[nn.Module, str, Tensor]]:
        found = []
        for path in self.family.buffers:
            parent, _, name = path.rpartition(".")
            module = self.owner.get_submodule(parent)
            old = module._buffers.get(name)
            if old is not None:
                found.append((module, name, _buffer_like(old, name, stated)))
        return found


@dataclass
class TablePlan:
    """Everything that the extension of a part needs, computed.

    Attributes:
        part: what it is for.
        grown: id of a weight -> its new values.
        buffers: module, name, new value.
        stated: the length that the config will state.
        change: for the report.
    """

    part: TablePart
    grown: dict[int, Tensor]
    buffers: list[tuple[nn.Module, str, Tensor]]
    stated: int
    change: Change

    def apply(self, undo: contextlib.ExitStack) -> GrownTable:
        """Change the model; `undo` collects the way back.

        Returns:
            What knows whether that is still open.
        """
        part, made = self.part, []
        for old, users in _users(part.root, self.grown):
            new = nn.Parameter(self.grown[id(old)], requires_grad=old.requires_grad)
            vars(new).update(vars(old))  # transformers and others mark parameters
            made.append((new, new._version))
            for module, name in users:
                undo_on(undo, module, _put_back, name, old)
                module._parameters[name] = new
                if isinstance(module, nn.Embedding):
                    set_attribute(module, "num_embeddings", len(new), undo)
        for module, name, value in self.buffers:
            set_buffer(module, name, value, undo)
        first = record_of(part.config).get("original_max_length", self.change.before)
        record = {
            "max_length": self.change.after,
            "original_max_length": first,
            "method": self.change.method,
        }
        length = part.family.length
        for config in copies_of(part.root, part.config, length):
            if getattr(config, "n_ctx", None) == getattr(config, length):
                set_attribute(config, "n_ctx", self.stated, undo)
            set_attribute(config, length, self.stated, undo)
            set_record(config, record, undo)
        return GrownTable(part.where, weakref.ref(part.root), made)


@dataclass
class GrownTable:
    """A table that was extended.

    Attributes:
        where: path of the table.
        root: the model, which this does not keep alive.
        made: the new parameters and the versions they had when they were made.
    """

    where: str
    root: weakref.ref[PreTrainedModel]
    made: list[tuple[nn.Parameter, int]]

    def check_undo(self) -> None:
        """Whether the old table can be put back.

        Raises:
            ContextExtensionError: it cannot, and why.
        """
        root = self.root()
        held = [] if root is None else holders(root)
        if held:
            raise ContextExtensionError(
                f"{self.where} was extended and is held by {', '.join(held)} now; putting the "
                "old table back would leave that with a table the model no longer has. Drop it "
                "first, or keep the extended model."
            )
        for parameter, version in self.made:
            if parameter._version != version or parameter.grad is not None:
                raise ContextExtensionError(
                    f"{self.where} was extended and has been trained or loaded since; putting "
                    "the old table back would lose that. Keep the extended model, or load the "
                    "original one anew."
                )


def table_parts(root: PreTrainedModel) -> list[TablePart]:
    """The learned position tables in `root` that the families know, each once."""
    parts: dict[int, TablePart] = {}
    for prefix, owner in root.named_modules():
        family = family_of(getattr(owner, "config", None))
        if not isinstance(owner, PreTrainedModel) or family is None:
            continue
        if family.positions != "learned":
            continue
        try:
            module: Any = owner.get_submodule(family.table)
        except AttributeError:
            continue  # the model around the one that owns the table
        found = _copies(module)
        if found and id(found[0]) not in parts:
            where = f"{prefix}.{family.table}".strip(".")
            parts[id(found[0])] = TablePart(where, root, owner, found, family, owner.config)
    return list(parts.values())


def _copies(module: Any) -> list[nn.Embedding]:
    """The embedding, or what peft's modules_to_save made of it: the original and the copies."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return [module.original_module, *module.modules_to_save.values()]
    return [module] if isinstance(getattr(module, "weight", None), Tensor) else []


def _users(
    root: nn.Module, grown: dict[int, Tensor]
) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Every parameter to be replaced, and all modules that share it."""
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in grown:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _buffer_like(old: Tensor, name: str, length: int) -> Tensor:
    if name == "position_ids":
        new = torch.arange(length, dtype=old.dtype).expand(1, -1)
    elif name == "token_type_ids":
        new = torch.zeros(1, length, dtype=old.dtype)
    else:  # a causal mask, as models used to keep it
        new = torch.ones(length, length, dtype=old.dtype).tril()
    return new.to(old.device)


def _put_back(module: nn.Module, name: str, old: nn.Parameter) -> None:
    """The old table, on the device and in the dtype that the model has now."""
    now = module._parameters[name]
    if now is not None and (now.device != old.device or now.dtype != old.dtype):
        old.data = old.data.to(device=now.device, dtype=now.dtype)
    module._parameters[name] = old
