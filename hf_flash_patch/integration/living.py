"""What lives: who else refers to what is about to be changed, and what it takes to undo that."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any


def living(*classes: type) -> list[Any]:
    """Every object that the garbage collector tracks and whose class is one of `classes`, or below.

    Unreachable ones count until they are collected.
    """
    # By type(), not isinstance: proxies among all these objects answer __class__ with an import.
    # Half a million of them once transformers is loaded, each a cache miss: touched once, by map.
    objects = gc.get_objects()
    types = list(map(type, objects))
    wanted = {kind for kind in set(types) if issubclass(kind, classes)}
    return [objects[i] for i, kind in enumerate(types) if kind in wanted]


def undo_on(
    undo: contextlib.ExitStack, owner: Any, function: Callable[..., Any], *arguments: Any
) -> None:
    """Have function(owner, *arguments) called at undo, if the owner still lives then."""

    def call(reference: weakref.ref[Any]) -> None:
        there = reference()
        if there is not None:
            function(there, *arguments)

    undo.callback(call, weakref.ref(owner))
