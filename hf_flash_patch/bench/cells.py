"""What is measured: cells, their groups, and the work that counts.

Hidden size 2048 and 16384 tokens a call (batch 1 past that), as in the papers, unless a group says
otherwise. Work is what the mask leaves visible. As in the papers the diagonal of a causal mask
counts half: seqlen^2 / 2 pairs where exactly seqlen * (seqlen + 1) / 2 are visible, 0.2% more at
512.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch

HIDDEN, TOKENS = 2048, 16384
SHORTEST = 128

# Of rows and of keys: the compiled tiles are about that size, and only ratios of counts matter.
TILE = 128

# Of K and V together, bytes: half of the memory of the GPUs that serve models.
KV_LIMIT = 40 * 2**30

LAYOUTS = ("dense", "packed", "documents", "padded", "decode")


@dataclass(frozen=True)
class Cell:
    """One shape and mask; self-attention, or one query per sequence over a cache (decode).

    Attributes:
        group: the group's name in `GROUPS`.
        layout: "dense"; "packed", sequences of random lengths one after the other (cu_seqlens);
            "documents", the same with lengths as texts have them; "padded", random lengths padded
            on the left; "decode".
        head_dim, num_heads, num_heads_k: as in `flash_attn_func`.
        causal: whether a query sees only keys up to its own position.
        seqlen: keys of the longest sequence.
        batch: number of sequences; packed, batch * seqlen is the number of tokens.
        window: how many keys a query sees, its own position included; 0 for all.
        dropout: probability.
        density: part of the blocks of `TILE` x `TILE` off the diagonal that are visible, drawn for
            each head; the diagonal is. 0: no block mask.
    """

    group: str
    layout: str
    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    num_heads: int
    num_heads_k: int
    window: int = 0
    dropout: float = 0.0
    density: float = 0.0

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences, in tokens; random ones are the same in every process."""
        if self.layout in ("dense", "decode"):
            return (self.seqlen,) * self.batch
        draw = random.Random(0)
        if self.layout == "padded":
            return tuple(draw.randint(SHORTEST, self.seqlen) for _ in range(self.batch))
        lengths: list[int] = []
        left = self.batch * self.seqlen
        while left:
            if self.layout == "packed":
                length = draw.randint(SHORTEST, self.seqlen)
            else:  # most are short, the first is the longest
                length = round(draw.lognormvariate(math.log(300), 0.8)) if lengths else self.seqlen
            lengths.append(min(left, self.seqlen, length))
            left -= lengths[-1]
        return tuple(lengths)

    @property
    def ragged(self) -> bool:
        """Whether the sequences differ in length."""
        return self.packed or self.layout == "padded"

    @property
    def packed(self) -> bool:
        """Whether the sequences come one after the other, without padding."""
        return self.layout in ("packed", "documents")

    @property
    def decode(self) -> bool:
        """Whether there is one query per sequence, and no backward."""
        return self.layout == "decode"

    @property
    def window_size(self) -> tuple[int, int]:
        """As `flash_attn_func` takes it."""
        return (self.window - 1, 0) if self.window else (-1, -1)

    @property
    def pairs(self) -> float:
        """Visible (query, key) pairs of one head, over the batch; of blocks, the mean of heads."""
        if self.density:
            return self.tiles * TILE**2 / self.num_heads
        return sum(self._pairs(length) for length in self.lengths)

    def _pairs(self, length: int) -> float:
        if self.decode:
            return length
        if not self.causal:
            return length**2
        window = min(self.window or length, length)
        return window * length - window**2 / 2

    @cached_property
    def blocks(self) -> torch.Tensor:
        """bool (num_heads, n, n), the visible blocks where there is a density; the same in every
        process."""
        n = self.seqlen // TILE
        draw = torch.Generator().manual_seed(0)
        drawn = torch.rand(self.num_heads, n, n, generator=draw) < self.density
        return drawn | torch.eye(n, dtype=torch.bool)

    @property
    def flop(self) -> float:
        """Of the forward: two products of head_dim multiply-adds a pair. Backward has 2.5 times."""
        return 4 * self.num_heads * self.head_dim * self.pairs

    @property
    def kv_bytes(self) -> int:
        """Of K and V, in 16 bits."""
        return 2 * 2 * self.batch * self.seqlen * self.num_heads_k * self.head_dim

    @property
    def tiles(self) -> int:
        """Tiles of `TILE` x `TILE` with a visible pair, over batch and heads; no window."""
        if self.density:
            return self.batch * int(self.blocks.sum())
        sides = [math.ceil(length / TILE) for length in self.lengths]
        return self.num_heads * sum(n * (n + 1) // 2 if self.causal else n**2 for n in sides)

    @property
    def uniform(self) -> Cell:
        """The dense cell nearest to a ragged one: about its tokens and pairs, in equal lengths; or
        without its block mask."""
        if self.density:
            return replace(self, density=0.0)
        tokens = sum(self.lengths)
        seqlen = TILE * round(sum(n**2 for n in self.lengths) / tokens / TILE)
        return replace(self, layout="dense", seqlen=seqlen, batch=round(tokens / seqlen))

    def work(self, direction: str) -> float:
        """FLOP of "fwd" or "bwd"; bytes of K and V for decode, which is bound by reading them."""
        if self.decode:
            return self.kv_bytes
        return self.flop * (2.5 if direction == "bwd" else 1.0)

    @property
    def unit(self) -> str:
        """Of work per second."""
        return "GB/s" if self.decode else "TFLOP/s"

    @property
    def series(self) -> str:
        """What a line of the figure has in common."""
        words = [f"d{self.head_dim}", "decode" if self.decode else _mask(self.causal)]
        if self.num_heads != self.num_heads_k or self.decode:
            words.append(f"{self.num_heads}/{self.num_heads_k} heads")
        if self.window:
            words.append(f"window {self.window}")
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        if self.density:
            words.append(f"blocks {100 * self.density:.3g}%")
        if self.ragged:
            words.append("left-padded" if self.layout == "padded" else self.layout)
        return " ".join(words)

    @property
    def size(self) -> str:
        """What tells the cells of a series apart."""
        if self.layout == "dense" or self.packed:
            return short(self.seqlen * (self.batch if self.packed else 1))
        return f"{self.batch}x{short(self.seqlen)}"

    @property
    def name(self) -> str:
        """Series and size."""
        return f"{self.series} {self.size}"


def short(number: int) -> str:
    """16384 as "16k"; what is no multiple of 1024 stays as it is."""
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def cells(groups: list[str]) -> list[Cell]:
    """The cells of the named groups, in the order of the names; "all" names every group."""
    names = [name for group in groups for name in (GROUPS if group == "all" else [group])]
    return [cell for name in dict.fromkeys(names) for cell in GROUPS[name](name)]


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _dense(
    group: str,
    head_dim: int,
    causal: bool,
    seqlen: int,
    *,
    gqa: int = 1,
    window: int = 0,
    dropout: float = 0.0,
) -> Cell:
    num_heads = HIDDEN // head_dim
    batch = max(1, TOKENS // seqlen)
    heads = (num_heads, num_heads // gqa)
    return Cell(group, "dense", head_dim, causal, seqlen, batch, *heads, window, dropout)


def _core(group: str) -> Iterator[Cell]:
    for head_dim, causal in product((64, 128), (False, True)):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            yield _dense(group, head_dim, causal, seqlen)


def _head_dims(group: str) -> Iterator[Cell]:
    for head_dim, causal, seqlen in product((32, 96, 256), (False, True), (1024, 8192)):
        yield _dense(group, head_dim, causal, seqlen)


def _gqa(group: str) -> Iterator[Cell]:
    for causal, seqlen in product((False, True), (2048, 8192)):
        yield _dense(group, 128, causal, seqlen, gqa=4)


def _window(group: str) -> Iterator[Cell]:
    yield _dense(group, 128, True, 16384, window=1024)


def _dropout(group: str) -> Iterator[Cell]:
    for head_dim, causal, seqlen in product((64, 128), (False, True), (512, 1024, 4096)):
        yield _dense(group, head_dim, causal, seqlen, dropout=0.1)


def _varlen(group: str) -> Iterator[Cell]:
    """32768 tokens."""
    for head_dim in (64, 128):
        heads = (HIDDEN // head_dim, HIDDEN // head_dim)
        for causal in (False, True):
            yield Cell(group, "packed", head_dim, causal, 8192, 4, *heads)
        yield Cell(group, "padded", head_dim, True, 4096, 8, *heads)


def _documents(group: str) -> Iterator[Cell]:
    """32768 tokens, the longest document 4096, half of them 300 and fewer."""
    for head_dim, causal in ((64, False), (64, True), (128, True)):
        heads = (HIDDEN // head_dim, HIDDEN // head_dim)
        yield Cell(group, "documents", head_dim, causal, 4096, 8, *heads)


def _decode(group: str) -> Iterator[Cell]:
    """Grouped heads as in LLaMA, and as many heads of K and V as of Q; smallest cache first."""
    grouped = product((8,), (1, 4, 16, 64), (4096, 32768, 131072))
    equal = product((32,), (1, 4, 16, 64), (4096, 32768))
    made = [
        Cell(group, "decode", 128, False, seqlen, batch, 32, num_heads_k)
        for num_heads_k, batch, seqlen in (*grouped, *equal)
    ]
    yield from sorted((c for c in made if c.kv_bytes <= KV_LIMIT), key=lambda c: c.kv_bytes)


def _blocks(group: str) -> Iterator[Cell]:
    for head_dim, seqlen in ((64, 8192), (128, 8192), (128, 32768)):
        for density in (0.05, 0.25, 0.5, 1.0):
            yield replace(_dense(group, head_dim, False, seqlen), density=density)


def _density(group: str) -> Iterator[Cell]:
    """Time against density, at lengths up to 128k."""
    for seqlen in (4096, 16384, 65536, 131072):
        for density in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0):
            yield replace(_dense(group, 128, False, seqlen), density=density)


def _long_sparse(group: str) -> Iterator[Cell]:
    """Table 20 of the FlashAttention paper (arXiv 2205.14135): 16 sequences, 8 heads of 64, where
    each query sees about 256 keys: its own block, and one more."""
    for seqlen in (1024, 4096, 16384, 65536):
        density = TILE / seqlen
        yield Cell(group, "dense", 64, False, seqlen, 16, 8, 8, density=density)


GROUPS: dict[str, Callable[[str], Iterator[Cell]]] = {
    "core": _core,
    "head_dims": _head_dims,
    "gqa": _gqa,
    "window": _window,
    "dropout": _dropout,
    "varlen": _varlen,
    "documents": _documents,
    "decode": _decode,
    "blocks": _blocks,
    "density": _density,
    "long_sparse": _long_sparse,
}
