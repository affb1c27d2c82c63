"""Which modules of a transformers model work on each token by itself, and tiling them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError
from .technique import Changes, Technique, changing
from .tiling import TILE, tiled

_MLP = re.compile(r"(MLP|FeedForward|FFN)$", re.IGNORECASE)
_NORM = re.compile(r"(RMS|Layer)_?Norm(1P)?$", re.IGNORECASE)  # LayerNorm2d is of images
_EXPERTS = re.compile(r"router|expert", re.IGNORECASE)  # children of an MLP that is a mixture
_CHUNK = "feed_forward_chunk"  # BERT-like layers: intermediate and output in one method


def tile_layers(model: nn.Module, *, tile: int = TILE) -> Technique:
    """Compute the MLPs and norms of a model's layers, and its last norm, tile by tile of tokens.

    Their activations no longer grow with the sequence: the backward recomputes them tile by tile.
    Where dropout is in an MLP, tiles draw other numbers than the whole would, of the same
    distribution, and the backward replays them.

    Args:
        model: a model of transformers, a PeftModel, or a module around one.
        tile: tokens at a time; shorter sequences are not changed.

    Raises:
        ValueError: tile is not positive.
        UnsupportedModelError: no MLP of it is known to work on each token by itself, or it is
            compiled or sharded.
    """
    if tile < 1:
        raise ValueError(f"tile={tile}; it takes at least one token.")
    with changing(model, "tile_layers") as (root, changes):
        changes.refuse_replicas(root, "tile_layers")
        layers = [m for m in root.modules() if isinstance(m, GradientCheckpointingLayer)]
        inside = {id(module) for layer in layers for module in layer.modules()}
        mlps = norms = 0
        for layer in layers:
            mlps += _tile_chunk(layer, tile, changes)
            for child in layer.children():
                mlps += _tile(child, _MLP, tile, changes)
                norms += _tile(child, _NORM, tile, changes)
        if not mlps:
            raise UnsupportedModelError(
                f"{type(root).__name__} has no layers with an MLP that works on each token by "
                "itself, as far as tile_layers knows (mixtures of experts do not)."
            )
        for owner in root.modules():
            if id(owner) not in inside:  # its norms come after all layers, or before them
                for child in owner.children():
                    norms += id(child) not in inside and _tile(child, _NORM, tile, changes)
    return Technique(
        "tile_layers", f"{mlps} MLPs and {norms} norms, {tile} tokens at a time", changes
    )


def _tile(module: nn.Module, kind: re.Pattern[str], tile: int, changes: Changes) -> bool:
    """Tiles a module of a kind, if it takes one tensor; whether it did."""
    named = getattr(module, "original_module", module)  # below a module that peft trains whole
    if not kind.search(type(named).__name__) or len(_parameters(type(named).forward)) != 2:
        return False
    if any(_EXPERTS.search(name) for name, _ in named.named_children()):
        return False
    if getattr(named, "data_format", None) == "channels_first":  # norms of images: no tokens
        return False

    changes.replace(module, "forward", partial(_forward, tile))
    _gather_whole(module, changes)
    return True


def _tile_chunk(layer: nn.Module, tile: int, changes: Changes) -> bool:
    """Tiles the method in which a BERT-like layer has its MLP; whether there is one."""
    method: Any = getattr(type(layer), _CHUNK, None)
    if method is None or len(_parameters(method)) != 2:
        return False

    changes.replace(layer, _CHUNK, partial(_feed_forward_chunk, tile))
    _gather_whole(layer, changes)
    return True


def _forward(tile: int, module: nn.Module, x: Tensor) -> Tensor:
    return tiled(lambda part: type(module).forward(module, part), module, x, tile)


def _feed_forward_chunk(tile: int, layer: Any, x: Tensor) -> Tensor:
    # All but attention: besides intermediate and output, pre-norm layers use a norm of theirs.
    used = [m for name, m in layer.named_children() if not name.endswith("attention")]
    method = getattr(type(layer), _CHUNK)
    return tiled(lambda part: method(layer, part), nn.ModuleList(used), x, tile)


def _gather_whole(module: nn.Module, changes: Changes) -> None:
    """Tell ZeRO-3 to gather a module's parameters at once, not those of each layer in it by itself:
    its hooks there would gather in every tile, and processes have different numbers of tiles."""
    if "_z3_leaf" not in vars(module):  # what deepspeed.utils.set_z3_leaf_module sets
        module._z3_leaf = True  # type: ignore[assignment]
        changes.undo.callback(delattr, module, "_z3_leaf")


def _parameters(method: Callable[..., Any]) -> list[str]:
    """Names of what a method takes, itself included: what is optional may be given, too."""
    return list(inspect.signature(method).parameters)
