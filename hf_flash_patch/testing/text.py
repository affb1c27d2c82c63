"""From texts to tokens: a tokenizer of their own, and documents of one length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


def byte_pairs(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE trained on texts; every digit is a token.

    Args:
        texts: to learn from.
        vocab_size: at most.
        special: the first tokens, which no text gives.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut(streams: Mapping[str, Tensor], count: int, length: int) -> tuple[Tensor, list[str]]:
    """Documents of `length` tokens, in turns from the sources that have them.

    Args:
        streams: source -> int (tokens,).
        count: of documents, at most.
        length: of each, tokens.

    Returns:
        (documents, length), and the source of each.

    Raises:
        ValueError: no source has so many tokens.
    """
    left = {
        name: list(ids[: len(ids) // length * length].view(-1, length))
        for name, ids in streams.items()
    }
    found: list[Tensor] = []
    sources: list[str] = []
    while len(found) < count and any(left.values()):
        for name, documents in left.items():
            if documents and len(found) < count:
                found.append(documents.pop(0))
                sources.append(name)
    if not found:
        raise ValueError(f"no source has {length} tokens; read more of each")
    return torch.stack(found), sources
