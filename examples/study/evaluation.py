"""What a context is worth: perplexity by length, pass keys by depth, masked tokens by length."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .data import KEY_DIGITS, Corpus, Passkeys
from .training import IGNORED, Clock, mask, precision

STRIDE = 256


def stride_of(length: int) -> int:
    """Tokens that a window of `length` predicts."""
    return min(STRIDE, length // 2)


def _batches(rows: list[Tensor], tokens: int, clock: Clock) -> Iterator[Tensor]:
    size = max(1, tokens // len(rows[0]))
    for first in range(0, len(rows), size):
        clock.check()
        yield torch.stack(rows[first : first + size]).long()


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    documents: Tensor,
    length: int,
    lengths: list[int],
    windows: int,
    batch_tokens: int,
    clock: Clock,
) -> float:
    """Sliding-window perplexity: of each window the last 256 tokens, given those before.

    The windows end at the same places whatever the length, so every length predicts the same
    tokens.

    Args:
        model: a decoder.
        documents: int32 (documents, tokens).
        length: tokens of a window.
        lengths: all that are compared.
        windows: of a document, evenly spaced.
        batch_tokens: tokens of a forward.
        clock: says when to stop.
    """
    stride = stride_of(min(lengths))
    ends = torch.linspace(max(lengths), documents.shape[1], windows).round().int().tolist()
    rows = [text[end - length : end] for text in documents for end in ends]
    total, count = 0.0, 0
    for batch in _batches(rows, batch_tokens, clock):
        batch = batch.to(model.device)
        with precision(model.device):
            logits = model(input_ids=batch, logits_to_keep=stride + 1).logits[:, :-1]
        target = batch[:, -stride:].flatten()
        total += cross_entropy(logits.flatten(0, 1).float(), target, reduction="sum").item()
        count += len(target)
    return math.exp(total / count)


@torch.no_grad()
def masked_loss(
    model: PreTrainedModel, corpus: Corpus, length: int, batch_tokens: int, clock: Clock
) -> float:
    """Nats a masked token, over all test documents in windows of `length` tokens.

    The same tokens are masked whatever the length.

    Args:
        model: an encoder.
        corpus: whose test documents to read.
        length: tokens of a window; divides the documents.
        batch_tokens: tokens of a forward.
        clock: says when to stop.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, labels = mask(corpus.test.long(), corpus, generator)
    rows = torch.stack([inputs, labels], -1).view(-1, length, 2)  # (windows, length, 2)
    total, count = 0.0, 0
    for batch in _batches(list(rows), batch_tokens, clock):
        batch = batch.to(model.device)
        with precision(model.device):
            logits = model(input_ids=batch[..., 0]).logits
        asked = batch[..., 1] != IGNORED
        target = batch[..., 1][asked]
        total += cross_entropy(logits[asked].float(), target, reduction="sum").item()
        count += len(target)
    return total / count


@torch.no_grad()
def passkey(
    model: PreTrainedModel,
    corpus: Corpus,
    length: int,
    depth: float,
    trials: int,
    batch_tokens: int,
    clock: Clock,
) -> float:
    """Share of pass keys that greedy decoding would give right, all five digits.

    The text around is test text. One forward tells: greedy decoding is right exactly if every
    digit is the most likely one after the right digits before it.

    Args:
        model: a decoder.
        corpus: whose test documents are the text.
        length: tokens of the whole input, question and answer included.
        depth: where the key stands, from 0 to 1.
        trials: inputs.
        batch_tokens: tokens of a forward.
        clock: says when to stop.
    """
    keys = Passkeys(corpus.tokenizer, seed=length + round(1000 * depth))
    generator = torch.Generator().manual_seed(length)
    rows = []
    for trial in range(trials):
        text = corpus.test[trial % len(corpus.test)]
        first = int(torch.randint(0, len(text) - length + 1, (), generator=generator))
        rows.append(keys.insert(text[first : first + length], depth)[0])
    right = 0
    for batch in _batches(rows, batch_tokens, clock):
        batch = batch.to(model.device)
        with precision(model.device):
            logits = model(input_ids=batch, logits_to_keep=KEY_DIGITS + 1).logits[:, :-1]
        right += (logits.argmax(-1) == batch[:, -KEY_DIGITS:]).all(1).sum().item()
    return right / trials
