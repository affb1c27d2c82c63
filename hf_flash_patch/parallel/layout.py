"""Which tokens a process has.

"contiguous": rank r of n has the r-th of n equal parts. "zigzag": the sequence has 2 n equal
chunks, and rank r has chunks r and 2 n - 1 - r, in that order, so that under a causal mask all
have the same work. Or, chunk by chunk, any other: `balanced` makes those.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..errors import ParallelError

LAYOUTS = ("contiguous", "zigzag")
Layout = str | tuple[tuple[int, ...], ...]


def shard(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    dim: int = 1,
    layout: Layout = "zigzag",
) -> torch.Tensor:
    """This process's tokens of a tensor that every process has whole.

    Shift labels by one, and make position_ids, before: neighbours in a shard need not be neighbours
    in the sequence.

    Args:
        tensor: any, with the sequence along `dim`.
        group: processes that share the sequence; None for all.
        dim: of the sequence.
        layout: "zigzag" for `ring_attention`, "contiguous" for `ulysses_attention`; or the numbers
            of each process's chunks, as from `balanced`.

    Returns:
        The shard, contiguous; length seqlen / n along `dim`.

    Raises:
        ParallelError: the sequence does not divide into equal chunks, or there is no such layout.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    chunks = _chunks(tensor.shape[dim], size, layout)
    return torch.cat([tensor.split(chunks, dim)[i] for i in owned(rank, size, layout)], dim)


def unshard(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    dim: int = 1,
    layout: Layout = "zigzag",
) -> torch.Tensor:
    """The whole tensor from every process's shard, without a gradient; undoes `shard`.

    Args:
        tensor: this process's shard, of one shape everywhere.
        group, dim, layout: as `shard` was given them.

    Returns:
        The tensor, length n times the shard's along `dim`.

    Raises:
        ParallelError: there is no such layout.
    """
    size = dist.get_world_size(group)
    _chunks(tensor.shape[dim] * size, size, layout)
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(shards, tensor.detach().contiguous(), group=group)
    placed: dict[int, torch.Tensor] = {}
    for rank, part in enumerate(shards):
        numbers = owned(rank, size, layout)
        placed |= dict(zip(numbers, part.chunk(len(numbers), dim), strict=True))
    return torch.cat([placed[i] for i in sorted(placed)], dim)


def balanced(cost: list[float], size: int) -> Layout:
    """Chunks for each of `size` processes, as many each, so that their costs differ little.

    Args:
        cost: of each chunk of the sequence, from any number that `size` divides.
        size: processes.

    Returns:
        the numbers of each process's chunks, rising: the most expensive ones are given out first,
        each to whom has the least (Graham's rule), and of equal ones the first.
    """
    each = len(cost) // size
    given: list[list[int]] = [[] for _ in range(size)]
    for chunk in sorted(range(len(cost)), key=lambda i: (-cost[i], i)):
        room = (rank for rank in range(size) if len(given[rank]) < each)
        given[min(room, key=lambda rank: (sum(cost[i] for i in given[rank]), rank))].append(chunk)
    return tuple(tuple(sorted(chunks)) for chunks in given)


def owned(rank: int, size: int, layout: Layout) -> tuple[int, ...]:
    """The numbers of a rank's chunks, in its order."""
    if not isinstance(layout, str):
        return layout[rank]
    return (rank,) if layout == "contiguous" else (rank, 2 * size - 1 - rank)


def _chunks(seqlen: int, size: int, layout: Layout) -> int:
    """Tokens of a chunk."""
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise ParallelError(f"layout is {layout!r}; it has to be one of {', '.join(LAYOUTS)}.")
    each = [len(owned(rank, size, layout)) for rank in range(size)]
    count = sum(each)
    if len(set(each)) > 1 or (
        sorted(i for rank in range(size) for i in owned(rank, size, layout)) != [*range(count)]
    ):
        raise ParallelError(f"layout {layout} does not give {size} processes equally many chunks.")
    if seqlen % count:
        raise ParallelError(
            f"{seqlen} tokens do not divide into {count} equal chunks ({size} processes, "
            f"{layout}); pad the sequence to a multiple of {count}."
        )
    return seqlen // count
