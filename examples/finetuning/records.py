"""What a run leaves behind: complete checkpoints, metrics.csv, and a figure of its losses."""

from __future__ import annotations

import csv
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MARK = "complete"
COLUMNS = ("step", "metric", "value")
Log = list[dict[str, Any]]


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was saved to the end."""
    found = [mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}")]
    return max(found, key=step_of, default=None)


def remove_incomplete(folder: Path) -> None:
    """Deletes what a kill in the middle of saving left."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (checkpoint / MARK).exists():
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every process has written its part and the disk has it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by every process after a checkpoint."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for file in [*checkpoint.rglob("*"), checkpoint]:
                _flush(file)
            (checkpoint / MARK).touch()
            _flush(checkpoint)


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MetricsFile(TrainerCallback):
    """Keeps metrics.csv: a line (step, metric, value) for every number logged.

    A run that goes on starts with the lines up to its checkpoint, so no step is there twice.
    """

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what the checkpoint remembers."""
        if state.is_world_process_zero:
            with self._path.open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)
            for entry in state.log_history:
                self._append(entry)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the newest numbers."""
        if state.is_world_process_zero and self._path.exists():
            self._append(state.log_history[-1])

    def _append(self, entry: dict[str, Any]) -> None:
        rows = [(entry["step"], k, v) for k, v in entry.items() if k not in ("step", "epoch")]
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)


def losses(log: Log, name: str) -> dict[int, float]:
    """Step -> the number logged under a name."""
    return {entry["step"]: entry[name] for entry in log if name in entry}


def draw(log: Log, lengths: list[int], path: Path) -> None:
    """The training loss by step, and the perplexity by length, first and last.

    Args:
        log: Trainer's.
        lengths: evaluated; tokens.
        path: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = losses(log, "loss")
    left.plot(train.keys(), train.values(), label="training", color="#4477aa")
    curves = {length: losses(log, f"eval_{length}_loss") for length in lengths}
    for length, curve in curves.items():
        left.plot(curve.keys(), curve.values(), "o-", ms=3, label=f"held out, {length:,} tokens")
    left.set(xlabel="step", ylabel="loss")
    left.legend(fontsize=8)
    known = {length: list(curve.values()) for length, curve in curves.items() if curve}
    for index, name in ((0, "before"), (-1, "after")):
        right.plot(known.keys(), [math.exp(c[index]) for c in known.values()], "o-", label=name)
    right.set_xscale("log", base=2)
    right.set(xlabel="context, tokens", ylabel="perplexity, the same tokens at every length")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
