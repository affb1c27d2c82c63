"""Long Range Arena: accuracy and training speed of eager, dense and block-sparse attention.

    python -m benchmarks.paper.lra                              # all tasks, all contestants
    python -m benchmarks.paper.lra --tasks listops pathfinder --budget 540
    python -m benchmarks.paper.lra --tiny                       # a minute, on a CPU

One small BERT-style encoder a task (2 layers, hidden size 64, 2 heads, mean pooling; the sizes of
Xiong et al. 2021, which FlashAttention's table 3 uses), trained from the same weights on the same
batches by three contestants: transformers' eager attention, ours, and ours under a butterfly of
blocks. ListOps and Pathfinder are the arena's, from our own generators; text, retrieval and image
are surrogates (datasets.py says of what).

Steps a second are the median over windows of 50 training steps, data and all. Stops after --budget
seconds with exit status 3, everything saved; the same command goes on.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BertConfig, BertModel, HfArgumentParser
from transformers.utils import logging

import hf_flash_patch as hfp

from . import datasets, lra_report
from .datasets import Split, Task
from .loop import Clock, OutOfTime, adamw, precision, rate, save, wait, wilson
from .records import Records

BLOCK = 128  # tokens, of the sparse contestant's butterfly
WINDOW = 50  # steps between two looks at the clock
CONTESTANTS = ("eager", "dense", "sparse")


@dataclass(frozen=True)
class Recipe:
    """How a task is trained; the same for all contestants.

    Attributes:
        steps: optimizer steps.
        batch: examples; a pair counts once.
        learning_rate: at the peak.
        warmup: steps.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int


RECIPES = {
    "listops": Recipe(5000, 32, 5e-4, 500),
    "text": Recipe(4000, 32, 5e-4, 500),
    "retrieval": Recipe(4000, 16, 5e-4, 500),
    "image": Recipe(6000, 256, 1e-3, 300),
    "pathfinder": Recipe(12_000, 256, 1e-3, 600),
}
TINY = {"listops": 128, "text": 128, "retrieval": 128, "image": 256, "pathfinder": 256}


@dataclass
class Arguments:
    """What to train."""

    tasks: list[str] = field(
        default_factory=lambda: list(RECIPES), metadata={"choices": list(RECIPES)}
    )
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"choices": list(CONTESTANTS)}
    )
    budget: float = field(default=540, metadata={"help": "seconds, after which to stop"})
    shrink: int = field(default=1, metadata={"help": "divides steps, to try things out"})
    compile: bool = field(default=False, metadata={"help": "torch.compile, for all contestants"})
    folder: str = field(default="paper_output/lra", metadata={"help": "data and checkpoints"})
    output: str = field(default="docs/results", metadata={"help": "CSV, figure and conclusion"})
    workers: int = field(default=16, metadata={"help": "processes that make data"})
    tiny: bool = field(default=False, metadata={"help": "short texts and few steps, for a CPU"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    seed: int = 0


class Classifier(nn.Module):
    """A stock BERT encoder, mean pooling and two linear layers.

    Args:
        task: what it reads and says.
        dropout: of hidden states and of attention.
    """

    def __init__(self, task: Task, dropout: float = 0.1):
        super().__init__()
        self.padded = task.name not in ("image", "pathfinder")
        width = 64
        config = BertConfig(
            vocab_size=257,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=task.length,
            type_vocab_size=1,
            pad_token_id=0,
            attn_implementation="eager",
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        wide = 4 * width if task.pair else width
        self.head = nn.Sequential(nn.Linear(wide, 128), nn.ReLU(), nn.Linear(128, task.classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, classes) of uint8 tokens (batch, length) or (batch, 2, length)."""
        rows = tokens.flatten(0, -2)
        ids = rows.int()
        if not self.padded:
            hidden = self.encoder(input_ids=ids + 1).last_hidden_state
            pooled = hidden.mean(1)
        else:
            real = rows != 0
            hidden = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
            weights = real[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        if tokens.ndim == 3:
            one, other = pooled.view(len(tokens), 2, -1).unbind(1)
            pooled = torch.cat((one, other, one * other, one - other), -1)
        return self.head(pooled)


def build(task: Task, contestant: str, arguments: Arguments) -> Classifier:
    """The model with a contestant's attention; its weights depend on the seed alone."""
    torch.manual_seed(arguments.seed)
    model = Classifier(task).to(arguments.device)
    if contestant == "dense":
        hfp.patch(model)
    elif contestant == "sparse":
        hfp.patch(model, mask=hfp.masks.butterfly(_block(task)))
    return model


def _block(task: Task) -> int:
    return min(BLOCK, task.length // 4)


def density(task: Task, contestant: str) -> float:
    """The part of all pairs that a contestant looks at."""
    if contestant != "sparse":
        return 1.0
    return float(hfp.masks.butterfly(_block(task)).density(task.length))


def batch_of(split: Split, recipe: Recipe, step: int, seed: int) -> np.ndarray:
    """Which examples a step sees: every epoch is a new order of all of them."""
    steps = max(1, len(split.labels) // recipe.batch)
    order = _order(len(split.labels), seed, step // steps)
    first = step % steps * recipe.batch
    return order[first : first + recipe.batch]


@lru_cache(maxsize=2)  # a step takes no longer than its attention lets it
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Run:
    """One task and contestant: training that goes on where it was, then the test.

    Args:
        task: what to learn.
        contestant: of CONTESTANTS.
        splits: training and test examples.
        recipe: how.
        arguments: of the command.
        clock: says when to stop.
    """

    def __init__(
        self,
        task: Task,
        contestant: str,
        splits: tuple[Split, Split],
        recipe: Recipe,
        arguments: Arguments,
        clock: Clock,
    ):
        self.task, self.contestant, self._recipe = task, contestant, recipe
        self._splits, self._arguments, self._clock = splits, arguments, clock
        self._device = torch.device(arguments.device)
        # Of other conditions it is another run.
        names = (task.name, contestant, arguments.seed, task.length, recipe.steps, recipe.batch)
        name = "-".join(map(str, names)) + ("-compiled" if arguments.compile else "")
        self._path = Path(arguments.folder) / f"{name}.pt"
        self._model = build(task, contestant, arguments)
        self._optimizer = adamw(self._model, 0.01, (0.9, 0.98))
        self._windows: list[float] = []  # seconds a step
        self._first: list[float] = []  # the same, of each piece's first window: it warms up
        self._step = 0
        if self._path.exists():
            state = torch.load(self._path, map_location=self._device)
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._step = state["step"]
            self._windows, self._first = state["windows"], state["first"]
        self._forward = torch.compile(self._model) if arguments.compile else self._model

    def train(self) -> None:
        """To the recipe's end.

        Raises:
            OutOfTime: the time is over and everything is saved.
        """
        split, recipe, device = self._splits[0], self._recipe, self._device
        tokens, labels = (torch.from_numpy(x).to(device) for x in (split.tokens, split.labels))
        self._model.train()
        name = f"{self.task.name}, {self.contestant}"
        begun, start = self._step, time.perf_counter()
        with tqdm(total=recipe.steps, initial=begun, desc=name, unit="step", mininterval=5) as bar:
            while self._step < recipe.steps:
                torch.manual_seed(self._arguments.seed * 1_000_003 + self._step)  # of dropout
                chosen = batch_of(split, recipe, self._step, self._arguments.seed)
                index = torch.from_numpy(chosen).to(device, non_blocking=True)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate(
                        self._step, recipe.steps, recipe.learning_rate, recipe.warmup
                    )
                with precision(device):
                    logits = self._forward(tokens[index])
                loss = cross_entropy(logits.float(), labels[index].long())
                loss.backward()
                nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                self._step += 1
                bar.update()
                if (self._step - begun) % WINDOW == 0 or self._step == recipe.steps:
                    wait(device)
                    steps = (self._step - begun - 1) % WINDOW + 1
                    warm = self._step - begun > WINDOW
                    windows = self._windows if warm else self._first
                    windows.append((time.perf_counter() - start) / steps)
                    bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                    if self._clock.over() and self._step < recipe.steps:
                        self._save()
                        raise OutOfTime
                    start = time.perf_counter()
        self._save()

    def _save(self) -> None:
        optimizer = self._optimizer.state_dict()
        state = {"model": self._model.state_dict(), "optimizer": optimizer, "step": self._step}
        save(self._path, {**state, "windows": self._windows, "first": self._first})

    @torch.no_grad()
    def test(self) -> dict[str, Any]:
        """What the CSV has: accuracy with its interval, steps a second, peak memory."""
        split, device = self._splits[1], self._device
        self._model.eval()
        right = 0
        for first in range(0, len(split.labels), 2 * self._recipe.batch):
            rows = slice(first, first + 2 * self._recipe.batch)
            with precision(device):
                logits = self._model(torch.from_numpy(split.tokens[rows]).to(device))
            labels = torch.from_numpy(split.labels[rows]).to(device)
            right += int((logits.argmax(-1) == labels).sum())
        count = len(split.labels)
        low, high = wilson(right, count)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return {
            "surrogate": self.task.surrogate,
            "length": self.task.length,
            "density": density(self.task, self.contestant),
            "batch": self._recipe.batch,
            "steps": self._recipe.steps,
            "accuracy": right / count,
            "low": low,
            "high": high,
            "tested": count,
            "steps_per_second": 1 / statistics.median(self._windows or self._first),
            "peak_gib": memory,
        }


def main(arguments: Arguments) -> int:
    """Trains what is not in the CSV yet; returns 0 when all is done, 3 when time is over."""
    clock = Clock(arguments.budget)
    logging.set_verbosity_error()
    name = "lra-tiny.csv" if arguments.tiny else "lra.csv"
    records = Records(Path(arguments.output) / name)
    status = 0
    try:
        for name in arguments.tasks:
            _task(name, arguments, records, clock)
    except OutOfTime:
        status = 3
    records.refresh()
    lra_report.report(records.rows, records.path)
    if status:
        print("Time is over; run the same command again to go on.")
    print(f"{time.monotonic() - clock.start:.0f} s, hf_flash_patch {hfp.__version__}")
    return status


def _task(name: str, arguments: Arguments, records: Records, clock: Clock) -> None:
    task, recipe = datasets.TASKS[name], RECIPES[name]
    if arguments.tiny:
        task = replace(task, length=TINY[name], train=64, test=32)
        recipe = replace(recipe, steps=12, batch=8, warmup=2)
    steps, warmup = (max(1, n // arguments.shrink) for n in (recipe.steps, recipe.warmup))
    recipe = replace(recipe, steps=steps, warmup=warmup)
    keys = {
        contestant: {
            "task": name,
            "contestant": contestant,
            "steps": recipe.steps,
            "seed": arguments.seed,
            "compiled": arguments.compile,
        }
        for contestant in arguments.contestants
    }
    todo = [contestant for contestant, key in keys.items() if not records.has(**key)]
    if not todo:
        return
    data = Path(arguments.folder) / "data"
    splits = datasets.load(task, data, arguments.seed, arguments.workers, clock, arguments.device)
    for contestant in todo:
        clock.check()
        if arguments.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        run = Run(task, contestant, splits, recipe, arguments, clock)
        run.train()
        records.add({**keys[contestant], **run.test()})


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
