"""The table, the figure and the conclusion of pathx.py's rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .verdict import measured_on

Row = dict[str, Any]
PAPER = {"Path-X": 0.614, "Path-256": 0.631}  # FlashAttention, table 6: the best of each
COLOURS = {"labels": "#4477aa", "pretrain": "#228833", "traced": "#cc3311", "paper": "#999999"}
MORE_THAN_THE_TASK = "traced"  # a route with targets that the task does not give


def tested(rows: Iterable[Row]) -> list[Row]:
    """Rows with an accuracy."""
    return [row for row in rows if row["accuracy"] not in ("", None)]


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line a stage."""
    lines = [
        "| route | stage | goal | tokens | contour | density | minutes | images | images/s "
        "| accuracy, % (95%) | dots alone, % | where those mislead, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row["route"],
            row["stage"],
            row["goal"],
            f"{int(row['tokens']):,}",
            str(row["contour"]),
            f"{float(row['density']):.2f}",
            f"{float(row['seconds']) / 60:.1f}",
            f"{int(row['images']):,}",
            f"{float(row['images_per_second']):.1f}",
        ]
        if row in tested([row]):
            accuracy, low, high = (100 * float(row[key]) for key in ("accuracy", "low", "high"))
            cells.append(f"{accuracy:.1f} ({low:.1f} to {high:.1f})")
            cells.append(f"{100 * float(row['tips']):.1f}")
            misled = row["misled"]
            share = "-" if misled in ("", None) else f"{100 * float(misled):.1f}"
            cells.append(f"{share} of {row['misled_tested']}")
        else:
            cells += ["-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conclusion(rows: Iterable[Row]) -> list[str]:
    """A sentence for each of Path-X and Path-256 and kind of route, about the best row."""
    said = []
    for stage, paper in PAPER.items():
        for task_only in (True, False):
            found = [
                row
                for row in tested(rows)
                if row["stage"] == stage and (row["route"] != MORE_THAN_THE_TASK) == task_only
            ]
            if not found:
                continue
            best = max(found, key=lambda row: float(row["accuracy"]))
            accuracy, low = float(best["accuracy"]), float(best["low"])
            floor = "above" if low > 0.5 else "not above"
            against = "more" if accuracy > paper else "no more"
            more = "" if task_only else ", which also gives the generator's map of contours"
            said.append(
                f"{stage}: {100 * accuracy:.1f}% by the route {best['route']}{more}; {floor} "
                f"chance with 95% confidence, {against} than the paper's {100 * paper:.1f}%. "
                f"The dots' surroundings alone tell {100 * float(best['tips']):.1f}%."
            )
    return said


def report(rows: Iterable[Row], path: Path) -> None:
    """Prints the table, writes a page and a figure beside the CSV; nothing without rows.

    Args:
        rows: of the CSV.
        path: of the CSV.
    """
    rows = list(rows)
    if not rows:
        return
    text = "\n".join([table(rows), "", *conclusion(rows), measured_on(rows)])
    print(text)
    figure = ""
    if tested(rows):
        drawn = path.with_suffix(".svg")
        draw(rows, drawn)
        figure = f"![Accuracy by stage]({drawn.name})\n\n"
    path.with_suffix(".md").write_text(f"# Path-X and Path-256\n\n{figure}{text}\n")


def draw(rows: Iterable[Row], path: Path) -> None:
    """Accuracy with its interval after each stage, a line a route."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(row["stage"] for row in tested(rows)))
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for place, (route, colour) in enumerate(COLOURS.items()):
        have = [row for row in tested(rows) if row["route"] == route]
        if not have:
            continue
        at = [stages.index(row["stage"]) + 0.06 * place for row in have]
        accuracy = [100 * float(row["accuracy"]) for row in have]
        low = [a - 100 * float(row["low"]) for a, row in zip(accuracy, have, strict=True)]
        high = [100 * float(row["high"]) - a for a, row in zip(accuracy, have, strict=True)]
        axis.errorbar(at, accuracy, (low, high), color=colour, marker="o", capsize=3, label=route)
    for stage, paper in PAPER.items():
        if stage in stages:
            x = stages.index(stage)
            axis.hlines(100 * paper, x - 0.3, x + 0.3, color="black", linestyle=":")
    axis.axhline(50, color="black", linewidth=0.8)
    axis.set_xticks(range(len(stages)), stages)
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
