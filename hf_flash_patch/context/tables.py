"""Grows a learned position table: the four methods, as functions of one tensor.

Legend: old, new: positions before and after; d: embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ContextExtensionError

# Su's alpha. 0.5 would make position (i, j) equal to (j, i); below it the fine index weighs more.
ALPHA = 0.4


def tile(table: Tensor, length: int) -> Tensor:
    """Copies the table one after the other.

    Args:
        table: (old, d) fp32.
        length: new.

    Returns:
        (new, d); its first `old` rows are `table`.

    Source: Beltagy et al., Longformer, 2020, section 5 (arXiv:2004.05150).
    """
    return table[torch.arange(length, device=table.device) % len(table)]


def interpolate(table: Tensor, length: int) -> Tensor:
    """Stretches the table linearly: its first and its last row stay the first and the last.

    Args:
        table: (old, d) fp32.
        length: new.

    Returns:
        (new, d).

    Source: Chen et al., Position Interpolation, 2023, there for RoPE (arXiv:2306.15595).
    """
    # fp64: in fp32 a position past 2^24 / 2^8 would lose its fraction.
    where = torch.arange(length, device=table.device, dtype=torch.float64)
    where = where * ((len(table) - 1) / max(length - 1, 1))  # (new,) in old positions
    below = where.floor().long().clamp(max=len(table) - 1)
    above = (below + 1).clamp(max=len(table) - 1)
    weight = (where - below).to(table.dtype)[:, None]
    return torch.lerp(table[below], table[above], weight)


def hierarchical(table: Tensor, length: int) -> Tensor:
    """Decomposes a position into two digits in base `old`, each with a vector of its own.

    Row i·old + j is alpha·u_i + (1 - alpha)·u_j with u = (table - alpha·table[0]) / (1 - alpha),
    alpha = 0.4; so the first `old` rows are `table`.

    Args:
        table: (old, d) fp32.
        length: new; old² at most.

    Returns:
        (new, d).

    Source: Su Jianlin, hierarchical decomposition of position embeddings, 2020 (kexue.fm 7947).
    """
    old = len(table)
    u = (table - ALPHA * table[:1]) / (1 - ALPHA)
    position = torch.arange(length, device=table.device)
    grown = ALPHA * u[position // old] + (1 - ALPHA) * u[position % old]
    grown[:old] = table  # exact, where the formula is so but for rounding
    return grown


def random(table: Tensor, length: int) -> Tensor:
    """Keeps the table and draws the new rows from its own mean and standard deviation.

    For comparison: it forgets what the table knows. Draws from torch's global generator.

    Args:
        table: (old, d) fp32.
        length: new.

    Returns:
        (new, d); its first `old` rows are `table`.
    """
    noise = torch.randn(length - len(table), table.shape[1], device=table.device, dtype=table.dtype)
    std, mean = torch.std_mean(table)
    return torch.cat([table, noise * std + mean])


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tile": tile,
    "interpolate": interpolate,
    "hierarchical": hierarchical,
    "random": random,
}
KEEP_OLD_LENGTHS = ("tile", "hierarchical", "random")


def check_capacity(method: str, old: int, length: int) -> None:
    """Whether `method` can make `length` positions out of `old`.

    Raises:
        ContextExtensionError: it cannot.
    """
    if method == "hierarchical" and length > old * old:
        raise ContextExtensionError(
            f'positions="hierarchical" reaches {old}² = {old * old} tokens from {old} positions, '
            f'not {length}; use positions="tile" or "interpolate".'
        )


def grow(weight: Tensor, reserved: int, length: int, method: str) -> Tensor:
    """A position table for `length` tokens.

    Args:
        weight: (reserved + old, d), any floating dtype and device, meta included.
        reserved: rows before position 0; they stay.
        length: new.
        method: a key of `METHODS`.

    Returns:
        (reserved + length, d) in the dtype and on the device of `weight`; computed in fp32.

    Raises:
        ContextExtensionError: the method cannot reach `length`.
    """
    check_capacity(method, len(weight) - reserved, length)
    if weight.is_meta:
        return weight.new_empty(reserved + length, weight.shape[1])
    with torch.no_grad():
        wide = weight if weight.dtype == torch.float64 else weight.float()
        grown = METHODS[method](wide[reserved:], length)
        return torch.cat([wide[:reserved], grown]).to(weight.dtype)
