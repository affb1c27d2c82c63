"""Attention against PyTorch's own, forward and backward, on one GPU.

    python benchmarks/attention.py --csv docs/results/attention.csv

Every cell first checks each contestant against the others' result, then times them in turns on the
same data. TFLOP/s count the visible work: 4 * batch * heads * seqlen^2 * head_dim, half of it under
a causal mask, 2.5 times that backward. Hidden size 2048 and 16384 tokens a call, as in the papers.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_flash_patch as hfp
from hf_flash_patch.testing.bench import time_interleaved

HIDDEN, TOKENS = 2048, 16384


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    head_dim: int
    causal: bool
    seqlen: int
    dropout: float = 0.0

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.seqlen)

    @property
    def num_heads(self) -> int:
        return max(1, HIDDEN // self.head_dim)

    @property
    def flop(self) -> float:
        """Of the forward."""
        visible = 0.5 if self.causal else 1.0
        return 4 * visible * self.batch * self.num_heads * self.seqlen**2 * self.head_dim


def ours(q, k, v, cell: Cell) -> torch.Tensor:
    return hfp.flash_attn_func(q, k, v, dropout_p=cell.dropout, causal=cell.causal, backend="cuda")


def sdpa(backend: SDPBackend, q, k, v, cell: Cell) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=cell.dropout, is_causal=cell.causal)
    return out.transpose(1, 2)


CONTESTANTS: dict[str, Callable[..., torch.Tensor]] = {
    "hfp": ours,
    "sdpa_flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
}


def measure(cell: Cell, names: list[str], dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """One cell: {column: value}. A contestant that refuses the cell is left out of it."""
    shape = (cell.batch, cell.seqlen, cell.num_heads, cell.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape, device="cuda", dtype=dtype)
    forward, backward, results = {}, {}, {}
    for name in names:
        call = CONTESTANTS[name]
        try:
            out = call(q, k, v, cell)
        except RuntimeError:
            continue
        results[name] = out.detach()
        backward[name] = partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
        forward[name] = partial(_no_grad, call, q, k, v, cell)
    if cell.dropout == 0.0:
        first, *others = results.items()
        for name, out in others:
            # Two roundings of values of order 1 are at most 2^-7 apart in bf16.
            worst = (out.float() - first[1].float()).abs().max().item()
            if not worst < 2e-2:
                raise RuntimeError(f"{first[0]} and {name} differ by {worst:.1e} in {cell}.")

    row: dict[str, object] = vars(cell) | {"dtype": str(dtype).removeprefix("torch.")}
    for direction, calls, flop in (
        ("fwd", forward, cell.flop),
        ("bwd", backward, 2.5 * cell.flop),
    ):
        for name, timing in time_interleaved(calls, rounds=rounds).items():
            row[f"{direction}_{name}"] = round(flop / timing.median / 1e9, 1)
    return row


def _no_grad(call, *args):
    with torch.no_grad():
        return call(*args)


def ratio(row: dict[str, object], direction: str, peer: str) -> float | None:
    us, them = row.get(f"{direction}_hfp"), row.get(f"{direction}_{peer}")
    return us / them if us and them else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--peers", nargs="*", default=["sdpa_flash"], choices=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, "
        f"dropout {args.dropout}; TFLOP/s, and ours over the peer's"
    )
    rows = []
    for head_dim in args.head_dims:
        for causal in (False, True):
            for seqlen in args.seqlens:
                cell = Cell(head_dim, causal, seqlen, args.dropout)
                row = measure(cell, ["hfp", *args.peers], getattr(torch, args.dtype), args.rounds)
                rows.append(row)
                line = f"d{head_dim:<4}{'causal' if causal else 'full':7}{seqlen:6}"
                for direction in ("fwd", "bwd"):
                    line += f"  {direction} {row[f'{direction}_hfp']:6.1f}"
                    for peer in args.peers:
                        r = ratio(row, direction, peer)
                        line += f"  {peer} " + (f"{r:.2f}x" if r else "-")
                print(line, flush=True)
    for direction in ("fwd", "bwd"):
        for peer in args.peers:
            ratios = [r for row in rows if (r := ratio(row, direction, peer))]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{direction} against {peer}: mean {mean:.3f}x, worst {min(ratios):.2f}x")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
