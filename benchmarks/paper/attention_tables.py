"""Attention's time and memory by length: the paper's tables 8 to 21, on today's PyTorch.

    python -m benchmarks.paper.attention_tables           # minutes on a GPU; goes on where it was
    python -m benchmarks.paper.attention_tables --tiny    # seconds, on a CPU

Batch 16, 8 heads of 64, fp16, not causal; 128 to 64k tokens; with and without dropout 0.1 and a
padding mask (lengths uniform in the last 20 tokens). Eager PyTorch, SDPA and FlexAttention against
ours, dense and under the paper's butterfly and a window with global tokens. Times are of forward,
backward and both, interleaved with the others of the row's length; memory is the peak of both. A
contestant that runs out of memory is not asked for longer ones.

Leaves attention_tables.csv, .svg and .md in --output. Stops after --budget seconds with exit status
3; the same command goes on.
"""

import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser

import hf_flash_patch as hfp
from hf_flash_patch.bench.timing import time_interleaved

from .loop import Clock, OutOfTime
from .records import Records

BATCH, HEADS, HEAD_DIM = 16, 8, 64
PATTERNS = {
    "ours, butterfly": hfp.masks.butterfly(128),
    "ours, local + global": hfp.masks.sliding_window(128) | hfp.masks.global_tokens(128),
}
PEERS = ("eager", "sdpa", "flex")
CONTESTANTS = (*PEERS, "ours", *PATTERNS)
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Arguments:
    """What to measure."""

    seqlens: list[int] = field(default_factory=lambda: [2**n for n in range(7, 17)])
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"choices": list(CONTESTANTS)}
    )
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.1])
    masks: list[str] = field(
        default_factory=lambda: ["none", "padding"], metadata={"choices": ["none", "padding"]}
    )
    rounds: int = 3
    seed: int = 0
    budget: float = field(default=540, metadata={"help": "seconds; no length starts after"})
    output: str = "docs/results"
    tiny: bool = field(default=False, metadata={"help": "small sizes, on a CPU"})


class Problem:
    """Tensors of one length, and who computes them.

    Attributes:
        q, k, v, dout: (batch, seqlen, heads, head_dim).
        real: bool (batch, seqlen), or None without padding.
    """

    def __init__(self, seqlen: int, mask: str, dropout: float, seed: int, tiny: bool):
        device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.float16)
        draw = torch.Generator(device).manual_seed(seed)
        batch = 2 if tiny else BATCH
        shape = (batch, seqlen, HEADS, HEAD_DIM)

        def random() -> torch.Tensor:
            return torch.randn(shape, generator=draw, dtype=dtype, device=device)

        self.q, self.k, self.v = (random().requires_grad_() for _ in range(3))
        self.dout, self.dropout, self.real = random(), dropout, None
        if mask == "padding":
            short = torch.randint(0, 21, (batch, 1), generator=draw, device=device)
            self.real = torch.arange(seqlen, device=device) < seqlen - short

    def call(self, name: str) -> Call:
        """What computes attention; raises ValueError where a contestant has no dropout."""
        if name == "eager":
            return self._eager
        if name == "sdpa":
            visible = None if self.real is None else self.real[:, None, None]
            return lambda q, k, v: F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), visible, self.dropout
            ).transpose(1, 2)
        if name == "flex":
            return self._flex()
        pattern = PATTERNS.get(name)
        lists = None
        if pattern is not None:
            seqlen = self.q.shape[1]
            lists = pattern.block_mask(seqlen, seqlen, HEADS, self.q.device)
        return lambda q, k, v: hfp.flash_attn_func(
            q, k, v, self.dropout, block_mask=lists, key_padding_mask=self.real
        )

    def _eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT * HEAD_DIM**-0.5
        if self.real is not None:
            scores = scores.masked_fill(~self.real[:, None, None], float("-inf"))
        return (F.dropout(scores.softmax(-1), self.dropout) @ v).transpose(1, 2)

    def _flex(self) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self.dropout:
            raise ValueError("FlexAttention has no dropout.")
        torch._functorch.config.donated_buffer = False  # a backward is repeated
        torch._dynamo.reset()
        real, lists = self.real, None
        if real is not None:
            size = (real.shape[0], None, real.shape[1], real.shape[1], str(real.device))
            lists = create_block_mask(lambda b, h, i, j: real[b, j], *size)
        compiled = flex_attention
        if self.q.is_cuda:
            compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda q, k, v: compiled(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=lists
        ).transpose(1, 2)

    def gradients(self, out: torch.Tensor, again: bool = True) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv."""
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.dout, retain_graph=again)


def measure(problem: Problem, names: list[str], rounds: int) -> dict[str, dict]:
    """Milliseconds and peak MiB of each; an outcome where there are none."""
    found: dict[str, dict] = {}
    calls: dict[str, Call] = {}
    for name in names:
        row: dict = dict.fromkeys(("fwd_ms", "bwd_ms", "both_ms", "peak_mib"))
        try:
            call = problem.call(name)
            problem.gradients(call(problem.q, problem.k, problem.v), again=False)  # compiles
            row["peak_mib"] = _peak(problem, call)
            row["outcome"], calls[name] = "ok", call
        except torch.OutOfMemoryError:
            row["outcome"] = "out of memory"
        except (ValueError, NotImplementedError) as error:
            row["outcome"] = str(error).splitlines()[0]
        found[name] = row
        _release(problem)
    for direction in ("fwd", "bwd", "both"):
        timed = {}
        for name, call in calls.items():
            timed[name] = _timed(problem, call, direction)
        for name, milliseconds in _times(timed, rounds, problem.q.is_cuda).items():
            found[name][f"{direction}_ms"] = round(milliseconds, 5)
        del timed
        _release(problem)
    return found


def _timed(problem: Problem, call: Call, direction: str) -> Callable[[], object]:
    inputs = (problem.q, problem.k, problem.v)
    if direction == "fwd":
        return lambda: call(*inputs)
    if direction == "both":
        return lambda: problem.gradients(call(*inputs), again=False)
    out = call(*inputs)
    return lambda: problem.gradients(out)


def _times(calls: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, float]:
    if cuda:
        return {n: t.median for n, t in time_interleaved(calls, rounds=rounds).items()}
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        found[name] = 1e3 * (time.perf_counter() - start)
    return found


def _peak(problem: Problem, call: Call) -> float | None:
    if not problem.q.is_cuda:
        return None
    _release(problem)
    torch.cuda.reset_peak_memory_stats()
    problem.gradients(call(problem.q, problem.k, problem.v), again=False)
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def _release(problem: Problem) -> None:
    gc.collect()
    if problem.q.is_cuda:
        torch.cuda.empty_cache()


def main(arguments: Arguments) -> int:
    """Measures what is not in the CSV yet; returns 0 when all is done, 3 when time is over."""
    clock, status = Clock(arguments.budget), 0
    if arguments.tiny:
        arguments.seqlens = [128, 256]
    output = Path(arguments.output)
    records = Records(output / "attention_tables.csv")
    try:
        for settings in product(arguments.masks, arguments.dropouts):
            _lengths(arguments, records, clock, *settings)
    except OutOfTime:
        status = 3
        print("Time is over; run the same command again to go on.")
    report(records.rows, output)
    return status


def _lengths(
    arguments: Arguments, records: Records, clock: Clock, mask: str, dropout: float
) -> None:
    too_long: set[str] = set()
    for seqlen in sorted(arguments.seqlens):
        key = {"seqlen": seqlen, "mask": mask, "dropout": dropout}
        names = [
            name
            for name in arguments.contestants
            if name not in too_long and not records.has(**key, contestant=name)
        ]
        if not names:
            continue
        clock.check()
        problem = Problem(seqlen, mask, dropout, arguments.seed, arguments.tiny)
        for name, row in measure(problem, names, arguments.rounds).items():
            if row["outcome"] != "ok":
                too_long.add(name)
            density = PATTERNS[name].density(seqlen) if name in PATTERNS else 1.0
            more = {"density": round(density, 6), "seed": arguments.seed}
            dtype = str(problem.q.dtype).removeprefix("torch.")
            records.add({**key, "contestant": name, **row, **more, "dtype": dtype})
        print(f"{seqlen:>6} tokens, mask {mask}, dropout {dropout}: {', '.join(names)}")
        del problem


def report(rows: list[dict[str, str]], folder: Path) -> None:
    """Writes attention_tables.md and .svg."""
    if not rows:
        return
    last = rows[-1]
    text = ["# Attention by length", ""]
    text += [f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, {last['dtype']}; {last['device']}, "]
    text[-1] += f"torch {last['torch']}, commit {last['commit']}, seed {last['seed']}."
    tables: dict[tuple[str, str], dict[str, dict[int, dict[str, str]]]] = {}
    for row in rows:
        table = tables.setdefault((row["mask"], row["dropout"]), {})
        table.setdefault(row["contestant"], {})[int(row["seqlen"])] = row
    for (mask, dropout), table in tables.items():
        lengths = sorted({n for entries in table.values() for n in entries})
        for column, unit in (("both_ms", "ms, forward and backward"), ("peak_mib", "MiB")):
            text += ["", f"## Mask {mask}, dropout {dropout}: {unit}", ""]
            text += ["| | " + " | ".join(map(str, lengths)) + " |"]
            text += ["| --- " * (len(lengths) + 1) + "|"]
            for name, entries in table.items():
                values = [entries.get(n, {}).get(column) or "-" for n in lengths]
                text.append(f"| {name} | {' | '.join(values)} |")
        text += ["", *conclusions(table)]
    text += ["", f"Command: `{last['command']}`"]
    (folder / "attention_tables.md").write_text("\n".join(text) + "\n")
    _draw(tables, folder / "attention_tables.svg")


def conclusions(table: dict[str, dict[int, dict[str, str]]]) -> list[str]:
    """Lines: ours against each peer from 1k to 8k, memory at 4k, block-sparse against its ideal."""
    found = []
    ours = {n: row for n, row in table.get("ours", {}).items() if row["outcome"] == "ok"}
    for peer in PEERS:
        ratios = [
            float(row["both_ms"]) / float(ours[n]["both_ms"])
            for n, row in table.get(peer, {}).items()
            if row["outcome"] == "ok" and n in ours and 1024 <= n <= 8192
        ]
        if ratios:
            found.append(
                f"* {geometric_mean(ratios):.2f} times as fast as {peer} from 1k to 8k (mean; at "
                f"least {min(ratios):.2f})."
            )
        theirs = table.get(peer, {}).get(4096, {}).get("peak_mib")
        if theirs and 4096 in ours:
            ratio = float(theirs) / float(ours[4096]["peak_mib"])
            found.append(f"* {ratio:.1f} times less memory than {peer} at 4k.")
    for name in PATTERNS:
        done = [n for n, row in table.get(name, {}).items() if row["outcome"] == "ok" and n in ours]
        if done:
            n = max(done)
            row = table[name][n]
            gain = float(ours[n]["both_ms"]) / float(row["both_ms"])
            ideal = 1 / float(row["density"])
            found.append(
                f"* {name}: {gain:.1f} times as fast as dense at {n}, {gain / ideal:.0%} of what a "
                f"density of {float(row['density']):.2%} would give."
            )
    return found


def _draw(tables: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, ((mask, dropout), table) in zip(axes, tables.items(), strict=True):
        for name, entries in table.items():
            done = {n: float(row["both_ms"]) for n, row in entries.items() if row["both_ms"]}
            axis.plot(list(done), [ms if ms else math.nan for ms in done.values()], label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward and backward")
        axis.set_xscale("log", base=2)
        axis.set_title(f"mask {mask}, dropout {dropout}", fontsize=9)
        axis.legend(fontsize=6)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
