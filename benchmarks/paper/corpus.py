"""Text for language models: installed packages, whole ones held out."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hf_flash_patch.testing.sources import size_of
from hf_flash_patch.testing.text import byte_pairs, cut

from .loop import alone, save
from .text import SPECIAL, Distinct, encode, own_files, read

LARGEST_TEST_SHARE = 0.05  # of all text, of one package held out: most text is to learn from
EVERY = 3  # of the packages that may be held out, one is
TOKENIZER_TEXT = 1_000_000  # characters of a package that the tokenizer learns from


@dataclass(frozen=True)
class Corpus:
    """Tokens; no package and no near-copy of a file is in both splits.

    Attributes:
        vocab_size: of the tokenizer.
        train: int32 (tokens,), one a package.
        test: documents, int32 (documents, document tokens), each from one package.
        sources: the test documents' packages.
        bytes_per_token: of the test packages.
    """

    vocab_size: int
    train: list[Tensor]
    test: Tensor
    sources: list[str]
    bytes_per_token: float

    @property
    def name(self) -> str:
        """Of these very tokens: machines with other packages have another text."""
        found = 0
        for tokens in (*self.train, self.test):
            found = zlib.crc32(tokens.numpy().tobytes(), found)
        return f"{found:08x}"

    def __str__(self) -> str:
        count, length = self.test.shape
        names = ", ".join(dict.fromkeys(self.sources))
        return (
            f"{sum(map(len, self.train)) / 1e6:.1f} M tokens of {len(self.train)} packages to "
            f"learn from; {count} documents of {length - 1} tokens from other packages ({names}), "
            f"{self.bytes_per_token:.2f} bytes a token"
        )


def corpus(folder: Path, most: int, vocab_size: int, documents: int, length: int) -> Corpus:
    """Reads the packages, or what an earlier call left in `folder`.

    Args:
        folder: for the tokenizer and the tokens.
        most: bytes of a package to read.
        vocab_size: of the tokenizer.
        documents: test documents at most.
        length: tokens of each, which are predicted; one more starts it.
    """
    cache = folder / "corpus.pt"
    with alone(folder):
        if not cache.exists():
            _make(folder, cache, most, vocab_size, documents, length)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Corpus(tokenizer.get_vocab_size(), **torch.load(cache))


def _make(
    folder: Path, cache: Path, most: int, vocab_size: int, documents: int, length: int
) -> None:
    """As `corpus`; leaves the tokenizer in `folder` and the rest in `cache`."""
    files = own_files()
    sizes = {name: min(most, sum(map(size_of, found))) for name, found in files.items()}
    test_names = held_out(sizes, least=8 * length)
    train_names = [name for name in sorted(sizes) if name not in test_names]
    distinct = Distinct()
    train_texts, test_texts = (  # in this order: of copies, that to learn from is kept
        [_joined(files[name], most, distinct) for name in names]
        for names in (train_names, test_names)
    )
    tokenizer = byte_pairs((text[:TOKENIZER_TEXT] for text in train_texts), vocab_size, SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    streams = dict(zip(test_names, encode(tokenizer, test_texts), strict=True))
    try:
        test, sources = cut(streams, documents, length + 1)
    except ValueError as error:
        raise SystemExit(f"text held out: {error}") from None
    written = sum(len(text.encode()) for text in test_texts)
    save(
        cache,
        {
            "train": encode(tokenizer, train_texts),
            "test": test,
            "sources": sources,
            "bytes_per_token": written / sum(map(len, streams.values())),
        },
    )


def held_out(sizes: dict[str, int], least: int) -> list[str]:
    """Names of the test packages: from large to small every third that is neither so large that it
    is worth more for training, nor smaller than `least` bytes."""
    most = LARGEST_TEST_SHARE * sum(sizes.values())
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    return [name for name in names if least <= sizes[name] <= most][::EVERY]


def _joined(files: Iterable[Path], most: int, distinct: Distinct) -> str:
    parts, size = [], 0
    for file in files:
        if size >= most:
            break
        text = read(file)
        if distinct(text):
            parts.append(f"# {file.name}\n{text}\n")
            size += len(text)
    return "".join(parts)


class Blocks:
    """Blocks of the training text in random order, each once an epoch; what index means is fixed.

    Args:
        texts: int32 (tokens,) each.
        length: tokens of a block, and one more that comes after.
        seed: of the order.
    """

    def __init__(self, texts: list[Tensor], length: int, seed: int):
        self._texts = [text for text in texts if len(text) > length]
        self._length, self._seed = length, seed
        self._epoch, self._order = -1, torch.empty(0)
        if not self._texts:
            raise SystemExit(f"no package has {length} tokens to learn from; read more of each")

    def __call__(self, first: int, count: int) -> Tensor:
        """Blocks first, ..., first + count - 1; int64 (count, length + 1)."""
        return torch.stack([self._block(index) for index in range(first, first + count)]).long()

    def __len__(self) -> int:
        """Blocks of an epoch."""
        return sum((len(text) - 1) // self._length for text in self._texts)

    def _block(self, index: int) -> Tensor:
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.tensor(list(self._starts(epoch)))
            shuffled = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = self._order[torch.randperm(len(self._order), generator=shuffled)]
        text, start = self._order[place].tolist()
        return self._texts[text][start : start + self._length + 1]

    def _starts(self, epoch: int) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch + 500_000)
        for index, text in enumerate(self._texts):
            count, rest = divmod(len(text) - 1, self._length)
            offset = int(torch.randint(0, rest + 1, (), generator=generator))
            for block in range(count):
                yield index, offset + block * self._length
