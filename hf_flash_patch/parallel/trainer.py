"""accelerate and transformers' Trainer with sequences that processes share."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from ..errors import ParallelError
from .model import SequenceParallel, sequence_parallel


def share_in_trainer(trainer: Any, *, method: str = "auto") -> SequenceParallel:
    """`share_in_accelerator` of a Trainer's model.

    Its method `_prepare_context_parallel_inputs` is replaced, too.

    Args:
        trainer: with a patched model, before train() and evaluate(); trl's trainers, too.
        method: as in `sequence_parallel`.

    Returns:
        The handle; its restore() leaves the Trainer's methods replaced.

    Raises:
        ParallelError: cp_size is 1, the model cannot be shared, or the versions of transformers and
            accelerate are of another make.
    """
    _check(trainer, "_prepare_context_parallel_inputs")
    shared = share_in_accelerator(trainer.accelerator, trainer.model, method=method)
    trainer._prepare_context_parallel_inputs = _inputs_as_they_are
    return shared


def share_in_accelerator(
    accelerator: Any, model: nn.Module, *, method: str = "auto"
) -> SequenceParallel:
    """`sequence_parallel` over the processes that accelerate's ParallelismConfig calls "cp".

    accelerate then gives all of them the same batches and shards the model over them too (FSDP2).
    Its own context parallelism, which knows SDPA and plain causal masks only, is left out: the
    method `_prepare_cp` of this Accelerator is replaced. In the file for `accelerate launch`:

        distributed_type: FSDP
        fsdp_config: {fsdp_version: 2}
        parallelism_config: {parallelism_config_cp_size: 2, parallelism_config_dp_shard_size: 1}

    Args:
        accelerator: an Accelerator, before its prepare().
        model: patched.
        method: as in `sequence_parallel`.

    Raises:
        ParallelError: as `share_in_trainer`.
    """
    config = getattr(accelerator, "parallelism_config", None)
    if config is None or not config.cp_enabled:
        raise ParallelError(
            "accelerate's processes do not share sequences: set cp_size, such as "
            "parallelism_config_cp_size: 2 in the file for accelerate launch, or "
            "ParallelismConfig(cp_size=2)."
        )
    _check(accelerator, "_prepare_cp")
    shared = sequence_parallel(model, accelerator.torch_device_mesh["cp"], method=method)
    accelerator._prepare_cp = _models_as_they_are
    return shared


def _check(owner: Any, method: str) -> None:
    if not hasattr(owner, method):
        raise ParallelError(
            f"{type(owner).__name__} has no {method}; this needs transformers 5.17 and accelerate "
            "1.15, or versions like them."
        )


def _inputs_as_they_are(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return contextlib.nullcontext, inputs


def _models_as_they_are(*prepared: Any) -> tuple[Any, ...]:
    return prepared
