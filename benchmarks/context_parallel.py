"""Scaling of attention that processes share, forward and backward, against one process alone.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --seqlen 65536 --csv shared.csv

The ideal is the time of one process over their number, both measured here, on the same tensors; the
default shape is Llama-3.1-8B's attention. Output and gradients are compared before anything is
timed. On a CPU it runs on gloo, with --head_dim 16 --seqlen 2048 in seconds.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

import hf_flash_patch as hfp

LAYOUTS = {"ring": "zigzag", "ulysses": "contiguous"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seqlen", nargs="+", type=int, default=[65536], help="tokens in all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num_heads", type=int, default=32)
    parser.add_argument("--num_heads_k", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def main() -> None:
    """Prints a line for each method and length, on the first process."""
    options = arguments()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rows = []
    for seqlen in options.seqlen:
        tensors = make(options, seqlen, device)
        alone, expected = measure(options, tensors, hfp.flash_attn_func)
        for method in options.methods:
            layout = LAYOUTS[method]
            mine = [hfp.parallel.shard(x, layout=layout) for x in tensors]
            function = getattr(hfp.parallel, f"{method}_attention")
            seconds, parts = measure(options, mine, function)
            error = compare(parts, [hfp.parallel.shard(x, layout=layout) for x in expected])
            ideal = alone / size
            rows.append((method, seqlen, size, alone, seconds, ideal / seconds, error))
            if rank == 0:
                print(
                    f"{method:8s} {seqlen:8d} tokens, {size} processes: {1e3 * seconds:9.2f} ms, "
                    f"one alone {1e3 * alone:9.2f} ms, {ideal / seconds:6.1%} of ideal, "
                    f"largest error {error:.1e}",
                    flush=True,
                )
    if options.csv and rank == 0:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            names = ["method", "seqlen", "processes", "alone_s", "shared_s", "of_ideal", "error"]
            writer.writerows([names, *rows])
    dist.destroy_process_group()


def make(options: argparse.Namespace, seqlen: int, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, the same on every process."""
    draw = torch.Generator(device).manual_seed(0)
    heads = (options.num_heads, options.num_heads_k, options.num_heads_k, options.num_heads)
    shapes = [(options.batch, seqlen, count, options.head_dim) for count in heads]
    dtype = getattr(torch, options.dtype)
    return [torch.randn(s, generator=draw, device=device, dtype=dtype) for s in shapes]


def measure(options, tensors, function) -> tuple[float, list[torch.Tensor]]:
    """Median seconds of forward and backward, of the slowest process; and what came out."""
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    times = []
    for _ in range(options.repeats + 2):
        synchronise(dout.device)
        start = time.perf_counter()
        out = function(*leaves, causal=not options.full)
        gradients = torch.autograd.grad(out, leaves, dout)
        if dout.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(times[2:]), device=dout.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item(), [out.detach(), *gradients]


def synchronise(device: torch.device) -> None:
    """All processes begin together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def compare(parts: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, over the largest value, anywhere.

    Raises:
        AssertionError: it is more than a few roundings.
    """
    errors = [
        (a.float() - b.float()).abs().max() / b.float().abs().max()
        for a, b in zip(parts, expected, strict=True)
    ]
    error = torch.stack(errors).max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    limit = 16 * torch.finfo(parts[0].dtype).eps
    assert error <= limit, f"{error.item():.1e} off, more than {limit:.1e}"
    return error.item()


if __name__ == "__main__":
    main()
