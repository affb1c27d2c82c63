"""Ulysses: every process gets all tokens of some heads, and computes them as if it were alone."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from ..errors import MaskError, ParallelError
from ..masks.block_mask import BlockMask
from ..masks.part import part_of
from ..masks.pattern import Pattern
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
        if options.get(name) not in (None, False):
            raise ParallelError(f"ulysses_attention has no {name}.")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    num_heads, num_heads_k = q.shape[2], k.shape[2]
    if num_heads % size:
        raise ParallelError(
            f"{num_heads} heads do not divide among {size} processes; use ring_attention, or fewer."
        )
    if num_heads_k % size:
        if size % num_heads_k:
            raise ParallelError(
                f"{num_heads_k} heads of k and v neither divide by {size} processes nor divide "
                "them; use ring_attention."
            )
        k, v = (x.repeat_interleave(size // num_heads_k, dim=2) for x in (k, v))
    if isinstance(block_mask, Pattern):
        seqlen = q.shape[1] * size
        block_mask = block_mask.block_mask(seqlen, seqlen, num_heads, q.device)
    if block_mask is not None and block_mask.num_heads > 1:
        if block_mask.num_heads % size:
            raise MaskError(
                f"block_mask has lists for {block_mask.num_heads} heads, which do not divide among "
                f"{size} processes."
            )
        each = block_mask.num_heads // size
        block_mask = part_of(block_mask, heads=slice(rank * each, (rank + 1) * each))
    q, k, v = (cast(torch.Tensor, _Exchange.apply(x, 2, 1, group)) for x in (q, k, v))
    out = cast(torch.Tensor, flash_attn_func(q, k, v, block_mask=block_mask, **options))
    return cast(torch.Tensor, _Exchange.apply(out, 1, 2, group))


class _Exchange(torch.autograd.Function):
    """Divides dimension `give` among the processes and puts dimension `take` together."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, give: int, take: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.give, ctx.take, ctx.group = give, take, group
        return _exchange(x, give, take, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, ctx.take, ctx.give, ctx.group), None, None, None


def _exchange(
    x: torch.Tensor, give: int, take: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    size = dist.get_world_size(group)
    sent = torch.stack(x.chunk(size, dim=give))  # one for each process
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), dim=take)
