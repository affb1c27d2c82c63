"""Blocks chosen by what q and k hold, on the device, at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..errors import MaskError
from .block_mask import FULL_TILE, BlockMask, check_block_size, from_grid
from .pattern import Pattern
from .tokens import at_least

_NEVER, _ALWAYS = float("-inf"), float("inf")


@dataclass(frozen=True)
class TopKBlocks(Pattern):
    """For each head and block of queries, the `count` blocks of keys with the largest scores.

    Not a set of positions, so without `visible`, and not to be combined.
    """

    count: int
    block: int
    per_group: bool

    @property
    def positional(self) -> bool:
        """No."""
        return False

    @torch.no_grad()
    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        *,
        causal: bool,
        q_start: int | torch.Tensor | None = None,
        k_start: int = 0,
        key_padding: torch.Tensor | None = None,
    ) -> BlockMask:
        """The blocks for q and k, without a synchronisation; they carry no gradient.

        Args:
            q: (batch, seqlen_q, num_heads, head_dim).
            k: (batch, seqlen_k, num_heads_k, head_dim).
            causal: whether blocks past the queries' positions are out of the question.
            q_start, k_start: positions of the first query and key, as in `Pattern.dense`.
            key_padding: bool (batch, seqlen_k), True where a key is real; others do not count.

        Returns:
            A mask of full blocks, for each sequence and head, or key head with `per_group`.
        """
        seqlen_q, seqlen_k, size, device = q.shape[1], k.shape[1], self.block, q.device
        start = k_start + seqlen_k - seqlen_q if q_start is None else q_start
        pooled_q, _ = _pool(q, None, size)
        pooled_k, real = _pool(k, key_padding, size)  # b g nk d, b nk
        pooled_q = pooled_q.unflatten(1, (k.shape[2], -1))  # b g h nq d
        if self.per_group:
            pooled_q = pooled_q.mean(dim=2, keepdim=True)
        score = torch.einsum("bghid,bgjd->bghij", pooled_q, pooled_k).flatten(1, 2)
        rows, columns = score.shape[2:]
        first = torch.arange(rows, device=device)[:, None] * size + start
        last = (first + size).clamp(max=start + seqlen_q) - 1
        key = torch.arange(columns, device=device) * size + k_start
        own = (key <= last) & (key + size > first)
        score = score.masked_fill(own | (key < k_start + size), _ALWAYS)
        if causal:
            score = score.masked_fill(key > last, _NEVER)
        score = score.masked_fill(~real[:, None, None], _NEVER)
        # Queries that do not start on a block of keys lie in two.
        aligned = isinstance(start, int) and (start - k_start) % size == 0
        count = min(self.count if aligned else self.count + 1, columns)
        best, chosen = score.topk(count, dim=-1)
        live = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, best > _NEVER)
        tile = torch.full((1,), FULL_TILE, device=device).expand(live.shape)
        tiles = torch.zeros(0, size, size // 32, dtype=torch.int32, device=device)
        capacity = live.shape[0] * live.shape[1] * rows * count
        return from_grid(live, tile, tiles, seqlen_q, seqlen_k, size, capacity)

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> NoReturn:
        """Refused."""
        raise MaskError(
            "top_k_blocks is chosen from q and k at each call and has no positions of its own; "
            "pass it as block_mask or to patch, and look at TopKBlocks.select's BlockMask."
        )

    def block_mask(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused."""
        self.visible(torch.zeros(()), torch.zeros(()))

    def dense(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused."""
        self.visible(torch.zeros(()), torch.zeros(()))


def _pool(
    x: torch.Tensor, real: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (batch, heads, blocks, head_dim), fp32, and whether a block has tokens, bool (batch,
    blocks)."""
    batch, seqlen = x.shape[:2]
    if real is None:
        real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    counts = real.float()
    pad = -seqlen % size
    total = torch.nn.functional.pad(x.float() * counts[..., None, None], (0, 0, 0, 0, 0, pad))
    total = total.unflatten(1, (-1, size)).sum(dim=2)
    counts = torch.nn.functional.pad(counts, (0, pad)).unflatten(1, (-1, size)).sum(dim=2)
    means = total / counts.clamp(min=1.0)[..., None, None]
    return means.transpose(1, 2), counts > 0


def top_k_blocks(k: int, *, block_size: int = 128, per_group: bool = False) -> Pattern:
    """For each head and block of queries, the k blocks of keys whose mean fits best.

    The score of a pair of blocks is the product of the means of q and of k. The queries' own block
    and the first are always among the k. In a causal model, later blocks are never. Chosen at every
    call on the device; a single query (decode) sees all.

    Args:
        k: blocks of keys a block of queries, at least 2.
        block_size: tokens a block, a multiple of 32.
        per_group: choose once for the query heads of a key head, by the mean of their q.

    Raises:
        MaskError: k or block_size.

    Source: block selection by mean pooling as in MoBA (arXiv 2502.13189), here for blocks
        of queries.
    """
    check_block_size(at_least("top_k_blocks' block_size", block_size, 1))
    return TopKBlocks(at_least("top_k_blocks' k", k, 2), block_size, per_group)
