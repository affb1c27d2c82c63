"""Tokens/s and peak memory of a training step, each model and attention in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_flash_patch as hfp

from .checkpoints import Checkpoint

ATTENTIONS = ("eager", "sdpa", "patched")
SECONDS = 0.5  # a measurement repeats for this long, and three times at least


@dataclass(frozen=True)
class Measurement:
    """One training step, forward and backward, of one sequence.

    Attributes:
        model: name of the checkpoint.
        attention: one of `ATTENTIONS`.
        context: tokens.
        tokens_per_second: median over the repetitions; None if memory did not suffice.
        peak_mib: highest memory, above what model, gradients and a step of 64 tokens took.
    """

    model: str
    attention: str
    context: int
    tokens_per_second: float | None = None
    peak_mib: float | None = None


def sweep(
    models: list[Checkpoint], contexts: list[int], device: str, dtype: str
) -> list[Measurement]:
    """Measures every model under every attention at every context that it has positions for."""
    jobs = []
    for model in models:
        limit = model.max_context or max(contexts)
        fitting = sorted({min(context, limit) for context in contexts})
        jobs += [(model, attention, fitting) for attention in ATTENTIONS]
    measured = []
    with tqdm(total=sum(len(fitting) for *_, fitting in jobs), desc="measuring", unit="run") as bar:
        for model, attention, fitting in jobs:
            bar.set_postfix_str(f"{model.name}, {attention}")
            for measurement in measure_apart(model, attention, fitting, device, dtype):
                measured.append(measurement)
                bar.update()
    return measured


def measure_apart(
    model: Checkpoint, attention: str, contexts: list[int], device: str, dtype: str
) -> Iterator[Measurement]:
    """Yields what `measure` sends from a process of its own; where that was killed, out of memory.

    Raises:
        RuntimeError: the process failed for another reason; its traceback is on stderr.
    """
    # The fork server imports the libraries once; a process forked from it starts with a clean peak.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["__main__", "transformers.modeling_utils"])
    receiver, sender = processes.Pipe(duplex=False)
    arguments = (sender, model, attention, contexts, device, dtype)
    process = processes.Process(target=measure, args=arguments)
    process.start()
    sender.close()
    left = list(contexts)
    while left:
        try:
            measurement = receiver.recv()
        except EOFError:
            break
        left.remove(measurement.context)
        yield measurement
    process.join()
    if left and process.exitcode != -9:
        raise RuntimeError(f"measuring {model.name} with {attention} failed: {process.exitcode}")
    for context in left:
        yield Measurement(model.name, attention, context)


def measure(
    sender: Connection,
    checkpoint: Checkpoint,
    attention: str,
    contexts: list[int],
    device: str,
    dtype: str,
) -> None:
    """Sends a `Measurement` for each context, smallest first: a process's peak only ever grows."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = checkpoint.load("sdpa" if attention == "patched" else attention, device, dtype)
    if attention == "patched":
        hfp.patch(model)
    tokens = torch.randint(10, model.config.vocab_size, (1, max(contexts)), device=device)
    step(model, tokens[:, :64])  # makes gradients, threads and library handles
    before = peak_memory(device)
    for context in sorted(contexts):
        try:
            step(model, tokens[:, :context])
            peak = peak_memory(device) - before
            times: list[float] = []
            while sum(times) < SECONDS or len(times) < 3:
                times.append(step(model, tokens[:, :context]))
        except torch.OutOfMemoryError:
            sender.send(Measurement(checkpoint.name, attention, context))
            continue
        speed = context / statistics.median(times)
        sender.send(Measurement(checkpoint.name, attention, context, speed, peak / 2**20))


def step(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Forward and backward of tokens (1, context); returns seconds."""
    start = time.perf_counter()
    model(tokens)[0].float().square().mean().backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: str) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
