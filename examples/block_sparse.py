"""Sparse attention by one line: what a pattern hides costs nothing, and the rest stays exact.

    python examples/block_sparse.py                             # a few seconds on a CPU
    python examples/block_sparse.py --seqlen 16384 --device cuda --dtype bfloat16

Patches a BERT, a GPT-2 and a LLaMA of random weights with patterns of `hfp.masks` and compares them
with transformers' eager attention under the same mask written out; generates text under a mask and
compares each step with one forward over the whole; then times attention alone, dense and sparse.
The exit status is 0 only if every comparison held. `--pictures` writes a picture of each pattern.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    HfArgumentParser,
    LlamaConfig,
    set_seed,
)

import hf_flash_patch as hfp
from hf_flash_patch import masks

SIZES = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "BERT": BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=1024,
        **SIZES,
    ),
    "GPT-2": GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=1024, **SIZES),
    "LLaMA": LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=1024,
        **SIZES,
    ),
}
PATTERNS = {
    "window and global tokens": masks.sliding_window(64) | masks.global_tokens(8),
    "BigBird": masks.bigbird(3, 2, 1, block=32),
    "butterfly": masks.butterfly(32),
    "shifted groups": masks.shifted_groups(128),
    "a pattern a head": masks.per_head(
        [masks.sliding_window(32), masks.strided(16), masks.full(), masks.sinks(4)]
    )
    | masks.sliding_window(2),
}
TIMED = {
    "window of 512": masks.sliding_window(512),
    "window of 128 and sinks": masks.sliding_window(128) | masks.sinks(4),
    "BigBird": masks.bigbird(3, 3, 1),
    "butterfly": masks.butterfly(),
}
PICTURES = {
    "full": masks.full(),
    "causal": masks.causal(),
    "sliding_window": masks.sliding_window(96),
    "dilated_window": masks.dilated_window(192, 32),
    "global_tokens": masks.global_tokens([0, 1, 2, 3, *range(320, 336)]),
    "sinks": masks.sliding_window(96) & masks.causal() | masks.sinks(32) & masks.causal(),
    "strided": masks.strided(128),
    "fixed": masks.fixed(128, 16),
    "bigbird": masks.bigbird(3, 2, 1, block=32),
    "longformer": masks.longformer(128, 16),
    "butterfly": masks.butterfly(32),
    "shifted_groups": masks.shifted_groups(256),
    "documents": masks.documents(cu_seqlens=[0, 160, 480, 1024]),
    "per_head": masks.per_head([masks.sliding_window(64), masks.strided(96), masks.causal()]),
}
TOLERANCE = 1e-4  # of fp32 logits of size 1; half precision is checked by the tests' error rule


@dataclass
class Arguments:
    seqlen: int = field(default=2048, metadata={"help": "tokens, where attention is timed"})
    new_tokens: int = field(default=16, metadata={"help": "tokens to generate"})
    device: str = "cpu"
    dtype: str = field(default="float32", metadata={"help": "torch dtype of the timing"})
    pictures: str | None = field(
        default=None, metadata={"help": "folder for a picture (.svg) of each pattern"}
    )
    seed: int = 0


def main(arguments: Arguments) -> int:
    """Runs all parts; returns the exit status."""
    set_seed(arguments.seed)
    console = Console()
    if arguments.pictures is not None:
        for name, pattern in PICTURES.items():
            pattern.plot(1024, Path(arguments.pictures) / f"{name}.svg")
    held = compare(console, arguments)
    held &= generate(console, arguments)
    measure(console, arguments)
    if not held:
        console.print("[red]A comparison failed.[/red]")
    return 0 if held else 1


def build(name: str, arguments: Arguments) -> torch.nn.Module:
    """A model of random weights, fp32, eager."""
    auto = AutoModelForMaskedLM if name == "BERT" else AutoModelForCausalLM
    model = auto.from_config(MODELS[name], attn_implementation="eager")
    return model.eval().to(arguments.device)


def written_out(name: str, pattern: masks.Pattern, seqlen: int, device: str) -> torch.Tensor:
    """The additive mask that eager attention needs: quadratic, one a head."""
    if name != "BERT":
        pattern = pattern & masks.causal()
    seen = pattern.dense(seqlen, num_heads=4, device=device)
    seen = seen.repeat_interleave(4 // seen.shape[1], dim=1)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))


@torch.no_grad()
def compare(console: Console, arguments: Arguments) -> bool:
    """Logits of patched models against eager ones under the mask written out."""
    table = Table("model", "pattern", "density", "largest difference", title="Equality")
    held = True
    for name in MODELS:
        model = build(name, arguments)
        ids = torch.randint(3, 256, (2, 512), device=arguments.device)
        for title, pattern in PATTERNS.items():
            expected = model(ids, attention_mask=written_out(name, pattern, 512, ids.device))
            with hfp.patched(model, mask=pattern):
                actual = model(ids)
            error = (actual.logits - expected.logits).abs().max().item()
            held &= error < TOLERANCE
            table.add_row(name, title, f"{pattern.density(512):.1%}", f"{error:.1e}")
    console.print(table)
    return held


@torch.no_grad()
def generate(console: Console, arguments: Arguments) -> bool:
    """Prefill and decode under a pattern against one forward over what came out."""
    model = build("LLaMA", arguments)
    ids = torch.randint(3, 256, (2, 200), device=arguments.device)
    pattern = masks.sliding_window(64) | masks.sinks(4)
    with hfp.patched(model, mask=pattern) as patch:
        console.print(str(patch))
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    whole = generated.sequences
    mask = written_out("LLaMA", pattern, whole.shape[1], whole.device)
    expected = model(whole, attention_mask=mask).logits[:, 199:-1]
    error = (torch.stack(generated.logits, dim=1) - expected).abs().max().item()
    console.print(f"{arguments.new_tokens} tokens generated, largest difference {error:.1e}\n")
    return error < TOLERANCE


def measure(console: Console, arguments: Arguments) -> None:
    """Forward and backward of attention alone, causal, dense and under patterns."""
    seqlen, dtype = arguments.seqlen, getattr(torch, arguments.dtype)
    q, k, v = (
        torch.randn(1, seqlen, 4, 64, device=arguments.device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    table = Table(
        "pattern", "density", "time", "times as fast", title=f"{seqlen} tokens, causal, fwd + bwd"
    )
    dense = _seconds(q, k, v, masks.full())
    table.add_row("dense, as a list", "100.0%", f"{dense * 1e3:.1f} ms", "1.0")
    for title, pattern in TIMED.items():
        seconds = _seconds(q, k, v, pattern)
        both = (pattern & masks.causal()).density(seqlen)
        density = both / masks.causal().density(seqlen)
        row = (title, f"{density:.1%}", f"{seconds * 1e3:.1f} ms", f"{dense / seconds:.1f}")
        table.add_row(*row)
    console.print(table)


def _seconds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: masks.Pattern) -> float:
    """The fastest of three calls after a first one, which lowers the pattern."""
    times = []
    for _ in range(4):
        _synchronize(q)
        start = time.perf_counter()
        hfp.flash_attn_func(q, k, v, causal=True, block_mask=pattern).sum().backward()
        _synchronize(q)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
