"""Several processes on gloo, forked, so that none of them imports anything anew."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

TIMEOUT = 120  # seconds


def run(world_size: int, function: Callable[..., Any], *arguments: Any, fsdp: bool = False) -> list:
    """Calls a function in every process; what each returns (picklable), by rank.

    Args:
        world_size: processes.
        function: finds RANK and WORLD_SIZE in its environment, as under torchrun.
        arguments: of the function.
        fsdp: accelerate shards with FSDP2; it would not do so on a CPU of its own accord.

    Raises:
        AssertionError: a process raised, died, or took too long; with its traceback.
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(
            target=_work, args=(rank, world_size, port, queue, fsdp, function, arguments)
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        results: dict[int, Any] = {}
        while len(results) < world_size:
            assert queue._reader.poll(TIMEOUT), f"only {sorted(results)} answered"
            rank, result, error = queue.get()
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
        return [results[rank] for rank in range(world_size)]
    finally:
        for worker in workers:
            worker.kill() if len(results) < world_size else worker.join(TIMEOUT)


def _work(rank, world_size, port, queue, fsdp, function, arguments):
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    settings |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings |= {"ACCELERATE_USE_CPU": "true"}
    if fsdp:
        settings |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}
        settings |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        settings |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        _shard_on_the_cpu()
    os.environ.update({name: str(value) for name, value in settings.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os._exit(0)


def _shard_on_the_cpu() -> None:
    """accelerate takes FSDP from its environment only where there are accelerators."""
    start = AcceleratorState.__init__

    def sharded(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)  # takes the type anew from PartialState each time
        plugin: FullyShardedDataParallelPlugin | None = kwargs.get("fsdp_plugin")
        if plugin is not None:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


def reset() -> None:
    """Makes accelerate forget the processes of an earlier test of this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
