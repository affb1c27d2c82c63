"""The table, the figure and the conclusion of lra.py's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .verdict import measured_on

Row = dict[str, Any]
TARGETS = {"dense": 2.4, "sparse": 2.8}  # FlashAttention, table 3: geometric means of speed-ups
PAPER = {  # accuracy there, per cent: Transformer, FlashAttention, block-sparse FlashAttention
    "listops": (36.0, 37.6, 37.0),
    "text": (63.6, 63.9, 63.0),
    "retrieval": (81.6, 81.4, 81.3),
    "image": (42.3, 43.5, 43.6),
    "pathfinder": (72.7, 72.7, 73.3),
}
NAMES = {"eager": "Transformer, eager", "dense": "ours, dense", "sparse": "ours, block-sparse"}
ROOT_ALONE = 0.37  # ListOps: what knowing the outermost operator alone scores
EQUAL = 0.01  # of accuracy
CHANCE = {"listops": 0.1, "text": 0.5, "retrieval": 0.5, "image": 0.1, "pathfinder": 0.5}


def latest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """(task, contestant) -> its last row."""
    return {(row["task"], row["contestant"]): row for row in rows}


def speedup(rows: dict[tuple[str, str], Row], contestant: str) -> dict[str, float]:
    """Steps a second over eager's, by task, where both are there and did the same."""
    found = {}
    for (task, name), row in rows.items():
        eager = rows.get((task, "eager"))
        if name != contestant or not eager or not _comparable(eager, row):
            continue
        found[task] = float(row["steps_per_second"]) / float(eager["steps_per_second"])
    return found


def _comparable(one: Row, other: Row) -> bool:
    keys = ("steps", "batch", "length", "seed", "compiled")
    return all(str(one[key]) == str(other[key]) for key in keys)


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def conclusion(rows: dict[tuple[str, str], Row]) -> list[str]:
    """What the rows say, a sentence each."""
    said = []
    for contestant, target in TARGETS.items():
        speed = speedup(rows, contestant)
        if not speed:
            continue
        gaps = {
            task: float(rows[task, contestant]["accuracy"]) - float(rows[task, "eager"]["accuracy"])
            for task in speed
        }
        worst = min(gaps, key=lambda task: gaps[task])
        verdict = "reached" if mean(speed.values()) >= target else "missed"
        equal = "yes" if gaps[worst] >= -EQUAL else "no"
        said.append(
            f"{NAMES[contestant]}: {mean(speed.values()):.2f} times eager's steps a second "
            f"(geometric mean of {len(speed)} of {len(PAPER)} tasks; target {target}, {verdict}); "
            f"accuracy within a point or better: {equal} "
            f"(worst: {worst}, {100 * gaps[worst]:+.1f}), on average "
            f"{100 * sum(gaps.values()) / len(gaps):+.1f}."
        )
    found = [row for (task, _), row in rows.items() if task == "listops"]
    if found:
        best = max(float(row["low"]) for row in found)
        more = "more than" if best > ROOT_ALONE else "no more than"
        said.append(
            f"ListOps: {more} the outermost operator was learnt, which alone scores "
            f"{100 * ROOT_ALONE:.0f}%."
        )
    guessed = [
        f"{task} ({NAMES[name]})"
        for (task, name), row in rows.items()
        if float(row["low"]) <= CHANCE[task]
    ]
    if guessed:
        said.append(f"Not above chance with 95% confidence: {', '.join(guessed)}.")
    return said


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Markdown: a line for every task and contestant."""
    lines = [
        "| task | contestant | accuracy, % (95%) | paper, % | density | steps/s | speed-up | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, values in PAPER.items():
        for contestant, paper in zip(NAMES, values, strict=True):
            row = rows.get((task, contestant))
            if row is None:
                continue
            surrogate = str(row["surrogate"]) == "True"
            accuracy, low, high = (100 * float(row[key]) for key in ("accuracy", "low", "high"))
            ratio = speedup(rows, contestant).get(task)
            memory = f"{float(row['peak_gib']):.1f}" if row["peak_gib"] not in ("", None) else "-"
            cells = (
                f"{task}{' (surrogate)' if surrogate else ''}",
                NAMES[contestant],
                f"{accuracy:.1f} ({low:.1f} to {high:.1f})",
                "-" if surrogate else f"{paper}",
                f"{float(row['density']):.2f}",
                f"{float(row['steps_per_second']):.1f}",
                f"{ratio:.2f}" if ratio else "-",
                memory,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: Iterable[Row], path: Path) -> None:
    """Prints the table, writes a page and a figure beside the CSV; nothing without rows.

    Args:
        rows: of the CSV.
        path: of the CSV.
    """
    found = latest(rows)
    if not found:
        return
    said = [*conclusion(found), measured_on(found.values())]
    text = "\n".join([table(found), "", *said])
    print(text)
    drawn = path.with_suffix(".svg")
    figure = f"![Accuracy and speed]({drawn.name})"
    path.with_suffix(".md").write_text(f"# Long Range Arena\n\n{figure}\n\n{text}\n")
    draw(found, drawn)


def draw(rows: dict[tuple[str, str], Row], path: Path) -> None:
    """Bars by task: accuracy with its interval, and steps a second over eager's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in PAPER if any(key[0] == task for key in rows)]
    colours = {"eager": "#999999", "dense": "#4477aa", "sparse": "#cc3311"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for place, contestant in enumerate(NAMES):
        have = [(x, rows[t, contestant]) for x, t in enumerate(tasks) if (t, contestant) in rows]
        if not have:
            continue
        at = [x + 0.27 * (place - 1) for x, _ in have]
        accuracy = [100 * float(row["accuracy"]) for _, row in have]
        error = [
            [a - 100 * float(row["low"]) for a, (_, row) in zip(accuracy, have, strict=True)],
            [100 * float(row["high"]) - a for a, (_, row) in zip(accuracy, have, strict=True)],
        ]
        left.bar(at, accuracy, 0.25, yerr=error, color=colours[contestant], label=NAMES[contestant])
        speed = speedup(rows, contestant)
        fast = [(x, speed[t]) for x, t in enumerate(tasks) if t in speed]
        at = [x + 0.27 * (place - 1) for x, _ in fast]
        right.bar(at, [ratio for _, ratio in fast], 0.25, color=colours[contestant])
    for axis, title in ((left, "test accuracy, %"), (right, "training speed over eager's")):
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="y")
    for contestant, target in TARGETS.items():
        right.axhline(target, color=colours[contestant], linestyle=":", linewidth=1)
    left.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
