"""Which package a source file is from, by how much of the file an encoder reads.

    python -m benchmarks.paper.long_documents                 # one H200, some 15 minutes a seed
    python -m benchmarks.paper.long_documents --lengths 512 16384 --seeds 0 --budget 500
    python -m benchmarks.paper.long_documents --preset tiny   # a minute, on a CPU

Files of 20 installed packages, of 1024 tokens or more, without what names a package
(`masked_sources` says what is taken out), without near-copies, whole folders held out. Every length
takes the same documents, cut to it; the longest is 16384 tokens.

For every seed a small BERT first learns the task at 512 tokens, from windows anywhere in the
training documents: it has seen all of their text before lengths are compared. Then, for every
length, 512 as well: its learned positions are tiled to the length by hfp.extend_context, and it is
fine-tuned on the documents cut to that length, with the same documents in the same steps.

Stops after --budget seconds with exit status 3, everything saved; the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils import logging

import hf_flash_patch as hfp
from hf_flash_patch.testing.text import byte_pairs

from . import long_documents_report as report
from .fit import Recipe, Spent, fit
from .loop import Clock, OutOfTime, adamw, alone, carry, precision, save
from .masked_sources import documents
from .text import PAD, SPECIAL, START, encode

LARGEST = 6  # characters of a document that are masked, for each token of the longest length
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Preset:
    """What to train, on what, for how long.

    Attributes:
        sizes: of BertConfig.
        first: tokens of the encoder's own context.
        lengths: to compare, in this order; the claim is about the first two.
        classes: packages.
        most: files of a package.
        smallest: bytes of a file.
        vocab_size: of the tokenizer.
        window_epochs: over windows of the first length.
        window_batch: windows of a step.
        epochs: over documents.
        batch: documents of a step.
        micro: tokens of a forward, padding included, at most; a document is never cut for it.
        learning_rate: at its peak, with windows.
        tuning_rate: with documents.
    """

    sizes: dict[str, int]
    first: int
    lengths: tuple[int, ...]
    classes: int
    most: int
    smallest: int
    vocab_size: int
    window_epochs: int
    window_batch: int
    epochs: int
    batch: int
    micro: int
    learning_rate: float
    tuning_rate: float

    @property
    def shortest(self) -> int:
        """Tokens of a document at least, so that the first length never has all of one."""
        return 2 * self.first


PRESETS = {
    "h200": Preset(
        sizes={
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        first=512,
        lengths=(512, 16384, 2048, 8192, 4096, 1024),
        classes=20,
        most=300,
        smallest=4000,
        vocab_size=8192,
        window_epochs=12,
        window_batch=256,
        epochs=6,
        batch=32,
        micro=131072,
        learning_rate=5e-4,
        tuning_rate=2e-4,
    ),
    "tiny": Preset(
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        first=32,
        lengths=(32, 128),
        classes=3,
        most=20,
        smallest=500,
        vocab_size=400,
        window_epochs=10,
        window_batch=32,
        epochs=2,
        batch=8,
        micro=1024,
        learning_rate=3e-3,
        tuning_rate=1e-3,
    ),
}


@dataclass
class Arguments:
    """What to do."""

    preset: str = field(default="h200", metadata={"choices": list(PRESETS)})
    lengths: list[int] = field(
        default_factory=list, metadata={"help": "by default the preset's, in its order"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    window_epochs: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    epochs: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    micro: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    budget: float = field(default=540, metadata={"help": "seconds, after which to stop"})
    folder: str = field(default="paper_output/long_documents", metadata={"help": "text and models"})
    output: str = field(default="docs/results", metadata={"help": "CSV, figure and conclusion"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Documents:
    """Documents as tokens, the first of which is the one that starts a text.

    Attributes:
        names: of the packages; a label is an index.
        train: int32 (tokens,) each.
        train_labels: int64 (documents,).
        test: as train; of other folders.
        test_labels: as train_labels.
    """

    names: list[str]
    train: list[Tensor]
    train_labels: Tensor
    test: list[Tensor]
    test_labels: Tensor

    def __str__(self) -> str:
        sizes = torch.tensor([float(len(ids)) for ids in self.test])
        low, middle, high = sizes.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return (
            f"{len(self.train)} documents to learn from, {len(self.test)} to test, of "
            f"{low:.0f}, {middle:.0f} and {high:.0f} tokens (10th, 50th and 90th percentile), from "
            f"{len(self.names)} packages: {', '.join(self.names)}"
        )


def read_documents(folder: Path, preset: Preset) -> Documents:
    """Masks and encodes documents, or reads what an earlier call left in `folder`."""
    cache = folder / "documents.pt"
    with alone(folder):
        if not cache.exists():
            _make(cache, preset)
    return Documents(**torch.load(cache))


def _make(cache: Path, preset: Preset) -> None:
    """As `read_documents`; leaves them in `cache`."""
    longest = max(preset.lengths)
    found = documents(preset.classes, preset.smallest, LARGEST * longest, preset.most, TEST_SHARE)
    to_learn = [document.text for document in found if not document.test]
    tokenizer = byte_pairs(to_learn, preset.vocab_size, SPECIAL)
    start = torch.tensor([START], dtype=torch.int32)
    tokens = encode(tokenizer, [document.text for document in found])
    names = list(dict.fromkeys(document.package for document in found))
    parts: dict[str, list] = {"names": names}
    for part, test in (("train", False), ("test", True)):
        kept = [
            (torch.cat([start, ids])[:longest], names.index(document.package))
            for document, ids in zip(found, tokens, strict=True)
            if document.test == test and len(ids) >= preset.shortest
        ]
        parts[part] = [ids for ids, _ in kept]
        parts[f"{part}_labels"] = torch.tensor([label for _, label in kept])
    save(cache, parts)


class Study:
    """All lengths and seeds of one preset.

    Args:
        arguments: what to do; the preset's values where they say nothing.
    """

    def __init__(self, arguments: Arguments):
        self.arguments, self.clock = arguments, Clock(arguments.budget)
        given = {n: getattr(arguments, n) for n in ("window_epochs", "epochs", "micro")}
        changes = {name: value for name, value in given.items() if value is not None}
        self.preset = replace(PRESETS[arguments.preset], **changes)
        self.device = torch.device(arguments.device)
        self.folder = Path(arguments.folder) / arguments.preset
        self.documents = read_documents(self.folder, self.preset)
        self.log = report.open_log(self)

    def run(self, length: int, seed: int) -> None:
        """Trains and tests one length and seed, if that is not done yet.

        Raises:
            OutOfTime: the time is over; what is done is saved.
        """
        if report.done(self, length, seed):
            return
        p, base = self.preset, self.base(seed)
        if not base.exists():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_config(self._config())
            steps = p.window_epochs * self._windows // p.window_batch
            recipe = Recipe(max(1, steps), p.learning_rate, warmup=max(1, steps // 20))
            self._train(
                model, recipe, self._window_step(model, seed), base, f"windows, seed {seed}"
            )
            partial = base.with_suffix(".partial")
            model.save_pretrained(partial)
            partial.rename(base)
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        if length > p.first:
            hfp.extend_context(model, length, positions="tile")
        steps = p.epochs * len(self.documents.train) // p.batch
        recipe = Recipe(max(1, steps), p.tuning_rate, warmup=max(1, steps // 20))
        backward = self._document_step(model, length, seed)
        tuned = self.folder / f"tuned-{length}-{p.epochs}-{base.name}"
        spent = self._train(model, recipe, backward, tuned, f"{length} tokens, seed {seed}")
        report.record(self, length, seed, self._answers(model, length), spent)

    def base(self, seed: int) -> Path:
        """Where the model is that every length starts from; of other windows it is another."""
        return self.folder / f"base-{self.preset.window_epochs}-{seed}"

    def _config(self) -> BertConfig:
        return BertConfig(
            vocab_size=self.preset.vocab_size,
            max_position_embeddings=self.preset.first,
            attention_probs_dropout_prob=0.0,
            num_labels=len(self.documents.names),
            pad_token_id=PAD,
            **self.preset.sizes,
        )

    def _train(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        backward: Callable[[int], Tensor],
        path: Path,
        name: str,
    ) -> Spent:
        """Patches the model and trains it; both stay."""
        hfp.patch(model.to(self.device))
        optimizer = adamw(model.train(), weight_decay=0.05, betas=(0.9, 0.98))
        state = path.with_suffix(".state")
        return fit(model, optimizer, recipe, backward, state, self.clock, name)

    @property
    def _windows(self) -> int:
        """Windows of an epoch."""
        return sum((len(ids) - 1) // (self.preset.first - 1) for ids in self.documents.train)

    def _window_step(self, model: PreTrainedModel, seed: int) -> Callable[[int], Tensor]:
        """A step over windows anywhere in the documents."""
        text, size = self.documents, self.preset.first - 1
        counts = torch.tensor([(len(ids) - 1) // size for ids in text.train])
        start = torch.tensor([START])

        def backward(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            chosen = torch.multinomial(
                counts.float(), self.preset.window_batch, replacement=True, generator=generator
            )
            rows = []
            for index in chosen.tolist():
                ids = text.train[index]
                room = len(ids) - size
                first = int(torch.randint(1, room + 1, (), generator=generator))
                rows.append(torch.cat([start, ids[first : first + size]]))
            return self._learn(model, rows, text.train_labels[chosen])

        return backward

    def _document_step(
        self, model: PreTrainedModel, length: int, seed: int
    ) -> Callable[[int], Tensor]:
        """A step over documents from their start."""
        text, batch = self.documents, self.preset.batch

        def backward(step: int) -> Tensor:
            chosen = torch.tensor([self._order(seed, step * batch + i) for i in range(batch)])
            rows = [text.train[index][:length] for index in chosen.tolist()]
            return self._learn(model, rows, text.train_labels[chosen])

        return backward

    def _order(self, seed: int, place: int) -> int:
        """The document at a place of the training order; each comes once an epoch."""
        epoch, place = divmod(place, len(self.documents.train))
        return _permutation(len(self.documents.train), seed * 1_000_003 + epoch)[place]

    def _learn(self, model: PreTrainedModel, rows: list[Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients of some rows in the model; their mean loss, on the device."""
        total = torch.zeros((), device=self.device)
        for part in micro_batches(rows, self.preset.micro):
            logits = self._logits(model, [rows[index] for index in part])
            asked = carry(labels[torch.tensor(part)], self.device)
            loss = cross_entropy(logits.float(), asked, reduction="sum") / len(rows)
            loss.backward()
            total += loss.detach()
        return total

    def _logits(self, model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
        ids = pad_sequence([row.long() for row in rows], batch_first=True, padding_value=PAD)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids, real = carry(ids, self.device), carry(real, self.device)
        with precision(self.device):
            return model(input_ids=ids, attention_mask=real).logits

    @torch.no_grad()
    def _answers(self, model: PreTrainedModel, length: int) -> Tensor:
        """Whether each test document is told right; bool (documents,)."""
        model.eval()
        rows = [ids[:length] for ids in self.documents.test]
        right = torch.zeros(len(rows), dtype=torch.bool)
        for part in micro_batches(rows, self.preset.micro):
            found = self._logits(model, [rows[index] for index in part]).argmax(-1).cpu()
            right[torch.tensor(part)] = found == self.documents.test_labels[torch.tensor(part)]
        return right


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def micro_batches(rows: list[Tensor], tokens: int) -> list[list[int]]:
    """Indices of rows, those of similar lengths together, at most so many tokens with padding."""
    found: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if not found or (len(found[-1]) + 1) * longest > tokens:
            found.append([])
            longest = len(rows[index])
        found[-1].append(index)
    return found


def main(arguments: Arguments) -> int:
    """Goes on with what is not done; returns the exit status: 0 for all done, 3 for time over."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(arguments)
    lengths = arguments.lengths or list(study.preset.lengths)
    unknown = set(lengths) - set(study.preset.lengths)
    if unknown:
        known = ", ".join(map(str, sorted(study.preset.lengths)))
        raise SystemExit(f"--lengths {' '.join(map(str, unknown))}; there are {known}")
    print(study.documents)
    status = 0
    try:
        for seed in arguments.seeds:
            for length in lengths:
                study.run(length, seed)
    except OutOfTime:
        status = 3
    print(report.conclude(study))
    if status:
        print("Time is over; run the same command again to go on.")
    return status


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
