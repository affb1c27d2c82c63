"""Timing on a GPU: contestants take turns on the same data, so clocks that drift hit all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: over the medians of the rounds.
        spread: the largest round's median over the smallest's, minus 1.
    """

    median: float
    spread: float


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 3,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time several callables on the current CUDA device, one after the other, `rounds` times over.

    Args:
        contestants: name -> callable that enqueues its work on the current stream.
        rounds: how often everyone's turn comes.
        repeats: calls per turn, each between two events.
        warmup: calls per turn that do not count.

    Returns:
        name -> Timing.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("time_interleaved needs a CUDA device.")
    medians: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            for _ in range(warmup):
                call()
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(repeats)
            ]
            for start, stop in events:
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            medians[name].append(statistics.median(a.elapsed_time(b) for a, b in events))
    return {
        name: Timing(statistics.median(values), max(values) / min(values) - 1)
        for name, values in medians.items()
    }
