"""Who may stand between an attention call and the engine's forward: a keeper of results.

Checkpointing runs a forward twice. A keeper that is told of both runs can give in the second what
the engine gave in the first. There is at most one at a time on a thread; a checkpoint's second run
may be on another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch

Results = tuple[torch.Tensor | None, ...]


class Keeper(Protocol):
    """Gives the results of a call, from `compute` or from where it kept them."""

    def __call__(self, call: Hashable, compute: Callable[[], Results]) -> Results:
        """Results of one call; calls of a function come in the order in which it makes them.

        Args:
            call: shapes and options; equal where two runs make the same call.
            compute: runs the engine; tensors without a graph.
        """


class _Thread(threading.local):
    keeper: Keeper | None = None


_thread = _Thread()


def current() -> Keeper | None:
    """The keeper of this thread, if there is one."""
    return _thread.keeper


@contextlib.contextmanager
def keeping(keeper: Keeper | None) -> Iterator[None]:
    """Attention goes through a keeper, or through none; afterwards, through the one before."""
    before = _thread.keeper
    _thread.keeper = keeper
    try:
        yield
    finally:
        _thread.keeper = before


def kept(call: Hashable, compute: Callable[[], Results]) -> Results:
    """What the keeper gives for a call, or `compute()` where there is none.

    What is computed, a ring's parts for example, is not kept by itself.
    """
    keeper = _thread.keeper
    if keeper is None:
        return compute()
    with keeping(None):
        return keeper(call, compute)
