"""Pictures of patterns: text, SVG, or matplotlib's formats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .pattern import Pattern
from .tokens import at_least

MAX_PANELS = 8  # heads that differ beyond that are left out
_DENSE = 2048  # tokens up to which every pair is looked at
_BLOCK = 128
_SHADES = "·░▒▓█"


def fractions(pattern: Pattern, seqlen: int, cells: int = 32) -> torch.Tensor:
    """Part of the pairs that see each other in each cell of a picture.

    Args:
        pattern: of which the first sequence is shown.
        seqlen: tokens.
        cells: rows and columns at most.

    Returns:
        fp64 (heads that differ, at most `MAX_PANELS`, rows, rows); 0 to 1.
    """
    at_least("a picture's seqlen", seqlen, 1)
    heads = pattern.static_heads or 1
    if seqlen <= _DENSE:
        size = -(-seqlen // cells)
        mask = pattern.dense(seqlen, num_heads=heads)[0, :MAX_PANELS].double()
        rows = -(-seqlen // size)
        mask = torch.nn.functional.pad(mask, (0, rows * size - seqlen) * 2)
        seen = mask.unflatten(2, (rows, size)).unflatten(1, (rows, size)).sum(dim=(2, 4))
    else:
        size = -(-seqlen // (cells * _BLOCK)) * _BLOCK
        rows = -(-seqlen // size)
        block_mask = pattern.block_mask(seqlen, num_heads=heads)
        lists, row, column, pairs = block_mask.block_pairs()
        panels = min(block_mask.num_heads, MAX_PANELS)
        shown = lists < panels  # of the first sequence
        blocks = size // _BLOCK
        cell = (lists * rows + row // blocks) * rows + column // blocks
        seen = torch.zeros(panels * rows * rows, dtype=torch.float64)
        seen.index_add_(0, cell[shown], pairs[shown].double())
        seen = seen.view(panels, rows, rows)
    tokens = (seqlen - torch.arange(rows) * size).clamp(max=size).double()
    return seen / (tokens[:, None] * tokens)


def plot(pattern: Pattern, seqlen: int, path: Any = None, cells: int = 32) -> str:
    """`Pattern.plot`."""
    shown = fractions(pattern, seqlen, cells)
    if path is not None and Path(path).suffix.lower() == ".svg":
        Path(path).write_text(_svg(shown.tolist()), encoding="utf-8")
    elif path is not None:
        fine = fractions(pattern, seqlen, max(cells, 256))
        _save(fine.tolist(), seqlen, str(path))
    return "\n\n".join(
        "\n".join("".join(map(_shade, row)) for row in panel) for panel in shown.tolist()
    )


def _shade(part: float) -> str:
    if part in (0.0, 1.0):
        return _SHADES[0 if part == 0.0 else -1]
    return _SHADES[1 + min(int(part * 3), 2)]


def _svg(panels: Sequence[Sequence[Sequence[float]]]) -> str:
    pixel, gap = 8, 16
    side = pixel * len(panels[0])
    width = len(panels) * (side + gap) - gap
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{side}" '
        f'viewBox="0 0 {width} {side}" shape-rendering="crispEdges">'
    ]
    for number, panel in enumerate(panels):
        x = number * (side + gap)
        lines.append(f'<rect x="{x}" y="0" width="{side}" height="{side}" fill="#eef1f5"/>')
        for i, row in enumerate(panel):
            j = 0
            for part, cells in groupby(row):
                count = len(list(cells))
                if part:
                    lines.append(
                        f'<rect x="{x + j * pixel}" y="{i * pixel}" width="{count * pixel}" '
                        f'height="{pixel}" fill="#1f4e8c" fill-opacity="{max(part, 0.15):.2f}"/>'
                    )
                j += count
    return "\n".join([*lines, "</svg>", ""])


def _save(panels: Sequence[Sequence[Sequence[float]]], seqlen: int, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels) + 0.8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        axis.imshow(panel, cmap="Blues", vmin=0.0, vmax=1.0, extent=(0, seqlen, seqlen, 0))
        axis.set_xlabel("key")
        axis.set_ylabel("query")
        if len(panels) > 1:
            axis.set_title(f"head {number}")
    figure.savefig(path, dpi=150)
