"""The longest sequence and the time of a step by memory technique, on one device or several.

    python benchmarks/long_context.py          # Llama-3.1-8B's shape, LoRA, bf16
    python benchmarks/long_context.py --lengths 262144 524288 --techniques tile mask --budget 500
    torchrun --nproc_per_node 2 benchmarks/long_context.py --techniques tile --lengths 524288
    python benchmarks/long_context.py --tiny   # seconds, on a CPU

A model of random weights, patched, with LoRA on its attention, takes whole training steps: forward,
backward, AdamW. Techniques add up in this order:

    plain    every layer checkpointed, logits whole
    loss     hfp.memory.chunked_loss
    offload  hfp.memory.offload_checkpoints instead of plain checkpoints
    tile     hfp.memory.tile_layers
    mask     a sparse mask

--keep_attention: the checkpoints of all of them keep attention's results.

Several processes share the sequence (hfp.parallel.sequence_parallel) and have the model each.

First all techniques but the mask have to give one loss. A row is then a length and a technique:
the last step's time, tokens a second, peak memory (of tensors, and of what the allocator holds); or
that it ran out of memory, after which the technique is done, or with several processes the run.
CSV and figure if asked for.
"""

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import csv
import gc
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, logging

import hf_flash_patch as hfp

TECHNIQUES = ("plain", "loss", "offload", "tile", "mask")
SHAPES = {  # of meta-llama/Llama-3.1-8B's config.json
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SAME_LOSS = 0.01  # between techniques, relative: bf16 logits, here whole and there in chunks


@dataclass
class Arguments:
    """What to measure."""

    shape: str = field(default="8b", metadata={"choices": list(SHAPES)})
    layers: int | None = field(default=None, metadata={"help": "instead of the shape's"})
    lengths: list[int] = field(
        default_factory=lambda: [2**n for n in range(14, 21)], metadata={"help": "tokens"}
    )
    techniques: list[str] = field(
        default_factory=lambda: list(TECHNIQUES), metadata={"choices": list(TECHNIQUES)}
    )
    mask: str = "sliding_window(8192) | global_tokens(64)"
    tune: str = field(default="lora", metadata={"choices": ["lora", "full"]})
    share: str = field(
        default="auto", metadata={"help": "how processes share: auto, ring, ulysses, both"}
    )
    backend: str = field(default="auto", metadata={"help": "of attention: auto, cuda, torch, ..."})
    keep_attention: bool = field(
        default=False, metadata={"help": "checkpoints keep attention's results"}
    )
    host_gib: float | None = field(
        default=None,
        metadata={"help": "a process's, for offloading; by default, of all 70%% of the machine's"},
    )
    steps: int = field(default=2, metadata={"help": "of a row; the last one counts"})
    budget: float = field(
        default=540, metadata={"help": "seconds; a row that would end later is left out"}
    )
    csv: str | None = None
    figure: str | None = None
    tiny: bool = field(default=False, metadata={"help": "--shape tiny, short lengths, on a CPU"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Row:
    """One length and technique; numbers are None where it did not end.

    Attributes:
        seconds: of the last step.
        allocated_gib: peak of what tensors took; on a CPU, the process's largest size so far.
        reserved_gib: peak of what the allocator held.
    """

    technique: str
    length: int
    outcome: str
    seconds: float | None = None
    tokens_per_second: float | None = None
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    loss: float | None = None


def build(arguments: Arguments) -> torch.nn.Module:
    """The model, made on the device."""
    shape = dict(SHAPES[arguments.shape])
    if arguments.layers is not None:
        shape["num_hidden_layers"] = arguments.layers
    config = LlamaConfig(
        max_position_embeddings=max(arguments.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **shape,
    )
    dtype = torch.bfloat16 if arguments.device != "cpu" else torch.float32
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if arguments.tune == "lora":
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            lora = LoraConfig(r=16, target_modules=targets)
            # In bf16: fp32 adapters would keep their inputs in fp32, 4 GiB each at 256k tokens.
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def apply(model: torch.nn.Module, technique: str, arguments: Arguments, undo: ExitStack) -> None:
    """Patches the model and applies a technique with those before it; `undo` takes it all back."""
    level = TECHNIQUES.index(technique)
    mask = hfp.masks.parse(arguments.mask) if technique == "mask" else None
    undo.enter_context(hfp.patch(model, mask=mask, backend=arguments.backend))
    if level >= TECHNIQUES.index("loss"):
        undo.enter_context(hfp.memory.chunked_loss(model))
    if level >= TECHNIQUES.index("offload"):
        gib = arguments.host_gib
        if gib is None:
            gib = 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
            gib /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        undo.enter_context(
            hfp.memory.offload_checkpoints(
                model,
                keep_attention=arguments.keep_attention,
                max_host_bytes=int(gib * 2**30),
            )
        )
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        undo.callback(model.gradient_checkpointing_disable)
        if arguments.keep_attention:
            undo.enter_context(hfp.memory.keep_attention(model))
    if level >= TECHNIQUES.index("tile"):
        undo.enter_context(hfp.memory.tile_layers(model))
    if dist.is_initialized():
        undo.enter_context(hfp.parallel.sequence_parallel(model, method=arguments.share))


def measure(
    model: torch.nn.Module, technique: str, length: int, arguments: Arguments, steps: int
) -> Row:
    """Takes steps on one random sequence."""
    device = torch.device(arguments.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(device)
    _release(device)
    row = Row(technique, length, "out of memory")
    try:
        for _ in range(steps):
            _wait(device)
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            _average(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row.loss = loss.item()
            _wait(device)
            row.seconds = time.perf_counter() - start
        row.allocated_gib, row.reserved_gib = _peak(device)
        row.outcome, row.tokens_per_second = "ok", length / row.seconds
    except torch.OutOfMemoryError:
        if dist.is_initialized():  # the others wait for this one
            raise SystemExit(f"{technique} ran out of memory at {length:,} tokens.") from None
        row.seconds = row.loss = None
    del optimizer
    model.zero_grad(set_to_none=True)
    return row


def _average(parameters: list[torch.nn.Parameter]) -> None:
    """The gradients' mean over processes, as DDP would take it."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _agreed(number: float) -> float:
    """The first process's, for all."""
    if not dist.is_initialized():
        return number
    found = [number]
    dist.broadcast_object_list(found)
    return found[0]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return size, size


def check(model: torch.nn.Module, arguments: Arguments) -> None:
    """Raises if techniques other than the mask give another loss, on 4096 tokens at most."""
    losses = {}
    for technique in dict.fromkeys(["plain", *arguments.techniques]):
        if technique != "mask":
            with ExitStack() as undo:
                apply(model, technique, arguments, undo)
                length = min(4096, min(arguments.lengths))
                losses[technique] = measure(model, technique, length, arguments, steps=1).loss
    expected = losses["plain"]
    for technique, loss in losses.items():
        if loss is None or expected is None or abs(loss - expected) > SAME_LOSS * expected:
            raise SystemExit(f"{technique} gives the loss {loss}, plain gives {expected}.")


def save_csv(rows: list[Row], arguments: Arguments) -> None:
    """All rows so far."""
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def save_figure(rows: list[Row], path: Path) -> None:
    """Step time and peak memory by length, a line a technique."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    plots = zip(
        figure.subplots(1, 2), ("seconds", "allocated_gib"), ("s a step", "GiB at the peak"),
        strict=True,
    )  # fmt: skip
    for axis, name, label in plots:
        for technique in TECHNIQUES:
            done = [r for r in rows if r.technique == technique and r.outcome == "ok"]
            lengths = [r.length for r in done]
            axis.plot(lengths, [getattr(r, name) for r in done], "o-", label=technique)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens", ylabel=label, yscale="log" if name == "seconds" else "linear")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Arguments) -> list[Row]:
    """Measures, prints, saves; the rows."""
    start = time.monotonic()
    logging.set_verbosity_error()
    if arguments.tiny:
        arguments.shape, arguments.device = "tiny", "cpu"
        # A ring of two, under the mask, wants four chunks on blocks of 128.
        arguments.lengths = [512, 1024] if "WORLD_SIZE" in os.environ else [128, 256]
        arguments.mask = "sliding_window(64) | global_tokens(8)"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group()
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    first = not dist.is_initialized() or dist.get_rank() == 0
    torch.manual_seed(0)  # of several processes, too
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    processes = dist.get_world_size() if dist.is_initialized() else 1
    model = build(arguments)
    if first:
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        print(f"{processes} x {name}, torch {torch.__version__}, hf_flash_patch {hfp.__version__}")
        keeping = ", attention's results kept" if arguments.keep_attention else ""
        print(f"{arguments.shape}: {billions:.2f} G parameters, {arguments.tune}{keeping}")
    check(model, arguments)
    rows: list[Row] = []
    for technique in arguments.techniques:
        with ExitStack() as undo:
            apply(model, technique, arguments, undo)
            expected = 0.0  # seconds of a step: quadratic or, masked, linear from the row before
            for index, length in enumerate(sorted(arguments.lengths)):
                left = _agreed(arguments.budget - (time.monotonic() - start))
                # A step that takes minutes needs no warm-up, and no second one fits.
                steps = arguments.steps if arguments.steps * expected < min(left, 120) else 1
                if expected * steps > left:
                    row = Row(technique, length, "no time left")
                else:
                    row = measure(model, technique, length, arguments, steps)
                rows.append(row)
                if first:
                    _print(row)
                    save_csv(rows, arguments)
                if row.outcome != "ok":
                    break
                following = sorted(arguments.lengths)[index + 1 : index + 2]
                expected = _agreed(row.seconds or 0.0)
                growth = 1 if technique == "mask" else 2
                expected *= (following[0] / length) ** growth if following else 0.0
    if arguments.figure is not None and first:
        save_figure(rows, Path(arguments.figure))
    return rows


def _print(row: Row) -> None:
    line = f"{row.technique:8}{row.length:>10,} tokens  "
    if row.seconds is not None:
        line += f"{row.seconds:9.2f} s {row.tokens_per_second:10,.0f} tokens/s"
        line += f"{row.allocated_gib:8.1f} GiB ({row.reserved_gib:.1f} held)  loss {row.loss:.3f}"
    print(line if row.outcome == "ok" else line + row.outcome, flush=True)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
