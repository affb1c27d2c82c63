"""Attention over sequences that several processes share; see docs/parallel.md."""

from .layout import shard, unshard
from .ring import ring_attention
from .ulysses import ulysses_attention

__all__ = ["ring_attention", "shard", "ulysses_attention", "unshard"]
