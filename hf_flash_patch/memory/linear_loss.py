"""Cross-entropy of a linear layer's output, chunk by chunk: the logits are never whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedKernelError

BACKENDS = ("auto", "torch", "liger")
CHUNK = 512  # rows; with 128k words and fp32 logits, their softmax and gradient take 1 GiB
_SCALED_ROWS = 8192
Step = Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    steps: tuple[Step, ...] = (torch.Tensor.float,),
    chunk: int = CHUNK,
    backend: str = "auto",
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), target)`, without the logits.

    The forward computes the gradients too, chunk by chunk, so the backward only scales them: it can
    run once. The weight's gradient is summed in fp32.

    Args:
        hidden: (tokens, hidden_size).
        weight: (vocab_size, hidden_size).
        target: int (tokens,).
        bias: (vocab_size,).
        class_weight: (vocab_size,), as cross_entropy's weight.
        ignore_index: target of tokens that do not count.
        reduction: "mean" or "sum".
        label_smoothing: as cross_entropy's.
        steps: what happens to the logits, element by element, before the softmax.
        chunk: tokens at a time.
        backend: "torch"; "liger" (liger-kernel's kernel); "auto": that one if it is installed, on
            a GPU, with no other step than float.

    Returns:
        The loss, a scalar, in the dtype that the steps give.

    Raises:
        ValueError: reduction or chunk is out of range.
        UnsupportedKernelError: the backend is unknown, not installed, or cannot serve the call.

    Source: Liger Kernel (arXiv 2410.10989), section 3.2.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r}; allowed are "mean" and "sum".')
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; it takes at least one token.")
    plain = all(step is torch.Tensor.float for step in steps)
    if uses_liger(backend, hidden.device, plain):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ce_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            accum_dtype=torch.float32,
        )
    options: dict[str, Any] = {"weight": class_weight, "ignore_index": ignore_index}
    options["label_smoothing"] = label_smoothing
    loss = _Options(options, steps, chunk, torch.is_grad_enabled())
    count = torch.ones((), device=target.device)  # a step may have moved the logits there
    if reduction == "mean":
        real = target != ignore_index
        each = torch.ones_like(target) if class_weight is None else class_weight[target * real]
        count = (each * real).sum()
    return _LinearCrossEntropy.apply(hidden, weight, bias, target, count, loss)  # type: ignore[return-value]


def uses_liger(backend: str, device: torch.device, plain: bool = True) -> bool:
    """Whether a call goes to liger-kernel.

    Args:
        backend: one of `BACKENDS`.
        device: of the hidden states.
        plain: the logits go to the softmax as they are.

    Raises:
        UnsupportedKernelError: the backend is unknown, not installed, or cannot serve the call.
    """
    if backend not in BACKENDS:
        raise UnsupportedKernelError(
            f"backend={backend!r}; allowed are {', '.join(map(repr, BACKENDS))}."
        )
    installed = importlib.util.find_spec("liger_kernel") is not None
    if backend != "liger":
        return backend == "auto" and installed and plain and device.type == "cuda"
    for missing, reason in (
        (not installed, "the package liger-kernel, which is not installed"),
        (device.type != "cuda", f"a GPU; the hidden states are on {device}"),
        (not plain, "logits that go to the softmax as they are; this model scales or caps them"),
    ):
        if missing:
            raise UnsupportedKernelError(f'backend="liger" needs {reason}. Use "auto" or "torch".')
    return True


@dataclass(frozen=True)
class _Options:
    cross_entropy: dict[str, Any]
    steps: tuple[Step, ...]
    chunk: int
    gradients: bool  # may be asked for; needs_input_grad does not know of no_grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, count, options):  # type: ignore[override]
        wanted = [options.gradients and needed for needed in ctx.needs_input_grad[:3]]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Cast once: autocast would do so for every chunk.
        w = weight.detach().to(dtype or weight.dtype).requires_grad_(wanted[1])
        b = None
        if bias is not None:
            b = bias.detach().to(dtype or bias.dtype).requires_grad_(wanted[2])
        in_hidden = torch.empty_like(hidden) if wanted[0] else None
        in_weights = [
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needed else None
            for x, needed in zip((weight, bias), wanted[1:], strict=True)
        ]
        losses = []
        for start in range(0, max(len(target), 1), options.chunk):
            rows = slice(start, start + options.chunk)
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_(wanted[0])
                logits = F.linear(h, w, b)
                for step in options.steps:
                    logits = step(logits)
                part = F.cross_entropy(
                    logits, target[rows], reduction="sum", **options.cross_entropy
                )
            losses.append(part.detach())
            inputs = [x for x, needed in zip((h, w, b), wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(part, inputs) if inputs else ())
            if in_hidden is not None:
                in_hidden[rows] = next(found)
            for total in in_weights:
                if total is not None:
                    total += next(found)
        ctx.save_for_backward(count, in_hidden, *in_weights)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return torch.stack(losses).sum() / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[override]
        count, *totals = ctx.saved_tensors
        scale = grad_output / count
        for total in totals:
            # In place, since the hidden states' gradient is as large as they are; by way of fp32,
            # since a scale rounded to bf16 would be wrong by up to 0.4% everywhere.
            for part in () if total is None else total.split(_SCALED_ROWS):
                part.copy_(part.float() * scale.to(part.device))
        gradients = zip(totals, ctx.dtypes, strict=True)
        return (*(x if x is None else x.to(dtype) for x, dtype in gradients), None, None, None)
