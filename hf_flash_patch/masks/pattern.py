"""The algebra: a pattern says which query positions see which key positions; `&`, `|`, `~`.

Positions count from the first key. Of seqlen_q queries and seqlen_k keys, query i stands at
position i + seqlen_k - seqlen_q: aligned bottom-right, as causal and windows are.

Legend: q, k int64 tensors of positions, of shapes that broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MaskError
from .grid import PARTIAL, Grid, Runs, everywhere

if TYPE_CHECKING:
    from .block_mask import BlockMask


@dataclass(frozen=True)
class Pattern:
    """Which tokens see each other, for any length; immutable, hashable, picklable.

    Combine with `&`, `|` and `~`. `str(pattern)` is an expression that `parse` reads back, which
    is how a model's config keeps it.
    """

    @property
    def positional(self) -> bool:
        """Whether positions alone decide; else q and k do, at each call."""
        return True

    @property
    def static_heads(self) -> int:
        """How many patterns there are among the heads, 0 for one a head; head h of num_heads uses
        number h * static_heads // num_heads."""
        return 1

    @property
    def batches(self) -> int:
        """1, or how many sequences have a pattern of their own."""
        return 1

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """What one sequence and head, of num_heads, see: a pattern without batches and heads of
        its own."""
        return self

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether q sees k, element by element, for what `at` returned."""
        raise NotImplementedError

    def runs(self, grid: Grid) -> Runs:
        """Which blocks of the grid are empty, partial and full, for what `at` returned."""
        return everywhere(grid, PARTIAL)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """int64 tensors (n,): blocks of the grid that start at (q, k) and agree in all have equal
        elements."""
        return [q, k]

    def check(self, grid: Grid) -> None:
        """Raise MaskError where the pattern was made for other lengths than the grid's."""

    def heads(self, num_heads: int) -> int:
        """How many different patterns num_heads heads have.

        Raises:
            MaskError: num_heads is no multiple of it.
        """
        heads = self.static_heads or num_heads
        if num_heads % heads:
            raise MaskError(
                f"{self._short()} has {heads} patterns among its heads, the call has {num_heads} "
                "heads; give one pattern a head, or one a group (num_heads_k)."
            )
        return heads

    def dense(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        num_heads: int | None = None,
        *,
        q_start: int | torch.Tensor | None = None,
        k_start: int = 0,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """The mask as bool (batch or 1, heads or 1, seqlen_q, seqlen_k); quadratic memory.

        Args:
            seqlen_q, seqlen_k: queries and keys; seqlen_q of both if seqlen_k is None.
            num_heads: heads of the call; needed where heads differ.
            q_start, k_start: position of the first query (may be a tensor of one element on
                `device`) and of the first key; seqlen_k - seqlen_q and 0 unless given.
            device: where to make it.

        Raises:
            MaskError: the pattern was made for another length or number of heads.
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        num_heads = num_heads or self.static_heads or 1
        first = seqlen_k - seqlen_q + k_start if q_start is None else q_start
        if not isinstance(first, torch.Tensor):
            self.check(Grid(seqlen_q, seqlen_k, first, k_start, 1))
        q = torch.arange(seqlen_q, device=device)[:, None] + first
        k = torch.arange(seqlen_k, device=device) + k_start
        heads = self.heads(num_heads)
        parts = [
            self.at(b, h * (num_heads // heads), num_heads).visible(q, k).expand(seqlen_q, seqlen_k)
            for b in range(self.batches)
            for h in range(heads)
        ]
        return torch.stack(parts).view(self.batches, heads, seqlen_q, seqlen_k)

    def block_mask(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        num_heads: int | None = None,
        device: torch.device | str = "cpu",
        *,
        block_size: int = 128,
        q_start: int | None = None,
        k_start: int = 0,
    ) -> BlockMask:
        """The pattern as block lists for given lengths; the last 32 are kept.

        Args:
            seqlen_q, seqlen_k: queries and keys; seqlen_q of both if seqlen_k is None.
            num_heads: heads of the call; needed where heads differ.
            device: where the lists are to be.
            block_size: tokens a block, a multiple of 32.
            q_start, k_start: as in `dense`.

        Raises:
            MaskError: the pattern was made for another length or number of heads, or block_size is
                no multiple of 32.
        """
        from .block_mask import BlockMask
        from .lowering import lower

        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        q_start = seqlen_k - seqlen_q + k_start if q_start is None else q_start
        heads = num_heads or self.static_heads or 1
        numbers = [seqlen_q, seqlen_k, q_start, k_start, block_size, heads]
        if torch.compiler.is_compiling():
            # Written out, a symbolic length becomes a constant, and a guard of the graph.
            numbers = [int(f"{number}") for number in numbers]
            # Reading its id makes this very pattern a guard of the graph, which has its lists.
            return BlockMask(*self._parts(id(self), numbers, torch.device(device)))
        return lower(self, Grid(*numbers[:5]), heads, torch.device(device))

    # A method, because a function could not be given a pattern before torch 2.13.
    @torch.compiler.assume_constant_result
    def _parts(self, identity: int, numbers: Sequence[int], device: torch.device) -> tuple:
        """The fields of `lower`'s mask, for torch.compile, which makes them constants of a graph.

        Args:
            identity: the pattern's.
            numbers: the fields of the grid, then the heads.
            device: as in `lower`.
        """
        from .lowering import lower

        *grid, num_heads = numbers
        mask = lower(self, Grid(*grid), num_heads, device)
        sizes = (mask.seqlen_q, mask.seqlen_k, mask.block_size, mask.batch_size, mask.num_heads)
        return (*sizes, *mask.tensors(), mask.host)

    def density(self, seqlen_q: int, seqlen_k: int | None = None) -> float:
        """Part of all pairs that see each other, 0 to 1, over batches and heads, of seqlen_q
        queries and as many keys, or seqlen_k."""
        return self.block_mask(seqlen_q, seqlen_k).density()

    def plot(self, seqlen: int, path: Any = None, *, cells: int = 32) -> str:
        """A picture: text, or a file whose suffix decides (.svg, or what matplotlib writes).

        Args:
            seqlen: tokens.
            path: file to write; None for none.
            cells: rows and columns of the picture at most.

        Returns:
            The picture as text, a character a cell: "█" all pairs, "▒" some, "·" none.

        Raises:
            MaskError: seqlen is no int >= 1.
            ImportError: the suffix is not .svg, and matplotlib is missing.
        """
        from .plot import plot

        return plot(self, seqlen, path, cells)

    def __and__(self, other: Pattern) -> Pattern:
        return And(_pattern(self, "&"), _pattern(other, "&"))

    def __or__(self, other: Pattern) -> Pattern:
        return Or(_pattern(self, "|"), _pattern(other, "|"))

    def __invert__(self) -> Pattern:
        return Not(_pattern(self, "~"))

    def __str__(self) -> str:
        from .text import text_of

        return text_of(self)

    def _short(self) -> str:
        return f"{type(self).__name__}({', '.join(f.name for f in fields(self))})"


def _pattern(value: Any, operator: str) -> Pattern:
    if not isinstance(value, Pattern):
        raise MaskError(
            f"a pattern {operator} a {type(value).__name__}; both have to be patterns of "
            "hf_flash_patch.masks (from_block_layout, from_mask_mod and from_flex make them)."
        )
    if not value.positional:
        raise MaskError(
            f"{value} is chosen anew at each call; it cannot be part of an expression with "
            f"{operator}."
        )
    return value


@dataclass(frozen=True)
class _Pair(Pattern):
    """Two patterns combined."""

    left: Pattern
    right: Pattern

    @property
    def static_heads(self) -> int:
        return math.lcm(self.left.static_heads, self.right.static_heads)

    @property
    def batches(self) -> int:
        a, b = self.left.batches, self.right.batches
        if a != b and 1 not in (a, b):
            raise MaskError(f"patterns for {a} and for {b} sequences are combined.")
        return max(a, b)

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        sides = (
            p.at(sequence if p.batches > 1 else 0, head, num_heads) for p in (self.left, self.right)
        )
        return type(self)(*sides)

    def heads(self, num_heads: int) -> int:
        return math.lcm(self.left.heads(num_heads), self.right.heads(num_heads))

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        return self.left.signature(grid, q, k) + self.right.signature(grid, q, k)

    def check(self, grid: Grid) -> None:
        self.left.check(grid)
        self.right.check(grid)


@dataclass(frozen=True)
class And(_Pair):
    """Pairs that both see."""

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.left.visible(q, k) & self.right.visible(q, k)

    def runs(self, grid: Grid) -> Runs:
        """The smaller state."""
        return self.left.runs(grid) & self.right.runs(grid)


@dataclass(frozen=True)
class Or(_Pair):
    """Pairs that either sees."""

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Either."""
        return self.left.visible(q, k) | self.right.visible(q, k)

    def runs(self, grid: Grid) -> Runs:
        """The larger state."""
        return self.left.runs(grid) | self.right.runs(grid)


@dataclass(frozen=True)
class Not(Pattern):
    """Pairs that the other does not see."""

    of: Pattern

    @property
    def static_heads(self) -> int:
        """Of the other."""
        return self.of.static_heads

    @property
    def batches(self) -> int:
        """Of the other."""
        return self.of.batches

    def at(self, sequence: int, head: int, num_heads: int) -> Pattern:
        """The other's, negated."""
        return Not(self.of.at(sequence, head, num_heads))

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Not the other."""
        return ~self.of.visible(q, k)

    def runs(self, grid: Grid) -> Runs:
        """Empty for full, full for empty."""
        return ~self.of.runs(grid)

    def signature(self, grid: Grid, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """The other's."""
        return self.of.signature(grid, q, k)

    def check(self, grid: Grid) -> None:
        """The other's."""
        self.of.check(grid)
