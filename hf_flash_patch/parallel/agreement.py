"""Whether processes are about to do the same: if not, all of them raise before anything is sent.

One that went on alone would wait for the others for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError

Fact = str | int | float | torch.Tensor | None

_HOW = {"batches": ": with accelerate, by cp_size in its parallelism_config"}


def check_agreement(
    groups: list[dist.ProcessGroup],
    device: torch.device,
    facts: Mapping[str, Mapping[str, Fact]],
    problem: Exception | None = None,
) -> None:
    """Compare facts among processes, by one all-reduce a group and one synchronisation.

    Args:
        groups: whose members together are the processes.
        device: where the groups can reduce.
        facts: kind -> name -> fact; kinds and names are the same everywhere. Of integer tensors,
            values and their places are compared; of other tensors, that they are there.
        problem: why this process cannot go on.

    Raises:
        ParallelError: facts differ, or another process cannot go on.
        Exception: the problem, which others have as well or alone.
    """
    names = [(kind, name) for kind, known in facts.items() for name in known]
    values = [fact for known in facts.values() for fact in known.values()]
    mine = torch.tensor([problem is not None, *map(_number, values)]).to(device)
    for place, fact in enumerate(values, 1):
        if isinstance(fact, torch.Tensor) and not fact.is_floating_point():
            mine[place] = _checksum(fact, device)
    most = torch.stack((mine, -mine))
    for group in groups:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    (refused, *_), same = most[0].tolist(), (most[0] == -most[1]).tolist()
    differ = [name for name, equal in zip(names, same[1:], strict=True) if not equal]
    if refused and not same[0]:  # some can go on, some cannot
        which = f" They differ in {', '.join(name for _, name in differ)}." if differ else ""
        raise problem or ParallelError(
            "another of the processes that share a sequence cannot go on, and says why; this one "
            f"stops with it.{which}"
        )
    for kind, _ in differ:
        which = ", ".join(name for other, name in differ if other == kind)
        raise ParallelError(
            f"the processes that share a sequence were given different {kind} ({which}); give all "
            f"of them the same{_HOW.get(kind, '')}."
        ) from problem
    if problem is not None:
        raise problem


def device_of(model: nn.Module, groups: list[dist.ProcessGroup]) -> torch.device:
    """Where groups can reduce: the model's device, or a process's own."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kinds = [kind.type for kind in groups[0]._device_types]
    if not kinds or device.type in kinds:
        return device
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _number(fact: Fact) -> int:
    """Of what the host knows; its negative exists, too."""
    if fact is None or isinstance(fact, int):
        return int(fact or 0)
    if isinstance(fact, torch.Tensor):
        return 1
    digest = hashlib.blake2b(str(fact).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _checksum(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64, of values and their places."""
    values = tensor.detach().to(device, torch.int64).flatten()
    weights = torch.arange(1, len(values) + 1, device=device) * 0x9E3779B97F4A7
    return ((values + 1) * weights).sum() >> 1  # so that its negative exists
