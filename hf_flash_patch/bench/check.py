"""Whether a contestant computes the cell at all: nothing is timed that is wrong.

A probe (the last sequence, the heads of the last key head) is compared with the dense formula in
fp32, whose error beside 16 bits is nothing, by the rule of testing/tolerance.py: the error may be
some times that of PyTorch's own formula in the contestant's dtype.
"""

from __future__ import annotations

import torch

from ..ops.arguments import MaskArguments
from ..testing.reference import attention_reference
from ..testing.tolerance import assert_close_to_reference
from .cells import TILE
from .problem import Problem, Tensors

NAMES = ("out", "dq", "dk", "dv")

# Twice is what our tests allow. Peers promise nothing of that kind, and a probe is small: this is
# wide enough for how they round P, while a wrong mask or scale is off by far more.
ERROR_FACTOR = 4.0

# Rows of the formula at a time, so that its memory is that of 1024 x seqlen logits a head.
ROWS = 1024


class Reference:
    """The formula on a problem's probe, in fp32 and in the problem's dtype; without dropout."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.exact = _formula(problem, torch.float32)
        self.eager = _formula(problem, problem.q.dtype)

    def check(self, results: Tensors) -> None:
        """Compare out, and dq, dk and dv where they are given, all in the problem's layout.

        Raises:
            AssertionError: one is off, with the worst position.
        """
        triples = zip(NAMES, results, self.exact, self.eager, strict=False)
        for name, actual, exact, eager in triples:
            assert_close_to_reference(
                self.problem.probe(actual), exact, eager, name=name, factor=ERROR_FACTOR
            )


def check_dropout(dropped: Tensors, plain: Tensors, dropout: float) -> None:
    """Check results under dropout against the same contestant's without, which are right.

    Each is finite, its expectation is the plain one, and out varies as it must. The expectation is
    fitted as a factor on `plain`. Forgetting to rescale what is kept would put it at 1 - dropout,
    whence the bound; over 64 heads, the fewest measured, its standard deviation is 0.005. The noise
    in out has dropout / (1 - dropout) times the power of out itself, since values are independent.

    Args:
        dropped, plain: out, and dq, dk and dv where there are any.
        dropout: probability.

    Raises:
        AssertionError: one is off, with the number.
    """
    for name, x, y in zip(NAMES, dropped, plain, strict=False):
        if not x.isfinite().all():
            raise AssertionError(f"{name} under dropout is not finite")
        power = _dot(y, y)
        factor = _dot(x, y) / power
        if not abs(factor - 1.0) < dropout / 2:
            raise AssertionError(
                f"{name} under dropout is {factor:.3f} times that without, on average; 1 is right"
            )
        if name == "out":
            noise = (_dot(x, x) - 2 * _dot(x, y) + power) / power
            expected = dropout / (1.0 - dropout)
            if not expected / 2 < noise < 2 * expected:
                raise AssertionError(
                    f"out under dropout varies by {noise:.3f} of its power; {expected:.3f} is right"
                )


def _blocks(problem: Problem, heads: int, rows: range) -> MaskArguments | None:
    """The block mask of some rows of the last heads, element by element."""
    if not problem.cell.density:
        return None
    hidden = problem.cell.seqlen - problem.cell.lengths[-1]  # padding, which is on the left
    start, stop = hidden + rows.start, hidden + rows.stop
    first = start // TILE
    blocks = problem.cell.blocks[-heads:, first : (stop - 1) // TILE + 1].to(problem.q.device)
    seen = blocks.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
    start, stop = start - first * TILE, stop - first * TILE
    return MaskArguments(attn_bias=seen[None, :, start:stop, hidden:])


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x.detach().float() * y.detach().float()).sum(dtype=torch.float64).item()


def _formula(problem: Problem, dtype: torch.dtype) -> Tensors:
    """Out, and for training dq, dk and dv, of the probe: (1, length, heads, head_dim) each."""
    cell = problem.cell
    leaves = [problem.probe(x).to(dtype) for x in (problem.q, problem.k, problem.v)]
    q, k, v = (x.requires_grad_(not cell.decode) for x in leaves)
    dout = problem.probe(problem.dout).to(dtype)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    outs, sums = [], [torch.zeros_like(x, dtype=torch.float32) for x in leaves]
    for start in range(0, seqlen_q, ROWS):
        rows = slice(start, start + ROWS)
        # Causal is aligned bottom-right, so cut keys leave the rows where they were.
        keys = slice(min(start + ROWS, seqlen_q) if cell.causal else seqlen_k)
        out, _ = attention_reference(
            q[:, rows],
            k[:, keys],
            v[:, keys],
            mask=_blocks(problem, q.shape[2], range(start, min(start + ROWS, seqlen_q))),
            causal=cell.causal,
            window_size=cell.window_size,
            dtype=dtype,
        )
        outs.append(out.detach())
        if not cell.decode:
            for total, grad in zip(
                sums, torch.autograd.grad(out, (q, k, v), dout[:, rows]), strict=True
            ):
                total += grad
    out = torch.cat(outs, dim=1)
    return (out,) if cell.decode else (out, *sums)
