"""Figure, tables and conclusion of attention_tables.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_flash_patch.bench.cells import short

from .verdict import conclusion, provenance_line, verdict

NUMBERS = (
    "fwd_ms", "fwd_spread", "bwd_ms", "bwd_spread", "both_ms", "both_spread", "memory_mb",
)  # fmt: skip
EAGER_SPEEDUP, SDPA_SPEEDUP, EAGER_MEMORY, OF_IDEAL = 5.0, 1.05, 20.0, 0.58
SPEED_LENGTHS = (1024, 2048, 4096, 8192)
MEMORY_LENGTH, SPARSE_LENGTH = 4096, 65536
SDPA, SPARSE = ("sdpa", "sdpa_cudnn"), ("butterfly", "local_global")
TITLES = {"fwd_ms": "forward, ms", "bwd_ms": "backward, ms", "both_ms": "both, ms"}
COLOURS = {
    "eager": "#bbbbbb",
    "sdpa": "#4477aa",
    "sdpa_cudnn": "#66ccee",
    "flex": "#ccbb44",
    "hfp": "#cc3311",
    "butterfly": "#882255",
    "local_global": "#228833",
}

# Of the paper, on an A100 of 40 GB, from 128 tokens on: setting, number, who -> values.
PAPER = {
    ("none", "fwd_ms", "PyTorch"): "0.21 0.22 0.43 1.27 4.32 16.47 67.77",
    ("none", "fwd_ms", "FlashAttention"): (
        "0.08 0.09 0.18 0.68 2.40 8.42 35.54 134.03 535.95 2147.05"
    ),
    ("none", "fwd_ms", "block-sparse"): "0.56 0.52 0.63 0.61 0.61 0.96 1.69 3.02 5.69 11.77",
    ("none", "bwd_ms", "FlashAttention"): (
        "0.11 0.12 0.52 1.62 5.45 21.57 84.75 336.00 1338.56 5343.19"
    ),
    ("none", "bwd_ms", "block-sparse"): "0.11 0.12 0.16 0.38 1.20 2.34 4.69 9.10 18.74 37.04",
    ("none", "both_ms", "PyTorch"): "0.67 0.70 1.18 3.67 13.22 50.44",
    ("none", "both_ms", "FlashAttention"): (
        "0.31 0.31 0.73 2.29 7.64 30.09 118.50 470.51 1876.08 7492.85"
    ),
    ("none", "both_ms", "block-sparse"): "0.74 0.77 0.82 0.88 1.71 3.21 6.56 12.60 24.93 50.39",
    ("none", "memory_mb", "PyTorch"): "36 104 336 1184 4416 17024",
    ("none", "memory_mb", "FlashAttention"): "22 44 104 209 418 836 1672 3344 6688 13376",
    ("dropout+padding", "fwd_ms", "FlashAttention"): (
        "0.04 0.06 0.21 0.82 2.85 10.41 41.74 167.19 670.76 2682.35"
    ),
    ("dropout+padding", "fwd_ms", "block-sparse"): (
        "0.06 0.06 0.06 0.12 0.44 0.86 1.70 3.29 6.55 13.34"
    ),
    ("dropout+padding", "both_ms", "PyTorch"): "0.84 0.86 2.35 8.29 31.75 124.19",
    ("dropout+padding", "both_ms", "FlashAttention"): (
        "0.43 0.41 0.95 2.55 9.56 37.49 147.75 586.61 2339.11 9341.30"
    ),
    ("dropout+padding", "both_ms", "block-sparse"): (
        "0.44 0.44 0.45 0.89 1.95 4.12 7.64 16.60 32.73 64.11"
    ),
}

Cells = dict[tuple[str, int, str], dict[str, Any]]  # setting, length, contestant -> row


def conclude(rows: list[dict[str, str]], path: Path) -> str:
    """Draws, writes and returns what the rows say.

    Args:
        rows: of the CSV.
        path: of figure and text, without suffix.
    """
    cells = {(r["setting"], int(r["seqlen"]), r["contestant"]): _parsed(r) for r in rows}
    said = conclusion(_claims(cells), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = path.with_suffix(".svg")
    _draw(cells, figure)
    first = next(iter(cells.values()), {})
    parts = [
        "# Attention: time and memory",
        said,
        f"{first.get('batch')} sequences, {first.get('num_heads')} heads of "
        f"{first.get('head_dim')}, fp16; memory is the peak of forward and backward with q, k, v "
        f"and all gradients. {provenance_line(rows)} How: `benchmarks/paper/attention_tables.py`.",
        f"![Time and memory by length]({figure.name})",
        *_tables(cells),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return said


def _parsed(row: dict[str, str]) -> dict[str, Any]:
    numbers = {name: float(row[name]) if row[name] else None for name in NUMBERS}
    return {**row, **numbers, "density": float(row["density"])}


def _settings(cells: Cells) -> list[str]:
    return list(dict.fromkeys(setting for setting, _, _ in cells))


def _value(cells: Cells, number: str, setting: str, seqlen: int, contestant: str) -> float | None:
    row = cells.get((setting, seqlen, contestant))
    return row[number] if row and row["outcome"] == "ok" else None


def _claims(cells: Cells) -> Iterator[str]:
    for setting in _settings(cells):
        for names, target in ((("eager",), EAGER_SPEEDUP), (SDPA, SDPA_SPEEDUP)):
            yield from _speed(cells, setting, names, target)
    for setting in _settings(cells):
        ours = _value(cells, "memory_mb", setting, MEMORY_LENGTH, "hfp")
        eager = _value(cells, "memory_mb", setting, MEMORY_LENGTH, "eager")
        if ours and eager:
            ratio = eager / ours
            yield (
                f"- {setting}: {ratio:.1f} times less memory than eager at {MEMORY_LENGTH} tokens "
                f"({ours:,.0f} MB, {eager:,.0f} MB); {verdict(ratio, EAGER_MEMORY, '>= {:g}')}."
            )
    for setting in _settings(cells):
        for name in SPARSE:
            yield from _sparse(cells, setting, name)


def _speed(cells: Cells, setting: str, names: tuple[str, ...], target: float) -> Iterator[str]:
    ratios = {}
    for length in SPEED_LENGTHS:
        ours = _value(cells, "both_ms", setting, length, "hfp")
        others = [_value(cells, "both_ms", setting, length, name) for name in names]
        fastest = min((other for other in others if other), default=None)
        if ours and fastest:
            ratios[length] = fastest / ours
    if ratios:
        listed = ", ".join(f"{short(length)} {ratio:.2f}" for length, ratio in ratios.items())
        against = names[0] if len(names) == 1 else "the faster of SDPA's"
        yield (
            f"- {setting}: forward and backward against {against}, times as fast: {listed}; "
            f"{verdict(min(ratios.values()), target, '>= {:g} everywhere')}."
        )


def _sparse(cells: Cells, setting: str, name: str) -> Iterator[str]:
    dense = _value(cells, "both_ms", setting, SPARSE_LENGTH, "hfp")
    sparse = _value(cells, "both_ms", setting, SPARSE_LENGTH, name)
    if dense and sparse:
        density = cells[setting, SPARSE_LENGTH, name]["density"]
        share = dense / sparse * density
        yield (
            f"- {setting}: {name} at {short(SPARSE_LENGTH)}, density {density:.2%}: "
            f"{dense / sparse:.1f} times as fast as our dense kernel, {share:.0%} of the ideal; "
            f"{verdict(share, OF_IDEAL, '>= {:.0%}')}."
        )


def _tables(cells: Cells) -> Iterator[str]:
    """Markdown: for each setting and number a line a contestant, a column a length."""
    numbers = {**TITLES, "memory_mb": "peak memory, MB"}
    for setting in _settings(cells):
        lengths = sorted({length for s, length, _ in cells if s == setting})
        for number, title in numbers.items():
            lines = [
                f"{setting}, {title}:\n",
                f"| | {' | '.join(map(short, lengths))} |",
                f"| --- |{' ---: |' * len(lengths)}",
            ]
            for name in COLOURS:
                texts = [_text(cells.get((setting, length, name)), number) for length in lengths]
                if any(texts):
                    lines.append(f"| {name} | {' | '.join(texts)} |")
            for (s, n, name), values in PAPER.items():
                if (s, n) == (setting, number):
                    known = dict(zip((2**i for i in range(7, 17)), values.split(), strict=False))
                    texts = [known.get(length, "") for length in lengths]
                    lines.append(f"| paper's {name}, A100 | {' | '.join(texts)} |")
            yield "\n".join(lines)


def _text(row: dict[str, Any] | None, number: str) -> str:
    if row is None:
        return ""
    if row["outcome"] == "ok":
        digits = 0 if number == "memory_mb" else 3
        return "" if row[number] is None else f"{row[number]:,.{digits}f}"
    return row["outcome"].split(":")[0]


def _draw(cells: Cells, path: Path) -> None:
    from matplotlib.figure import Figure

    settings = _settings(cells)
    figure = Figure(figsize=(1 + 3.6 * max(1, len(settings)), 6.6), layout="constrained")
    axes = figure.subplots(2, max(1, len(settings)), squeeze=False, sharey="row", sharex=True)
    for column, setting in enumerate(settings):
        for axis, number in zip(axes[:, column], ("both_ms", "memory_mb"), strict=True):
            for name, colour in COLOURS.items():
                points = [
                    (length, row[number])
                    for (s, length, n), row in sorted(cells.items())
                    if (s, n) == (setting, name) and row["outcome"] == "ok" and row[number]
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(setting, fontsize=10)
        axes[1, column].set_xlabel("tokens")
    axes[0, 0].set_ylabel("forward and backward, ms")
    axes[1, 0].set_ylabel("peak memory, MB")
    handles, names = axes[0, 0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.savefig(path)
