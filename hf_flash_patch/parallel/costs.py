"""What the parts of a sequence cost in a model's attention, by its patterns."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families import family_of
from ..integration.assignment import heads_of
from ..integration.sparse import pattern_of
from ..masks.pattern import Pattern
from ..masks.tokens import causal
from ..masks.top_k import TopKBlocks

BLOCK_SIZE = 128  # of lists; a ring's chunks have to lie on blocks


class Costs:
    """Of a model whose attention modules have patterns, or none."""

    def __init__(self, root: PreTrainedModel, modules: list[nn.Module]):
        family = family_of(root.config)
        self._causal = family is not None and family.causal
        self._heads = heads_of(modules[0]) or root.config.get_text_config().num_attention_heads
        self._patterns = Counter(pattern_of(module) for module in modules)

    def of_chunks(self, seqlen: int, chunks: int) -> list[float] | None:
        """Blocks that the queries of each equal chunk see, in all layers and a head's mean.

        Args:
            seqlen: tokens.
            chunks: parts, each a multiple of `BLOCK_SIZE` tokens.

        Returns:
            a number for each chunk; None if no layer has a pattern of positions.
        """
        if all(pattern is None or isinstance(pattern, TopKBlocks) for pattern in self._patterns):
            return None
        total = torch.zeros(chunks)
        for pattern, layers in self._patterns.items():
            total += layers * self._of_pattern(pattern, seqlen, chunks)
        return total.tolist()

    def _of_pattern(self, pattern: Pattern | None, seqlen: int, chunks: int) -> torch.Tensor:
        side = seqlen // chunks // BLOCK_SIZE
        if pattern is None or isinstance(pattern, TopKBlocks):
            seen = torch.arange(chunks) + 0.5 if self._causal else torch.full((chunks,), chunks)
            return seen * side * side
        pattern = pattern & causal() if self._causal else pattern
        lists = pattern.block_mask(seqlen, seqlen, self._heads, block_size=BLOCK_SIZE)
        rows = lists.row_offsets.diff(dim=2).float().mean(dim=(0, 1))
        return rows.view(chunks, side).sum(1)
