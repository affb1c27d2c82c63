"""The five tasks of Long Range Arena as arrays on disk, made once.

ListOps and Pathfinder follow the published descriptions. The arena's other three need data that not
every machine has, so these are surrogates, of the same lengths:

    text       which of two packages a piece of Python is from, in bytes (instead of film reviews)
    retrieval  whether two pieces are from one package, in bytes (instead of cited papers)
    image      which of ten shapes a grey image shows, in pixels (instead of CIFAR-10)

No file is in both the training and the test split.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hf_flash_patch.testing import sources

from . import listops, pathfinder, shapes
from .loop import Clock

Arrays = tuple[np.ndarray, np.ndarray]  # tokens and labels
# Examples; a shard is the unit that is not made twice. A GPU makes many images at a time.
SHARD = {"cpu": 2000, "cuda": 20_000}
TEST_SHARE = 0.2  # of the files
SHORTEST_PIECE = 1000  # bytes


@dataclass(frozen=True)
class Task:
    """What an example is.

    Attributes:
        name: as on the command line.
        length: tokens, padded to it.
        classes: of the label.
        train: examples.
        test: examples.
        pair: two texts an example.
        surrogate: not the arena's own data.
    """

    name: str
    length: int
    classes: int
    train: int
    test: int
    pair: bool = False
    surrogate: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("listops", 2000, 10, 96_000, 4_000),
        Task("text", 4000, 2, 40_000, 10_000, surrogate=True),
        Task("retrieval", 4000, 2, 40_000, 10_000, pair=True, surrogate=True),
        Task("image", 1024, 10, 46_000, 10_000, surrogate=True),
        Task("pathfinder", 1024, 2, 160_000, 20_000),
    )
}


@dataclass(frozen=True)
class Split:
    """Examples in memory.

    Attributes:
        tokens: uint8 (examples, length), or (examples, 2, length) for pairs. Padding is 0; so is
            a black pixel, but images have no padding.
        labels: uint8 (examples,).
    """

    tokens: np.ndarray
    labels: np.ndarray


def load(
    task: Task, folder: Path, seed: int, workers: int, clock: Clock, device: str = "cpu"
) -> tuple[Split, Split]:
    """Training and test split, made if they are not there.

    Args:
        task: which.
        folder: of all tasks' shards.
        seed: of the random choices.
        workers: processes to make shards with; 0 makes them in this one.
        clock: says when to stop.
        device: where Pathfinder's images are made; on a GPU by this process. They are others there.

    Raises:
        OutOfTime: the time is over; the shards that are done are kept.
    """
    kind = torch.device(device).type if task.name == "pathfinder" else "cpu"
    workers = workers if kind == "cpu" else 0
    shards = {
        name: [
            folder / f"{task.name}-{task.length}-{kind}-{seed}-{name}-{index}.npz"
            for index in range(-(-count // SHARD[kind]))
        ]
        for name, count in (("train", task.train), ("test", task.test))
    }
    todo = [
        (task, name, seed, index, path, kind)
        for name, paths in shards.items()
        for index, path in enumerate(paths)
        if not path.exists()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), desc=f"{task.name}: data", unit="shard", disable=not todo) as bar:
        if workers and todo:
            # Processes that have imported this and never seen the GPU.
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
            with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
                waiting = [pool.submit(_make, *job) for job in todo]
                try:
                    for done in as_completed(waiting):
                        done.result()
                        bar.update()
                        clock.check()
                finally:
                    pool.shutdown(cancel_futures=True)
        else:
            for job in todo:
                clock.check()
                _make(*job)
                bar.update()
    made = []
    for name, count in (("train", task.train), ("test", task.test)):
        arrays = [np.load(path) for path in shards[name]]
        tokens, labels = (np.concatenate([a[k] for a in arrays])[:count] for k in ("x", "y"))
        made.append(Split(tokens, labels))
    return made[0], made[1]


def _make(task: Task, split: str, seed: int, index: int, path: Path, device: str) -> None:
    """One shard, the same whoever makes it."""
    count = min(SHARD[device], getattr(task, split) - index * SHARD[device])
    tokens, labels = _MAKERS[task.name](task, split, f"{seed}-{split}-{index}", count, device)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, x=tokens, y=labels)
    partial.replace(path)


def _listops(task: Task, split: str, seed: str, count: int, device: str) -> Arrays:
    longest = min(listops.LONGEST, task.length + 1)
    found = listops.expressions(seed, min(listops.SHORTEST, task.length // 4), longest)
    tokens = np.zeros((count, task.length), np.uint8)
    labels = np.zeros(count, np.uint8)
    for row, (text, value) in enumerate(itertools.islice(found, count)):
        tokens[row, : len(text)] = np.frombuffer(text, np.uint8)
        labels[row] = value
    return tokens, labels


def _image(task: Task, split: str, seed: str, count: int, device: str) -> Arrays:
    pixels, kinds = shapes.shapes(f"image-{seed}", count)
    side = round(task.length**0.5)
    blocks = pixels.reshape(count, side, shapes.SIZE // side, side, shapes.SIZE // side)
    return blocks.mean((2, 4)).astype(np.uint8).reshape(count, -1), kinds


def _pathfinder(task: Task, split: str, seed: str, count: int, device: str) -> Arrays:
    side = round(task.length**0.5)
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big")
    generator = torch.Generator(device).manual_seed(number)
    geometry = pathfinder.GEOMETRIES.get(side)
    if geometry is None:  # to try things out
        geometry = pathfinder.smaller(pathfinder.GEOMETRIES[32], side, 2, 1)
    images = pathfinder.generate(geometry, count, generator)
    return images.pixels.view(count, -1).cpu().numpy(), images.labels.byte().cpu().numpy()


@functools.cache
def _pieces(split: str, longest: int) -> _Pieces:
    return _Pieces(split, longest)


class _Pieces:
    """Pieces of the installed packages' files, those of one split."""

    def __init__(self, split: str, longest: int):
        self._longest = longest
        self._shortest = min(SHORTEST_PIECE, longest // 4)
        self._files: dict[str, list[Path]] = {}
        self._sizes: dict[str, list[int]] = {}
        for name, files in sources.installed().items():
            kept = [
                file
                for file in files
                if sources.size_of(file) > 2 * self._shortest
                and (_share(file.parent.name + "/" + file.name) < TEST_SHARE) == (split == "test")
            ]
            if len(kept) > 1:
                self._files[name] = kept
                self._sizes[name] = [sources.size_of(file) for file in kept]
        by_size = {name: sum(sizes) for name, sizes in self._sizes.items()}
        self.packages = sorted(by_size, key=lambda name: (-by_size[name], name))

    def piece(self, draw: random.Random, package: str) -> bytes:
        """Any bytes of any file but its first, which name the package and its licence."""
        file = draw.choices(self._files[package], self._sizes[package])[0]
        content = file.read_bytes()
        length = draw.randint(self._shortest, self._longest)
        first = draw.randint(self._shortest, max(len(content) - length, self._shortest))
        return content[first : first + length]


def _share(name: str) -> float:
    """A number from 0 to 1 that a name always has; copies of a file have the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _text(task: Task, split: str, seed: str, count: int, device: str) -> Arrays:
    pieces, draw = _pieces(split, task.length), random.Random(seed)
    two = sorted(_pieces("train", task.length).packages[:2])
    tokens = np.zeros((count, task.length), np.uint8)
    labels = np.zeros(count, np.uint8)
    for row in range(count):
        labels[row] = draw.randrange(2)
        text = pieces.piece(draw, two[labels[row]])
        tokens[row, : len(text)] = np.frombuffer(text, np.uint8)
    return tokens, labels


def _retrieval(task: Task, split: str, seed: str, count: int, device: str) -> Arrays:
    pieces, draw = _pieces(split, task.length), random.Random(seed)
    names = pieces.packages[:40]
    tokens = np.zeros((count, 2, task.length), np.uint8)
    labels = np.zeros(count, np.uint8)
    for row in range(count):
        labels[row] = draw.randrange(2)
        one = draw.choice(names)
        other = one if labels[row] else draw.choice([name for name in names if name != one])
        for place, name in enumerate((one, other)):
            text = pieces.piece(draw, name)
            tokens[row, place, : len(text)] = np.frombuffer(text, np.uint8)
    return tokens, labels


_MAKERS: dict[str, Callable[[Task, str, str, int, str], Arrays]] = {
    "listops": _listops,
    "text": _text,
    "retrieval": _retrieval,
    "image": _image,
    "pathfinder": _pathfinder,
}
