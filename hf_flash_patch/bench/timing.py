"""Timing on a GPU: contestants take turns on the same data, so clocks that drift hit all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A spin of this many cycles lasts at least a millisecond on every GPU so far (boost clocks stay
# below 3 GHz).
CYCLES_PER_MS = 3_000_000

# A turn's calls have to fit the launch queue, about 1000 kernels, or the host waits for the spin.
MAX_REPEATS = 50
MIN_REPEATS = 3
WARMUP = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: over the rounds, of a turn's mean.
        spread: the largest round over the smallest, minus 1.
    """

    median: float
    spread: float


@dataclass(frozen=True)
class Turn:
    """What a contestant's turn consists of.

    Attributes:
        call: enqueues the work.
        repeats: calls between the two events.
        spin: cycles for which the GPU is kept busy while the host enqueues them.
    """

    call: Callable[[], object]
    repeats: int
    spin: int


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 3, turn_ms: float = 20.0
) -> dict[str, Timing]:
    """Time several callables on the current CUDA device, one after the other, `rounds` times over.

    The calls of a turn run back to back between one pair of events, behind a spin kernel that lasts
    until the host has enqueued them all. So neither the host (50 us a call and more, where a decode
    kernel takes 10) nor the events are part of the time. Nothing is flushed in between: a caller
    whose tensors fit the L2 cache has to take turns among copies of them.

    Args:
        contestants: name -> callable that enqueues its work on the current stream.
        rounds: how often everyone's turn comes; who begins rotates, so that nobody always runs
            in the heat of the same other.
        turn_ms: about how long a turn lasts, within `MIN_REPEATS` and `MAX_REPEATS` calls.

    Returns:
        name -> Timing.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("time_interleaved needs a CUDA device.")
    turns = {name: _plan(call, turn_ms) for name, call in contestants.items()}
    order = list(turns)
    measured: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds):
        first = number % max(1, len(order))
        for name in (*order[first:], *order[:first]):
            measured[name].append(_take(turns[name]))
    return {
        name: Timing(statistics.median(values), max(values) / min(values) - 1)
        for name, values in measured.items()
    }


def plan(
    call: Callable[[], object], *, gpu_ms: float, host_ms: float, turn_ms: float = 20.0
) -> Turn:
    """The turn of a contestant whose calls take gpu_ms at most, and host_ms to enqueue."""
    repeats = min(MAX_REPEATS, max(MIN_REPEATS, math.ceil(turn_ms / gpu_ms)))
    return Turn(call, repeats, math.ceil((repeats + WARMUP) * host_ms * CYCLES_PER_MS))


def _plan(call: Callable[[], object], turn_ms: float, calls: int = 3) -> Turn:
    for _ in range(WARMUP):
        call()
    start, stop = _events()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    for _ in range(calls):
        call()
    host_ms = 1e3 * (time.perf_counter() - begin) / calls
    stop.record()
    stop.synchronize()
    gpu_ms = start.elapsed_time(stop) / calls
    return plan(call, gpu_ms=gpu_ms, host_ms=host_ms, turn_ms=turn_ms)


def _take(turn: Turn) -> float:
    start, stop = _events()
    torch.cuda._sleep(turn.spin)
    for _ in range(WARMUP):
        turn.call()
    start.record()
    for _ in range(turn.repeats):
        turn.call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / turn.repeats


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
