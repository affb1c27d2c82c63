"""The figure: for every group and direction a row, for every head_dim and mask a plot of bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .contestants import OURS
from .results import Result

SUFFIXES = (".svg", ".png", ".pdf")

# Ours stands out; the others differ for the colour-blind, too.
COLOURS = {
    OURS: "#cc3311",
    "sdpa_flash": "#bbbbbb",
    "sdpa_cudnn": "#4477aa",
    "flex": "#ccbb44",
    "fa2": "#999933",
    "fa3": "#228833",
    "fa4": "#66ccee",
    "hfp_dense": "#882255",
    "copy": "#000000",
}


def check_figure(path: Path) -> None:
    """Whether `save_figure` will be able to write path; for before the measuring.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the suffix is none of `SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--figure is {path}; it has to end in one of {', '.join(SUFFIXES)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--figure needs matplotlib, which is not installed. Install it (pip install "
            "matplotlib), or save --csv here and draw where it is: hfp bench --from-csv FILE "
            "--figure FILE."
        ) from error


def save_figure(results: list[Result], path: Path) -> None:
    """Draws rates; a contestant without a result has no bar.

    Args:
        results: of any groups.
        path: where to; the suffix decides the format.

    Raises:
        ValueError: there are no results.
    """
    from matplotlib.figure import Figure

    rows: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        row = rows.setdefault((result.cell.group, result.direction), {})
        row.setdefault(result.cell.series, []).append(result)
    if not rows:
        raise ValueError("There are no results to draw.")
    columns = max(len(series) for series in rows.values())
    figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for line, ((group, direction), series) in zip(axes, rows.items(), strict=True):
        for axis, (title, drawn) in zip(line, series.items(), strict=False):
            _bars(axis, drawn)
            axis.set_title(f"{group}: {title}, {direction}", fontsize=10)
        for axis in line[len(series) :]:
            axis.set_axis_off()
    handles = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[name] for name in names],
        [_label(name, results) for name in names],
        loc="outside lower center",
        ncols=len(names),
        fontsize=9,
    )
    figure.suptitle(f"Attention on one {results[0].device}, {results[0].dtype}")
    figure.savefig(path, dpi=150)


def _bars(axis: Any, results: list[Result]) -> None:
    sizes = list(dict.fromkeys(result.cell.size for result in results))
    names = [name for name in COLOURS if any(r.contestant == name for r in results)]
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        drawn = [result for result in results if result.contestant == name]
        shift = (index - (len(names) - 1) / 2) * width
        places = [sizes.index(result.cell.size) + shift for result in drawn]
        axis.bar(places, [r.rate for r in drawn], width, color=COLOURS[name], label=name)
    crowded = len(sizes) > 6
    axis.set_xticks(range(len(sizes)), sizes, fontsize=8, rotation=45 if crowded else 0)
    axis.tick_params("y", labelsize=8, labelleft=True)
    axis.set_ylabel(results[0].cell.unit, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _label(name: str, results: list[Result]) -> str:
    version = next(result.version for result in results if result.contestant == name)
    return f"{name} ({version})" if version else name
