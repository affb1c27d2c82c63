"""The tensors of a cell, and the piece of them that is compared with the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from ..masks import from_block_layout
from ..ops.arguments import MaskArguments
from ..ops.padding import pack_key_padding
from .cells import TILE, Cell

Tensors = tuple[torch.Tensor, ...]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# A cache is read from memory, not from L2, if this many times the L2 lies between two readings.
L2_FACTOR = 4


class Problem:
    """Standard normal q, k, v and dout of a cell, the same for every contestant.

    Attributes:
        cell: what they are for.
        q, k, v: (batch, seqlen, heads, head_dim); packed, (total, heads, head_dim). Leaves that
            require gradients, but for decode. Decode's k and v lie in memory as transformers'
            caches do, (batch, heads, seqlen, head_dim).
        dout: like q; 0 at padding, where no loss is.
        sources: the (k, v) to read from in turns, so that decode finds none of it in L2; (k, v) is
            the first.
    """

    def __init__(self, cell: Cell, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.cell = cell
        draw = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=dtype, device=device)

        rows = (1,) if cell.decode else (cell.seqlen,)
        shape = (sum(cell.lengths),) if cell.packed else (cell.batch, *rows)
        self.q = random(*shape, cell.num_heads, cell.head_dim)
        self.dout = random(*self.q.shape)
        if cell.decode:
            cache = (cell.batch, cell.num_heads_k, cell.seqlen, cell.head_dim)
            self.sources = [
                (random(*cache).transpose(1, 2), random(*cache).transpose(1, 2))
                for _ in range(_copies(self.q.device, cell.kv_bytes))
            ]
        else:
            shape = (*shape, cell.num_heads_k, cell.head_dim)
            self.sources = [(random(*shape).requires_grad_(), random(*shape).requires_grad_())]
            self.q.requires_grad_()
        self.k, self.v = self.sources[0]
        if cell.layout == "padded":
            self.dout[~self.real] = 0

    def without_dropout(self) -> Problem:
        """The same tensors under the same mask, with dropout 0."""
        other = object.__new__(Problem)
        other.__dict__ = {**vars(self), "cell": replace(self.cell, dropout=0.0)}
        return other

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 (batch + 1,), of the sequences without padding."""
        edges = [0, *accumulate(self.cell.lengths)]
        return torch.tensor(edges, dtype=torch.int32, device=self.q.device)

    @cached_property
    def real(self) -> torch.Tensor:
        """bool (batch, seqlen), True where the token is no padding, which is on the left."""
        start = self.cell.seqlen - torch.tensor(self.cell.lengths, device=self.q.device)
        return torch.arange(self.cell.seqlen, device=self.q.device) >= start[:, None]

    @cached_property
    def documents(self) -> torch.Tensor:
        """int64 (total,), the number of each packed token's sequence."""
        lengths = torch.tensor(self.cell.lengths, device=self.q.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=self.q.device), lengths)

    @cached_property
    def mask(self) -> MaskArguments | None:
        """What ours is given; padding and blocks as the patch gives them, once for all layers."""
        given: dict[str, Any] = {}
        if self.cell.density:
            pattern = from_block_layout(self.cell.blocks, TILE)
            seqlen, num_heads = self.cell.seqlen, self.cell.num_heads
            given["block_mask"] = pattern.block_mask(
                seqlen, num_heads=num_heads, device=self.q.device
            )
        if self.cell.packed:
            longest = max(self.cell.lengths)
            given |= {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens}
            given |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        if self.cell.layout == "padded":
            given["key_range"], given["key_bits"] = pack_key_padding(self.real)
        return MaskArguments(**given) if given else None

    def gradients(self, out: torch.Tensor) -> Tensors:
        """dq, dk and dv, by autograd; may be called again."""
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.dout, retain_graph=True)

    def probe(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is checked of q, k, v, out or a gradient: the last sequence and key head.

        Args:
            tensor: in the problem's layout.

        Returns:
            (1, length, heads, head_dim), heads the last key head's; detached.
        """
        length = self.cell.lengths[-1]
        first = -(tensor.shape[-2] // self.cell.num_heads_k)
        rows = tensor if self.cell.packed else tensor[-1]
        return rows[-length:, first:].detach()[None]


def _copies(device: torch.device, size: int) -> int:
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return math.ceil(L2_FACTOR * l2 / size)
