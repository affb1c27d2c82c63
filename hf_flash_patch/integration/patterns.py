"""What a transformers mask function says, read by evaluating it on symbols instead of indices.

transformers describes a mask as a function (batch, head, query index, key index) -> bool, composed
of closures. Calling it with the probes below yields a `Pattern` where every operation is one of
those transformers itself uses; anything else raises, and the caller materialises the mask: a rule
is read exactly or not at all. Unlike looking into the closures, calling them also works while
torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class UnreadableMaskError(Exception):
    """The mask function does something a `Pattern` cannot express."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Conjunction of rules between query position q and key position k.

    Attributes:
        causal: k <= q.
        window_left, window_right: k >= q - window_left, k <= q + window_right; -1 for no bound.
        documents: int tensor (batch, seqlen) or None; q and k carry the same number.
        chunk_size, chunk_origin: (q - origin[b]) // size == (k - origin[b]) // size, origin int
            (batch,); 0 for none.
    """

    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    documents: torch.Tensor | None = None
    chunk_size: int = 0
    chunk_origin: torch.Tensor | None = None

    # transformers moves partial results to one device before it combines them.
    device = None

    def to(self, device: object) -> Pattern:
        """Itself; a pattern is on no device."""
        return self

    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            raise UnreadableMaskError("a pattern and-ed with something else")
        if (self.documents is not None and other.documents is not None) or (
            self.chunk_size and other.chunk_size
        ):
            raise UnreadableMaskError("two document rules")
        chunked = self if self.chunk_size else other
        return Pattern(
            causal=self.causal or other.causal,
            window_left=_narrower(self.window_left, other.window_left),
            window_right=_narrower(self.window_right, other.window_right),
            documents=self.documents if self.documents is not None else other.documents,
            chunk_size=chunked.chunk_size,
            chunk_origin=chunked.chunk_origin,
        )


def _narrower(a: int, b: int) -> int:
    if a < 0 or b < 0:
        return max(a, b)
    return min(a, b)


class _Index:
    """Symbol of an index: one of "batch", "head", "query", "key", minus `shift`, minus
    `origin[batch]`, over `chunk`."""

    device = None

    def __init__(
        self, axis: str, shift: int = 0, origin: torch.Tensor | None = None, chunk: int = 0
    ):
        self.axis, self.shift, self.origin, self.chunk = axis, shift, origin, chunk

    def is_plain(self, axis: str) -> bool:
        return self.axis == axis and self.shift == 0 and self.origin is None and self.chunk == 0

    def new_ones(self, *args: object, **kwargs: object) -> Pattern:
        return Pattern()  # how and_masks starts

    def __sub__(self, other: object) -> _Index | _Distance:
        plain = self.is_plain(self.axis)
        if isinstance(other, int) and plain:
            return _Index(self.axis, shift=other)
        if isinstance(other, _Lookup) and plain and other.axes == ("batch",):
            return _Index(self.axis, origin=other.tensor)
        if isinstance(other, _Index) and plain and other.is_plain("key") and self.axis == "query":
            return _Distance()
        raise UnreadableMaskError(f"{self.axis} - {other!r}")

    def __floordiv__(self, size: object) -> _Index:
        if not isinstance(size, int) or self.origin is None or self.chunk:
            raise UnreadableMaskError(f"{self.axis} // {size!r}")
        return _Index(self.axis, origin=self.origin, chunk=size)

    def __le__(self, other: object) -> Pattern:
        if self.is_plain("key") and isinstance(other, _Index) and other.is_plain("query"):
            return Pattern(causal=True)
        raise UnreadableMaskError(f"{self.axis} <= {other!r}")

    def __gt__(self, other: object) -> Pattern:
        # key > query - size
        if (
            self.is_plain("key")
            and isinstance(other, _Index)
            and other.axis == "query"
            and other.shift > 0
        ):
            return Pattern(window_left=other.shift - 1)
        raise UnreadableMaskError(f"{self.axis} > {other!r}")

    def __ge__(self, other: object) -> Pattern:
        if self.is_plain("query") and isinstance(other, int) and other == 0:
            return Pattern()  # how transformers writes "everything"
        raise UnreadableMaskError(f"{self.axis} >= {other!r}")

    def __eq__(self, other: object) -> Pattern:  # type: ignore[override]
        if (
            isinstance(other, _Index)
            and self.chunk
            and self.chunk == other.chunk
            and self.origin is other.origin
        ):
            return Pattern(chunk_size=self.chunk, chunk_origin=self.origin)
        raise UnreadableMaskError(f"{self.axis} == {other!r}")

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """`tensor[index]` and `tensor[index, index]` become lookups."""
        if func is torch.Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(index, _Index) and index.is_plain(index.axis) for index in indices):
                return _Lookup(args[0], tuple(index.axis for index in indices))
        raise UnreadableMaskError(f"{func} on an index")


class _Distance:
    """Symbol of query - key."""

    def __abs__(self) -> _Distance:
        return _AbsoluteDistance()


class _AbsoluteDistance(_Distance):
    def __le__(self, size: object) -> Pattern:
        if not isinstance(size, int):
            raise UnreadableMaskError(f"abs(query - key) <= {size!r}")
        return Pattern(window_left=size, window_right=size)


class _Lookup:
    """Symbol of tensor[axes]."""

    def __init__(self, tensor: torch.Tensor, axes: tuple[str, ...]):
        self.tensor, self.axes = tensor, axes

    def __eq__(self, other: object) -> Pattern:  # type: ignore[override]
        if (
            isinstance(other, _Lookup)
            and self.tensor is other.tensor
            and {self.axes, other.axes} == {("batch", "query"), ("batch", "key")}
        ):
            return Pattern(documents=self.tensor)
        raise UnreadableMaskError("a comparison of table entries")

    __hash__ = None  # type: ignore[assignment]


def read_mask_function(mask_function: Callable) -> Pattern | None:
    """The `Pattern` that `mask_function` (batch, head, query, key) -> bool stands for, or None if
    it has none."""
    try:
        pattern = mask_function(_Index("batch"), _Index("head"), _Index("query"), _Index("key"))
    except Exception:
        # Whatever a stranger's function does with the symbols, the answer is the same: not
        # readable.
        return None
    return pattern if isinstance(pattern, Pattern) else None
