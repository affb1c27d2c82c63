"""What holds on to a model's modules or parameters: compilers, sharding, optimizers."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn

from .living import living

# By name: torch.distributed may be absent from a build. Both FSDP generations.
_FSDP = {"FullyShardedDataParallel", "FSDPModule"}
_DDP = {"DistributedDataParallel", "DataParallel"}


def compiled_or_sharded(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules in `model` that are compiled or sharded: where, and which of the two."""
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if getattr(module, "_compiled_call_impl", None) is not None or _is_compiled(type(module)):
            yield where, "compiled"
        elif _bases(type(module)) & _FSDP:
            yield where, "sharded by FSDP"


def holders(model: nn.Module) -> list[str]:
    """What, among all living objects, holds on to the parameters of `model`, or to it from outside.

    Returns:
        a phrase for each, such as "an optimizer (AdamW)"; unreachable objects do not count.
    """
    found = _holders(model)
    if found:
        gc.collect()  # an optimizer in a reference cycle that nobody can reach holds nothing
        found = _holders(model)
    return found


def _holders(model: nn.Module) -> list[str]:
    mine = set(map(id, model.modules()))
    parameters = set(map(id, model.parameters()))
    found = []
    for candidate in living(torch.optim.Optimizer, nn.Module):
        kind = type(candidate)
        if issubclass(kind, torch.optim.Optimizer):
            groups = vars(candidate).get("param_groups", ())
            if any(id(parameter) in parameters for g in groups for parameter in g["params"]):
                found.append(f"an optimizer ({kind.__name__})")
        elif id(candidate) not in mine:
            outside = "torch.compile" if _is_compiled(kind) else _name(kind, _DDP | _FSDP)
            if outside and any(id(module) in mine for module in candidate.modules()):
                found.append(outside)
    return found


def _is_compiled(kind: type) -> bool:
    return "OptimizedModule" in _bases(kind)


def _name(kind: type, names: set[str]) -> str:
    return next((name for name in sorted(names) if name in _bases(kind)), "")


def _bases(kind: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__)
