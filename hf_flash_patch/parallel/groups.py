"""The processes that share a sequence: a ring, some that exchange heads, or a ring of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ParallelError
from .layout import Layout, shard, unshard
from .ulysses import check_heads

METHODS = ("auto", "ring", "ulysses", "both")
Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Groups:
    """Process r * u + i of r rings of u that exchange heads is i-th of its u, and r-th of its ring.

    The sequence is divided among the ring's places by a layout; the tokens of a place among its u
    processes, in order.

    Attributes:
        ring, ulysses: this process's; one of them may be None.
    """

    ring: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None

    @property
    def ring_size(self) -> int:
        """Places in the ring; 1 without one."""
        return 1 if self.ring is None else dist.get_world_size(self.ring)

    @property
    def ulysses_size(self) -> int:
        """Processes that exchange heads; 1 without."""
        return 1 if self.ulysses is None else dist.get_world_size(self.ulysses)

    @property
    def all(self) -> list[dist.ProcessGroup]:
        """Those there are."""
        return [group for group in (self.ulysses, self.ring) if group is not None]

    @property
    def size(self) -> int:
        """Processes that share a sequence."""
        return self.ring_size * self.ulysses_size

    @property
    def unit(self) -> int:
        """What a sequence's length has to be a multiple of."""
        return self.size * (1 if self.ring is None else 2)

    def shard(self, tensor: torch.Tensor, dim: int = 1, layout: Layout = "zigzag") -> torch.Tensor:
        """This process's tokens of a tensor that has all of them along `dim`."""
        tensor = self.ring_shard(tensor, dim, layout)
        if self.ulysses is not None:
            tensor = shard(tensor, self.ulysses, dim=dim, layout="contiguous")
        return tensor

    def ring_shard(
        self, tensor: torch.Tensor, dim: int = 1, layout: Layout = "zigzag"
    ) -> torch.Tensor:
        """The tokens of this process's place in the ring."""
        return tensor if self.ring is None else shard(tensor, self.ring, dim=dim, layout=layout)

    def unshard(
        self, tensor: torch.Tensor, dim: int = 1, layout: Layout = "zigzag"
    ) -> torch.Tensor:
        """The way back of `shard`, without a gradient."""
        if self.ulysses is not None:
            tensor = unshard(tensor, self.ulysses, dim=dim, layout="contiguous")
        return tensor if self.ring is None else unshard(tensor, self.ring, dim=dim, layout=layout)

    def reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Of the tensors of all processes that share a sequence; in place."""
        for group in self.all:
            dist.all_reduce(tensor, operation, group=group)
        return tensor

    def __str__(self) -> str:
        if self.ring is None:
            return f"{self.size} processes that exchange heads"
        if self.ulysses is None:
            return f"a ring of {self.size} processes"
        return f"a ring of {self.ring_size} times {self.ulysses_size} processes that exchange heads"


def members(group: Group) -> list[dist.ProcessGroup]:
    """The process groups of a group or a mesh; None is all processes.

    Raises:
        ParallelError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise ParallelError(
            "torch.distributed is not initialised; start with torchrun or accelerate launch, and "
            "call init_process_group (or make an Accelerator) first."
        )
    if isinstance(group, DeviceMesh):
        return [group.get_group(i) for i in range(group.ndim)]
    whole = group or dist.group.WORLD
    assert whole is not None
    return [whole]


def groups_of(group: Group, method: str, num_heads: int, num_heads_k: int) -> Groups:
    """The groups that a method makes of one; every process of the job calls it at the same time.

    Args:
        group: the processes that share a sequence, None for all; or a `DeviceMesh` of one
            dimension, or of two, which are the ring's and that of exchanged heads.
        method: "ring", "ulysses", "both", or "auto": "ulysses" where the heads divide, else "both"
            where a part of the processes can exchange heads, else "ring".
        num_heads, num_heads_k: of the attention.

    Raises:
        ParallelError: no such method, the heads do not divide, or the mesh does not fit it.
    """
    if method not in METHODS:
        raise ParallelError(f"method is {method!r}; it has to be one of {', '.join(METHODS)}.")
    whole, *second = members(group)
    if second:
        if method not in ("auto", "both"):
            raise ParallelError(f'a mesh of two dimensions is for "both", not for {method!r}.')
        check_heads(num_heads, num_heads_k, dist.get_world_size(second[0]))
        return Groups(whole, second[0])
    size = dist.get_world_size(whole)
    fits = [
        n
        for n in range(1, size + 1)
        if size % n == 0 and num_heads % n == 0 and 0 in (num_heads_k % n, n % num_heads_k)
    ]
    if method == "auto":
        method = "ulysses" if fits[-1] == size else "ring" if fits[-1] == 1 else "both"
    if method == "ulysses":
        check_heads(num_heads, num_heads_k, size)
        return Groups(None, whole)
    if method == "ring":
        return Groups(whole, None)
    fits = [n for n in fits if 1 < n < size]
    if not fits:
        raise ParallelError(
            f"{size} processes make no ring of processes that exchange {num_heads} heads of q and "
            f'{num_heads_k} of k and v; use method="auto".'
        )
    return _divided(whole, fits[-1])


def _divided(group: dist.ProcessGroup, exchanging: int) -> Groups:
    """A ring of groups of neighbours. All processes of the job make all groups, as they must."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, dist.get_process_group_ranks(group))
    me = dist.get_rank()
    found: dict[str, dist.ProcessGroup] = {}
    for ranks in sorted(set(map(tuple, every))):
        rows = [ranks[i : i + exchanging] for i in range(0, len(ranks), exchanging)]
        for name, parts in (("ulysses", rows), ("ring", zip(*rows, strict=True))):
            for part in parts:
                made = dist.new_group(list(part))
                if me in part:
                    found[name] = made
    return Groups(found["ring"], found["ulysses"])
