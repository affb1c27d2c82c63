"""Optimizer steps that can be stopped at any one and go on as if they had not been."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .loop import Clock, OutOfTime, rate, save, wait

UNTIMED = 5  # steps at the start of a piece: kernels are compiled and memory is taken
EVERY = 150.0  # seconds between two saves: what a kill costs at most; 1.5 GB of GPT-2 take two


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: at its peak.
        warmup: steps up to it; a cosine follows.
        clip: largest norm of the gradient.
    """

    steps: int
    learning_rate: float
    warmup: int
    clip: float = 1.0


@dataclass
class Spent:
    """What training took so far, without the first steps of every piece.

    Attributes:
        steps: that were timed.
        seconds: all of these together.
        gib: peak of what tensors took on the GPU; 0 on a CPU.
    """

    steps: int = 0
    seconds: float = 0.0
    gib: float = 0.0

    def per_second(self, amount: float) -> float:
        """Tokens, say, in a second, at so many a step; nan if nothing was timed."""
        return amount * self.steps / self.seconds if self.steps else float("nan")


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    backward: Callable[[int], Tensor],
    state: Path,
    clock: Clock,
    name: str,
) -> Spent:
    """Trains to the end of the recipe, from the step that `state` holds.

    Args:
        model: on its device, in training mode.
        optimizer: of its parameters.
        recipe: what to do.
        backward: leaves a step's gradients in the parameters and returns its loss, on the device.
        state: file that takes everything when the time is over, and now and then before; gone at
            the end.
        clock: says when.
        name: for the progress bar.

    Raises:
        OutOfTime: the time is over and `state` is written.
    """
    device = next(model.parameters()).device
    first, before = _resume(model, optimizer, state, device) if state.exists() else (0, Spent())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, saved = 0.0, time.perf_counter()

    def spent(step: int) -> Spent:
        wait(device)
        steps = max(0, step - first - UNTIMED)
        seconds = time.perf_counter() - started if steps else 0.0
        gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        return Spent(before.steps + steps, before.seconds + seconds, max(before.gib, gib))

    with tqdm(total=recipe.steps, initial=first, desc=name, unit="step", mininterval=5) as bar:
        for step in range(first, recipe.steps):
            if clock.over():
                save(state, _state(model, optimizer, device, step, spent(step)))
                raise OutOfTime
            if step == first + UNTIMED:
                wait(device)
                started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate(step, recipe.steps, recipe.learning_rate, recipe.warmup)
            loss = backward(step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step == recipe.steps - 1:  # reading it waits for the device
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
            if time.perf_counter() - saved > EVERY:
                done = spent(step + 1)
                now = time.perf_counter()
                save(state, _state(model, optimizer, device, step + 1, done))
                saved = time.perf_counter()
                started += saved - now  # saving is no training
        found = spent(recipe.steps)
    state.unlink(missing_ok=True)
    return found


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    step: int,
    spent: Spent,
) -> dict:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": (spent.steps, spent.seconds, spent.gib),
        "random": [torch.get_rng_state(), *_cuda_random(device)],
    }


def _cuda_random(device: torch.device) -> list[Tensor]:
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Path, device: torch.device
) -> tuple[int, Spent]:
    saved = torch.load(state, map_location="cpu")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    own, *cuda = saved["random"]
    torch.set_rng_state(own)
    if cuda:
        torch.cuda.set_rng_state(cuda[0], device)
    return saved["step"], Spent(*saved["spent"])
