"""transformers' Trainer with sequences that processes share, by accelerate's ParallelismConfig."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..errors import ParallelError
from .model import SequenceParallel, sequence_parallel


def share_in_trainer(trainer: Any, *, method: str = "auto") -> SequenceParallel:
    """`sequence_parallel` of a Trainer's model, over the processes that accelerate calls "cp".

    accelerate then gives all of them the same batches and shards the model over them too (FSDP2).
    Its own context parallelism, which knows SDPA and plain causal masks only, is left out: two
    methods of this Trainer and its Accelerator, `_prepare_context_parallel_inputs` and
    `_prepare_cp`, are replaced. In the file for `accelerate launch --config_file`:

        distributed_type: FSDP
        fsdp_config: {fsdp_version: 2}
        parallelism_config: {parallelism_config_cp_size: 2, parallelism_config_dp_shard_size: 1}

    Args:
        trainer: with a patched model, before train() and evaluate(); trl's trainers, too.
        method: as in `sequence_parallel`.

    Returns:
        The handle; its restore() leaves the Trainer's methods replaced.

    Raises:
        ParallelError: cp_size is 1, the model cannot be shared, or the versions of transformers and
            accelerate are of another make.
    """
    accelerator = trainer.accelerator
    config = getattr(accelerator, "parallelism_config", None)
    if config is None or not config.cp_enabled:
        raise ParallelError(
            "the Trainer's processes do not share sequences: set cp_size, such as "
            "parallelism_config_cp_size: 2 in the file for accelerate launch, or "
            "TrainingArguments(parallelism_config=ParallelismConfig(cp_size=2))."
        )
    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (trainer, "_prepare_context_parallel_inputs", _inputs_as_they_are),
        (accelerator, "_prepare_cp", _models_as_they_are),
    )
    for owner, name, _ in replacements:
        if not hasattr(owner, name):
            raise ParallelError(
                f"{type(owner).__name__} has no {name}; this needs transformers 5.17 and "
                "accelerate 1.15, or versions like them."
            )
    shared = sequence_parallel(trainer.model, accelerator.torch_device_mesh["cp"], method=method)
    for owner, name, function in replacements:
        setattr(owner, name, function)
    return shared


def _inputs_as_they_are(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return contextlib.nullcontext, inputs


def _models_as_they_are(*prepared: Any) -> tuple[Any, ...]:
    return prepared
