"""Training in pieces: a clock, checkpoints that survive being stopped, rates and intervals."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class OutOfTime(Exception):
    """The time of this piece is over; everything is saved."""


@dataclass
class Clock:
    """When to stop.

    Attributes:
        budget: seconds from now on.
        start: time.monotonic() of now.
    """

    budget: float
    start: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        """Whether it is time to stop."""
        return time.monotonic() - self.start > self.budget

    def check(self) -> None:
        """Raises OutOfTime if it is time to stop."""
        if self.over():
            raise OutOfTime


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.505 + 0.495 * math.cos(math.pi * min(done, 1.0)))


def adamw(module: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices only; fused where there is a GPU."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, betas=betas, fused=fused)


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on a GPU, nothing on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def carry(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, of which the host does not wait for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save that leaves the old file or the new one, whenever it is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Other processes that ask for the same folder wait until this one is through.

    Args:
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share, 95% by default.

    Args:
        right: successes.
        count: trials, at least 1.
        z: standard deviations.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, square = right / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return middle - half, middle + half
