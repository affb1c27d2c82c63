"""The arena's tasks from our own generators: what they ask has one answer, and no short cut."""

import itertools
import statistics
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.paper import datasets, listops, pathfinder, shapes, tips
from benchmarks.paper.loop import Clock, OutOfTime, rate, wilson

PYTHON = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value_of(words: list[str]) -> int:
    """By Python's own functions, from the text."""
    stack: list[list] = [[]]
    for word in words:
        if word in PYTHON:
            stack.append([PYTHON[word]])
        elif word == "]":
            operator, *values = stack.pop()
            stack[-1].append(operator(values))
        else:
            stack[-1].append(int(word))
    (value,) = stack.pop()
    assert not stack
    return value


@pytest.fixture(scope="module")
def expressions() -> list[tuple[bytes, int]]:
    return list(itertools.islice(listops.expressions(0), 1000))


def test_listops_values_are_pythons(expressions):
    for ids, value in expressions[:200]:
        assert value_of(listops.text(ids).split()) == value


def test_listops_lengths_depth_and_digits(expressions):
    assert all(500 < len(ids) < 2000 for ids, _ in expressions)
    assert len({ids for ids, _ in expressions}) == len(expressions)
    depths = []
    for ids, _ in expressions:
        words = listops.text(ids).split()
        deep = itertools.accumulate((w in PYTHON) - (w == "]") for w in words)
        depths.append(max(deep))
    assert max(depths) == listops.MAX_DEPTH - 1
    assert {value for _, value in expressions} == set(range(10))
    assert list(itertools.islice(listops.expressions(0), 3)) == expressions[:3]
    assert list(itertools.islice(listops.expressions(1), 3)) != expressions[:3]


def test_listops_outermost_operator_tells_what_the_papers_say(expressions):
    by_root: dict[int, Counter] = defaultdict(Counter)
    for ids, value in expressions:
        by_root[ids[0]][value] += 1
    right = sum(values.most_common(1)[0][1] for values in by_root.values()) / len(expressions)
    assert 0.33 < right < 0.42  # 0.373; four standard deviations, and the best of few


def by_the_paddles(images: pathfinder.Images, index: int) -> bool:
    """Whether a chain of paddles joins the dots: what is no farther apart than a gap is a chain."""
    tails, heads = images.paddles[index].split(2, -1)
    points = tails[:, None] + (heads - tails)[:, None] * torch.linspace(0, 1, 9)[:, None]
    count = len(points)
    apart = torch.cdist(points.flatten(0, 1), points.flatten(0, 1)).view(count, 9, count, 9)
    linked = apart.amin((1, 3)) <= images.gaps[index] + 0.25
    reached = torch.zeros(count, dtype=torch.bool)
    reached[(tails - images.dots[index, 0]).norm(dim=1).argmin()] = True
    for _ in range(count):
        reached = linked[reached].any(0)
    return bool(reached[(heads - images.dots[index, 1]).norm(dim=1).argmin()])


def by_the_pixels(images: pathfinder.Images, index: int, geometry: pathfinder.Geometry) -> bool:
    """A flood from the one dot, over gaps of the image's width, that does or does not arrive."""
    bright = images.pixels[index] >= 0.5 * 255 * geometry.contrast
    where = bright.nonzero().float().flip(1)
    to_dots = torch.cdist(images.dots[index], where)
    outside = (to_dots > geometry.marker_radius + 0.5).all(0)
    where, to_dots = where[outside], to_dots[:, outside]
    near = to_dots <= geometry.marker_radius + 1.5
    linked = torch.cdist(where, where) <= images.gaps[index] - geometry.thickness + 2.6
    reached, before = near[0], -1
    while int(reached.sum()) > before:
        before = int(reached.sum())
        reached = reached | linked[reached].any(0)
    return bool((reached & near[1]).any())


@pytest.mark.parametrize(("size", "count"), [(32, 8), (64, 16), (128, 32), (256, 24)])
def test_pathfinder_can_be_solved(size, count):
    geometry = pathfinder.GEOMETRIES[size]
    images = pathfinder.generate(geometry, count, seeded(size))
    assert images.pixels.shape == (count, size, size) and images.pixels.dtype == torch.uint8
    joined = (images.labels == 1).tolist()
    assert [by_the_paddles(images, i) for i in range(count)] == joined
    if size == 128:
        assert [by_the_pixels(images, i, geometry) for i in range(count)] == joined
    # Traces: a contour with both dots, or two with one each.
    kinds = [set(trace.unique().tolist()) for trace in images.traces]
    assert [3 in kind for kind in kinds] == joined
    assert [2 in kind for kind in kinds] == [not j for j in joined]
    assert ((images.traces > 0) <= (images.pixels > 0)).all()


def test_pathfinder_is_inside_and_has_its_contours():
    geometry = pathfinder.GEOMETRIES[128]
    images = pathfinder.generate(geometry, 16, seeded(1))
    targets = images.paddles[:, :28]
    assert targets.min() >= geometry.padding and targets.max() <= 127 - geometry.padding
    lengths = (targets[..., 2:] - targets[..., :2]).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, geometry.paddle))
    # The next paddle of a contour, two on, starts a gap ahead of the last one's head.
    steps = (targets[:, 2:, :2] - targets[:, :-2, 2:]).norm(dim=-1)
    torch.testing.assert_close(steps, images.gaps[:, None].expand_as(steps), atol=1e-3, rtol=0)
    assert set(images.gaps.tolist()) <= {4.0, 6.0}


def test_pathfinder_is_decided_by_the_seed():
    geometry = pathfinder.smaller(pathfinder.GEOMETRIES[128], 64, 4, 2)
    one, same = (pathfinder.generate(geometry, 20, seeded(3)) for _ in range(2))
    other = pathfinder.generate(geometry, 20, seeded(4))
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.labels, same.labels)
    assert not torch.equal(one.pixels, other.pixels)
    assert len({image.numpy().tobytes() for image in torch.cat((one.pixels, other.pixels))}) == 40


def test_pathfinder_is_balanced_and_no_plain_statistic_tells():
    geometry = replace(pathfinder.GEOMETRIES[128], distractors=0)  # which would only blur them
    images = pathfinder.generate(geometry, 800, seeded(5))
    joined = images.labels == 1
    half = len(images) // 2
    margin = 4 * 0.5 / half**0.5
    assert abs(joined.float().mean() - 0.5) < margin
    statistics = {
        "distance of the dots": (images.dots[:, 0] - images.dots[:, 1]).norm(dim=-1),
        "mean": images.pixels.float().mean((1, 2)),
        "bright pixels": (images.pixels > 100).sum((1, 2)).float(),
    }
    for name, value in statistics.items():
        limits = value[:half].quantile(torch.linspace(0.02, 0.98, 49))
        right = ((value[:half, None] > limits) == joined[:half, None]).float().mean(0)
        best = limits[(right - 0.5).abs().argmax()]
        found = ((value[half:] > best) == joined[half:]).float().mean()
        assert abs(found - 0.5) < margin, name


def test_directions_under_the_dots_tell_much():
    """Not a property to be proud of, but one to know: it is why tips.py exists."""
    geometry = pathfinder.smaller(pathfinder.GEOMETRIES[128], 64, 6, 2)
    train, test = (pathfinder.generate(geometry, 400, seeded(seed)) for seed in (6, 7))
    right = (tips.guesses(train, test, geometry) == test.labels).float().mean()
    assert right > 0.7


def test_contours_without_room_are_refused():
    geometry = replace(pathfinder.GEOMETRIES[32], size=12, contour=9)
    with pytest.raises(ValueError, match="no room"):
        pathfinder.generate(geometry, 4, seeded(0))


def test_shapes_differ_by_kind_and_seed():
    pixels, kinds = shapes.shapes("a", 300)
    again, _ = shapes.shapes("a", 300)
    other, _ = shapes.shapes("b", 300)
    assert pixels.dtype == np.uint8 and pixels.shape == (300, 32, 32)
    assert set(kinds.tolist()) == set(range(len(shapes.KINDS)))
    assert (pixels == again).all() and (pixels != other).any()
    assert 60 < pixels.mean() < 200 and pixels.std() > 15


@pytest.mark.parametrize("name", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_datasets_are_made_once(tmp_path, name):
    length = 256 if name in ("image", "pathfinder") else 200
    task = replace(datasets.TASKS[name], length=length, train=24, test=8)
    train, test = datasets.load(task, tmp_path, 0, 0, Clock(60))
    shape = (24, 2, length) if task.pair else (24, length)
    assert train.tokens.shape == shape and train.tokens.dtype == np.uint8
    assert len(test.labels) == 8 and train.labels.max() < task.classes
    rows = {row.tobytes() for row in train.tokens}
    assert len(rows) == 24 and not rows & {row.tobytes() for row in test.tokens}
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again, _ = datasets.load(task, tmp_path, 0, 0, Clock(-1))  # no time to make anything
    assert (again.tokens == train.tokens).all() and len(files) == 2
    with pytest.raises(OutOfTime):
        datasets.load(task, tmp_path, 1, 0, Clock(-1))


def test_datasets_are_the_same_from_other_processes(tmp_path):
    task = replace(datasets.TASKS["image"], length=256, train=8, test=4)
    one, _ = datasets.load(task, tmp_path / "one", 0, 0, Clock(60))
    other, _ = datasets.load(task, tmp_path / "other", 0, 1, Clock(60))
    assert (one.tokens == other.tokens).all() and (one.labels == other.labels).all()


def test_files_of_text_are_in_one_split():
    train, test = (datasets._pieces(split, 200) for split in ("train", "test"))
    both = set(itertools.chain(*train._files.values())) & set(
        itertools.chain(*test._files.values())
    )
    assert not both and set(train.packages[:2]) <= set(test.packages)


def test_rates_and_intervals():
    assert rate(0, 100, 1.0, 10) == pytest.approx(0.1) and rate(9, 100, 1.0, 10) == 1.0
    assert rate(100, 100, 1.0, 10) == pytest.approx(0.01)
    low, high = wilson(1228, 2000)
    assert (low, high) == pytest.approx((0.5925, 0.6351), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12) and 0.2 < wilson(0, 10)[1] < 0.35
