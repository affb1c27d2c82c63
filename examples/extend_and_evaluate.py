"""Train small models, extend their context, and measure what that is worth.

    python examples/extend_and_evaluate.py --preset llama            # 1k to 8k tokens, one GPU
    python examples/extend_and_evaluate.py --preset gpt2 bert        # 512 to 4k tokens
    python examples/extend_and_evaluate.py --tiny                    # a minute, on a CPU

Text: the sources of the installed Python packages, split by package. For every model: train at the
old length; extend by every method and measure without training; fine-tune some of them at the new
length and measure again. Perplexity by length (sliding windows, stride 256), pass-key retrieval by
depth and length; masked-token loss by length for BERT. A table, a figure and results.json.

Stops after --budget seconds with exit status 3, everything saved; the same command goes on.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from study import figure, presets, stages
from study.training import Clock, OutOfTime
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

import hf_flash_patch as hfp


@dataclass
class Arguments:
    preset: list[str] = field(
        default_factory=lambda: list(presets.PRESETS),
        metadata={"help": f"models: {', '.join(presets.PRESETS)}"},
    )
    tiny: bool = field(default=False, metadata={"help": "small enough for a CPU"})
    tune: list[str] = field(
        default_factory=list, metadata={"help": "methods to fine-tune; by default the preset's"}
    )
    budget: float = field(default=450, metadata={"help": "seconds, after which to stop"})
    output: str = field(default="context_output", metadata={"help": "folder for everything"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    shrink: int = field(
        default=1, metadata={"help": "divides steps and samples, to try things out"}
    )
    seed: int = 0


def main(arguments: Arguments) -> int:
    """Runs the study; returns the exit status: 0 when all is done, 3 when time is over."""
    start = time.monotonic()
    set_seed(arguments.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    output = Path(arguments.output)
    unknown = set(arguments.preset) - set(presets.PRESETS)
    if unknown:
        raise SystemExit(f"--preset {' '.join(unknown)}; there are {', '.join(presets.PRESETS)}")
    clock = Clock(start + arguments.budget)
    status = 0
    for name in arguments.preset:
        preset = presets.PRESETS[name]
        if arguments.tiny:
            preset = presets.tiny(preset)
        study = stages.Study(
            preset.shrunk(arguments.shrink),
            output / f"{name}{'-tiny' if arguments.tiny else ''}",
            torch.device(arguments.device),
            arguments.seed,
            clock,
            tuple(arguments.tune),
        )
        try:
            study.run()
        except OutOfTime:
            status = 3
        if study.results:
            console.rule(f"{name}: {study.preset.old} to {study.preset.new} tokens")
            console.print(study.conditions, soft_wrap=True)
            for table in figure.tables(study.preset, study.results):
                console.print(table)
            where = figure.save(study.preset, study.results, study.folder / "context.png")
            console.print(f"Figure: {where}", soft_wrap=True)
            (study.folder / "summary.json").write_text(
                json.dumps({"conditions": study.conditions, "results": study.results}, indent=1)
            )
        if status:
            console.print("Time is over; run the same command again to go on.")
            break
    console.print(f"{time.monotonic() - start:.0f} s, hf_flash_patch {hfp.__version__}")
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
