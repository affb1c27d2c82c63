"""Ulysses: every process gets all tokens of some heads, and computes them as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist

from ..errors import MaskError, ParallelError
from ..masks.block_mask import BlockMask
from ..masks.part import part_of
from ..masks.pattern import Pattern
from ..ops.dropout import new_rng_state
from ..ops.functional import flash_attn_func


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    block_mask: Pattern | BlockMask | None = None,
    **options: Any,
) -> torch.Tensor:
    """`flash_attn_func` of a sequence whose tokens n processes share, by exchanging heads.

    Two exchanges bring whole sequences of num_heads / n heads to each process, one brings the
    output back; all in q's dtype. Where num_heads_k does not divide by n, heads of k and v are
    repeated first.

    Args:
        q: (batch, seqlen / n, num_heads, head_dim), this process's part, "contiguous" layout.
        k, v: (batch, seqlen / n, num_heads_k, head_dim).
        group: the processes; None for all.
        block_mask: as in `flash_attn_func`, of the whole sequence and all heads.
        options: all others of `flash_attn_func` but alibi_slopes and return_lse;
            key_padding_mask is of the whole sequence.

    Returns:
        (batch, seqlen / n, num_heads, head_dim), this process's part of the output.

    Raises:
        ParallelError: num_heads does not divide by n, or an option cannot be shared out.
        UnsupportedKernelError, MaskError: as in `flash_attn_func`.

    Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
    """
    for name in ("alibi_slopes", "return_lse"):
        value = options.get(name)
        if value is not None and value is not False:
            raise ParallelError(f"ulysses_attention has no {name}.")
    size, num_heads = dist.get_world_size(group), q.shape[2]
    check_heads(num_heads, k.shape[2], size)
    if isinstance(block_mask, Pattern):
        seqlen = q.shape[1] * size
        block_mask = block_mask.block_mask(seqlen, seqlen, num_heads, q.device)
    if block_mask is not None:
        block_mask = own_heads(block_mask, group)
    q, k, v = to_heads(q, k, v, group)
    with own_draws(options.get("dropout_p", 0.0), q.device, group):
        out = flash_attn_func(q, k, v, block_mask=block_mask, **options)
    return to_tokens(cast(torch.Tensor, out), group)


@contextlib.contextmanager
def own_draws(
    dropout_p: float, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[None]:
    """Dropout's numbers of this process, of as many draws as there are processes.

    With one seed on all of them, as Trainer has it, heads of different processes would otherwise
    drop the same places.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for _ in range(rank if dropout_p else 0):
        new_rng_state(device)
    yield
    for _ in range(size - 1 - rank if dropout_p else 0):
        new_rng_state(device)


def check_heads(num_heads: int, num_heads_k: int, size: int) -> None:
    """Raise ParallelError where `size` processes cannot share the heads out."""
    if num_heads % size:
        raise ParallelError(
            f"{num_heads} heads do not divide among {size} processes; use ring_attention, or fewer."
        )
    if num_heads_k % size and size % num_heads_k:
        raise ParallelError(
            f"{num_heads_k} heads of k and v neither divide by {size} processes nor divide them; "
            "use ring_attention."
        )


def to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From this process's tokens of all heads to all processes' tokens of its own heads.

    Args:
        q, k, v: (batch, tokens, heads, head_dim), of which `check_heads` approves.
        group: the processes; None for all.

    Returns:
        (batch, n * tokens, heads / n, head_dim), by rank; of k and v at least one head.
    """
    size = dist.get_world_size(group)
    if k.shape[2] % size:
        k, v = (x.repeat_interleave(size // k.shape[2], dim=2) for x in (k, v))
    q, k, v = cast(tuple[torch.Tensor, ...], _Exchange.apply(2, 1, group, q, k, v))
    return q, k, v


def to_tokens(out: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The way back of `to_heads`, for the output."""
    return cast(tuple[torch.Tensor, ...], _Exchange.apply(1, 2, group, out))[0]


def own_heads(mask: BlockMask, group: dist.ProcessGroup | None) -> BlockMask:
    """The lists of this process's heads.

    Raises:
        MaskError: lists and processes do not divide.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if mask.num_heads == 1:
        return mask
    if mask.num_heads % size:
        raise MaskError(
            f"block_mask has lists for {mask.num_heads} heads, which do not divide among {size} "
            "processes."
        )
    each = mask.num_heads // size
    return part_of(mask, heads=slice(rank * each, (rank + 1) * each))


class _Exchange(torch.autograd.Function):
    """Divides dimension `give` of tensors among the processes, puts dimension `take` together."""

    @staticmethod
    def forward(
        ctx: Any, give: int, take: int, group: dist.ProcessGroup | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.give, ctx.take, ctx.group = give, take, group
        return _exchange(tensors, give, take, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *_exchange(grads, ctx.take, ctx.give, ctx.group)


def _exchange(
    tensors: tuple[torch.Tensor, ...], give: int, take: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, ...]:
    # Copied where dimensions really change places: of one sequence, once instead of twice. While
    # one tensor travels, the next is copied: the largest last before it leaves, so that the first
    # leaves soon, and first where copies are made on arrival.
    size = dist.get_world_size(group)
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].numel(), reverse=give < take)
    travelling = []
    for i in order:
        sent = tensors[i].unflatten(give, (size, -1)).movedim(give, 0).contiguous()  # a part each
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=group, async_op=True)
        travelling.append((i, received, sent, work))
    arrived: dict[int, torch.Tensor] = {}
    for i, received, _, work in travelling:
        if work is not None:
            work.wait()
        arrived[i] = received.movedim(0, take).flatten(take, take + 1)
    return tuple(arrived[i] for i in range(len(tensors)))
