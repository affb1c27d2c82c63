"""Path-X and Path-256: are two dots joined, in 16,384 and 65,536 tokens, one a pixel?

    python -m benchmarks.paper.pathx --route labels        # routes.py says what there is
    python -m benchmarks.paper.pathx --route traced --budget 540
    python -m benchmarks.paper.pathx --tiny                # seconds, on a CPU

A stock encoder of 1.1 million weights, patched, with block masks from the route's stage. Images are
made while it trains, on the same device, and each is seen four times at most, turned and mirrored
anew. A stage lasts as many minutes of training as its route says (times --scale), whatever the
device does in them; the CSV says how many images that was. Then it is tested on images made from a
seed of their own: accuracy with its 95% interval, and accuracy where the directions of the lines
under the dots mislead (tips.py).

Stops after --budget seconds with exit status 3, everything saved; the same command goes on.
"""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm
from transformers import HfArgumentParser, logging

import hf_flash_patch as hfp

from . import pathfinder, pathx_report, tips
from .loop import Clock, OutOfTime, adamw, precision, rate, save, wilson
from .records import Records
from .routes import ROUTES, Stage, tiny
from .tracer import Shape, Tracer

HIDDEN = 0.5  # of the pixels, in self-pretraining; in squares of 2 x 2
SEEN = 4  # times that an image is used
POOL_PIXELS = {"cpu": 2**16, "cuda": 2**24}  # of the images made at a time
TRACE_WEIGHTS = (0.1, 1.0, 1.0, 1.0)  # nine pixels of ten are background
EVERY = 60.0  # seconds between two saves: what a kill costs at most
GROWING = 0.6  # of a stage; then contours have their full length


@dataclass
class Arguments:
    """What to train."""

    route: str = field(default="labels", metadata={"choices": list(ROUTES)})
    scale: float = field(default=1.0, metadata={"help": "times the minutes of every stage"})
    tested: int = field(default=2000, metadata={"help": "images after each stage"})
    budget: float = field(default=540, metadata={"help": "seconds, after which to stop"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the encoder"})
    hidden: int = field(default=128, metadata={"help": "size of a token"})
    layers: int = 8
    heads: int = 4
    folder: str = field(default="paper_output/pathx", metadata={"help": "checkpoints"})
    output: str = field(default="docs/results", metadata={"help": "CSV, figure and conclusion"})
    tiny: bool = field(default=False, metadata={"help": "canvases of 16 pixels, for a CPU"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    seed: int = 0


def numbers(device: torch.device, *names: object) -> torch.Generator:
    """A generator of its own for every list of names."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "big"))


class Fresh:
    """Images for a stage, made as they are needed.

    Args:
        stage: of what.
        seed: of all of them.
        device: where they are made and stay.

    Attributes:
        pools: made so far; set it to go on behind them.
        images: different ones so far.
    """

    def __init__(self, stage: Stage, seed: int, device: torch.device):
        self._stage, self._seed, self._device = stage, seed, device
        self.pools, self.images = 0, 0
        self._left: list[Tensor] = []
        self._parts: tuple[Tensor, ...] = ()

    def batch(self, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (batch, size, size), labels (batch,) and traces (batch, size, size).

        Args:
            progress: of the stage, from 0 to 1: how long contours are.
        """
        if not self._left:
            self._fill(progress)
        index = self._left.pop()
        pixels, labels, traces = (part[index] for part in self._parts)
        turn = len(self._left) % 8
        both = torch.stack((pixels, traces)).rot90(turn % 4, (2, 3))
        pixels, traces = both.flip(3) if turn > 3 else both
        return pixels, labels, traces

    def _fill(self, progress: float) -> None:
        stage, geometry = self._stage, self._stage.geometry
        random = numbers(self._device, self._seed, "train", stage.name, geometry, self.pools)
        grown = min(1.0, progress / GROWING) * (geometry.contour - stage.shortest)
        longest = stage.shortest + round(grown)
        drawn = torch.rand(2, generator=random, device=self._device).tolist()
        shorter = [stage.shortest + int(x * (longest - stage.shortest + 1)) for x in drawn]
        count = POOL_PIXELS[self._device.type] // geometry.size**2
        count = max(stage.batch, count // stage.batch * stage.batch)
        made = [
            pathfinder.generate(replace(geometry, contour=contour), -(-count // 4), random)
            for contour in (longest, longest, *shorter)
        ]
        self._parts = tuple(
            torch.cat([getattr(part, name) for part in made])
            for name in ("pixels", "labels", "traces")
        )
        have = len(self._parts[1])
        for _ in range(SEEN):
            order = torch.randperm(have, generator=random, device=self._device)
            self._left += [i for i in order.split(stage.batch) if len(i) == stage.batch]
        self.pools += 1
        self.images += have


def hide(count: int, size: int, random: torch.Generator) -> Tensor:
    """Which pixels are hidden, in squares of two by two: bool (count, size * size)."""
    coarse = torch.rand(count, -(-size // 2), -(-size // 2), generator=random, device=random.device)
    fine = (coarse < HIDDEN).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return fine[:, :size, :size].flatten(1)


def loss_of(
    model: nn.Module, stage: Stage, batch: tuple[Tensor, Tensor, Tensor], random: torch.Generator
) -> Tensor:
    """What the stage's goal asks for."""
    pixels, labels, traces = batch
    if stage.goal == "pixels":
        hidden = hide(len(pixels), stage.geometry.size, random)
        bright = model(pixels, hidden)[0].float()
        target = pixels.flatten(1).float() / 255
        losses = binary_cross_entropy_with_logits(bright, target, reduction="none")
        return (losses * hidden).sum() / hidden.sum()
    _, traced, joined = model(pixels)
    loss = binary_cross_entropy_with_logits(joined.float(), labels.float())
    if stage.goal == "traces":
        weights = _weights(pixels.device)
        traced = traced.flatten(0, 1).float()
        loss = loss + cross_entropy(traced, traces.flatten().long(), weight=weights)
    return loss


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """TRACE_WEIGHTS; a copy at every step would wait for the device."""
    return torch.tensor(TRACE_WEIGHTS, device=device)


class Journey:
    """A route, from where its checkpoint is.

    Args:
        arguments: of the command.
        records: the CSV.
        clock: says when to stop.
    """

    def __init__(self, arguments: Arguments, records: Records, clock: Clock):
        self._arguments, self._records, self._clock = arguments, records, clock
        self._device = torch.device(arguments.device)
        self._shape = Shape(arguments.hidden, arguments.layers, arguments.heads)
        name = f"{arguments.route}{'-tiny' if arguments.tiny else ''}-{arguments.seed}"
        self._path = Path(arguments.folder) / f"{name}.pt"
        route = ROUTES[arguments.route]
        self._stages = tiny(route) if arguments.tiny else route
        torch.manual_seed(arguments.seed)
        self._model = Tracer(self._shape).to(self._device)
        conditions = [arguments.scale, arguments.hidden, arguments.layers, arguments.heads]
        self._conditions = conditions
        self._state: dict[str, Any] = {"stage": 0, "seconds": 0.0, "steps": 0, "seen": (0, 0)}
        if self._path.exists():
            self._state = torch.load(self._path, map_location=self._device)
            if self._state["conditions"] != conditions:
                raise SystemExit(
                    f"{self._path} is of scale, hidden, layers and heads "
                    f"{self._state['conditions']}, asked is {conditions}; give another --folder."
                )
            self._model.load_state_dict(self._state.pop("model"))

    def run(self) -> None:
        """Every stage that is not done.

        Raises:
            OutOfTime: the time is over and everything is saved.
        """
        for index in range(self._state["stage"], len(self._stages)):
            stage = self._stages[index]
            self._model.fit(stage.geometry.size, stage.stretch)
            masks = stage.masks(self._shape)
            with hfp.patch(self._model, mask=lambda layer, masks=masks: masks[layer]):
                model = torch.compile(self._model) if self._arguments.compile else self._model
                row = self._state.get("row")
                row = row or {**self._train(model, stage), **self._test(model, stage)}
            self._state["row"] = row
            self._save()
            row = {**self._key(index), **row}
            if not self._records.has(**row):  # a kill may have come after it was added
                self._records.add(row)
            self._state = {"stage": index + 1, "seconds": 0.0, "steps": 0, "seen": (0, 0)}
            self._save()
            self._clock.check()

    def _key(self, index: int) -> dict[str, Any]:
        stage, arguments = self._stages[index], self._arguments
        return {
            "route": arguments.route,
            "stage": stage.name,
            "goal": stage.goal,
            "scale": arguments.scale,
            "seed": arguments.seed,
            "size": stage.geometry.size,
            "tokens": stage.geometry.size**2,
            "contour": stage.geometry.contour,
            "weights": sum(p.numel() for p in self._model.parameters()),
            "density": stage.density(self._shape),
        }

    def _save(self, **more: Any) -> None:
        state = {**self._state, **more, "conditions": self._conditions}
        save(self._path, {**state, "model": self._model.state_dict()})

    def _train(self, model: nn.Module, stage: Stage) -> dict[str, Any]:
        state, device = self._state, self._device
        optimizer = adamw(self._model, 0.05, (0.9, 0.98))
        if "optimizer" in state:
            optimizer.load_state_dict(state.pop("optimizer"))
        fresh = Fresh(stage, self._arguments.seed, device)
        fresh.pools, fresh.images = state["seen"]
        limit = 60 * stage.minutes * self._arguments.scale
        every = 1 if device.type == "cpu" else 10  # steps; looking at the clock waits for the GPU
        random = numbers(device, self._arguments.seed, "hide", stage.name, state["steps"])
        model.train()
        last = saved = time.monotonic()
        name = f"{self._arguments.route}, {stage.name}"
        with tqdm(total=round(limit), initial=round(state["seconds"]), desc=name, unit="s") as bar:
            while state["seconds"] < limit:
                progress = state["seconds"] / limit
                for group in optimizer.param_groups:
                    group["lr"] = rate(int(1000 * progress), 1000, stage.learning_rate, 30)
                batch = fresh.batch(progress)
                with precision(device):
                    loss = loss_of(model, stage, batch, random)
                loss.backward()
                nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state["steps"] += 1
                if state["steps"] % every == 0:
                    shown, now = loss.item(), time.monotonic()
                    state["loss"] = shown
                    state["seconds"] += now - last
                    last, state["seen"] = now, (fresh.pools, fresh.images)
                    bar.set_postfix_str(f"step {state['steps']}, loss {shown:.3f}", refresh=False)
                    bar.update(round(state["seconds"]) - bar.n)
                    if self._clock.over() and state["seconds"] < limit:
                        self._save(optimizer=optimizer.state_dict())
                        raise OutOfTime
                    if now - saved > EVERY:
                        self._save(optimizer=optimizer.state_dict())
                        saved = now
        self._save(optimizer=optimizer.state_dict())
        return {
            "seconds": state["seconds"],
            "steps": state["steps"],
            "images": state["seen"][1],
            "images_per_second": state["steps"] * stage.batch / state["seconds"],
            "last_loss": state["loss"],
        }

    @torch.no_grad()
    def _test(self, model: nn.Module, stage: Stage) -> dict[str, Any]:
        """Accuracy on images of the full contour length; nothing after self-pretraining."""
        names = ("accuracy", "low", "high", "tested", "tips", "misled", "misled_tested")
        if stage.goal == "pixels":
            return dict.fromkeys(names)
        geometry, count = stage.geometry, self._arguments.tested
        model.eval()
        images, other = (
            pathfinder.generate(geometry, count, numbers(self._device, "test", geometry, part))
            for part in range(2)
        )
        said = []
        for first in range(0, count, stage.batch):
            with precision(self._device):
                joined = model(images.pixels[first : first + stage.batch])[2]
            said.append(joined > 0)
        right = torch.cat(said) == (images.labels == 1)
        with torch.enable_grad():
            guessed = tips.guesses(other, images, geometry) == images.labels
        low, high = wilson(int(right.sum()), count)
        misled = right[~guessed]
        values = (right.float().mean().item(), low, high, count, guessed.float().mean().item())
        found = misled.float().mean().item() if len(misled) else None
        return dict(zip(names, (*values, found, len(misled)), strict=True))


def main(arguments: Arguments) -> int:
    """Trains what is not done yet; returns 0 when the route is at its end, 3 when time is over."""
    clock = Clock(arguments.budget)
    logging.set_verbosity_error()
    name = "pathx-tiny.csv" if arguments.tiny else "pathx.csv"
    records = Records(Path(arguments.output) / name)
    status = 0
    try:
        Journey(arguments, records, clock).run()
    except OutOfTime:
        status = 3
    records.refresh()
    pathx_report.report(records.rows, records.path)
    if status:
        print("Time is over; run the same command again to go on.")
    print(f"{time.monotonic() - clock.start:.0f} s, hf_flash_patch {hfp.__version__}")
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
