"""Who sees whom, for the torch engine: a range of keys per row, and from it a tile's key blocks.

The host needs numbers to skip blocks and to leave whole blocks untested. It has all of them for
tensors on the CPU; elsewhere reading them would synchronise, so there it knows what follows from
shapes and scalars alone, and every block whose rules include a tensor gets the element test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .padding import unpack_key_bits
from .torch_blocks import ListedBlocks

# Key blocks start on a multiple of this, dropout's tile of columns.
ALIGNMENT = 32


def host_readable(device: torch.device) -> bool:
    """Whether reading a tensor of `device` on the host costs no synchronisation."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Rules:
    """The mask arguments of one dense call; fields as in `MaskArguments`.

    lengths_q, lengths_k, int (batch,), stand for sequences of different lengths padded to one: rows
    past lengths_q see nothing.
    """

    causal: bool
    window_left: int
    window_right: int
    seqused_k: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    key_bits: torch.Tensor | None = None
    doc_range: torch.Tensor | None = None
    lengths_q: torch.Tensor | None = None
    lengths_k: torch.Tensor | None = None

    @property
    def static(self) -> bool:
        """Whether shapes and scalars are all there is."""
        return not self.shifted and all(
            x is None for x in (self.key_range, self.key_bits, self.doc_range)
        )

    @property
    def shifted(self) -> bool:
        """Whether the alignment of causal and window depends on a tensor."""
        return any(x is not None for x in (self.seqused_k, self.lengths_q, self.lengths_k))


@dataclass(frozen=True)
class Block:
    """Keys [begin, end) of a tile, and which tests a pair of it may fail.

    Attributes:
        begin, end: keys.
        left, right: a row's range may start after `begin`, or end before `end`.
        holes: a key may be hidden by its bit.
        listed: a pair may be hidden by a tile of the block lists.
    """

    begin: int
    end: int
    left: bool
    right: bool
    holes: bool
    listed: bool


class RowMask:
    """The rules turned into one range of keys per row, and one bit per key.

    Attributes:
        shift: how far the diagonal lies to the right; int, or int64 (batch, 1) on the device.
        begin, end: int64 (batch or 1, seqlen_q) on the device; row i sees keys of [begin, end). A
            row that sees none has (seqlen_k, 0).
        bits: bool (batch, seqlen_k) or None.
        lists: block lists or None.
        seen_keys: no row sees a key from here on, as far as the host knows.
        lengths_q, lengths_k: int (batch,), where sequences end; None for all rows and keys.
    """

    def __init__(
        self,
        rules: Rules,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device,
        lists: ListedBlocks | None = None,
    ):
        self.seqlen_k, self.lists = seqlen_k, lists
        self.lengths_q = rules.lengths_q
        self.lengths_k = rules.lengths_k if rules.seqused_k is None else rules.seqused_k
        self.shift = _shift(rules, seqlen_q, seqlen_k)
        self.begin, self.end = _row_ranges(rules, self.shift, seqlen_q, seqlen_k, device)
        self.bits = None
        if rules.key_bits is not None:
            self.bits = unpack_key_bits(rules.key_bits, seqlen_k)

        self.readable = host_readable(device)
        self.exact = self.readable or rules.static
        self.host_begin, self.host_end = self.begin, self.end
        if not self.readable:
            scalars = Rules(rules.causal, rules.window_left, rules.window_right)
            if rules.shifted:
                scalars = Rules(False, -1, -1)
            self.host_begin, self.host_end = _row_ranges(
                scalars, seqlen_k - seqlen_q, seqlen_q, seqlen_k, torch.device("cpu")
            )

        self.seen_keys = int(self.host_end.amax()) if self.host_end.numel() else 0

    def blocks(self, batches: slice, heads: slice, rows: slice, block_size: int) -> Iterator[Block]:
        """The key blocks, of at most `block_size`, that a tile of rows meets in `batches` and
        query `heads`."""
        begin = _batches(self.host_begin, batches)[:, rows]
        end = _batches(self.host_end, batches)[:, rows]
        first, last = int(begin.amin()) // ALIGNMENT * ALIGNMENT, int(end.amax())
        if self.exact:
            every_from, every_to = int(begin.amax()), int(end.amin())
        else:
            every_from, every_to = self.seqlen_k, 0
        spans: Iterable[tuple[int, int, bool]] = [(0, last, False)]
        if self.lists is not None:
            spans = self.lists.spans(batches, heads, rows, self.seqlen_k)
        for begin_span, end_span, listed in spans:
            end_span = min(end_span, last)
            for start in range(max(begin_span, first), end_span, block_size):
                stop = min(start + block_size, end_span)
                holes = self.bits is not None
                if self.bits is not None and self.readable:
                    holes = not bool(self.bits[batches, start:stop].all())
                yield Block(start, stop, start < every_from, stop > every_to, holes, listed)

    def hidden_by_lists(
        self, batches: slice, heads: slice, rows: slice, block: Block
    ) -> torch.Tensor | None:
        """bool (batches or 1, heads or 1, rows, keys of the block), or None for nothing."""
        if self.lists is None or not block.listed:
            return None
        return ~self.lists.visible(batches, heads, rows, block.begin, block.end)

    def bias(
        self, batches: slice, rows: slice, block: Block, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """What to add to the logits of a block, broadcastable to (batches, rows, keys).

        -inf where a pair does not see each other, else 0; None if the whole block is seen. (Adding
        is an order of magnitude faster than filling by a broadcast mask.)
        """
        j = torch.arange(block.begin, block.end, device=self.begin.device)
        hidden = []
        if block.left:
            hidden.append(j < _batches(self.begin, batches)[:, rows, None])
        if block.right:
            hidden.append(j >= _batches(self.end, batches)[:, rows, None])
        if block.holes and self.bits is not None:
            hidden.append(~self.bits[batches, None, block.begin : block.end])
        if not hidden:
            return None
        either = functools.reduce(torch.logical_or, hidden)
        return torch.zeros(either.shape, dtype=dtype, device=j.device).masked_fill_(
            either, float("-inf")
        )

    def distance(self, batches: slice, rows: slice, block: Block) -> torch.Tensor:
        """|i + shift - j|, int64 (batches or 1, rows, keys of the block)."""
        device = self.begin.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(block.begin, block.end, device=device)
        if isinstance(self.shift, torch.Tensor):
            return (i + self.shift[batches, :, None] - j).abs()
        return (i + (self.shift - j)).abs()[None]


def _batches(ranges: torch.Tensor, batches: slice) -> torch.Tensor:
    return ranges if ranges.shape[0] == 1 else ranges[batches]


def _shift(rules: Rules, seqlen_q: int, seqlen_k: int) -> int | torch.Tensor:
    if not rules.shifted:
        return seqlen_k - seqlen_q
    shift: Any = -seqlen_q if rules.lengths_q is None else -rules.lengths_q.long()
    if rules.seqused_k is not None:
        shift = shift + rules.seqused_k.long()
    elif rules.lengths_k is not None:
        shift = shift + rules.lengths_k.long()
    else:
        shift = shift + seqlen_k
    return shift[:, None]


def _row_ranges(
    rules: Rules,
    shift: int | torch.Tensor,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(seqlen_q, device=device)[None]
    begin, end = torch.zeros_like(i), torch.full_like(i, seqlen_k)
    for used in (rules.seqused_k, rules.lengths_k):
        if used is not None:
            end = torch.minimum(end, used.long()[:, None])
    right = 0 if rules.causal else rules.window_right
    if rules.window_left >= 0:
        begin = torch.maximum(begin, i + (shift - rules.window_left))
    if right >= 0:
        end = torch.minimum(end, i + (shift + right + 1))
    if rules.key_range is not None:
        begin = torch.maximum(begin, rules.key_range[:, :1].long())
        end = torch.minimum(end, rules.key_range[:, 1:].long())
    if rules.doc_range is not None:
        begin = torch.maximum(begin, rules.doc_range[..., 0].long())
        end = torch.minimum(end, rules.doc_range[..., 1].long())
    nothing = begin >= end
    if rules.lengths_q is not None:
        nothing = nothing | (i >= rules.lengths_q[:, None])
    return begin.masked_fill(nothing, seqlen_k), end.masked_fill(nothing, 0)
