"""The tables and the figure of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .presets import Preset

Row = dict[str, Any]
COLOURS = {
    "none": "#999999",
    "linear": "#4477aa",
    "dynamic": "#66ccee",
    "yarn": "#cc3311",
    "longrope": "#228833",
    "llama3": "#ccbb44",
    "tile": "#cc3311",
    "interpolate": "#4477aa",
    "hierarchical": "#228833",
    "random": "#999933",
}
STAGES = {"extended": "without training", "tuned": "fine-tuned"}


def _series(results: list[Row], metric: str) -> dict[tuple[str, str], dict[int, list[Row]]]:
    """(stage, method) -> length -> rows."""
    found: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in results:
        if row["metric"] == metric:
            lengths = found.setdefault((row["stage"], row["method"]), {})
            lengths.setdefault(row["length"], []).append(row)
    return found


def tables(preset: Preset, results: list[Row]) -> list[Table]:
    """One table a metric: a row for every method and stage, a column a length."""
    made = []
    for metric in dict.fromkeys(row["metric"] for row in results):
        table = Table(title=metric + (": worst depth / mean" if metric == "pass key" else ""))
        table.add_column("method")
        for length in preset.lengths:
            table.add_column(f"{length:,}", justify="right")
        for (stage, method), lengths in _series(results, metric).items():
            cells = [_cell(metric, lengths.get(length, [])) for length in preset.lengths]
            table.add_row(f"{method}, {STAGES[stage]}", *cells)
        made.append(table)
    return made


def _cell(metric: str, rows: list[Row]) -> str:
    values = [row["value"] for row in rows]
    if not values:
        return "-"
    if metric == "pass key":
        return f"{100 * min(values):.0f}% / {100 * sum(values) / len(values):.0f}%"
    return f"{values[0]:.3f}" if values[0] < 1000 else f"{values[0]:.2g}"


def save(preset: Preset, results: list[Row], path: Path) -> Path:
    """Draws perplexity or loss by length, and pass keys by depth and length, fine-tuned if there;
    saves a PNG and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = _series(results, "pass key")
    shown = [key for key in keys if key[0] == "tuned"] or list(keys)[-1:]
    size = (5.4 * (1 + len(shown)), 4.2)
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=size, squeeze=False)
    _draw_lines(axes[0, 0], preset, results)
    for axis, key in zip(axes[0, 1:], shown, strict=True):
        image = _draw_keys(axis, preset, keys[key])
        axis.set_title(f"pass key: {key[1]}, {STAGES[key[0]]}")
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_lines(axis: Any, preset: Preset, results: list[Row]) -> None:
    metric = "masked loss" if preset.masked else "perplexity"
    for (stage, method), lengths in _series(results, metric).items():
        axis.plot(
            list(lengths),
            [rows[0]["value"] for rows in lengths.values()],
            color=COLOURS.get(method),
            marker="o",
            linestyle="--" if stage == "extended" else "-",
            label=f"{method}, {STAGES[stage]}",
        )
    axis.axvline(preset.old, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="context (tokens)", title=f"{preset.name}: {metric}")
    axis.set_xscale("log", base=2)
    if not preset.masked:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")


def _draw_keys(axis: Any, preset: Preset, lengths: dict[int, list[Row]]) -> Any:
    values = {(row["depth"], n): row["value"] for n, rows in lengths.items() for row in rows}
    grid = [[values.get((d, n), float("nan")) for n in lengths] for d in preset.depths]
    axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axis.set_yticks(range(len(preset.depths)), [f"{d:.0%}" for d in preset.depths])
    axis.set(xlabel="context (tokens)", ylabel="depth")
    return axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
