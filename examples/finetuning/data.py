"""Text in, batches out: reading, splitting, packing, and windows of several lengths."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from study.data import encode, train_tokenizer
from study.evaluation import stride_of
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
)

from hf_flash_patch.testing.sources import TEST_SHARE, packages, split

from .options import DataOptions

IGNORED = -100
SHORTEST = 2  # tokens of a document from which there is something to learn


def texts(source: str, options: DataOptions) -> dict[str, str]:
    """Documents by name, longest first.

    Args:
        source: as in `DataOptions.data`.
        options: what else there is to know about it.

    Raises:
        SystemExit: there is no such file, or `datasets` is needed and not installed.
    """
    path = Path(source)
    if source == "packages":
        found = packages(int(options.megabytes * 1e6))
    elif path.is_file():
        found = _of_file(path, options.text_field)
    elif path.is_dir() and not any(path.glob("*.arrow")) and not any(path.glob("dataset_*.json")):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        found = (document for file in files for document in _of_file(file, options.text_field))
    else:
        found = _of_datasets(source, options.text_field)
    documents = {name: text for name, text in found if text}
    if not documents:
        raise SystemExit(f"--data {source}: there is no text in it.")
    return dict(sorted(documents.items(), key=lambda item: (-len(item[1]), item[0])))


def _of_file(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    content = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".jsonl":
        yield str(path), content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if text_field not in row:
                raise SystemExit(
                    f"{path}, line {number} has {', '.join(row)} and no {text_field!r}; "
                    "name the field with --text_field."
                )
            yield f"{path}:{number}", row[text_field]


def _of_datasets(source: str, text_field: str) -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("datasets") is None:
        raise SystemExit(
            f"--data {source} is neither a file nor a folder of text, and reading it as a dataset "
            "needs the package datasets, which is not installed: pip install datasets."
        )
    import datasets

    local = Path(source).is_dir()
    found = datasets.load_from_disk(source) if local else datasets.load_dataset(source)
    rows = found["train"] if isinstance(found, dict) else found
    for number, text in enumerate(rows[text_field]):
        yield f"{source}:{number}", text


def held_out(documents: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Documents for training and for evaluation, 15% of the text; of a single one, its end."""
    if len(documents) == 1:
        (name, text), *_ = documents.items()
        cut = int(len(text) * (1 - TEST_SHARE))
        return {name: text[:cut]}, {name: text[cut:]}
    train, test = split(documents)
    return {name: documents[name] for name in train}, {name: documents[name] for name in test}


def new_tokenizer(documents: dict[str, str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of these documents; the same for the same documents."""
    return train_tokenizer(iter(documents.values()), vocab_size)


def tokens(tokenizer: PreTrainedTokenizerBase, documents: dict[str, str]) -> list[Tensor]:
    """Token ids of each document, int32 (tokens,), with the end-of-text token if there is one."""
    end = torch.tensor([i for i in [tokenizer.eos_token_id] if i is not None], dtype=torch.int32)
    found = [torch.cat([encode(tokenizer, text), end]) for text in documents.values()]
    return [ids for ids in found if len(ids) >= SHORTEST]


class Rows(Dataset):
    """Rows of documents for training; an item is a list of pieces, int32 (tokens,) each.

    Args:
        documents: int32 (tokens,) each.
        length: tokens of a row.
        packing: fill every row with documents, cut where a row ends; otherwise a row has one
            document, or the next `length` tokens of it.
    """

    def __init__(self, documents: list[Tensor], length: int, packing: bool):
        self._rows: list[list[Tensor]] = [[]]
        room = length
        for document in documents:
            start = 0
            while start < len(document):
                piece = document[start : start + room]
                start += len(piece)
                self._rows[-1].append(piece)
                room -= len(piece)
                if room < SHORTEST or not packing:
                    self._rows.append([])
                    room = length
        self._rows = [row for row in self._rows if sum(map(len, row)) >= SHORTEST]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self._rows[index]


class Windows(Dataset):
    """Windows for evaluation, all of one length; of each, the last tokens are predicted.

    Windows of every length end at the same places, so every length predicts the same tokens.

    Args:
        documents: int32 (tokens,) each.
        length: tokens of a window.
        lengths: all that are compared.
        count: windows.
        mask_token: for a masked model: stands for the token that is asked for, of every seventh.

    Raises:
        SystemExit: no document is as long as the longest window.
    """

    def __init__(
        self,
        documents: list[Tensor],
        length: int,
        lengths: list[int],
        count: int,
        mask_token: int | None = None,
    ):
        longest, asked = max(lengths), stride_of(min(lengths))
        long = [document for document in documents if len(document) >= longest]
        if not long:
            most = max(map(len, documents), default=0)
            raise SystemExit(
                f"--eval_lengths up to {longest}: the longest document held out has {most} tokens."
            )
        self._length, self._asked, self._mask_token = length, asked, mask_token
        each = -(-count // len(long))
        ends = [
            (document, end)
            for document in long
            for end in torch.linspace(longest, len(document), each).round().int().unique().tolist()
        ]
        self._ends = ends[:count]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document, end = self._ends[index]
        ids = document[end - self._length : end].long()
        labels = ids.clone()
        labels[: -self._asked] = IGNORED
        if self._mask_token is not None:
            asked = torch.arange(end - self._length, end) % 7 == 0  # by place in the document
            labels[~asked] = IGNORED
            ids = torch.where(labels != IGNORED, self._mask_token, ids)
        return {"input_ids": ids, "labels": labels}


@dataclass
class Collator:
    """Batches of `Rows` and of `Windows`.

    Attributes:
        tokenizer: pads, and masks for a masked model.
        packing: rows become one row (1, tokens) with position_ids and cu_seq_lens; otherwise they
            are padded on the right to (batch, tokens).
        masked: BERT's task instead of the next token.
        first_position: of a document; RoBERTa-like models start at 2.
        multiple: batches are as long as a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    packing: bool
    masked: bool
    first_position: int = 0
    multiple: int = 1

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """The batch of some items."""
        if isinstance(items[0], dict):
            windows = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            short = self._short_of(windows["input_ids"].shape[1])
            return windows if not short else self._padded_windows(windows, short)
        if self.packing:
            flatten = DataCollatorWithFlattening(
                return_flash_attn_kwargs=True, position_ids_start=self.first_position
            )
            pieces = [{"input_ids": piece, "labels": piece} for row in items for piece in row]
            filling = self._short_of(sum(len(piece["input_ids"]) for piece in pieces))
            if filling:  # a document of its own, of which no token counts
                nothing = torch.full((filling,), IGNORED)
                pieces.append({"input_ids": torch.full_like(nothing, self._pad), "labels": nothing})
            batch = flatten(pieces, return_tensors="pt")
            real = torch.arange(batch["labels"].shape[1])[None] < batch["labels"].shape[1] - filling
        else:
            batch = self._padded([row[0].long() for row in items])
            real = batch["attention_mask"].bool()
        if self.masked:
            task = DataCollatorForLanguageModeling(self.tokenizer)
            inputs, labels = task.torch_mask_tokens(batch["input_ids"].clone())
            batch["input_ids"] = torch.where(real, inputs, batch["input_ids"])
            batch["labels"] = labels.masked_fill(~real, IGNORED)
        return batch

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _short_of(self, length: int) -> int:
        return -length % self.multiple

    def _padded_windows(self, windows: dict[str, Tensor], short: int) -> dict[str, Tensor]:
        fill = {"input_ids": self._pad, "labels": IGNORED, "attention_mask": 0}
        windows["attention_mask"] = torch.ones_like(windows["input_ids"])
        return {name: F.pad(x, (0, short), value=fill[name]) for name, x in windows.items()}

    def _padded(self, rows: list[Tensor]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        length = longest + self._short_of(longest)

        def column(values: list[Tensor], fill: int) -> Tensor:
            return torch.stack([F.pad(x, (0, length - len(x)), value=fill) for x in values])

        return {
            "input_ids": column(rows, self._pad),
            "labels": column(rows, IGNORED),
            "attention_mask": column([torch.ones_like(row) for row in rows], 0),
        }
