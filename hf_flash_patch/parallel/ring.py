"""Ring attention in zigzag order: keys and values go round, every process keeps its queries.

Process r has chunks r and 2 n - 1 - r of 2 n. Under a causal mask alone, each step is then one call
of the same cost everywhere: its own keys causally; the first half of an earlier process's keys for
all queries; all keys of a later process for the second half of the queries. Under other masks, and
in other layouts, a step is a call for each pair of chunks that sees anything.
"""

from __future__ import annotations

from collections import Counter
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
    are put together in fp32, and so are gradients; those of k and v go round behind them, and are
    added to the owner's at home.

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
    plan.look()
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
    def sources(self) -> list[int]:
        """Ranks, in the order in which their keys come."""
        return [(self.rank - step) % self.size for step in range(self.size)]

    def pieces_of(self, rows: slice) -> list[tuple[int, int]]:
        """Starts and stops of the parts of rows that calls may take apart."""
        count = len(self.chunks[self.rank])
        if self.one_call and not self.causal:
            return [(0, count * self.chunk)]
        start, stop, _ = rows.indices(count * self.chunk)
        return [(i, i + self.chunk) for i in range(start, stop, self.chunk)]

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

    def look(self) -> None:
        """See which parts of the mask are empty: all at once and once a mask, as it is a sync."""
        if self.block_mask is not None:
            parts = [
                part_of(self.block_mask, rows=self._tokens(i), keys=self._tokens(j))
                for i in self.chunks[self.rank]
                for own in self.chunks
                for j in own
                if not (self.causal and j > i)
            ]
            new = [part for part in parts if part not in _seeing]
            if new:
                ends = torch.stack([part.row_offsets[-1, -1, -1] for part in new]).tolist()
                _seeing.update(zip(new, map(bool, ends), strict=True))

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
            if not _seeing[part]:
                return
        yield _Call(rows, keys, self.causal and i == j, part)

    def _tokens(self, chunk: int) -> slice:
        return slice(chunk * self.chunk, (chunk + 1) * self.chunk)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    calls = [list(plan.calls(source)) for source in plan.sources]
    total = _Total(q, plan, [call.rows for step in calls for call in step])
    for step, (keys, mask) in zip(calls, _round(k, v, padding, neighbours, plan), strict=True):
        for call in step:
            part, part_lse = attention(
                q[:, call.rows],
                keys[0][:, call.keys],
                keys[1][:, call.keys],
                return_lse=True,
                **call.options(plan, mask),
            )
            total.add(call.rows, part, part_lse)
    return total.out, total.lse


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
        late: list[tuple[slice, torch.Tensor]] = []  # for dq, to be added while something travels
        own: list[torch.Tensor] = []
        travelling: list[torch.Tensor] = []  # gradients of the keys that are here, without theirs
        rounds = _round(k, v, padding, neighbours, plan)
        for step, (source, (keys, mask)) in enumerate(zip(plan.sources, rounds, strict=True)):
            coming, works = neighbours.pass_on(travelling) if step > 1 else ([], [])
            here: list[torch.Tensor | None] = [None, None]
            for call in plan.calls(source):
                dq = _add_all(dq, late, q, exact)
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
                late = [(call.rows, part_q)]
                here = [
                    _add(total, call.keys, part, like, exact)
                    for total, part, like in zip(here, parts, (k, v), strict=True)
                ]
            for work in works:
                work.wait()
            sums = [
                _zeros(like, exact) if total is None else total
                for total, like in zip(here, (k, v), strict=True)
            ]
            for total, more in zip(sums, coming, strict=bool(coming)):
                total.add_(more)
            own, travelling = (sums, []) if step == 0 else (own, sums)
        home, works = neighbours.pass_on([x.to(q.dtype) for x in travelling])
        dq = _add_all(dq, late, q, exact)
        dq = torch.zeros_like(q) if dq is None else dq.to(q.dtype)
        for work in works:
            work.wait()
        for total, more in zip(own, home, strict=bool(home)):
            total.add_(more)
        return dq, own[0].to(k.dtype), own[1].to(v.dtype), None, None, None


def _round(
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None,
    neighbours: _Neighbours,
    plan: _Plan,
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor | None]]:
    """Keys and values and their padding of `plan.sources`; the next are on their way."""
    here = [k.contiguous(), v.contiguous()]
    if padding is not None:
        here.append(padding.to(torch.uint8).contiguous())
    for step in range(plan.size):
        following, works = neighbours.pass_on(here) if step < plan.size - 1 else ([], [])
        yield here, here[2].bool() if len(here) > 2 else None
        for work in works:
            work.wait()
        here = following


def _zeros(like: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=exact, device=like.device)  # contiguous, unlike zeros_like


class _Total:
    """Output and lse of queries, put together of parts; rows that see nothing stay at 0.

    A row's first part is its output as it is. Of more, the last goes from their sum in fp32
    straight into the output: passes over that are what a merge costs.

    Attributes:
        out: as q.
        lse: fp32 (batch, num_heads, seqlen).
    """

    def __init__(self, q: torch.Tensor, plan: _Plan, coming: list[slice]):
        """
        Args:
            q: of all rows.
            plan: of the ring.
            coming: rows of each part, in order.
        """
        self._plan, self._exact = plan, _exact(q.dtype)
        self._left = Counter(piece for rows in coming for piece in plan.pieces_of(rows))
        self._sums: dict[tuple[int, int], torch.Tensor | None] = {}  # None: there is one part
        if not coming or coming[0] != _ALL:
            self.out = _zeros(q, q.dtype)
            shape = (q.shape[0], q.shape[2], q.shape[1])
            self.lse = torch.full(shape, float("-inf"), dtype=self._exact, device=q.device)

    def add(self, rows: slice, part: torch.Tensor, part_lse: torch.Tensor) -> None:
        """A part of some rows."""
        pieces = self._plan.pieces_of(rows)
        self._left.subtract(pieces)
        if not self._sums and rows == _ALL:
            self.out, self.lse = part, part_lse.to(self._exact)
            self._sums = dict.fromkeys(pieces)
            return
        for piece in pieces:
            its = slice(piece[0] - (rows.start or 0), piece[1] - (rows.start or 0))
            self._add(piece, part[:, its], part_lse[..., its])

    def _add(self, piece: tuple[int, int], part: torch.Tensor, part_lse: torch.Tensor) -> None:
        out, lse = self.out[:, slice(*piece)], self.lse[..., slice(*piece)]
        if piece not in self._sums:
            self._sums[piece] = None
            out.copy_(part)
            lse.copy_(part_lse)
            return
        both = torch.logaddexp(lse, part_lse)
        base = both.masked_fill(both == float("-inf"), 0.0)
        old, new = (
            (x - base).exp_().transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse)
        )  # (batch, seqlen, num_heads, 1)
        total = self._sums[piece]
        total = out * old if total is None else total.mul_(old)
        if self._left[piece]:
            self._sums[piece] = total.addcmul_(part, new)
        else:
            self._sums[piece] = torch.addcmul(total, part, new, out=out)
        lse.copy_(both)


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


def _add_all(
    total: torch.Tensor | None,
    parts: list[tuple[slice, torch.Tensor]],
    like: torch.Tensor,
    exact: torch.dtype,
) -> torch.Tensor | None:
    for tokens, part in parts:
        total = _add(total, tokens, part, like, exact)
    parts.clear()
    return total
