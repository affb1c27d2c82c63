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


def _value(cells: Cells, number: str, *key: Any) -> float | None:
    row = cells.get(key)  # type: ignore[call-overload]
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
