"""One cell: everyone is bound to the same tensors, checked, and timed in turns."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .cells import Cell
from .check import Reference, check_dropout
from .contestants import COPY, DENSE, OURS, Contestant, reason
from .problem import Attend, Problem, Tensors
from .results import Result
from .timing import time_interleaved

COPY_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """How every cell is measured.

    Attributes:
        dtype: torch.bfloat16 or torch.float16.
        directions: of "fwd" and "bwd"; decode has the first alone.
        rounds: turns of each contestant.
        device: where the tensors are.
    """

    dtype: torch.dtype
    directions: tuple[str, ...]
    rounds: int
    device: str = "cuda"


@dataclass(frozen=True)
class Entry:
    """A contestant with its tensors.

    Attributes:
        problem: the tensors.
        attend: computes them.
        out: of the problem, with a graph where it has gradients.
    """

    problem: Problem
    attend: Attend
    out: torch.Tensor

    def call(self, direction: str) -> Callable[[], object]:
        """Enqueues one forward, as in training (lse included), or one backward."""
        if direction == "bwd":
            return partial(self.problem.gradients, self.out)
        sources = itertools.cycle(self.problem.sources)
        return lambda: self.attend(self.problem.q, *next(sources))


def measure(
    cell: Cell, contestants: list[Contestant], settings: Settings, note: Callable[[str], None]
) -> list[Result]:
    """Check and time one cell.

    Args:
        cell: what to measure.
        contestants: ours first, then the peers.
        settings: how.
        note: is told, in a sentence, who is left out and why.

    Returns:
        a result for each direction, and each contestant and yardstick that serves the cell.

    Raises:
        RuntimeError: ours is wrong, or does not serve the cell.
    """
    directions = [d for d in settings.directions if d == "fwd" or not cell.decode]
    try:
        problem = Problem(cell, dtype=settings.dtype, device=settings.device)
        reference = Reference(problem)
    except torch.OutOfMemoryError:
        note("the tensors do not fit the GPU's memory")
        return []
    entries: dict[str, Entry] = {}
    for contestant in contestants:
        try:
            entries[contestant.name] = enter(contestant, problem, reference, "bwd" in directions)
        except Exception as error:
            if contestant.name == OURS:
                raise RuntimeError(f"{OURS} fails at {cell.name}: {error}") from error
            verdict = "is wrong" if isinstance(error, Wrong) else "is left out"
            note(f"{contestant.name} {verdict}: {reason(error)}")
    if cell.ragged or cell.density:
        uniform = Problem(cell.uniform, dtype=settings.dtype, device=settings.device)
        attend = contestants[0].bind(uniform)
        entries[DENSE] = Entry(uniform, attend, attend(uniform.q, uniform.k, uniform.v))

    versions = {c.name: c.version for c in contestants}
    results = []
    for direction in directions:
        calls = {name: entry.call(direction) for name, entry in entries.items()}
        if cell.decode:
            calls[COPY] = _copy(settings.device)
        for name, timing in time_interleaved(calls, rounds=settings.rounds).items():
            milliseconds, work = timing.median, cell.work(direction)
            if name == DENSE:
                milliseconds *= cell.tiles / cell.uniform.tiles
            if name == COPY:
                work = 2 * COPY_BYTES
            results.append(
                Result(
                    cell=cell,
                    direction=direction,
                    contestant=name,
                    version=versions.get(name, ""),
                    milliseconds=milliseconds,
                    spread=timing.spread,
                    rate=work / milliseconds / (1e6 if cell.decode else 1e9),
                    dtype=str(settings.dtype).removeprefix("torch."),
                    device=_device_name(settings.device),
                )
            )
    return results


class Wrong(Exception):
    """A contestant's result is not attention; the text says where."""


def enter(contestant: Contestant, problem: Problem, reference: Reference, backward: bool) -> Entry:
    """Bind a contestant to a problem, run it once and check what comes out.

    Raises:
        Wrong: it is not what the formula says.
        Exception: whatever the contestant refuses the problem with.
    """
    dropout = problem.cell.dropout
    plain: Tensors = ()
    if dropout:
        _, plain = _run(contestant, problem.without_dropout(), backward)
        _checked(reference.check, plain)
        plain = tuple(x.detach() for x in plain)  # one graph at a time: eager attention's is large
    attend, results = _run(contestant, problem, backward)
    if dropout:
        _checked(check_dropout, results, plain, dropout)
    else:
        _checked(reference.check, results)
    return Entry(problem, attend, results[0])


def _run(contestant: Contestant, problem: Problem, backward: bool) -> tuple[Attend, Tensors]:
    with warnings.catch_warnings():
        # SDPA explains every refusal by several warnings.
        warnings.simplefilter("ignore")
        attend = contestant.bind(problem)
        out = attend(problem.q, problem.k, problem.v)
        return attend, (out, *(problem.gradients(out) if backward else ()))


def _checked(check: Callable[..., None], *arguments: object) -> None:
    try:
        check(*arguments)
    except AssertionError as error:
        raise Wrong(str(error)) from error


def _copy(device: str) -> Callable[[], object]:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
