"""Perplexity and speed of GPT-2 small by the context that it is trained with.

    python -m benchmarks.paper.longer_context                 # one H200, some 8 minutes a run
    python -m benchmarks.paper.longer_context --runs 1024 1024-to-4096 speed --budget 500
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.paper.longer_context --runs 4096   # beside another
    python -m benchmarks.paper.longer_context --preset tiny   # a minute, on a CPU

Text: the sources of the installed Python packages without near-copies of files, whole packages held
out. Runs, in this order unless --runs says otherwise:

    1024, 2048, 4096   from scratch, exact attention
    16384-sparse       from scratch, with a block-sparse mask
    1024-to-1024       the first one trained further, as it is
    1024-to-4096       the first one extended by hfp.extend_context, measured, and trained further
    speed              a few steps each of the shortest and the longest: eager (the shortest only),
                       sdpa and ours, as compiled as the runs, and not

Every dense run from scratch sees the same tokens in the same order, blocks of the longest dense
context, cut to its own; the two that go on see the same ones, too. The sparse run sees the same
text in blocks of its own length. The positions of all start as waves and are learned from there.
Test documents are as long as the longest context; a model reads them in windows of its own length
side by side: all models predict the same tokens, every one once, and start anew at the start of
each window. Perplexity is told over all, by the position in the document (the same tokens for every
model) and by the position in the window (the context that was there).

Stops after --budget seconds with exit status 3, everything saved; the same command goes on. What
is in the CSV is not done again, whether the model is still there or not. Several commands with
different --runs may share folder and CSV, each on a GPU of its own.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, HfArgumentParser, PreTrainedModel
from transformers.utils import logging

import hf_flash_patch as hfp

from . import longer_context_report as report
from .corpus import Blocks, Corpus, corpus
from .fit import Recipe, Spent, fit
from .loop import Clock, OutOfTime, adamw, carry, precision, wait

LOSS_CHUNK = 4096  # tokens whose logits are there at a time: 0.8 GB of them in fp32
UNTIMED = 3  # steps before those that are timed
# Of the peak, in further training: at half of it a model of 200 M tokens got worse by 3% on the
# context that it had been trained with, more than a longer one brought.
TUNING_RATE = 0.2
_GIVEN = ("tokens", "batch", "micro", "learning_rate", "mask")  # instead of the preset's


@dataclass(frozen=True)
class Preset:
    """What to train, on what, for how long.

    Attributes:
        sizes: of GPT2Config.
        lengths: contexts to train from scratch.
        sparse: context of the run with a mask; also the length of blocks and test documents.
        mask: its pattern.
        extended: contexts before and after extension.
        tokens: of a run from scratch.
        tuning: share of these for further training.
        batch: tokens of an optimizer step.
        micro: tokens of a forward, at most.
        learning_rate: at its peak.
        vocab_size: of the tokenizer.
        most: bytes of a package to read.
        documents: test documents at most.
        timed: steps of the run "speed".
    """

    sizes: dict[str, int]
    lengths: tuple[int, ...]
    sparse: int
    mask: str
    extended: tuple[int, int]
    tokens: int
    tuning: float
    batch: int
    micro: int
    learning_rate: float
    vocab_size: int
    most: int
    documents: int
    timed: int


PRESETS = {
    "h200": Preset(
        sizes={"n_embd": 768, "n_layer": 12, "n_head": 12},
        lengths=(1024, 2048, 4096),
        sparse=16384,
        mask="sliding_window(1024) | butterfly(128)",
        extended=(1024, 4096),
        tokens=200_000_000,
        tuning=0.1,
        batch=32768,
        micro=32768,
        learning_rate=6e-4,
        vocab_size=50304,
        most=100_000_000,
        documents=128,
        timed=8,
    ),
    "tiny": Preset(
        sizes={"n_embd": 32, "n_layer": 2, "n_head": 2},
        lengths=(32, 64),
        sparse=128,
        mask="sliding_window(32) | butterfly(16)",
        extended=(32, 64),
        tokens=6_000,
        tuning=0.3,
        batch=1024,
        micro=512,
        learning_rate=3e-3,
        vocab_size=512,
        most=60_000,
        documents=8,
        timed=1,
    ),
}


@dataclass
class Arguments:
    """What to do."""

    preset: str = field(default="h200", metadata={"choices": list(PRESETS)})
    runs: list[str] = field(
        default_factory=list, metadata={"help": "as above; by default all, in the order above"}
    )
    tokens: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    batch: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    micro: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    learning_rate: float | None = field(default=None, metadata={"help": "instead of the preset's"})
    mask: str | None = field(default=None, metadata={"help": "instead of the preset's"})
    compile: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "torch.compile each layer"}
    )
    budget: float = field(default=540, metadata={"help": "seconds, after which to stop"})
    folder: str = field(default="paper_output/longer_context", metadata={"help": "text and models"})
    output: str = field(default="docs/results", metadata={"help": "CSV, figure and conclusion"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One model.

    Attributes:
        name: of the run.
        length: tokens of its context.
        mask: pattern, or None.
        start: name of the run to go on with, or None to start from scratch.
    """

    name: str
    length: int
    mask: str | None = None
    start: str | None = None


def runs_of(preset: Preset) -> dict[str, Run]:
    """All runs of a preset but "speed", by name."""
    old, new = preset.extended
    found = [Run(str(length), length) for length in preset.lengths]
    found.append(Run(f"{preset.sparse}-sparse", preset.sparse, mask=preset.mask))
    found += [Run(f"{old}-to-{length}", length, start=str(old)) for length in (old, new)]
    return {run.name: run for run in found}


def waves(length: int, width: int) -> Tensor:
    """Positions to start from: sines and cosines, as large as GPT-2's random ones.

    Which token is the one before is then told alike at all positions. Of random rows every one has
    to be learned on its own, and a row of 4096 gets a quarter of the tokens that one of 1024 gets.
    On random text whose pieces of 16 tokens come again, 2 layers of 64 and 4096 tokens a step: from
    random rows, the loss of contexts of 128 falls within 200 steps, that of 512 not in 800 (4.159
    of 4.16 nats); from waves, that of 512 is 4.05 after 600.

    Returns:
        float32 (length, width).

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.cat((angles.sin(), angles.cos()), 1) * (0.02 * math.sqrt(2))


class Study:
    """All runs of one preset.

    Args:
        arguments: what to do; the preset's values where they say nothing.
    """

    def __init__(self, arguments: Arguments):
        self.arguments, self.clock = arguments, Clock(arguments.budget)
        given = {name: getattr(arguments, name) for name in _GIVEN}
        changes = {name: value for name, value in given.items() if value is not None}
        self.preset = replace(PRESETS[arguments.preset], **changes)
        self.device = torch.device(arguments.device)
        self.folder = Path(arguments.folder) / arguments.preset
        self.runs = runs_of(self.preset)
        p = self.preset
        if p.batch % p.sparse:
            raise SystemExit(f"--batch {p.batch} is no multiple of {p.sparse}, a block's tokens")
        # Models of other conditions are others.
        conditions = (p.tokens, p.batch, p.learning_rate, arguments.seed)
        self.models = self.folder / "-".join(map(str, conditions))
        self.text: Corpus = corpus(
            self.folder, p.most, p.vocab_size, documents=p.documents, length=p.sparse
        )
        self.log = report.open_log(self)

    def run(self, name: str) -> None:
        """Trains and measures what is not there yet.

        Raises:
            OutOfTime: the time is over; what is done is saved.
        """
        if name == "speed":
            self._speed()
            return
        if self.log.has(run=name, metric="perplexity"):
            return
        run, folder = self.runs[name], self.models / name
        if run.start is not None:
            self.run(run.start)
            base = self.models / run.start
            if not base.exists():
                self._train(self.runs[run.start], base)
            extends = run.length > self.runs[run.start].length
            if extends and not self.log.has(run=f"{name}, not tuned", metric="perplexity"):
                self._measure(f"{name}, not tuned", self._patched(self._load(run)), run.length)
        if not folder.exists():
            self._train(run, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).to(self.device)
        self._measure(name, self._patched(model), run.length)

    def _load(self, run: Run) -> PreTrainedModel:
        """The model that a run starts with, on the device."""
        if run.start is not None:
            model = AutoModelForCausalLM.from_pretrained(self.models / run.start)
            if run.length > model.config.n_positions:
                hfp.extend_context(model, run.length, positions="tile")
            return model.to(self.device)
        torch.manual_seed(self.arguments.seed)
        config = GPT2Config(
            vocab_size=self.preset.vocab_size,
            n_positions=run.length,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel instead of seven
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            **self.preset.sizes,
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.transformer.wpe.weight.copy_(waves(run.length, config.n_embd))
        return model.to(self.device)

    def _patched(self, model: PreTrainedModel, mask: str | None = None) -> PreTrainedModel:
        """With our attention; without a mask given, that which the model was saved with."""
        hfp.patch(model, mask=None if mask is None else hfp.masks.parse(mask))
        return model

    def _train(self, run: Run, folder: Path) -> None:
        p = self.preset
        tokens = p.tokens * (1.0 if run.start is None else p.tuning)
        steps = max(1, round(tokens / p.batch))
        rate = p.learning_rate * (1.0 if run.start is None else TUNING_RATE)
        recipe = Recipe(steps, rate, warmup=max(1, steps // 15))
        model = self._patched(self._load(run), run.mask)
        backward = self._backward(model, run.length, p.micro, self.arguments.compile)
        optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
        state = folder.with_suffix(".state")
        spent = fit(model, optimizer, recipe, backward, state, self.clock, run.name)
        partial = folder.with_suffix(".partial")
        model.save_pretrained(partial)
        self._record_training(run, steps, spent)
        partial.rename(folder)

    def _record_training(self, run: Run, steps: int, spent: Spent) -> None:
        p = self.preset
        row = {"run": run.name, "length": run.length, "attention": "hfp"}
        if self.log.has(**row, metric="tokens"):  # of an earlier machine, whose model is gone
            return
        self.log.add(**row, metric="tokens", value=steps * p.batch)
        self.log.add(**row, metric="tokens/s", value=spent.per_second(p.batch))
        self.log.add(**row, metric="GiB", value=spent.gib)

    def _backward(
        self, model: PreTrainedModel, length: int, micro: int, compiled: bool
    ) -> Callable[[int], Tensor]:
        """What makes a step's gradients; changes the model to make them fast."""
        p = self.preset
        # No longer than it has to be: of 16384 tokens, two would be all of a step, two packages'.
        block = max(length, *p.lengths)
        count = p.batch // block
        blocks = Blocks(self.text.train, block, self.arguments.seed)
        hfp.memory.chunked_loss(model.train(), chunk=LOSS_CHUNK)
        if compiled:
            torch.compiler.reset()  # shapes of an earlier model would make them dynamic
            for layer in model.transformer.h:
                layer.compile()

        def backward(step: int) -> Tensor:
            rows = blocks(step * count, count)
            inputs, labels = (part.reshape(-1, length) for part in (rows[:, :-1], rows[:, 1:]))
            parts = [part.split(max(1, micro // length)) for part in (inputs, labels)]
            total = torch.zeros((), device=self.device)
            for ids, asked in zip(*parts, strict=True):
                ids, asked = (carry(part.contiguous(), self.device) for part in (ids, asked))
                with precision(self.device):
                    # Shifted already: the last token of a row has a label, too.
                    loss = model(input_ids=ids, labels=asked, shift_labels=asked, use_cache=False)
                loss = loss.loss * (len(ids) / len(inputs))
                loss.backward()
                total += loss.detach()
            return total

        return backward

    @torch.no_grad()
    def _measure(self, name: str, model: PreTrainedModel, length: int) -> None:
        """Records a model's perplexity."""
        inputs, labels = (
            part.reshape(-1, length) for part in (self.text.test[:, :-1], self.text.test[:, 1:])
        )
        model.eval()
        losses = []
        rows = max(1, self.preset.micro // length)
        for ids, asked in zip(inputs.split(rows), labels.split(rows), strict=True):
            self.clock.check()
            with precision(self.device):
                hidden = model.transformer(ids.to(self.device), use_cache=False)[0].flatten(0, 1)
                for part, target in zip(
                    hidden.split(LOSS_CHUNK), asked.flatten().split(LOSS_CHUNK), strict=True
                ):
                    logits = model.lm_head(part).float()
                    target = target.to(self.device).long()
                    losses.append(cross_entropy(logits, target, reduction="none").cpu())
        by_document = torch.cat(losses).view(len(self.text.test), -1)
        report.record_losses(self.log, name, length, by_document, min(self.preset.lengths))

    def _speed(self) -> None:
        p = self.preset
        short, long = (self.runs[str(length)] for length in (min(p.lengths), max(p.lengths)))
        contestants = [
            *[(name, short) for name in ("eager", "sdpa", "hfp")],
            *[(name, long) for name in ("sdpa", "hfp")],
            ("hfp", self.runs[f"{p.sparse}-sparse"]),
        ]
        for compiled in sorted({self.arguments.compile, False}, reverse=True):
            for attention, run in contestants:
                row = {"run": "speed", "length": run.length, "attention": attention}
                row |= {"mask": run.mask or "", "compiled": compiled}
                if not self.log.has(**row, metric="tokens/s"):
                    self.clock.check()
                    speed, gib = self._time(attention, run, compiled)
                    self.log.add(**row, metric="GiB", value=gib)
                    self.log.add(**row, metric="tokens/s", value=speed)

    def _time(self, attention: str, run: Run, compiled: bool) -> tuple[float, float]:
        """Tokens a second and GiB of a few steps; with the largest micro-batch that there is room
        for."""
        micro = self.preset.micro
        while micro >= run.length:
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            model = self._load(run)
            if attention == "hfp":
                self._patched(model, run.mask)
            else:
                model.set_attn_implementation(attention)
            backward = self._backward(model, run.length, micro, compiled)
            optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
            try:
                for step in range(UNTIMED + self.preset.timed):
                    if step == UNTIMED:
                        wait(self.device)
                        start = time.perf_counter()
                    backward(step)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                wait(self.device)
            except torch.OutOfMemoryError:
                micro //= 2
                del model, backward, optimizer
                continue
            seconds = time.perf_counter() - start
            gib = 0.0
            if self.device.type == "cuda":
                gib = torch.cuda.max_memory_allocated(self.device) / 2**30
            return self.preset.timed * self.preset.batch / seconds, gib
        return float("nan"), float("nan")


def main(arguments: Arguments) -> int:
    """Goes on with what is not done; returns the exit status: 0 for all done, 3 for time over."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(arguments)
    names = arguments.runs or [*study.runs, "speed"]
    unknown = set(names) - {*study.runs, "speed"}
    if unknown:
        raise SystemExit(f"--runs {' '.join(unknown)}; there are {', '.join(study.runs)}, speed")
    print(study.text)
    status = 0
    try:
        for name in names:
            study.run(name)
    except OutOfTime:
        status = 3
    print(report.conclude(study))
    if status:
        print("Time is over; run the same command again to go on.")
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
