"""Rows, table, figure and conclusion of longer_context.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .records import Records
from .verdict import measured_on

if TYPE_CHECKING:
    from .longer_context import Study

TARGET = 0.5  # of perplexity, the longest dense context below the shortest
Z = 1.96  # standard deviations of a 95% interval
COLUMNS = ("run", "length", "attention", "mask", "compiled", "metric", "first", "last", "value")


class Log:
    """Rows under the conditions of one study.

    Args:
        path: of the CSV.
        conditions: what rows have in common that may be compared.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]):
        self._records, self._conditions = Records(path), conditions

    def refresh(self) -> None:
        """Reads what other processes added."""
        self._records.refresh()

    def has(self, **cells: Any) -> bool:
        """Whether a row has these cells."""
        return self._records.has(**self._conditions, **cells)

    def add(self, **cells: Any) -> None:
        """Adds a row; cells that are not given stay empty."""
        self._records.add({**self._conditions, **dict.fromkeys(COLUMNS, ""), **cells})

    def all(self) -> list[dict[str, Any]]:
        """Every row."""
        return self._records.where(**self._conditions)

    def rows(self, metric: str) -> list[dict[str, Any]]:
        """The rows of a metric, their length as a number."""
        found = self._records.where(**self._conditions, metric=metric)
        return [{**row, "length": int(row["length"])} for row in found]

    def values(self, metric: str) -> dict[str, float]:
        """run -> its value of a metric without further cells."""
        return {row["run"]: float(row["value"]) for row in self.rows(metric)}


def open_log(study: Study) -> Log:
    """The rows so far; each preset but "h200" has a file of its own."""
    p, arguments = study.preset, study.arguments
    conditions = {
        "preset": arguments.preset,
        "tokens": p.tokens,
        "batch": p.batch,
        "learning_rate": p.learning_rate,
        "seed": arguments.seed,
        "text": study.text.name,
    }
    return Log(_path(study, ".csv"), conditions)


def _path(study: Study, ending: str) -> Path:
    preset = study.arguments.preset
    name = "longer-context" + ("" if preset == "h200" else f"-{preset}")
    return Path(study.arguments.output) / f"{name}{ending}"


def buckets(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions, doubling: 0 to first, first to 2 first, and so on to the end."""
    low, high = 0, first
    while low < end:
        yield low, min(high, end)
        low, high = high, 2 * high


def record_losses(log: Log, run: str, length: int, losses: Tensor, shortest: int) -> None:
    """Adds a model's perplexity: over all, by position, and the loss of each document.

    Args:
        log: takes the rows.
        run: name of the model.
        length: tokens of its windows.
        losses: nats, float (documents, tokens).
        shortest: tokens of the shortest context.
    """
    row = {"run": run, "length": length}
    for low, high in buckets(shortest, losses.shape[1]):
        value = losses[:, low:high].mean().exp().item()
        log.add(**row, metric="perplexity in document", first=low, last=high - 1, value=value)
    windows = losses.view(-1, length)
    for low, high in buckets(shortest // 8, length):
        value = windows[:, low:high].mean().exp().item()
        log.add(**row, metric="perplexity in window", first=low, last=high - 1, value=value)
    each = " ".join(f"{loss:.6f}" for loss in losses.mean(1).tolist())
    log.add(**row, metric="documents' losses", first=0, last=len(losses) - 1, value=each)
    log.add(**row, metric="perplexity", value=losses.mean().exp().item())


def conclude(study: Study) -> str:
    """Draws, writes and returns what the rows say so far."""
    study.log.refresh()
    said = "\n".join(_claims(study))
    figure = _path(study, ".png")
    figure.parent.mkdir(parents=True, exist_ok=True)
    _draw(study, figure)
    p = study.preset
    text = [
        "# GPT-2 small by the context that it is trained with",
        said,
        "\n".join(_models(study)),
        "\n".join(_speeds(study)),
        f"{study.text}. Of each run from scratch: {p.tokens / 1e6:.0f} M tokens, {p.batch} a step, "
        f"dense ones the same in the same order; of further training {100 * p.tuning:.0f}% of "
        "that. Positions are learned, from sines and cosines on, in all runs; the rest starts as "
        f"GPT-2's. Mask of the sparse run: `{p.mask}`. {measured_on(study.log.all())}",
        "Perplexity: documents in windows of the model's own length side by side, every token "
        "predicted once, the same ones by all models. How it is done: "
        "`benchmarks/paper/longer_context.py`.",
        f"![Perplexity by context and by position]({figure.name})",
    ]
    _path(study, ".md").write_text("\n\n".join(part for part in text if part) + "\n")
    return said


def _claims(study: Study) -> Iterator[str]:
    log, p, compiled = study.log, study.preset, study.arguments.compile
    short, long = min(p.lengths), max(p.lengths)
    old, new = p.extended
    perplexity = log.values("perplexity")
    for what, longer, shorter in (
        ("from scratch", str(long), str(short)),
        ("further training of one model", f"{old}-to-{new}", f"{old}-to-{old}"),
    ):
        if longer in perplexity and shorter in perplexity:
            low, high = _interval(log, shorter, longer)
            gain = perplexity[shorter] - perplexity[longer]
            yield (
                f"Perplexity after {what}, the same tokens: {longer} {perplexity[longer]:.3f}, "
                f"{shorter} {perplexity[shorter]:.3f}; lower by {gain:.3f} (95% interval "
                f"{low:.3f} to {high:.3f}, paired over documents). Target {TARGET}: "
                f"{_verdict(gain >= TARGET)}."
            )
    eager, ours = _speed(log, "eager", short, compiled), _speed(log, "hfp", long, compiled)
    if eager and ours:
        ratio = ours / eager
        yield (
            f"Training with {long} tokens on our kernels: {ours:,.0f} tokens/s, with {short} and "
            f"eager attention: {eager:,.0f}; {ratio:.2f} times as fast per token. Target, faster: "
            f"{_verdict(ratio > 1)}."
        )
    if not perplexity:
        yield "No model is measured yet."


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _interval(log: Log, one: str, other: str) -> tuple[float, float]:
    """Of the difference in perplexity: that in loss, paired over documents, at the middle of both
    losses."""
    found = {row["run"]: row["value"].split() for row in log.rows("documents' losses")}
    losses = [torch.tensor([float(loss) for loss in found[run]]) for run in (one, other)]
    gap = losses[0] - losses[1]
    mean, half = gap.mean().item(), Z * gap.std().item() / len(gap) ** 0.5
    middle = math.exp((losses[0].mean() + losses[1].mean()).item() / 2)
    low, high = (2 * middle * math.sinh(side / 2) for side in (mean - half, mean + half))
    return low, high


def _speed(log: Log, attention: str, length: int, compiled: bool) -> float | None:
    wanted = {"run": "speed", "attention": attention, "compiled": str(compiled), "mask": ""}
    for row in log.rows("tokens/s"):
        if row["length"] == length and all(str(row[k]) == v for k, v in wanted.items()):
            return float(row["value"])
    return None


def _models(study: Study) -> list[str]:
    log = study.log
    perplexity, speed, gib = (log.values(name) for name in ("perplexity", "tokens/s", "GiB"))
    if not perplexity:
        return []
    positions = sorted({(int(r["first"]), int(r["last"])) for r in _by_document(log)})
    cells = {(r["run"], int(r["first"])): float(r["value"]) for r in _by_document(log)}
    head = ["run", "perplexity", *(f"{a} to {b}" for a, b in positions), "tokens/s", "GiB"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for run, value in perplexity.items():
        row = [run, f"{value:.3f}", *(f"{cells[run, first]:.3f}" for first, _ in positions)]
        row += [f"{speed[run]:,.0f}", f"{gib[run]:.1f}"] if run in speed else ["", ""]
        lines.append(f"| {' | '.join(row)} |")
    return ["Perplexity over all, and by position in the document:", "", *lines]


def _by_document(log: Log) -> list[dict[str, Any]]:
    return log.rows("perplexity in document")


def _speeds(study: Study) -> list[str]:
    log = study.log
    rows = [row for row in log.rows("tokens/s") if row["run"] == "speed"]
    if not rows:
        return []
    keys = ("attention", "length", "mask", "compiled")
    gib = {tuple(str(r[k]) for k in keys): float(r["value"]) for r in log.rows("GiB")}
    lines = ["| attention | length | mask | compiled | tokens/s | GiB |"]
    lines.append("| --- | ---: | --- | --- | ---: | ---: |")
    for row in rows:
        cells = [str(row[key]) for key in keys]
        numbers = f"{float(row['value']):,.0f} | {gib[tuple(cells)]:.1f}"
        cells[2] = cells[2].replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} | {numbers} |")
    return ["Training speed, a few steps each:", "", *lines]


def _draw(study: Study, path: Path) -> None:
    from matplotlib.figure import Figure

    log = study.log
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = (
        (left, "perplexity in document", "position in the document"),
        (
            right,
            "perplexity in window",
            "position in the window",
        ),
    )
    for axis, metric, label in shown:
        for run in log.values("perplexity"):
            rows = [row for row in log.rows(metric) if row["run"] == run]
            last = [int(row["last"]) + 1 for row in rows]
            axis.plot(last, [float(row["value"]) for row in rows], "o-", label=run)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=f"{label}: up to", ylabel="perplexity")
        axis.grid(alpha=0.3)
        if log.values("perplexity"):
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
