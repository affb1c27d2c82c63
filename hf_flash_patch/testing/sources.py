"""Text that every machine has: the sources of the installed Python packages."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LARGEST_FILE = 500_000  # bytes; beyond are tables that a program wrote
TEST_SHARE = 0.15  # of the text, in whole packages


def installed() -> dict[str, list[Path]]:
    """Python files of every installed package, and as "python" of the standard library; sorted."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    roots = {"python": [f for f in library.rglob("*.py") if "site-packages" not in f.parts]}
    for top in {Path(paths["purelib"]), Path(paths["platlib"])}:
        for package in top.iterdir() if top.is_dir() else ():
            if package.is_dir() and not package.name.startswith((".", "_")):
                roots.setdefault(package.name, list(package.rglob("*.py")))
    return {name: sorted(files) for name, files in roots.items()}


def size_of(file: Path) -> int:
    """Bytes of a file that is worth reading, of any other 0."""
    size = file.stat().st_size if file.is_file() else 0
    return size if 0 < size <= LARGEST_FILE else 0


def packages(limit: int) -> Iterator[tuple[str, str]]:
    """Name and text of every installed package and of the standard library, largest first.

    Args:
        limit: bytes of all together; the largest packages are cut to the same size to meet it.
    """
    roots = installed()
    sizes = {name: sum(map(size_of, files)) for name, files in roots.items()}
    cut = _cut(sorted(sizes.values()), limit)
    seen: set[bytes] = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        parts, size = [], 0
        for file in roots[name]:
            if size >= cut:
                break
            content = file.read_bytes() if size_of(file) else b""
            digest = hashlib.sha1(content).digest()
            if not content or digest in seen:  # a copy would be in both splits
                continue
            seen.add(digest)
            parts.append(f"# {file.name}\n" + content.decode("utf-8", errors="replace"))
            size += len(content)
        if parts:
            yield name, "\n\n".join(parts)


def _cut(sizes: list[int], limit: int) -> int:
    """The size to which packages have to be cut so that all together meet the limit."""
    for index, size in enumerate(sizes):
        left = len(sizes) - index
        if size * left > limit:
            return limit // left
        limit -= size
    return sizes[-1] if sizes else 0


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the training and of the test packages: from large to small, the first for training,
    then as many for testing as make up `TEST_SHARE`."""
    total = sum(map(len, texts.values()))
    train, test, size = [], [], 0
    for index, (name, text) in enumerate(texts.items()):
        if index % 3 == 1 and size < TEST_SHARE * total:
            test.append(name)
            size += len(text)
        else:
            train.append(name)
    return train, test
