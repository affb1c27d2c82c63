"""The FlashAttention paper's tables of attention's time and memory, with our kernels.

    python -m benchmarks.paper.attention_tables                  # one H200, some 15 minutes
    python -m benchmarks.paper.attention_tables --settings none --lengths 1024 4096 --budget 500
    python -m benchmarks.paper.attention_tables --tiny           # seconds, on a CPU

Tables 8 to 21 (arXiv 2205.14135): 16 sequences, 8 heads of 64, fp16, with and without dropout 0.1
and padding, where all but the last length - 20 to length tokens of a sequence are hidden. Forward,
backward, both, and the peak memory of both, q, k, v and all gradients included. Contestants:

    eager         transformers' eager attention
    sdpa          PyTorch, its own choice of kernel; sdpa_cudnn: cuDNN's
    flex          FlexAttention, compiled
    hfp           our kernels, dense
    butterfly     ours, block-sparse: every query sees its own block of 128 keys and the next one of
                  a butterfly, 256 / length of all, the paper's compression
    local_global  ours, block-sparse: its own block and the first one, which sees all

Everyone's results are compared with the formula before they are timed. What does not fit the
memory, takes longer than --limit or is not offered (FlexAttention has no dropout) is a row that
says so. Stops after --budget seconds with exit status 3; the same command goes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import HfArgumentParser
from transformers.models.bert.modeling_bert import eager_attention_forward

from hf_flash_patch.bench.cells import TILE, Cell
from hf_flash_patch.bench.check import Reference
from hf_flash_patch.bench.contestants import Contestant, Refusal, find_peer, reason
from hf_flash_patch.bench.measure import Wrong, enter
from hf_flash_patch.bench.problem import Attend, Problem
from hf_flash_patch.bench.timing import Timing, time_interleaved
from hf_flash_patch.ops.functional import attention

from . import attention_tables_report as report
from .records import Records

SETTINGS = {  # dropout, padding
    "none": (0.0, False),
    "dropout": (0.1, False),
    "padding": (0.0, True),
    "dropout+padding": (0.1, True),
}
LENGTHS = [2**n for n in range(7, 17)]
PADDING = 20  # tokens at most, as in the paper
SLOW = 0.2  # seconds of forward and backward, from where three calls have to do
BUDGET_SPENT = 3

Layout = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PATTERNS: dict[str, Layout] = {  # block of queries, block of keys -> visible
    "butterfly": lambda i, j: (i == j) | (i ^ j == 1),
    "local_global": lambda i, j: (i == j) | (i == 0) | (j == 0),
}
CONTESTANTS = ("eager", "sdpa", "sdpa_cudnn", "flex", "hfp", *PATTERNS)
OURS = ("hfp", *PATTERNS)


@dataclass
class Arguments:
    """What to measure."""

    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"choices": list(SETTINGS)}
    )
    lengths: list[int] = field(default_factory=lambda: LENGTHS, metadata={"help": "tokens"})
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"choices": list(CONTESTANTS)}
    )
    rounds: int = field(default=3, metadata={"help": "turns of each contestant"})
    limit: float = field(default=10, metadata={"help": "seconds of forward and backward"})
    budget: float = field(default=math.inf, metadata={"help": "seconds; start no cell after"})
    backend: str = field(default="cuda", metadata={"help": "of ours: cuda, torch, ..."})
    output: str = field(default="docs/results", metadata={"help": "folder of CSV, figure, text"})
    tiny: bool = field(default=False, metadata={"help": "short lengths, on a CPU"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class PaperCell(Cell):
    """A cell of the tables.

    Attributes:
        pattern: of `PATTERNS`, with `density` its visible part; "" if dense.
    """

    pattern: str = ""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences; padding is on the left, where it costs the same."""
        if self.layout == "dense":
            return (self.seqlen,) * self.batch
        draw = random.Random(0)
        shortest = max(1, self.seqlen - PADDING)
        return tuple(draw.randint(shortest, self.seqlen) for _ in range(self.batch))

    @cached_property
    def blocks(self) -> torch.Tensor:
        """bool (num_heads, n, n), of the pattern."""
        return block_layout(self.pattern, self.seqlen).expand(self.num_heads, -1, -1)


def block_layout(pattern: str, seqlen: int) -> torch.Tensor:
    """bool (n, n): which blocks of keys a block of queries sees."""
    places = torch.arange(seqlen // TILE)
    return PATTERNS[pattern](places[:, None], places)


def paper_cell(setting: str, seqlen: int, tiny: bool) -> PaperCell:
    """The dense cell of a setting and a length."""
    dropout, padded = SETTINGS[setting]
    batch, num_heads, head_dim = 16, 8, 64
    if tiny:  # The check of dropout is one of statistics, over 32 heads here.
        batch, num_heads, head_dim = 16 if dropout else 1, 2, 16
    return PaperCell(
        group=setting,
        layout="padded" if padded else "dense",
        head_dim=head_dim,
        causal=False,
        seqlen=seqlen,
        batch=batch,
        num_heads=num_heads,
        num_heads_k=num_heads,
        dropout=dropout,
    )


def find(name: str, backend: str) -> Contestant | str:
    """A contestant; or, in a sentence, why it is not there."""
    if name == "flex":
        return find_peer(name)
    binds: dict[str, Callable[[Problem], Attend]] = {
        "eager": _eager,
        "sdpa": lambda problem: _sdpa(problem, None),
        "sdpa_cudnn": lambda problem: _sdpa(problem, SDPBackend.CUDNN_ATTENTION),
    }
    return Contestant(name, "", binds.get(name) or (lambda problem: _ours(problem, backend)))


def _ours(problem: Problem, backend: str) -> Attend:
    mask, dropout = problem.mask, problem.cell.dropout
    return lambda q, k, v: attention(q, k, v, mask=mask, dropout_p=dropout, backend=backend)


def _eager(problem: Problem) -> Attend:
    module = torch.nn.Module().train()
    bias = None
    if problem.cell.ragged:
        lowest = torch.finfo(problem.q.dtype).min
        bias = (~problem.real[:, None, None]).to(problem.q.dtype) * lowest

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, q, k, v, bias, dropout=problem.cell.dropout)[0]

    return attend


def _sdpa(problem: Problem, backend: SDPBackend | None) -> Attend:
    seen = problem.real[:, None, None] if problem.cell.ragged else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with nullcontext() if backend is None else sdpa_kernel(backend):
            options: dict[str, Any] = {"attn_mask": seen, "dropout_p": problem.cell.dropout}
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return attend


class Tables:
    """A run of the command: which cells are left, and what they are measured with."""

    def __init__(self, arguments: Arguments):
        if arguments.tiny:
            arguments = replace(arguments, lengths=[128, 256], device="cpu", backend="torch")
            kept = [name for name in arguments.contestants if name not in ("flex", "sdpa_cudnn")]
            arguments = replace(arguments, contestants=kept, rounds=1)
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        name = "attention-tables" + ("-tiny" if arguments.tiny else "")
        self.path = Path(arguments.output) / name
        self.records = Records(self.path.with_suffix(".csv"))

    def left(self) -> Iterator[tuple[str, int, list[str]]]:
        """Setting, length and contestants without a row."""
        for setting, seqlen in product(self.arguments.settings, sorted(self.arguments.lengths)):
            names = [
                name
                for name in self.arguments.contestants
                if not self.records.has(setting=setting, seqlen=seqlen, contestant=name)
            ]
            if names:
                yield setting, seqlen, names

    def measure(self, setting: str, seqlen: int, names: list[str]) -> None:
        """Rows of one setting and length.

        Raises:
            RuntimeError: ours is wrong or does not serve the cell.
        """
        cell = paper_cell(setting, seqlen, self.arguments.tiny)
        found: dict[str, tuple[Problem, Attend]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name in names:
            rows[name], served = self._try(name, cell)
            if served is not None:
                found[name] = served
            _release(self.device)
        slow = {name for name in found if rows[name]["seconds"] > SLOW}
        for direction in ("fwd", "bwd", "both"):
            calls = {name: _call(direction, *served) for name, served in found.items()}
            for name, timing in self._time(calls, slow).items():
                rows[name][f"{direction}_ms"] = timing.median
                rows[name][f"{direction}_spread"] = timing.spread
            del calls
            _release(self.device)
        for row in rows.values():
            del row["seconds"]
            self.records.add(row)
            _print(row)

    def _time(self, calls: dict[str, Callable[[], object]], slow: set[str]) -> dict[str, Timing]:
        """In turns; by the clock what takes so long that the host does not count, and on a CPU."""
        device = self.device
        alone = slow if device.type == "cuda" else set(calls)
        turns = {name: call for name, call in calls.items() if name not in alone}
        times = time_interleaved(turns, rounds=self.arguments.rounds) if turns else {}
        return times | {name: time_by_clock(calls[name], device) for name in alone}

    def _try(
        self, name: str, cell: PaperCell
    ) -> tuple[dict[str, Any], tuple[Problem, Attend] | None]:
        """The row so far, and what is to be timed, if anything."""
        if name in PATTERNS:
            density = block_layout(name, cell.seqlen).float().mean().item()
            cell = replace(cell, pattern=name, density=density)
        row = {
            "setting": cell.group,
            "seqlen": cell.seqlen,
            "contestant": name,
            "batch": cell.batch,
            "num_heads": cell.num_heads,
            "head_dim": cell.head_dim,
            "dropout": cell.dropout,
            "padded": cell.ragged,
            "density": cell.density or 1.0,
            "outcome": "ok",
            **dict.fromkeys(report.NUMBERS),
            "seconds": None,
        }
        contestant = find(name, self.arguments.backend)
        if isinstance(contestant, str):
            return row | {"outcome": f"absent: {contestant}"}, None
        try:
            served, row["memory_mb"], row["seconds"] = self._enter(contestant, cell)
        except torch.OutOfMemoryError:
            return row | {"outcome": "out of memory"}, None
        except Exception as error:
            if name in OURS:
                raise RuntimeError(f"{name} fails at {cell.name}: {error}") from error
            text = str(error) if isinstance(error, Refusal) else reason(error)
            verdict = "wrong" if isinstance(error, Wrong) else "not served"
            return row | {"outcome": f"{verdict}: {text}"}, None
        if row["seconds"] > self.arguments.limit:
            return row | {"outcome": f"over {self.arguments.limit:g} s"}, None
        return row, served

    def _enter(
        self, contestant: Contestant, cell: PaperCell
    ) -> tuple[tuple[Problem, Attend], float | None, float]:
        """Checked; with the peak in MB and the seconds of one forward and backward."""
        # The same numbers for everyone, in tensors of one's own: the largest are 4.3 GB.
        problem = Problem(cell, dtype=torch.float16, device=self.device)
        attend = enter(contestant, problem, Reference(problem), True).attend
        _release(self.device)
        cuda = self.device.type == "cuda"
        _wait(self.device)
        own = sum(x.nbytes for x in (problem.q, problem.k, problem.v, problem.dout))
        others = torch.cuda.memory_allocated() - own if cuda else 0
        start = time.perf_counter()
        _both(problem, attend)
        _wait(self.device)
        seconds = time.perf_counter() - start
        peak = (torch.cuda.max_memory_allocated() - others) / 1e6 if cuda else None
        return (problem, attend), peak, seconds


def _both(problem: Problem, attend: Attend) -> tuple[torch.Tensor, ...]:
    leaves = (problem.q, problem.k, problem.v)
    return torch.autograd.grad(attend(*leaves), leaves, problem.dout)


def _call(direction: str, problem: Problem, attend: Attend) -> Callable[[], object]:
    if direction == "both":
        return lambda: _both(problem, attend)
    if direction == "fwd":
        return lambda: attend(problem.q, problem.k, problem.v)
    out = attend(problem.q, problem.k, problem.v)
    return lambda: problem.gradients(out)


def time_by_clock(call: Callable[[], object], device: torch.device) -> Timing:
    """The median of three calls, waiting for each."""
    times = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times), max(times) / min(times) - 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _print(row: dict[str, Any]) -> None:
    line = f"{row['setting']:16}{row['seqlen']:>6}  {row['contestant']:13}"
    if row["outcome"] == "ok":
        line += "".join(f"{row[f'{name}_ms']:11.3f} ms {name}" for name in ("fwd", "bwd", "both"))
        if row["memory_mb"] is not None:
            line += f"{row['memory_mb']:10,.0f} MB"
    print(line if row["outcome"] == "ok" else line + row["outcome"], flush=True)


def main(arguments: Arguments) -> int:
    """Measures what has no row yet, draws and concludes; the exit status."""
    start = time.monotonic()
    tables = Tables(arguments)
    left = list(tables.left())
    status = 0
    for done, (setting, seqlen, names) in enumerate(left):
        if time.monotonic() - start > arguments.budget:
            print(f"The budget of {arguments.budget:g} s is spent: {len(left) - done} cells left.")
            status = BUDGET_SPENT
            break
        print(f"[{done + 1}/{len(left)}] {setting}, {seqlen} tokens", flush=True)
        tables.measure(setting, seqlen, names)
    print(report.conclude(tables.records.rows, tables.path))
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
