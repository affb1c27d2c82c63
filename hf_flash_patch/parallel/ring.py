"""Ring attention in zigzag order: keys and values go round, every process keeps its queries.

Process r has chunks r and 2 n - 1 - r of 2 n. Under a causal mask alone, each step is then one call
of the same cost everywhere: its own keys causally; the first half of an earlier process's keys for
all queries; all keys of a later process for the second half of the queries. Under other masks, and
in other layouts, a step is a call for each pair of chunks that sees anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..errors import MaskError, ParallelError
from ..masks.block_mask import BlockMask
from ..masks.part import part_of
from ..masks.pattern import Pattern
from ..ops.arguments import MaskArguments, check_tensors
from ..ops.functional import Output, attention, attention_backward
from ..ops.keeper import kept
from ..ops.padding import pack_key_padding
from .layout import Layout, owned

_ALL = slice(None)
_seeing: WeakKeyDictionary[BlockMask, bool] = WeakKeyDictionary()


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    block_mask: Pattern | BlockMask | None = None,
    key_padding_mask: torch.Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    layout: Layout = "zigzag",
) -> Output:
    """Attention of a sequence whose tokens n processes share, exact.

    While a process computes with one part of the keys, the next part is on its way. Partial results
    are put together in fp32, and so are gradients; those of k and v go round behind them.

    Args:
        q: (batch, seqlen / n, num_heads, head_dim), this process's tokens (see `shard`).
        k, v: (batch, seqlen / n, num_heads_k, head_dim).
        group: the processes, in the order of the ring; None for all.
        causal, softmax_scale, softcap, deterministic, backend, return_lse: as in
            `flash_attn_func`. A window is a pattern: `masks.sliding_window`.
        block_mask: a pattern or `BlockMask` of the whole sequence. A chunk, in "zigzag" layout
            seqlen / (2 n), has to be a multiple of its block size.
        key_padding_mask: bool (batch, seqlen / n), True where this process's keys are real.
        layout: what `shard` was given.

    Returns:
        (batch, seqlen / n, num_heads, head_dim), this process's part of the output; a query that
        sees no key gives 0. With return_lse also lse, fp32 (batch, num_heads, seqlen / n).

    Raises:
        ParallelError: the shard does not divide into chunks.
        UnsupportedKernelError, MaskError: as in `flash_attn_func`.

    Source: Liu et al., Ring Attention (arXiv 2310.01889); zigzag order: Zhu, ring-flash-attention.
    """
    check_tensors(q, k, v, varlen=False)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    seqlen = q.shape[1]
    chunks = tuple(owned(place, size, layout) for place in range(size))
    each = len(chunks[rank])
    if seqlen % each or k.shape[1] != seqlen:
        raise ParallelError(
            f"the shard has {seqlen} queries and {k.shape[1]} keys; a ring wants as many, in "
            f"{each} equal chunks: pad the sequence to a multiple of {each * size}."
        )
    chunk = seqlen // each
    if isinstance(block_mask, Pattern):
        block_mask = block_mask.block_mask(seqlen * size, seqlen * size, q.shape[2], q.device)
    if block_mask is not None and block_mask.seqlen_q != seqlen * size:
        raise MaskError(
            f"block_mask is for {block_mask.seqlen_q} tokens, {size} processes share "
            f"{seqlen * size}."
        )
    if block_mask is not None and chunk % block_mask.block_size:
        raise MaskError(
            f"chunks of {chunk} tokens do not lie on blocks of {block_mask.block_size}; pad the "
            f"sequence to a multiple of {each * size * block_mask.block_size}."
        )
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != tuple(k.shape[:2]):
        raise MaskError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it has to be this "
            f"process's (batch, seqlen / n) = {tuple(k.shape[:2])}."
        )
    options = {"softmax_scale": softmax_scale, "softcap": softcap, "backend": backend}
    plan = _Plan(rank, chunks, chunk, causal, block_mask, options, deterministic)
    padding = None if key_padding_mask is None else key_padding_mask.bool()
    out, lse = _Ring.apply(q, k, v, padding, _Neighbours(group), plan)  # type: ignore[misc]
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """Some of this process's queries against some of another's keys."""

    rows: slice
    keys: slice
    causal: bool
    block_mask: BlockMask | None = None

    def options(self, plan: _Plan, padding: torch.Tensor | None) -> dict[str, Any]:
        mask = MaskArguments(block_mask=self.block_mask)
        if padding is not None:
            key_range, key_bits = pack_key_padding(padding[:, self.keys])
            mask = replace(mask, key_range=key_range, key_bits=key_bits)
        deterministic = {"deterministic": plan.deterministic}
        return {"mask": mask, "causal": self.causal, **plan.options, **deterministic}


@dataclass(frozen=True)
class _Plan:
    rank: int
    chunks: tuple[tuple[int, ...], ...]  # numbers, by rank
    chunk: int  # tokens
    causal: bool
    block_mask: BlockMask | None
    options: dict[str, Any]
    deterministic: bool

    @property
    def size(self) -> int:
        return len(self.chunks)

    @property
    def one_call(self) -> bool:
        """Whether a step is one call, so that a row meets at most as many parts as processes."""
        zigzag = all(
            own == owned(rank, self.size, "zigzag") for rank, own in enumerate(self.chunks)
        )
        return self.block_mask is None and (zigzag or not self.causal)

    def sum_dtype(self, part: torch.dtype) -> torch.dtype:
        """What to add up gradients in: two parts round once in their own dtype, as in fp32."""
        return part if self.one_call and self.size <= 2 else _exact(part)

    def calls(self, source: int) -> Iterator[_Call]:
        """What to compute with the keys of rank `source`."""
        if self.one_call and not self.causal:
            yield _Call(_ALL, _ALL, False)
        elif self.one_call:
            if source == self.rank:
                yield _Call(_ALL, _ALL, True)
            elif source < self.rank:
                yield _Call(_ALL, slice(0, self.chunk), False)
            else:
                yield _Call(slice(self.chunk, 2 * self.chunk), _ALL, False)
        else:
            for rows, i in enumerate(self.chunks[self.rank]):
                for keys, j in enumerate(self.chunks[source]):
                    yield from self._pair(self._tokens(rows), i, self._tokens(keys), j)

    def _pair(self, rows: slice, i: int, keys: slice, j: int) -> Iterator[_Call]:
        """Chunk i, this process's `rows`, against chunk j, `keys` of those that are here."""
        if self.causal and j > i:
            return
        part = None
        if self.block_mask is not None:
            part = part_of(self.block_mask, rows=self._tokens(i), keys=self._tokens(j))
            if not _sees_anything(part):
                return
        yield _Call(rows, keys, self.causal and i == j, part)

    def _tokens(self, chunk: int) -> slice:
        return slice(chunk * self.chunk, (chunk + 1) * self.chunk)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sees_anything(mask: BlockMask) -> bool:
    """Read from the device once for each mask."""
    if mask not in _seeing:
        _seeing[mask] = bool(mask.row_offsets[-1, -1, -1].item())
    return _seeing[mask]


class _Neighbours:
    """Sends to the next process of the ring, receives from the one before."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        whole = group or dist.group.WORLD
        assert whole is not None
        self.group, self.size = group, size
        self.after = dist.get_global_rank(whole, (rank + 1) % size)
        self.before = dist.get_global_rank(whole, (rank - 1) % size)

    def pass_on(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[dist.Work]]:
        """Starts an exchange: what is being received, and what to wait for."""
        if self.size == 1:
            return tensors, []
        received = [torch.empty_like(x) for x in tensors]
        operations = [dist.P2POp(dist.isend, x, self.after, self.group) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, self.before, self.group) for x in received]
        return received, dist.batch_isend_irecv(operations)


def _all_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None,
    neighbours: _Neighbours,
    plan: _Plan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of this process's queries, once the keys have gone round."""
    exact = _exact(q.dtype)
    total: tuple[torch.Tensor, torch.Tensor] | None = None
    for source, keys, mask in _round(k, v, padding, neighbours, plan):
        for call in plan.calls(source):
            part, part_lse = attention(
                q[:, call.rows],
                keys[0][:, call.keys],
                keys[1][:, call.keys],
                return_lse=True,
                **call.options(plan, mask),
            )
            total = _merge(total, call.rows, part, part_lse, q, exact)
    out, lse = _nothing(q, exact) if total is None else total
    return out.to(q.dtype), lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        padding: torch.Tensor | None,
        neighbours: _Neighbours,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        result, lse = kept(
            (q.shape, q.dtype, plan.causal, plan.rank),
            lambda: _all_keys(q, k, v, padding, neighbours, plan),
        )
        assert result is not None and lse is not None
        ctx.save_for_backward(q, k, v, padding, result, lse)
        ctx.neighbours, ctx.plan = neighbours, plan
        return result, lse

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, padding, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        neighbours, plan = ctx.neighbours, ctx.plan
        exact = plan.sum_dtype(q.dtype)
        dq: torch.Tensor | None = None
        gradients: list[torch.Tensor] = []  # of the keys that are here
        for step, (source, keys, mask) in enumerate(_round(k, v, padding, neighbours, plan)):
            coming, works = neighbours.pass_on(gradients) if step else ([], [])
            own: list[torch.Tensor | None] = [None, None]
            for call in plan.calls(source):
                part_q, *parts = attention_backward(
                    dout[:, call.rows],
                    None if dlse is None else dlse[..., call.rows].contiguous(),
                    q[:, call.rows],
                    keys[0][:, call.keys],
                    keys[1][:, call.keys],
                    out[:, call.rows],
                    lse[..., call.rows].contiguous(),
                    **call.options(plan, mask),
                )
                dq = _add(dq, call.rows, part_q, q, exact)
                own = [
                    _add(total, call.keys, part, like, exact)
                    for total, part, like in zip(own, parts, (k, v), strict=True)
                ]
            for work in works:
                work.wait()
            for i, (total, like) in enumerate(zip(own, (k, v), strict=True)):
                here = _zeros(like, exact) if total is None else total
                own[i] = here.add_(coming[i]) if coming else here
            gradients = [x for x in own if x is not None]
        # Complete sums: on their way home they need no more precision than what they are for.
        home, works = neighbours.pass_on([gradients[0].to(k.dtype), gradients[1].to(v.dtype)])
        for work in works:
            work.wait()
        dq = torch.zeros_like(q) if dq is None else dq
        return dq.to(q.dtype), *home, None, None, None


def _round(
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None,
    neighbours: _Neighbours,
    plan: _Plan,
) -> Iterator[tuple[int, list[torch.Tensor], torch.Tensor | None]]:
    """Each rank's keys and values and their padding, its own first; the next are on their way."""
    here = [k.contiguous(), v.contiguous()]
    if padding is not None:
        here.append(padding.to(torch.uint8).contiguous())
    for step in range(plan.size):
        following, works = neighbours.pass_on(here) if step < plan.size - 1 else ([], [])
        yield (plan.rank - step) % plan.size, here, here[2].bool() if len(here) > 2 else None
        for work in works:
            work.wait()
        here = following


def _nothing(q: torch.Tensor, exact: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of queries that have seen nothing yet."""
    shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, float("-inf"), dtype=exact, device=q.device)
    return _zeros(q, exact), lse


def _zeros(like: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=exact, device=like.device)  # contiguous, unlike zeros_like


def _merge(
    total: tuple[torch.Tensor, torch.Tensor] | None,
    rows: slice,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    q: torch.Tensor,
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a part's softmax to what is there, in place; rows that have seen nothing stay at 0."""
    if total is None and rows == _ALL:
        return part.to(exact), part_lse.to(exact)
    total = _nothing(q, exact) if total is None else total
    out, lse = total[0][:, rows], total[1][..., rows]
    both = torch.logaddexp(lse, part_lse)
    base = both.masked_fill(both == float("-inf"), 0.0)
    old, new = (
        (x - base).exp_().transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse)
    )  # (batch, seqlen, num_heads, 1)
    out.mul_(old).addcmul_(part, new)
    lse.copy_(both)
    return total


def _add(
    total: torch.Tensor | None,
    tokens: slice,
    part: torch.Tensor,
    like: torch.Tensor,
    exact: torch.dtype,
) -> torch.Tensor:
    """A part's gradient added to what is there, in place."""
    if total is None and tokens == _ALL:
        return part.to(exact).contiguous()  # it will be sent
    total = _zeros(like, exact) if total is None else total
    total[:, tokens] += part
    return total
