"""Source files by package, without what names the package.

Taken out, in this order:

    lines      import statements, also in docstrings; whole-line comments (license headers are
               such); lines with "copyright", "license", "author" or "all rights reserved"
    patterns   addresses of the web and of people, file names and paths; decorators, too
    words      names of all modules, subpackages and folders of all the packages chosen, and the
               short names that any of their files gives them by "import ... as"; whole words
    in words   names of all the packages chosen, as installed and as published: "TorchDispatch"
               loses "torch"

The last three leave an underscore, in files of all packages alike, so that a gap tells nothing.
What is left of a package are its subject and its style. The standard library is no package here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_flash_patch.testing.sources import size_of

from .text import Distinct, own_files, read

GAP = "_"
SHORTEST = 3, 2  # characters of a name and of an alias: "a" would take half of the text along
LEGAL = ("copyright", "license", "licence", "author", "all rights reserved")
IMPORT = re.compile(
    r"^[ \t]*(?:>>>[ ]?|\.\.\.[ ]?)?"
    r"(?:from[ \t]+[.\w]+[ \t]+import[ \t]*(?:\([^)]*\)|(?:[^\n\\]|\\\n)*)"
    r"|import[ \t]+(?:[^\n\\]|\\\n)*)",
    re.MULTILINE,
)
ALIAS = re.compile(
    r"^[ \t]*(?:>>>[ ]?)?(?:import|from)[ \t]+(\w+)[.\w]*[ \t]+(?:import[ \t]+\w+[ \t]+)?"
    r"as[ \t]+(\w+)",
    re.MULTILINE,
)
# Where an address or a file name may be, and what then goes: everything between blanks and quotes.
HINT = re.compile(r"://|@\w|www\.|\.(?:pyi?|rst|md|txt|cpp|cu|json|toml|cfg|ya?ml|html)\b")
ADDRESS = re.compile(rf"[^\s\"'`()<>\[\]]*(?:{HINT.pattern})[^\s\"'`()<>\[\]]*")
BETWEEN = "[-_. ]?"  # the words of a name
WORD = re.compile(r"([^\W\d]\w*)")


@dataclass(frozen=True)
class Document:
    """A source file.

    Attributes:
        package: it is from.
        text: masked.
        test: whether it is for testing; files of one folder are all on one side.
    """

    package: str
    text: str
    test: bool


def documents(
    classes: int, smallest: int, largest: int, most: int, test_share: float
) -> list[Document]:
    """Masked files of the packages that have most of them.

    Args:
        classes: packages.
        smallest: bytes of a file, before and after masking.
        largest: characters, after which a masked file is cut.
        most: files of a package; of more, a random choice.
        test_share: of a package's files, about.

    Raises:
        SystemExit: there are not as many packages with files for both splits.
    """
    files = {
        name: sorted((f for f in found if size_of(f) >= smallest), key=_draw)
        for name, found in own_files().items()
        if name != "python"
    }
    names = sorted(files, key=lambda name: (-len(files[name]), name))[:classes]
    texts = {name: {file: read(file) for file in files[name][: 2 * most]} for name in names}
    mask = masking(names, texts)
    distinct = Distinct()
    found = []
    for name in names:
        kept = {}
        for file, text in texts[name].items():
            if len(kept) == most:
                break
            masked = mask(text[: 2 * largest])[:largest]
            if len(masked) >= smallest and distinct(masked):
                kept[file] = masked
        test = held_out(list(kept), test_share)
        if not test or len(test) == len(kept):
            raise SystemExit(f"{name} has too few files for both splits; ask for fewer classes")
        found += [Document(name, text, file in test) for file, text in kept.items()]
    return found


def masking(names: list[str], texts: dict[str, dict[Path, str]]) -> Callable[[str], str]:
    """What masks a text.

    Args:
        names: of the packages.
        texts: their files; where aliases are looked for.
    """
    words = module_names(names) | aliases(names, texts)
    patterns = sorted(published(names), key=len, reverse=True)
    packages = re.compile("|".join(patterns), re.I)
    # Of two words, such as "hugging face": only these are looked for in the whole text.
    phrases = re.compile("|".join(p for p in patterns if BETWEEN in p) or r"(?!)", re.I)

    class Masked(dict):
        """Word -> what stands for it; each is looked at once."""

        def __missing__(self, word: str) -> str:
            plain = word.strip("_").lower()
            self[word] = GAP if plain in words else packages.sub(GAP, word)
            return self[word]

    masked = Masked()

    def mask(text: str) -> str:
        text = "\n".join(_lines(IMPORT.sub("", text)))
        parts = WORD.split(phrases.sub(GAP, text))  # every other one is a word
        parts[1::2] = [masked[word] for word in parts[1::2]]
        return "".join(parts)

    return mask


def _lines(text: str) -> Iterator[str]:
    """Lines that stay, without addresses and file names."""
    whole = text.lower()
    legal = [word for word in LEGAL if word in whole]
    for line in text.split("\n"):
        if line.lstrip().startswith("#") or (legal and _has(line.lower(), legal)):
            continue
        yield ADDRESS.sub(GAP, line) if HINT.search(line) else line


def _has(line: str, words: list[str]) -> bool:
    return any(word in line for word in words)


def module_names(names: Iterable[str]) -> set[str]:
    """Names of the packages' modules, subpackages and folders; lower case, without underscores at
    the ends."""
    found = set()
    every = own_files()
    for name in names:
        root = os.path.commonpath([file.parent for file in every[name]])
        for file in every[name]:
            inside = file.relative_to(root).with_suffix("").parts
            found |= {part.strip("_").lower() for part in inside}
    return {name for name in found if len(name) >= SHORTEST[0]}


def aliases(names: Iterable[str], texts: dict[str, dict[Path, str]]) -> set[str]:
    """The short names, "np" for one, under which any file imports the packages' modules."""
    known = set(names)
    return {
        alias.strip("_").lower()
        for files in texts.values()
        for text in files.values()
        for package, alias in (ALIAS.findall(text) if " as " in text else ())
        if package in known and len(alias.strip("_")) >= SHORTEST[1]
    }


def published(names: Iterable[str]) -> set[str]:
    """Regular expressions for the packages' names, as installed and as on the package index."""
    distributions = importlib.metadata.packages_distributions()
    found = set()
    for name in names:
        for known in [name, *distributions.get(name, [])]:
            parts = [re.escape(part) for part in re.split(r"[-_. ]+", known) if part]
            if len("".join(parts)) >= SHORTEST[0]:
                found.add(BETWEEN.join(parts))
    return found


def held_out(files: list[Path], share: float) -> set[Path]:
    """Files for testing: whole folders, by the hash of their paths, up to about a share of all."""
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)

    test: set[Path] = set()
    for folder in sorted(folders, key=_draw):
        if len(test) + len(folders[folder]) <= 1.5 * share * len(files):
            test |= set(folders[folder])
        if len(test) >= share * len(files):
            break
    return test


def _draw(path: Path) -> str:
    """A random order of paths, the same wherever Python is installed."""
    return hashlib.sha1("/".join(path.parts[-3:]).encode()).hexdigest()
