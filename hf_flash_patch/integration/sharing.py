"""What attention has to know where several processes share a sequence; see docs/parallel.md.

A model then runs on its own tokens only. Its masks are made of the whole sequence, and its
attention modules hand their calls over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from ..masks.pattern import Pattern
    from .attention_mask import AttentionMask

SHARE_ATTRIBUTE = "_hfp_share"  # of an attention module


class Share(Protocol):
    """How the processes compute an attention call together."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        pattern: Pattern | None,
        options: dict[str, Any],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """(batch, seqlen / n, num_heads, head_dim) from (batch, heads, seqlen / n, head_dim)."""


def share_of(module: nn.Module) -> Share | None:
    """What `parallel.sequence_parallel` gave the module."""
    return own_attribute(module, SHARE_ATTRIBUTE)


def own_attribute(module: nn.Module, name: str) -> Any:
    """What a module, not its class, has by a name, or None.

    A getattr that finds nothing takes 2 us, in each call of attention. While torch.compile traces
    it has to be one all the same: of a key that a __dict__ does not have, a graph has no guard.
    """
    if torch.compiler.is_compiling():
        return getattr(module, name, None)
    return vars(module).get(name)


@dataclass(frozen=True, eq=False)
class WholeSequence:
    """The sequence that a forward is about, of which the model sees a part.

    Attributes:
        seqlen: tokens in all.
        processes: that share it.
        key_padding: bool (batch, seqlen), True where a token is real; None if all are.
        doc_range: int32 (batch, seqlen, 2), packed documents; None if there is one a row.
    """

    seqlen: int
    processes: int
    key_padding: torch.Tensor | None = None
    doc_range: torch.Tensor | None = None


# The one that a forward now running is about. No context variable: torch.compile traces who reads.
_current: WholeSequence | None = None


def whole_sequence() -> WholeSequence | None:
    """The sequence of the shared forward that runs now; None outside of one."""
    return _current


def set_whole_sequence(sequence: WholeSequence | None) -> None:
    """Make `sequence` the current one."""
    global _current
    _current = sequence
