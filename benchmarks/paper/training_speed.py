"""Training speed and memory of BERT-large and GPT-2 with eager, SDPA's and our attention.

    python -m benchmarks.paper.training_speed                 # one H200, about an hour
    python -m benchmarks.paper.training_speed --workloads gpt2-1024 --extras none --budget 480
    python -m benchmarks.paper.training_speed --tiny          # a minute, on a CPU

Whole steps, forward, backward and AdamW, on random tokens: weights in fp32, bf16 autocast, dropout
0.1 as in the configs, random weights. BERT predicts 15 % of the tokens, in full batches and in
padded ones of 128 to 512 tokens, 56 sequences a step, the paper's share of a GPU; GPT-2 reads 1k,
2k and 4k, 16384 tokens a step.

Contestants are eager, sdpa, hfp and, for padded batches, hfp_unpadded, which is
hfp.patch(model, remove_padding=True). Everyone has the same extras: none, torch.compile,
hfp.memory.chunked_loss, and both. A row is the median of the steps after the warm-up: real tokens a
second, and the peak of what tensors took. Losses in evaluation have to agree before that.

A row that runs out of memory says so. What fails otherwise has no row, and the exit status is 1.
Stops after --budget seconds with exit status 3; the same command goes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import gc
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils import logging

import hf_flash_patch as hfp
from hf_flash_patch.bench.contestants import reason

from . import training_speed_report as report
from .records import Records

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
MODELS: dict[str, tuple[Any, dict[str, int]]] = {  # config, sizes unlike its defaults
    "bert-large": (BertConfig, {**LARGE, "intermediate_size": 4096}),
    "gpt2": (GPT2Config, {}),
    "gpt2-medium": (GPT2Config, LARGE),
}
TOKENS = {  # of a step, padding included
    "bert-large": 56 * 512,  # of 448 sequences on 8 GPUs; with 32 the host is slower than the GPU
    "gpt2": 16384,
    "gpt2-medium": 16384,
}
BATCHES = 4  # different ones, in turns
PREDICTED = 0.15  # of BERT's tokens
SHORTEST = 4  # a padded sequence has at least seqlen / SHORTEST tokens
IGNORED = -100
SAME_LOSS = 0.01  # between contestants, relative: bf16
CONTESTANTS = ("eager", "sdpa", "hfp", "hfp_unpadded")
EXTRAS = ("none", "compile", "loss", "compile+loss")
FAILED, BUDGET_SPENT = 1, 3


@dataclass(frozen=True)
class Workload:
    """A model and its batches.

    Attributes:
        model: of `MODELS`.
        seqlen: of a batch, padding included.
        padded: whether lengths are uniform from seqlen / `SHORTEST` to seqlen; else all seqlen.
        batch: sequences.
    """

    model: str
    seqlen: int
    padded: bool = False
    batch: int = 0

    @property
    def name(self) -> str:
        """As options and rows have it."""
        return f"{self.model}-{self.seqlen}" + ("-padded" if self.padded else "")


def _workloads() -> dict[str, Workload]:
    made = [Workload("bert-large", 512), Workload("bert-large", 512, padded=True)]
    made += [
        Workload(model, seqlen)
        for model, seqlen in itertools.product(("gpt2", "gpt2-medium"), (1024, 2048, 4096))
    ]
    return {w.name: replace(w, batch=TOKENS[w.model] // w.seqlen) for w in made}


WORKLOADS = _workloads()


@dataclass
class Arguments:
    """What to measure."""

    workloads: list[str] = field(
        default_factory=lambda: list(WORKLOADS), metadata={"choices": list(WORKLOADS)}
    )
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"choices": list(CONTESTANTS)}
    )
    extras: list[str] = field(
        default_factory=lambda: list(EXTRAS), metadata={"choices": list(EXTRAS)}
    )
    steps: int = field(default=20, metadata={"help": "that count, of a row"})
    warmup: int = field(default=6, metadata={"help": "steps before"})
    budget: float = field(default=math.inf, metadata={"help": "seconds; start no row after"})
    backend: str = field(default="cuda", metadata={"help": "of ours: cuda, torch, ..."})
    compiler: str = field(default="inductor", metadata={"help": "torch.compile's backend"})
    output: str = field(default="docs/results", metadata={"help": "folder of CSV, figure, text"})
    tiny: bool = field(default=False, metadata={"help": "small models, on a CPU, traced only"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Batch:
    """A step's data.

    Attributes:
        inputs: of the model, labels included.
        tokens: real ones.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int


def make_batches(workload: Workload, vocab_size: int, device: torch.device) -> list[Batch]:
    """`BATCHES` of them, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    shape = (workload.batch, workload.seqlen)
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(0, vocab_size, shape, generator=draw)
        inputs, labels, tokens = {"input_ids": ids}, ids, ids.numel()
        if workload.model.startswith("bert"):
            chosen = torch.rand(shape, generator=draw) < PREDICTED
            labels = ids.masked_fill(~chosen, IGNORED)
        if workload.padded:
            shortest = workload.seqlen // SHORTEST
            lengths = torch.randint(shortest, workload.seqlen + 1, shape[:1], generator=draw)
            real = torch.arange(workload.seqlen) < lengths[:, None]
            labels, tokens = labels.masked_fill(~real, IGNORED), int(lengths.sum())
            inputs["attention_mask"] = real.long()
        inputs["labels"] = labels
        made.append(Batch({name: x.to(device) for name, x in inputs.items()}, tokens))
    return made


class Speeds:
    """A run of the command: which rows are left, and how each is measured."""

    def __init__(self, arguments: Arguments):
        if arguments.tiny:
            arguments = replace(arguments, device="cpu", backend="torch", compiler="eager")
            arguments = replace(arguments, steps=2, warmup=1)
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        name = "training-speed" + ("-tiny" if arguments.tiny else "")
        self.path = Path(arguments.output) / name
        self.records = Records(self.path.with_suffix(".csv"))

    def left(self) -> Iterator[tuple[str, str, str]]:
        """Workload, extras and contestant of rows that are not there."""
        a = self.arguments
        for workload, extras, contestant in itertools.product(a.workloads, a.extras, a.contestants):
            if contestant == "hfp_unpadded" and not WORKLOADS[workload].padded:
                continue
            key = {"workload": workload, "contestant": contestant, "extras": extras}
            if not self.records.has(**key):
                yield workload, extras, contestant

    def measure(self, name: str, extras: str, contestant: str) -> None:
        """Adds a row.

        Raises:
            ValueError: the loss is another than that of the rows so far.
            Exception: whatever fails but memory.
        """
        workload = WORKLOADS[name]
        if self.arguments.tiny:
            workload = replace(workload, seqlen=workload.seqlen // 16, batch=2)
        row: dict[str, Any] = {
            "workload": name,
            "contestant": contestant,
            "extras": extras,
            "batch": workload.batch,
            "seqlen": workload.seqlen,
            "outcome": "ok",
            **dict.fromkeys(report.NUMBERS),
        }
        try:
            row |= self._train(workload, extras, contestant, name)
        except Exception as error:
            # Compilers wrap it in errors of their own.
            if "out of memory" not in str(error) + type(error).__name__:
                raise
            row["outcome"] = "out of memory"
        self.records.add(row)
        _print(row)

    def _train(
        self, workload: Workload, extras: str, contestant: str, name: str
    ) -> dict[str, float | None]:
        with ExitStack() as undo:
            model = self._model(workload, contestant)
            vocab_size = model.config.vocab_size
            if "loss" in extras:
                undo.enter_context(hfp.memory.chunked_loss(model))
            batches = make_batches(workload, vocab_size, self.device)
            loss = self._check(model, batches[0], name)
            trained: torch.nn.Module = model
            if "compile" in extras:
                trained = torch.compile(model, backend=self.arguments.compiler)
            times, tokens, peak = self._steps(trained.train(), batches)
        rates = [count / seconds for count, seconds in zip(tokens, times, strict=True)]
        return {
            "tokens_per_second": statistics.median(rates),
            "step_ms": 1e3 * statistics.median(times),
            "spread": max(rates) / min(rates) - 1,
            "peak_gib": peak,
            "loss": loss,
        }

    def _model(self, workload: Workload, contestant: str) -> PreTrainedModel:
        kind, sizes = MODELS[workload.model]
        sizes = sizes | (TINY if self.arguments.tiny else {})
        config = kind(max_position_embeddings=workload.seqlen, use_cache=False, **sizes)
        auto = AutoModelForMaskedLM if kind is BertConfig else AutoModelForCausalLM
        attention = "eager" if contestant == "eager" else "sdpa"
        torch.manual_seed(0)
        with self.device:
            model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
        if contestant.startswith("hfp"):
            unpad: dict[str, Any] = {"remove_padding": True} if contestant == "hfp_unpadded" else {}
            hfp.patch(model, backend=self.arguments.backend, **unpad)
        return model

    def _check(self, model: PreTrainedModel, batch: Batch, name: str) -> float:
        """The loss without dropout, if it is that of the other rows of the workload."""
        with torch.no_grad(), self._precision():
            loss = model.eval()(**batch.inputs).loss.item()
        for row in self.records.rows:
            if row["workload"] == name and row["outcome"] == "ok":
                expected = float(row["loss"])
                if not abs(loss - expected) <= SAME_LOSS * expected:
                    raise ValueError(f"the loss is {loss}, with {row['contestant']} {expected}.")
        return loss

    def _steps(
        self, model: torch.nn.Module, batches: list[Batch]
    ) -> tuple[list[float], list[int], float | None]:
        """Seconds and real tokens of each step that counts, and the peak in GiB."""
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
        turns = itertools.cycle(batches)

        def step() -> int:
            batch = next(turns)
            with self._precision():
                loss = model(**batch.inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return batch.tokens

        for _ in range(self.arguments.warmup):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        marks, tokens = [self._mark()], []
        for _ in range(self.arguments.steps):
            tokens.append(step())
            marks.append(self._mark())
        if not cuda:
            return [b - a for a, b in itertools.pairwise(marks)], tokens, None
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        return times, tokens, torch.cuda.max_memory_allocated() / 2**30

    def _mark(self) -> Any:
        """A moment; on a GPU an event, since waiting for each step would cost the host's lead."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _precision(self) -> AbstractContextManager:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def release(self) -> None:
        """Gives back what the last row took."""
        torch._dynamo.reset()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _print(row: dict[str, Any]) -> None:
    line = f"{row['workload']:24}{row['extras']:14}{row['contestant']:14}"
    if row["outcome"] == "ok":
        line += f"{row['tokens_per_second']:12,.0f} tokens/s{row['step_ms']:10.1f} ms a step"
        if row["peak_gib"] is not None:
            line += f"{row['peak_gib']:8.1f} GiB"
    print(line if row["outcome"] == "ok" else line + row["outcome"], flush=True)


def main(arguments: Arguments) -> int:
    """Measures what has no row yet, draws and concludes; the exit status."""
    start = time.monotonic()
    logging.set_verbosity_error()
    speeds = Speeds(arguments)
    left = list(speeds.left())
    status = 0
    for done, key in enumerate(left):
        if time.monotonic() - start > arguments.budget:
            print(f"The budget of {arguments.budget:g} s is spent: {len(left) - done} rows left.")
            status = BUDGET_SPENT
            break
        print(f"[{done + 1}/{len(left)}] ", end="", flush=True)
        try:
            speeds.measure(*key)
        except Exception as error:
            print(f"{' '.join(key)} fails: {reason(error)}", flush=True)
            traceback.print_exc(limit=-4)
            status = FAILED
        speeds.release()
    print(report.conclude(speeds.records.rows, speeds.path))
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
