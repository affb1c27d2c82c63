"""accelerate and transformers' Trainer with sequences that processes share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError
from .model import SequenceParallel, sequence_parallel


def share_in_trainer(trainer: Any, *, method: str = "auto") -> SequenceParallel:
    """`share_in_accelerator` of a Trainer's model.

    Evaluation counts every row once, as on one process; compute_metrics and predict() are given
    whole rows. The methods `_prepare_context_parallel_inputs` and `prediction_step` of this Trainer
    are replaced, too.

    Args:
        trainer: with a patched model, before train() and evaluate(); trl's trainers, too.
        method: as in `sequence_parallel`.

    Returns:
        The handle; its restore() leaves the Trainer's methods replaced.

    Raises:
        ParallelError: cp_size is 1, the model cannot be shared, the Trainer computes the loss
            itself, or the versions of transformers and accelerate are of another make.
    """
    _check(trainer, "_prepare_context_parallel_inputs")
    for name, setting in (
        ("label_smoother", "label_smoothing_factor"),
        ("compute_loss_func", "compute_loss_func"),
    ):
        if getattr(trainer, name, None) is not None:
            raise ParallelError(
                f"{setting} computes the loss of whole rows of logits, of which a process has its "
                "own tokens' alone: leave it out, so that the model computes the loss."
            )
    shared = share_in_accelerator(trainer.accelerator, trainer.model, method=method)
    trainer._prepare_context_parallel_inputs = _inputs_as_they_are
    trainer.prediction_step = _of_whole_rows(trainer.prediction_step, shared)
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    return shared


def share_in_accelerator(
    accelerator: Any, model: nn.Module, *, method: str = "auto"
) -> SequenceParallel:
    """`sequence_parallel` over the processes that accelerate's ParallelismConfig calls "cp".

    accelerate then gives all of them the same batches and shards the model over them too (FSDP2).
    Its own context parallelism, which knows SDPA and plain causal masks only, is left out: the
    method `_prepare_cp` of this Accelerator is replaced. So is `gather_for_metrics`, which then
    takes what processes that share a sequence have from one of them. In the file for `accelerate
    launch`:

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
    accelerator.gather_for_metrics = _gathering_once(accelerator)
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


def _gathering_once(accelerator: Any) -> Callable[..., Any]:
    """`gather_for_metrics`, from one process of those that share a sequence.

    accelerate drops what fills up the last batch from the end of what it has gathered: if that were
    there several times over, it would be the rows of some processes.
    """
    from accelerate.utils.operations import recursively_apply

    mesh = accelerator.torch_device_mesh
    first = mesh.mesh.select(mesh.mesh_dim_names.index("cp"), 0).flatten().tolist()

    def of_first(own: torch.Tensor) -> torch.Tensor:
        gathered = accelerator.gather(own)
        if own.ndim == 0:  # no rows, but what a process has counted: trl adds up those of all
            return gathered
        return gathered.unflatten(0, (accelerator.num_processes, -1))[first].flatten(0, 1)[last()]

    def last() -> slice:
        state = accelerator.gradient_state
        return slice(state.remainder if state.end_of_dataloader and state.remainder > 0 else None)

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        if use_gather_object:
            every: list[Any] = [None] * accelerator.num_processes
            dist.all_gather_object(every, input_data)
            return [item for rank in first for item in every[rank]][last()]
        return recursively_apply(of_first, input_data)

    return gather_for_metrics


def _of_whole_rows(step: Callable[..., Any], shared: SequenceParallel) -> Callable[..., Any]:
    """`prediction_step`, with the loss of all tokens and whatever has a value for each of them."""

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        own = 0 if tokens is None else tokens.shape[1] // shared.groups.size

        def whole(outputs: Any) -> Any:
            if isinstance(outputs, (tuple, list)):
                return type(outputs)(map(whole, outputs))
            divided = isinstance(outputs, torch.Tensor) and outputs.ndim > 1
            return shared.unshard(outputs) if divided and outputs.shape[1] == own else outputs

        loss, logits, labels = step(model, inputs, *args, **kwargs)
        if loss is not None:  # each process's share of it, times their number
            loss = shared.groups.reduce(loss.clone()) / shared.groups.size
        return loss, whole(logits), labels

    return prediction_step
