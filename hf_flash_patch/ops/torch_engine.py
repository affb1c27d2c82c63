"""The torch engine: exact attention in tiles with online softmax, in linear memory, on any device.

Products and sums are fp32 for fp32, bf16 and fp16 inputs, fp64 for fp64. Work is cut three ways:
into chunks of (batch, key head), into tiles of query rows, and into blocks of keys, of which those
that nobody sees are left out.

Legend: n chunk (batches x key heads), g query heads per key head, i rows of a tile, j keys of a
block, d head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .dropout import keep_scale, keep_threshold
from .dropout import keep_tile as dropout_keep_tile
from .torch_blocks import ListedBlocks, listed_blocks
from .torch_mask import Block, RowMask, Rules


@dataclass(frozen=True)
class Tiling:
    """How work is cut: `rows` x `keys` a tile, and at most `elements` logits at a time."""

    rows: int
    keys: int
    elements: int


# A few tiles of 2^17 fp32 logits fit a core's caches; a GPU wants enough of them to fill it.
HOST_TILING = Tiling(rows=256, keys=512, elements=2**19)
DEVICE_TILING = Tiling(rows=1024, keys=1024, elements=2**25)


@dataclass(frozen=True)
class Call:
    """Everything about a call but q, k and v, in the order of the operators' schema."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: torch.Tensor | None
    key_range: torch.Tensor | None
    key_bits: torch.Tensor | None
    doc_range: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    rng_state: torch.Tensor | None
    attn_bias: torch.Tensor | None
    row_offsets: torch.Tensor | None
    row_entries: torch.Tensor | None
    column_offsets: torch.Tensor | None
    column_entries: torch.Tensor | None
    tiles: torch.Tensor | None
    tiles_t: torch.Tensor | None
    host_offsets: torch.Tensor | None
    host_entries: torch.Tensor | None
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    # Which sequence of the batch the first one of this call is; dropout counts from it.
    first_sequence: int = 0
    lengths_q: torch.Tensor | None = None
    lengths_k: torch.Tensor | None = None

    @property
    def rules(self) -> Rules:
        """The part that says which pairs see each other."""
        return Rules(
            causal=self.causal,
            window_left=self.window_left,
            window_right=self.window_right,
            seqused_k=self.seqused_k,
            key_range=self.key_range,
            key_bits=self.key_bits,
            doc_range=self.doc_range,
            lengths_q=self.lengths_q,
            lengths_k=self.lengths_k,
        )

    def lists(self, num_heads: int) -> ListedBlocks | None:
        """The block lists, for num_heads query heads."""
        tensors = (
            *(self.row_offsets, self.row_entries, self.column_offsets, self.column_entries),
            *(self.tiles, self.tiles_t, self.host_offsets, self.host_entries),
        )
        return listed_blocks(tensors, num_heads, self.first_sequence)


def _exp_(x: torch.Tensor) -> torch.Tensor:
    """exp in place, by exp2: on a CPU, exp is four times slower where its argument is -inf."""
    return x.mul_(math.log2(math.e)).exp2_()


@dataclass(frozen=True)
class Tile:
    """A chunk's rows: `batches` and `heads` (key heads) of the call, `rows` of each."""

    batches: slice
    heads: slice
    rows: slice


class Engine:
    """One dense call, cut into tiles."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call):
        self.q, self.k, self.v, self.call = q, k, v, call
        self.batch, self.seqlen_q, self.num_heads, self.head_dim = q.shape
        self.seqlen_k, self.num_heads_k, self.head_dim_v = v.shape[1:]
        self.groups = self.num_heads // self.num_heads_k
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.tiling = HOST_TILING if q.device.type == "cpu" else DEVICE_TILING
        lists = call.lists(self.num_heads)
        if lists is not None and lists.host_offsets is not None:
            # A tile meets what any of its rows meets: one row of blocks a tile.
            self.tiling = replace(self.tiling, rows=lists.block_size)
        self.mask = RowMask(call.rules, self.seqlen_q, self.seqlen_k, q.device, lists)
        self.drops = call.rng_state is not None and keep_threshold(call.dropout_p) < 256
        self.kept_scale = keep_scale(call.dropout_p)
        # (batch or 1, key heads, groups, 1, 1)
        self.slopes = None
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes.to(self.dtype)
            slopes = slopes[None] if slopes.dim() == 1 else slopes
            self.slopes = self._by_group(slopes, dim=1)[..., None, None]
        # (batch, key heads, groups, seqlen_q, seqlen_k), expanded
        self.bias = None
        if call.attn_bias is not None:
            shape = (self.batch, self.num_heads, self.seqlen_q, self.seqlen_k)
            self.bias = self._by_group(call.attn_bias.expand(shape), dim=1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, (batch, seqlen_q, num_heads, head_dim of v) in q's dtype, and lse.

        lse is (batch, num_heads, seqlen_q), natural logarithm, fp32 (fp64 for fp64 inputs).
        """
        q = self.q
        out = q.new_zeros((*q.shape[:-1], self.head_dim_v))
        lse = q.new_full(
            (self.batch, self.num_heads, self.seqlen_q), float("-inf"), dtype=self.dtype
        )
        out_by_group = self._by_group(out, dim=2)  # b i h g d
        lse_by_group = self._by_group(lse, dim=1)  # b h g i
        for batches, heads in self._chunks():
            qc, kc, vc = self._chunk_inputs(batches, heads)
            for rows in self._row_tiles():
                tile = Tile(batches, heads, rows)
                results = self._forward_tile(tile, qc, kc, vc)
                if results is None:
                    continue
                out_tile, lse_tile = results
                shape = (batches.stop - batches.start, heads.stop - heads.start, self.groups, -1)
                lse_by_group[batches, heads, :, rows] = lse_tile.view(shape)
                out_tile = out_tile.view(*shape, self.head_dim_v)
                out_by_group[batches, rows, heads] = out_tile.permute(0, 3, 1, 2, 4).to(out.dtype)
        return out, lse

    def _forward_tile(
        self, tile: Tile, qc: torch.Tensor, kc: torch.Tensor, vc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """out (n, g * i, d) and lse (n, g * i, 1) of a tile; None if it meets no key."""
        q = qc[:, :, tile.rows].flatten(1, 2)  # n gi d
        highest = q.new_full((*q.shape[:2], 1), float("-inf"))
        total = torch.zeros_like(highest)
        acc: torch.Tensor | None = None
        for block in self._blocks(tile):
            s, _ = self._logits(tile, block, q, kc)  # n gi j
            peak = torch.maximum(highest, s.amax(dim=-1, keepdim=True))
            # A row that has seen nothing yet would give -inf - (-inf).
            base = peak.masked_fill(peak == float("-inf"), 0.0)
            p = _exp_(s.sub_(base))
            block_total = p.sum(dim=-1, keepdim=True)
            if self.drops:
                p = p.mul_(self._keep(tile, block))
            values = vc[:, block.begin : block.end]
            if acc is None:
                total, acc = block_total, torch.bmm(p, values)
            else:
                decay = torch.exp(highest - base)
                total = total.mul_(decay).add_(block_total)
                acc = acc.mul_(decay).baddbmm_(p, values)
            highest = peak
        if acc is None:
            return None
        empty = highest == float("-inf")
        lse = highest + total.masked_fill(empty, 1.0).log()
        acc = acc / total.masked_fill(empty, 1.0)
        return (acc * self.kept_scale if self.drops else acc), lse

    def backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, in their shapes and dtypes.

        Args:
            dout: (batch, seqlen_q, num_heads, head_dim of v).
            dlse: (batch, num_heads, seqlen_q), or None.
            out, lse: what `forward` returned.
        """
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in self._inputs)
        dq_by_group = self._by_group(dq, dim=2)  # b i h g d
        for batches, heads in self._chunks():
            qc, kc, vc = self._chunk_inputs(batches, heads)
            gradients = self._chunk_gradients(batches, heads, dout, dlse, out, lse)
            dqc, dkc, dvc = torch.zeros_like(qc), torch.zeros_like(kc), torch.zeros_like(vc)
            for rows in self._row_tiles():
                tile = Tile(batches, heads, rows)
                self._backward_tile(tile, qc, kc, vc, gradients, dqc, dkc, dvc)
            n = (batches.stop - batches.start, heads.stop - heads.start)
            dqc = dqc.mul_(self.call.softmax_scale).unflatten(0, n)  # b h g i d
            dq_by_group[batches, :, heads] = dqc.permute(0, 3, 1, 2, 4).to(dq.dtype)
            keys = slice(self.mask.seen_keys)
            dk[batches, keys, heads] = dkc.unflatten(0, n).transpose(1, 2).to(dk.dtype)
            dv[batches, keys, heads] = dvc.unflatten(0, n).transpose(1, 2).to(dv.dtype)
        return dq, dk, dv

    def _backward_tile(
        self,
        tile: Tile,
        qc: torch.Tensor,
        kc: torch.Tensor,
        vc: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dqc: torch.Tensor,
        dkc: torch.Tensor,
        dvc: torch.Tensor,
    ) -> None:
        """Add a tile's share to the gradients of its chunk."""
        q = qc[:, :, tile.rows].flatten(1, 2)  # n gi d
        dout, delta, lse = (x[:, :, tile.rows].flatten(1, 2) for x in gradients)
        base, total = lse, None
        if self.bias is not None and self.bias.dtype != torch.bool:
            base, total = self._row_statistics(tile, q, kc)
        dq = torch.zeros_like(q)
        for block in self._blocks(tile):
            keys = slice(block.begin, block.end)
            s, slope = self._logits(tile, block, q, kc)
            p = _exp_(s.sub_(base))  # n gi j
            if total is not None:
                p.div_(total)
            dp = torch.bmm(dout, vc[:, keys].transpose(1, 2))
            if self.drops:
                keep = self._keep(tile, block).to(self.dtype).mul_(self.kept_scale)
                dp.mul_(keep)
                dvc[:, keys].baddbmm_((p * keep).transpose(1, 2), dout)
            else:
                dvc[:, keys].baddbmm_(p.transpose(1, 2), dout)
            ds = dp.sub_(delta).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dq.baddbmm_(ds, kc[:, keys])
            dkc[:, keys].baddbmm_(ds.transpose(1, 2), q)
        dqc[:, :, tile.rows] = dq.unflatten(1, (self.groups, -1))

    def _row_statistics(
        self, tile: Tile, q: torch.Tensor, kc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest logit and sum of exp(logit - largest), (n, g * i, 1) each; (+inf, 1) of no
        logits.

        lse says the same, unless a bias such as finfo.min leaves no digits for the sum.
        """
        highest = q.new_full((*q.shape[:2], 1), float("-inf"))
        total = torch.zeros_like(highest)
        for block in self._blocks(tile):
            s, _ = self._logits(tile, block, q, kc)
            peak = torch.maximum(highest, s.amax(dim=-1, keepdim=True))
            base = peak.masked_fill(peak == float("-inf"), 0.0)
            block_total = _exp_(s.sub_(base)).sum(dim=-1, keepdim=True)
            total = total.mul_(torch.exp(highest - base)).add_(block_total)
            highest = peak
        empty = highest == float("-inf")
        return highest.masked_fill(empty, float("inf")), total.masked_fill(empty, 1.0)

    def _logits(
        self, tile: Tile, block: Block, q: torch.Tensor, kc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masked logits (n, g * i, j), and the slope of softcap there, if any."""
        s = torch.bmm(q, kc[:, block.begin : block.end].transpose(1, 2))
        slope = None
        if self.call.softcap > 0.0:
            capped = s.div_(self.call.softcap).tanh_()
            slope = 1.0 - capped * capped
            s = capped.mul_(self.call.softcap)
        batches, heads, rows = tile.batches, tile.heads, tile.rows
        n = (batches.stop - batches.start, heads.stop - heads.start, self.groups)
        by_group = s.view(*n, rows.stop - rows.start, block.end - block.begin)  # b h g i j
        if self.slopes is not None:
            slopes = self.slopes[:, heads]
            slopes = slopes if slopes.shape[0] == 1 else slopes[batches]
            distance = self.mask.distance(batches, rows, block).to(self.dtype)
            by_group.addcmul_(slopes, distance[:, None, None], value=-1.0)
        if self.bias is not None:
            bias = self.bias[batches, heads, :, rows, block.begin : block.end]
            if bias.dtype == torch.bool:
                by_group.masked_fill_(~bias, float("-inf"))
            else:
                by_group.add_(bias.to(self.dtype))
        unlisted = self.mask.hidden_by_lists(batches, self._query_heads(heads), rows, block)
        if unlisted is not None:
            if unlisted.shape[1] > 1:
                unlisted = unlisted.unflatten(1, (-1, self.groups))
            else:
                unlisted = unlisted[:, None]
            by_group.masked_fill_(unlisted, float("-inf"))
        hidden = self.mask.bias(batches, rows, block, self.dtype)  # b i j
        if hidden is not None:
            by_group.add_(hidden[:, None, None])
        return s, slope

    def _keep(self, tile: Tile, block: Block) -> torch.Tensor:
        """Which probabilities of a block survive dropout, bool (n, g * i, j)."""
        device = self.q.device
        first = self.call.first_sequence
        b = torch.arange(tile.batches.start + first, tile.batches.stop + first, device=device)
        h = torch.arange(
            tile.heads.start * self.groups, tile.heads.stop * self.groups, device=device
        )
        heads = (b[:, None] * self.num_heads + h).flatten()
        assert self.call.rng_state is not None
        keep = dropout_keep_tile(
            self.call.rng_state,
            self.call.dropout_p,
            heads,
            tile.rows.start,
            tile.rows.stop,
            block.begin,
            block.end,
        )
        return keep.reshape(-1, self.groups * keep.shape[1], keep.shape[2])

    def _query_heads(self, heads: slice) -> slice:
        return slice(heads.start * self.groups, heads.stop * self.groups)

    def _blocks(self, tile: Tile) -> Iterator[Block]:
        heads = self._query_heads(tile.heads)
        return self.mask.blocks(tile.batches, heads, tile.rows, self.tiling.keys)

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Batches and key heads that are worked on at once."""
        tiling = self.tiling
        tile = min(tiling.rows, self.seqlen_q) * min(tiling.keys, self.seqlen_k) * self.groups
        if 0 in (tile, self.batch):
            return
        heads = max(1, min(self.num_heads_k, tiling.elements // tile))
        batches, lists = 1, self.mask.lists
        if lists is not None and lists.per_head:
            heads = 1  # those with lists of their own go each by themselves
        if heads == self.num_heads_k and not (lists is not None and lists.per_sequence):
            batches = max(1, min(self.batch, tiling.elements // (tile * heads)))
        for b in range(0, self.batch, batches):
            for h in range(0, self.num_heads_k, heads):
                yield (
                    slice(b, min(b + batches, self.batch)),
                    slice(h, min(h + heads, self.num_heads_k)),
                )

    def _row_tiles(self) -> Iterator[slice]:
        for i in range(0, self.seqlen_q, self.tiling.rows):
            yield slice(i, min(i + self.tiling.rows, self.seqlen_q))

    def _chunk_inputs(
        self, batches: slice, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (n, g, i, d), scaled, k and v (n, j, d), contiguous, in the dtype of computation.

        Of k and v the keys that some row sees; zeros past each sequence's length.
        """
        q = self._by_group(self.q, dim=2)[batches, :, heads].permute(0, 2, 3, 1, 4)
        q = self._copy(q, batches, self.mask.lengths_q).mul_(self.call.softmax_scale)
        keys = slice(self.mask.seen_keys)
        k, v = (
            self._copy(x[batches, keys, heads].transpose(1, 2), batches, self.mask.lengths_k)
            for x in (self.k, self.v)
        )
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)

    def _chunk_gradients(
        self,
        batches: slice,
        heads: slice,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dout (n, g, i, d); rowsum(dout * out) - dlse and lse (n, g, i, 1), lse +inf if -inf."""
        dout, out = (
            self._copy(
                self._by_group(x, dim=2)[batches, :, heads].permute(0, 2, 3, 1, 4),
                batches,
                self.mask.lengths_q,
            )
            for x in (dout, out)
        )
        delta = (dout * out).sum(dim=-1, keepdim=True)
        if dlse is not None:
            delta = delta - self._by_group(dlse, dim=1)[batches, heads][..., None]
        lse = self._by_group(lse, dim=1)[batches, heads][..., None]
        # A row that sees nothing has no gradient, whatever the one of its lse: exp(logit - inf) is
        # 0 for every logit, also for -inf, and nothing non-finite may meet that 0.
        empty = lse == float("-inf")
        delta, lse = delta.masked_fill(empty, 0.0), lse.masked_fill(empty, float("inf"))
        return dout.flatten(0, 1), delta.flatten(0, 1), lse.flatten(0, 1)

    def _by_group(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Query heads of dimension `dim` as (key heads, groups)."""
        return x.unflatten(dim, (self.num_heads_k, self.groups))

    def _copy(self, x: torch.Tensor, batches: slice, lengths: torch.Tensor | None) -> torch.Tensor:
        # x (b, ..., rows, d), lengths (batch,). What lies past a sequence may be anything, and 0
        # times NaN is NaN.
        copy = torch.empty(x.shape, dtype=self.dtype, device=x.device).copy_(x)
        if lengths is None:
            return copy
        if self.mask.readable:  # a fill by a broadcast mask takes four times the copy
            for sequence, length in zip(copy, lengths[batches].tolist(), strict=True):
                sequence[..., length:, :] = 0.0
            return copy
        past = torch.arange(x.shape[-2], device=x.device) >= lengths[batches, None]
        return copy.masked_fill_(past.view(len(past), *(1,) * (x.dim() - 3), -1, 1), 0.0)

    @property
    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v
