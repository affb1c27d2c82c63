"""Text for the study: the sources of the installed Python packages, split by package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_flash_patch.testing.sources import packages, split
from hf_flash_patch.testing.text import byte_pairs, cut

KEY_DIGITS = 5


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits; no package, and no file, is in both.

    Attributes:
        tokenizer: byte-level BPE, trained on the training packages; every digit is a token.
        train: one int32 tensor (tokens,) a package.
        test: documents, int32 (documents, document tokens), each from one package.
        sources: the test documents' packages.
    """

    tokenizer: PreTrainedTokenizerFast
    train: list[Tensor]
    test: Tensor
    sources: list[str]


def corpus(
    folder: Path, megabytes: float, documents: int, document_tokens: int, vocab_size: int
) -> Corpus:
    """Reads the packages, or what an earlier call left in `folder`.

    Args:
        folder: for the tokenizer and the tokens.
        megabytes: text to read at most, of all packages together.
        documents: test documents at most.
        document_tokens: length of each.
        vocab_size: of the tokenizer.
    """
    cache = folder / "corpus.pt"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = dict(packages(int(megabytes * 1e6)))
        train_names, test_names = split(texts)
        tokenizer = train_tokenizer((texts[name] for name in train_names), vocab_size)
        tokenizer.save_pretrained(folder)
        test, sources = cut(
            {name: encode(tokenizer, texts[name]) for name in test_names},
            documents,
            document_tokens,
        )
        train = [encode(tokenizer, texts[name]) for name in train_names]
        partial = cache.with_suffix(".partial")
        torch.save({"train": train, "test": test, "sources": sources}, partial)
        partial.rename(cache)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Corpus(tokenizer, **torch.load(cache))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the first 100 kB of each text."""
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    tokenizer = byte_pairs((text[:100_000] for text in texts), vocab_size, special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids of a text, int32 (tokens,)."""
    pieces = [text[i : i + 50_000] for i in range(0, len(text), 50_000)]
    found = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in found["input_ids"]])


class Passkeys:
    """A number stated somewhere in a text and asked for at its end.

    Args:
        tokenizer: of the corpus.
        seed: of the numbers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self._statement = encode(tokenizer, "\n# The pass key is ")
        self._end = encode(tokenizer, ". Remember it.\n")
        self._question = encode(tokenizer, "\n# What is the pass key? The pass key is ")
        self._digits = torch.cat([encode(tokenizer, str(digit)) for digit in range(10)])
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def asking(self) -> int:
        """Tokens from a question's first to its answer's last."""
        return len(self._question) + KEY_DIGITS

    def insert(self, text: Tensor, depth: float, questions: int = 1) -> tuple[Tensor, list[int]]:
        """Puts a pass key over a text, which keeps its length.

        Args:
            text: int32 (tokens,).
            depth: where to state it, from 0 (start) to 1 (just before the question).
            questions: the last one ends the text, the others are anywhere after the statement.

        Returns:
            the text, and where each answer starts.
        """
        key = self._digits[torch.randint(0, 10, (KEY_DIGITS,), generator=self._generator)]
        statement = torch.cat([self._statement, key, self._end])
        question = torch.cat([self._question, key])
        text, last = text.clone(), len(text) - len(question)
        start = round(depth * (last - len(statement)))
        text[start : start + len(statement)] = statement
        text[last:] = question
        answers = [last + len(self._question)]
        room = last - len(question) - (start + len(statement))
        for _ in range(questions - 1 if room > 0 else 0):
            shift = int(torch.randint(0, room, (), generator=self._generator))
            where = start + len(statement) + shift
            if all(abs(where + len(self._question) - a) > len(question) for a in answers):
                text[where : where + len(question)] = question
                answers.append(where + len(self._question))
        return text, answers
