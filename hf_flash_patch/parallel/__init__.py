"""Attention over sequences that several processes share; see docs/parallel.md."""

from .layout import shard, unshard
from .model import SequenceParallel, sequence_parallel
from .ring import ring_attention
from .trainer import share_in_accelerator, share_in_trainer
from .ulysses import ulysses_attention

__all__ = [
    "SequenceParallel",
    "ring_attention",
    "sequence_parallel",
    "shard",
    "share_in_accelerator",
    "share_in_trainer",
    "ulysses_attention",
    "unshard",
]
