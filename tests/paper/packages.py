"""Python packages of nonsense, for benchmarks that read what is installed."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_flash_patch.testing import sources

SYLLABLES = ["ba", "do", "fe", "gi", "ku", "la", "mo", "ne", "pi", "ru", "sa", "ti", "vo", "zu"]


@contextlib.contextmanager
def few_objects() -> Iterator[None]:
    """Every patch looks through all living objects; this hides those that the imports left."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """Writes packages where `sources` looks for installed ones, and nothing else is there.

    Args:
        folder: for the packages.
        monkeypatch: undoes it.
        sizes: name -> lines of a file. A package has four folders of five files each.
    """
    paths = {"stdlib": str(folder / "none"), "purelib": str(folder), "platlib": str(folder)}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    for name, lines in sizes.items():
        draw = random.Random(name)
        own = draw.sample(SYLLABLES, 6)
        words = ["".join(draw.choices(own, k=3)) for _ in range(60)]
        for part in range(4):
            where = folder / name / f"part{part}"
            where.mkdir(parents=True)
            for number in range(5):
                text = [f"# Copyright of {name}", f"import {name}.part{part} as {name}short"]
                text += [
                    f"{draw.choice(words)} = {draw.choice(words)}({draw.randrange(99)}, "
                    f"{name}short.{draw.choice(words)})"
                    for _ in range(lines)
                ]
                (where / f"module{number}.py").write_text("\n".join(text) + "\n")
