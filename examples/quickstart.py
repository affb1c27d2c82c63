"""Patch real models in one line, and see that nothing but speed and memory changes.

    python examples/quickstart.py                          # GPT-2, LLaMA and BERT
    python examples/quickstart.py --model Qwen/Qwen3-0.6B  # a checkpoint of yours

Trains a byte-level GPT-2 and LLaMA on the sources of Python's standard library, takes a pretrained
BERT (MiniLM), saves and reloads them with transformers, patches them, and compares with the eager
and sdpa attention of transformers: logits, generated text or embeddings, tokens/s, peak memory.
The exit status is 0 only if every comparison held.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from demo import checkpoints, equality, figure, throughput
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

import hf_flash_patch as hfp


@dataclass
class Arguments:
    model: str | None = field(
        default=None, metadata={"help": "folder or hub name of a checkpoint to use instead"}
    )
    seconds: float = field(default=25, metadata={"help": "training time of each model"})
    contexts: list[int] = field(
        default_factory=list,
        metadata={"help": "tokens of context to measure; by default what fits the device"},
    )
    new_tokens: int = field(default=64, metadata={"help": "tokens to generate"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    dtype: str = field(
        default="auto", metadata={"help": "torch dtype; auto: bfloat16 on a GPU, else float32"}
    )
    output: str = field(
        default="demo_output", metadata={"help": "folder for checkpoints and figure"}
    )
    seed: int = 0

    def __post_init__(self) -> None:
        on_gpu = torch.device(self.device).type == "cuda"
        if self.dtype == "auto":
            self.dtype = "bfloat16" if on_gpu else "float32"
        if not self.contexts:
            self.contexts = [1024, 2048, 4096, 8192, 16384] if on_gpu else [256, 512, 1024, 2048]


def main(arguments: Arguments) -> int:
    """Runs the demonstration; returns the exit status."""
    start = time.monotonic()
    set_seed(arguments.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. Checkpoints")
    if arguments.model:
        models = [checkpoints.from_user(arguments.model)]
    else:
        models = checkpoints.make_all(
            output, arguments.seconds, max(arguments.contexts), torch.device(arguments.device)
        )

    console.rule(f"2. Equal? ({arguments.dtype} on {arguments.device})")
    results = []
    for model in models:
        result = equality.compare(model, arguments.device, arguments.dtype, arguments.new_tokens)
        results.append(result)
        console.print(model.name, style="bold")
        console.print(result.report + "\n", markup=False)
    console.print(equality_table(results))
    for result in results:
        if result.prompt:
            console.print(f"{result.name}, patched, continues:", style="bold")
            console.print(result.prompt, style="dim", end="", markup=False)
            console.print(result.continuation + "\n", markup=False)

    console.rule("3. Tokens/s and peak memory of one training step (forward and backward)")
    measured = throughput.sweep(models, arguments.contexts, arguments.device, arguments.dtype)
    console.print(throughput_table(measured))
    where = figure.save(measured, output / "quickstart.png", arguments.device, arguments.dtype)
    console.print(f"Figure: {where}")

    console.rule("Verdict")
    for result in results:
        for claim, holds in result.claims.items():
            verdict = "ok    " if holds else "FAILED"
            console.print(f"{verdict}  {result.name}: {claim}", markup=False, soft_wrap=True)
    failed = not all(holds for result in results for holds in result.claims.values())
    console.print(f"{time.monotonic() - start:.0f} s, hf_flash_patch {hfp.__version__}")
    return int(failed)


def equality_table(results: list[equality.Result]) -> Table:
    """One row a model: how far patched attention, and PyTorch's own sdpa, are from eager."""
    table = Table(title="Largest difference against eager attention, at real tokens")
    for column in ("model", "of", "patched", "allowed", "sdpa"):
        table.add_column(column, justify="left" if column in ("model", "of") else "right")
    for r in results:
        numbers = (f"{x:.1e}" for x in (r.patched_error, r.allowed_error, r.sdpa_error))
        table.add_row(r.name, r.compared, *numbers)
    return table


def throughput_table(measured: list[throughput.Measurement]) -> Table:
    """One row a model and context; a column a kind of attention."""
    table = Table(title="tokens/s | MiB at the peak above the model itself")
    table.add_column("model")
    table.add_column("context", justify="right")
    for name in throughput.ATTENTIONS:
        table.add_column(name, justify="right")
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for m in measured:
        text = "out of memory"
        if m.tokens_per_second is not None:
            text = f"{m.tokens_per_second:,.0f} | {m.peak_mib:,.0f}"
        cells.setdefault((m.model, m.context), {})[m.attention] = text
    for (model, context), row in cells.items():
        table.add_row(model, f"{context:,}", *(row[name] for name in throughput.ATTENTIONS))
    return table


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
