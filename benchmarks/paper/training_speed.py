"""Training speed of BERT-large and GPT-2: the paper's tables 1 and 2, on today's transformers.

    python -m benchmarks.paper.training_speed           # minutes on a GPU; goes on where it was
    python -m benchmarks.paper.training_speed --models gpt2 --seqlens 1024 --contestants sdpa ours
    python -m benchmarks.paper.training_speed --tiny    # seconds, on a CPU

Whole training steps (forward, backward, AdamW; bf16 autocast, dropout 0.1, weights of random
values, random tokens) with the model's eager attention, SDPA and ours, each alone and with extras
that have nothing to do with attention: torch.compile, and hfp.memory.chunked_loss. BERT's batches
are full, or padded from lengths uniform in a quarter of the maximum to the maximum, where ours can
also remove the padding. Tokens are real ones. The paper's baseline is eager attention alone; what
ours adds is seen with the same extras on both sides.

Leaves training_speed.csv, .svg and .md in --output. Stops after --budget seconds with exit status
3; the same command goes on.
"""

import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    HfArgumentParser,
    PreTrainedModel,
    logging,
)

import hf_flash_patch as hfp

from .loop import Clock
from .records import Records
from .training_speed_report import report

IGNORED = -100
CONTESTANTS = ("eager", "sdpa", "ours", "ours, no padding")
EXTRAS = ("none", "loss", "compile", "compile, loss")
# Layers, hidden size, heads, words.
SHAPES = {
    "bert-large": (24, 1024, 16, 30522),
    "gpt2": (12, 768, 12, 50257),
    "gpt2-medium": (24, 1024, 16, 50257),
    "tiny-bert": (2, 32, 4, 500),
    "tiny-gpt2": (2, 32, 4, 500),
}
WARM_UP = 3  # steps; the first compiles, the next two settle the allocator


@dataclass
class Arguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: ["bert-large", "gpt2", "gpt2-medium"],
        metadata={"choices": list(SHAPES)},
    )
    seqlens: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096], metadata={"help": "of GPT-2; BERT's is 512"}
    )
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"choices": list(CONTESTANTS)}
    )
    extras: list[str] = field(
        default_factory=lambda: list(EXTRAS), metadata={"choices": list(EXTRAS)}
    )
    tokens: int = field(default=16384, metadata={"help": "of a batch, padding included"})
    steps: int = field(default=10, metadata={"help": "that are timed; the median counts"})
    seed: int = 0
    budget: float = field(default=540, metadata={"help": "seconds; no row starts after"})
    output: str = "docs/results"
    tiny: bool = field(default=False, metadata={"help": "tiny models, on a CPU"})


@dataclass(frozen=True)
class Cell:
    """One row to measure."""

    model: str
    seqlen: int
    batch: str  # "full" or "padded"
    contestant: str
    extras: str


def cells(arguments: Arguments) -> list[Cell]:
    """All that the arguments ask for, those that are compared next to each other."""
    found = []
    for model in arguments.models:
        bert = "bert" in model
        lengths = [64 if arguments.tiny else 512] if bert else arguments.seqlens
        for seqlen in lengths:
            for batch in ("full", "padded") if bert else ("full",):
                for extras in arguments.extras:
                    for contestant in arguments.contestants:
                        if "padding" not in contestant or batch == "padded":
                            found.append(Cell(model, seqlen, batch, contestant, extras))
    return found


def build(cell: Cell, device: torch.device) -> PreTrainedModel:
    """The model with the cell's attention, in training mode."""
    layers, hidden, heads, words = SHAPES[cell.model]
    if "bert" in cell.model:
        config = BertConfig(
            vocab_size=words,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=cell.seqlen,
        )
        make = AutoModelForMaskedLM
    else:
        config = GPT2Config(
            vocab_size=words,
            n_positions=cell.seqlen,
            n_layer=layers,
            n_embd=hidden,
            n_head=heads,
        )
        make = AutoModelForCausalLM
    peer = cell.contestant if cell.contestant in ("eager", "sdpa") else "sdpa"
    with torch.device(device):
        model = make.from_config(config, attn_implementation=peer)
    if peer != cell.contestant:
        hfp.patch(model, remove_padding="padding" in cell.contestant or None)
    if "loss" in cell.extras:
        hfp.memory.chunked_loss(model, backend="torch")
    return model.train()


def batches(cell: Cell, arguments: Arguments, device: torch.device) -> list[dict]:
    """Four batches of random tokens; BERT's ask for 15% of them."""
    draw = torch.Generator().manual_seed(arguments.seed)
    rows = max(1, arguments.tokens // cell.seqlen)
    words = SHAPES[cell.model][-1]
    found = []
    for _ in range(4):
        shape = (rows, cell.seqlen)
        ids = torch.randint(words // 50, words, shape, generator=draw)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if "bert" in cell.model:
            asked = torch.rand(shape, generator=draw) < 0.15
            if cell.batch == "padded":
                low = cell.seqlen // 4
                lengths = torch.randint(low, cell.seqlen + 1, (rows, 1), generator=draw)
                real = torch.arange(cell.seqlen) < lengths
                batch["attention_mask"], asked = real.long(), asked & real
            batch["labels"] = ids.masked_fill(~asked, IGNORED)
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


def measure(cell: Cell, arguments: Arguments) -> dict:
    """Tokens a second, seconds a step and peak memory; or that it ran out of memory."""
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.manual_seed(arguments.seed)
    row = {"outcome": "out of memory", "tokens_per_second": None, "seconds": None}
    row |= {"peak_gib": None, "last_loss": None}
    try:
        model = build(cell, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        call = torch.compile(model) if "compile" in cell.extras else model
        data = batches(cell, arguments, device)
        times = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(WARM_UP + arguments.steps):
            batch = data[step % len(data)]
            _wait(device)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = call(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait(device)
            times.append((time.perf_counter() - start, batch))
        rates = [_real(batch) / seconds for seconds, batch in times[WARM_UP:]]
        row["tokens_per_second"] = round(statistics.median(rates), 1)
        row["seconds"] = round(statistics.median(s for s, _ in times[WARM_UP:]), 6)
        row["last_loss"] = round(loss.item(), 4)
        if device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        row["outcome"] = "ok"
    except torch.OutOfMemoryError:
        pass
    return row


def _real(batch: dict) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _release(tiny: bool) -> None:
    torch._dynamo.reset()
    gc.collect()
    if not tiny:
        torch.cuda.empty_cache()


def main(arguments: Arguments) -> int:
    """Measures what is not in the CSV yet; returns 0 when all is done, 3 when time is over."""
    logging.set_verbosity_error()
    clock, status = Clock(arguments.budget), 0
    if arguments.tiny:
        arguments.models, arguments.seqlens = ["tiny-bert", "tiny-gpt2"], [128]
        arguments.tokens = min(arguments.tokens, 512)
    output = Path(arguments.output)
    records = Records(output / "training_speed.csv")
    wanted = cells(arguments)
    for index, cell in enumerate(wanted):
        key = {**vars(cell), "tokens": arguments.tokens, "seed": arguments.seed}
        if records.has(**key):
            continue
        if clock.over():
            print(f"{len(wanted) - index} rows are left; run the same command again to go on.")
            status = 3
            break
        row = measure(cell, arguments)
        _release(arguments.tiny)
        records.add({**key, "dtype": "bfloat16 autocast", **row})
        speed = row["tokens_per_second"]
        said = row["outcome"] if speed is None else f"{speed:,.0f} tokens/s"
        print(f"{index + 1:>3} of {len(wanted)}  {' '.join(map(str, vars(cell).values()))}: {said}")
    report(records.rows, output)
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
