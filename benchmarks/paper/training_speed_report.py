"""Figure, table and conclusion of training_speed.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .verdict import conclusion, provenance_line, verdict

NUMBERS = ("tokens_per_second", "step_ms", "spread", "peak_gib", "loss")
OURS = ("hfp", "hfp_unpadded")
BEST_OVER_EAGER = {"gpt2-1024": 2.0, "gpt2-medium-1024": 2.0}
OVER_SDPA = {  # with the same extras
    "gpt2-1024": 1.05,
    "gpt2-medium-1024": 1.05,
    "gpt2-4096": 1.12,
    "gpt2-medium-4096": 1.12,
    "bert-large-512": 1.05,
    "bert-large-512-padded": 1.4,
}
COLOURS = {"eager": "#bbbbbb", "sdpa": "#4477aa", "hfp": "#cc3311", "hfp_unpadded": "#882255"}

Speeds = dict[tuple[str, str, str], dict[str, Any]]  # workload, extras, contestant -> row


def conclude(rows: list[dict[str, str]], path: Path) -> str:
    """Draws, writes and returns what the rows say.

    Args:
        rows: of the CSV.
        path: of figure and text, without suffix.
    """
    speeds = {(r["workload"], r["extras"], r["contestant"]): _parsed(r) for r in rows}
    said = conclusion(_claims(speeds), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = path.with_suffix(".svg")
    _draw(speeds, figure)
    parts = [
        "# Training speed",
        said,
        "Whole steps on random tokens, fp32 weights, bf16 autocast, dropout 0.1; real tokens a "
        f"second, medians. {provenance_line(rows)} How: `benchmarks/paper/training_speed.py`.",
        f"![Tokens a second]({figure.name})",
        "\n".join(_table(speeds)),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return said


def _parsed(row: dict[str, str]) -> dict[str, Any]:
    return {**row, **{name: float(row[name]) if row[name] else None for name in NUMBERS}}


def _rate(speeds: Speeds, *key: str) -> float:
    """Tokens a second; 0 where there is no number."""
    row = speeds.get(key)  # type: ignore[call-overload]
    return (row and row["tokens_per_second"]) or 0.0


def _extras(speeds: Speeds) -> list[str]:
    return list(dict.fromkeys(extras for _, extras, _ in speeds))


def _claims(speeds: Speeds) -> Iterator[str]:
    for workload, target in BEST_OVER_EAGER.items():
        eager = _rate(speeds, workload, "none", "eager")
        best, name, extras = max(
            (_rate(speeds, workload, e, name), name, e) for e in _extras(speeds) for name in OURS
        )
        if eager and best:
            yield (
                f"- {workload}: the best of ours ({name}, extras: {extras}) is {best / eager:.2f} "
                f"times as fast as eager; {verdict(best / eager, target, '>= {:g}')}."
            )
    for workload, target in OVER_SDPA.items():
        ratios = {}
        for extras in _extras(speeds):
            ours = max(_rate(speeds, workload, extras, name) for name in OURS)
            sdpa = _rate(speeds, workload, extras, "sdpa")
            if ours and sdpa:
                ratios[extras] = ours / sdpa
        if ratios:
            listed = ", ".join(f"{extras} {ratio:.2f}" for extras, ratio in ratios.items())
            yield (
                f"- {workload}: ours against sdpa with the same extras: {listed}; "
                f"{verdict(min(ratios.values()), target, '>= {:g} everywhere')}."
            )


def _table(speeds: Speeds) -> Iterator[str]:
    """Markdown, a line a row."""
    yield "| workload | extras | attention | tokens/s | ms a step | GiB |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    for (workload, extras, contestant), row in speeds.items():
        cells = [row["outcome"], "", ""]
        if row["outcome"] == "ok":
            gib = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            cells = [f"{row['tokens_per_second']:,.0f}", f"{row['step_ms']:.1f}", gib]
        yield f"| {' | '.join([workload, extras, contestant, *cells])} |"


def _draw(speeds: Speeds, path: Path) -> None:
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(workload for workload, _, _ in speeds))
    extras = _extras(speeds)
    columns = 4
    lines = max(1, -(-len(workloads) // columns))
    figure = Figure(figsize=(14, 0.6 + 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, workload in zip(axes, workloads, strict=False):
        names = [n for n in COLOURS if any((workload, e, n) in speeds for e in extras)]
        width = 0.84 / len(names)
        for index, name in enumerate(names):
            places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(extras))]
            rates = [_rate(speeds, workload, e, name) for e in extras]
            axis.bar(places, rates, width, color=COLOURS[name], label=name)
        axis.set_xticks(range(len(extras)), extras, fontsize=8)
        axis.set_title(workload, fontsize=10)
        axis.set_ylabel("tokens/s", fontsize=8)
        axis.tick_params("y", labelsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=7)
    for axis in list(axes)[len(workloads) :]:
        axis.set_axis_off()
    figure.savefig(path)
