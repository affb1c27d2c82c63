"""Text for measurements: files without near-copies, tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hf_flash_patch.testing.sources import installed, size_of

# Folders with copies of other packages.
VENDORED = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"}
VENDORED |= {"typeshed"}
PIECE = 50_000  # characters that the tokenizer takes as one text
BATCH = 512  # of them at a time
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, START, END = range(3)


def own_files() -> dict[str, list[Path]]:
    """`installed()` without empty and huge files and without vendored packages."""
    files = {
        name: [f for f in found if size_of(f) and VENDORED.isdisjoint(f.parts)]
        for name, found in installed().items()
    }
    return {name: found for name, found in files.items() if found}


def read(file: Path) -> str:
    """A file's text, with a newline at the end of every line, the last one too."""
    lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
    return "".join(f"{line}\n" for line in lines)


class Distinct:
    """Tells texts from copies of earlier ones: a copy shares half of its runs of lines.

    A run is four lines in sequence, blank ones and indentation left out; a quarter of all runs,
    chosen by their hash, is kept and compared.
    """

    LINES, SAMPLE, LARGEST_SHARE = 4, 4, 0.5

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, text: str) -> bool:
        """Whether less than half of the text stood in those before; if so, remembers it."""
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        crcs = torch.tensor([zlib.crc32(line.encode()) for line in lines], dtype=torch.int64)
        runs = {zlib.crc32("\n".join(lines).encode())}
        if len(lines) >= self.LINES:
            factors = torch.tensor([1_000_003**k for k in range(self.LINES)])
            hashes = (crcs.unfold(0, self.LINES, 1) * factors).sum(1)
            runs |= set(hashes[hashes % self.SAMPLE == 0].tolist())
        if len(runs & self._seen) > self.LARGEST_SHARE * len(runs):
            return False
        self._seen |= runs
        return True


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of each text, int32 (tokens,)."""
    pieces = [
        (index, text[start : start + PIECE])
        for index, text in enumerate(texts)
        for start in range(0, len(text), PIECE)
    ]
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int32)] for _ in texts]
    for first in range(0, len(pieces), BATCH):
        indices, batch = zip(*pieces[first : first + BATCH], strict=True)
        encoded = tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)
        for index, piece in zip(indices, encoded, strict=True):
            found[index].append(torch.tensor(piece.ids, dtype=torch.int32))
    return [torch.cat(parts) for parts in found]
