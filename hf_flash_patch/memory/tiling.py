"""A function of each token by itself, tile by tile; the backward recomputes a tile at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

TILE = 8192  # tokens; an MLP of width 14336 then takes 0.2 GiB for each of its activations in bf16


@torch.compiler.disable
def tiled(function: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor, tile: int) -> Tensor:
    """`function(x)` with the memory of one tile, forward and backward; gradients summed in fp32.

    Args:
        function: of (batch, tokens, hidden_size), each token by itself; what it draws at random is
            replayed in the backward.
        owner: holds the parameters that the function uses; it may hold others.
        x: (..., hidden_size).
        tile: tokens at a time; fewer are done as they are.

    Raises:
        UnsupportedModelError: the function gives anything but one tensor, of the same tokens.
    """
    tokens = x.shape[:-1].numel()
    if tokens <= tile:
        return _of_its_tokens(function(x), x, owner)
    rows = x.reshape(1, tokens, x.shape[-1])
    parameters = [p for p in owner.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (x.requires_grad or parameters):
        # Before the work: a checkpoint's recomputation ends where all that it saved is there again,
        # so that it leaves the work of a layer's last module out.
        kept = _Keep.apply(torch.empty(0, requires_grad=True), rows)
        out = _Tiled.apply(function, owner, tile, [kept], rows, *parameters)  # no input of it
    else:
        out = _forward(function, owner, rows, tile)
    return out.view(*x.shape[:-1], out.shape[-1])


def _of_its_tokens(result: Any, x: Tensor, owner: nn.Module) -> Tensor:
    """The result for x, if it can be put together from those for its tokens."""
    if isinstance(result, Tensor) and result.shape[:-1] == x.shape[:-1]:
        return result
    what = f"a {type(result).__name__}"
    if isinstance(result, Tensor):
        what = f"{tuple(result.shape)} of {tuple(x.shape)}"
    raise UnsupportedModelError(
        f"tile_layers takes modules that make one vector of each token; {type(owner).__name__} "
        f"made {what}. restore() it for this model."
    )


def _forward(
    function: Callable[[Tensor], Tensor], owner: nn.Module, rows: Tensor, tile: int
) -> Tensor:
    out: Tensor | None = None
    for start in range(0, rows.shape[1], tile):
        x = rows[:, start : start + tile]
        part = _of_its_tokens(function(x), x, owner)
        if out is None:
            out = part.new_empty(1, rows.shape[1], part.shape[-1])
        out[:, start : start + tile] = part
    assert out is not None
    return out


class _Keep(torch.autograd.Function):
    """Saves a tensor; who holds on to the result may ask its node for it.

    Its node alone would not do: before torch 2.13 that frees what it saved with the result.
    """

    @staticmethod
    def forward(ctx, nothing, x):  # type: ignore[override]
        ctx.save_for_backward(x)
        return nothing.clone()

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        raise AssertionError("never part of a graph that is walked")


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, owner, tile, kept, x, *parameters):  # type: ignore[override]
        ctx.function, ctx.tile, ctx.kept, ctx.parameters = function, tile, kept, parameters
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        before = _random_state(x.device)
        out = _forward(function, owner, x, tile)
        # Asked of the generators: modules may call F.dropout with a probability of any name.
        drawn = not all(map(torch.equal, before, _random_state(x.device)))
        ctx.random = before if drawn else None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[override]
        if ctx.kept is None:
            raise RuntimeError("tile_layers: the backward has been run; it can run once.")
        [kept], ctx.kept = ctx.kept, None
        (x,) = kept.grad_fn.saved_tensors
        wanted = ctx.needs_input_grad[4]
        grad_x = torch.empty_like(x) if wanted else None
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        with _replayed(ctx.random, x.device):
            for start in range(0, x.shape[1], ctx.tile):
                tokens = slice(start, start + ctx.tile)
                part = x[:, tokens].detach().requires_grad_(wanted)
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    out = ctx.function(part)
                if not out.requires_grad:  # all that is trained is what the function does not use
                    continue
                inputs = ((part,) if wanted else ()) + ctx.parameters
                found = torch.autograd.grad(out, inputs, grad_output[:, tokens], allow_unused=True)
                if grad_x is not None:
                    grad_x[:, tokens], *found = found  # type: ignore[assignment]
                for i, gradient in enumerate(found):
                    sums[i] = _added(sums[i], gradient)
        pairs = zip(sums, ctx.parameters, strict=True)
        gradients = (None if total is None else total.to(p.dtype) for total, p in pairs)
        return None, None, None, None, grad_x, *gradients


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return total
    if total is None:  # autograd's own; nobody else has it
        return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    return total.add_(gradient)


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of the CPU's generator and, if it is another device, of its own."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def _replayed(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """The generators as they were; afterwards, as they are."""
    if states is None:
        yield
        return
    accelerators = [device] * (len(states) - 1)
    kind = device.type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind):
        torch.set_rng_state(states[0])
        if accelerators:
            torch.get_device_module(device).set_rng_state(states[1], device)
        yield
