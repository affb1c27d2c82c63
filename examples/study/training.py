"""Training that can be stopped and goes on where it was."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from .data import KEY_DIGITS, Corpus, Passkeys

MASKED_SHARE = 0.15
IGNORED = -100


class OutOfTime(Exception):
    """The time of this piece is over; everything is saved."""


@dataclass(frozen=True)
class Clock:
    """When to stop, in seconds of time.monotonic()."""

    end: float

    def check(self) -> None:
        """Raises OutOfTime if it is time to stop."""
        if time.monotonic() > self.end:
            raise OutOfTime


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        steps: optimizer steps.
        length: tokens of a sequence.
        batch: sequences of a step.
        learning_rate: at the peak; linear warm-up, then a cosine down to a tenth.
        warmup: steps.
        passkeys: share of the sequences that hold a pass key; it is asked for four times.
        key_weight: weight of an answer's tokens in the loss; of all others 1.
    """

    steps: int
    length: int
    batch: int
    learning_rate: float
    warmup: int
    passkeys: float = 0.0
    key_weight: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


class Batches:
    """Random windows of the training packages; the step decides which.

    Args:
        corpus: where from.
        recipe: how long, how many.
        masked: BERT's task instead of the next token.
        seed: of the choice.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe, masked: bool, seed: int):
        self._texts = [text for text in corpus.train if len(text) > recipe.length]
        self._sizes = torch.tensor([float(len(text) - recipe.length) for text in self._texts])
        self._corpus, self._recipe, self._masked, self._seed = corpus, recipe, masked, seed
        if not self._texts:
            raise ValueError(f"no training package has {recipe.length} tokens")

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels (already shifted) and their weights, each (batch, length)."""
        recipe, seed = self._recipe, self._seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        keys = Passkeys(self._corpus.tokenizer, seed)
        which = torch.multinomial(self._sizes, recipe.batch, True, generator=generator)
        rows, weights = [], torch.ones(recipe.batch, recipe.length + 1)
        for index, text in enumerate(self._texts[i] for i in which.tolist()):
            first = int(torch.randint(0, len(text) - recipe.length, (), generator=generator))
            row = text[first : first + recipe.length + 1]
            if torch.rand((), generator=generator) < recipe.passkeys:
                # Early ones more often, since they alone are far from a question; a tenth at the
                # very ends, where drawn depths never are.
                depth = 1.1 * torch.rand((), generator=generator).item() - 0.05
                depth = min(max(depth, 0.0), 1.0) ** 2
                row, answers = keys.insert(row, depth, questions=4)
                for answer in answers:
                    weights[index, answer : answer + KEY_DIGITS] = recipe.key_weight
            rows.append(row)
        tokens = torch.stack(rows).long()
        if not self._masked:
            return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
        inputs, labels = mask(tokens[:, :-1], self._corpus, generator)
        return inputs, labels, weights[:, :-1]


def mask(tokens: Tensor, corpus: Corpus, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's task: of 15% of the tokens, 80% become <mask>, 10% random, 10% stay.

    Args:
        tokens: any shape.
        corpus: whose tokenizer has the mask.
        generator: of the choice.

    Returns:
        inputs and labels, both in the shape of `tokens`; a label is -100 where nothing is asked.
    """
    chosen = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
    how = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(4, len(corpus.tokenizer), tokens.shape, generator=generator)
    inputs = torch.where(chosen & (how < 0.8), corpus.tokenizer.mask_token_id, tokens)
    inputs = torch.where(chosen & (how >= 0.9), other, inputs)
    return inputs, torch.where(chosen, tokens, IGNORED)


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on a GPU, nothing on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def train(
    model: PreTrainedModel,
    batches: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    recipe: Recipe,
    state: Path,
    clock: Clock,
    name: str,
) -> None:
    """Trains to the end of the recipe, from the step that `state` holds.

    Args:
        model: on its device; patched, or not.
        batches: inputs, labels and weights of a step.
        recipe: what to do.
        state: file that takes weights, optimizer and step when the time is over.
        clock: says when.
        name: for the progress bar.

    Raises:
        OutOfTime: the time is over and `state` is written.
    """
    device = model.device
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)
    first = 0
    if state.exists():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    with tqdm(total=recipe.steps, initial=first, desc=name, unit="step", mininterval=5) as bar:
        for step in range(first, recipe.steps):
            try:
                clock.check()
            except OutOfTime:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                partial = state.with_suffix(".partial")
                torch.save({**saved, "step": step}, partial)
                partial.rename(state)
                raise
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            inputs, labels, weights = (x.to(device, non_blocking=True) for x in batches(step))
            with precision(device):
                logits = model(input_ids=inputs).logits
            target = labels.flatten()
            losses = cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
            weights = weights.flatten() * (target != IGNORED)
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step == recipe.steps - 1:  # reading it waits for the device
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()
