"""Pathfinder images: are the two dots on one contour?

Our own generator, from the published descriptions (Linsley et al. 2018, "Learning long-range
spatial dependencies with horizontal gated recurrent units"; Tay et al. 2021, Long Range Arena),
with the parameters of the arena's hard split: 32, 64, 128 (Path-X) and 256 pixels a side.

A contour is a chain of short lines ("paddles") with gaps. Two long ones start near each other and
grow in turns; shorter ones distract. A dot sits on the first paddle of a long one; the other on
the end of the same (label 1) or of the other one (label 0).

Contours are grown in plane coordinates, many images at a time, on any device; only the result
becomes pixels. Departures from the published programs:

* lines are drawn by their distance from each pixel, not by shrinking a larger drawing;
* long contours stay able to turn away from the border: of those that start blindly one in a million
  fits on 64 pixels;
* both pairs of dots that an image may have are about equally far apart (`Geometry.tolerance`), so
  that the distance does not tell the label.

What does tell it, in nine images of ten, is how the lines under the two dots are turned to each
other (tips.py): contours of 14 paddles are smooth. Without the second departure, on 256 pixels, it
is eight of ten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FAR = 1e4  # pixels; where a paddle that does not exist is kept
TRIES = 24  # directions of a paddle, before its contour is given up
CHECKED = 8  # of those that stay inside: also against the other paddles
STEERED = 4  # paddles; longer contours have to stay able to turn away from the border
TURN = 0.6  # of the largest turn: what some of TRIES paddles reach
SPARE_DISTRACTORS = 4  # that may fail
CHUNK_PIXELS = {"cpu": 2**22, "cuda": 2**27}  # grown at a time; the numbers drawn depend on it
LARGEST_CHUNK = {"cpu": 1024, "cuda": 2**17}


@dataclass(frozen=True)
class Geometry:
    """What an image looks like; lengths are in pixels.

    Attributes:
        size: of a side.
        padding: from the border to the ink.
        seed_distance: between the long contours' starts.
        paddle: length of a line.
        thickness: of a line.
        margins: half of the gap between paddles; one is drawn for each image.
        marker_radius: of a dot.
        contrast: brightness of a line, of 1.
        distractors: short contours.
        contour: paddles of a long contour.
        distractor_contour: paddles of a short one.
        continuity: the larger, the straighter: paddles turn by pi / 2 / continuity at most.
        tolerance: by how much, of the mean, the distance of the dots may tell the label.
    """

    size: int
    padding: float
    seed_distance: float
    paddle: float
    thickness: float
    margins: tuple[float, ...]
    marker_radius: float
    contrast: float
    distractors: int
    contour: int = 14
    distractor_contour: int = 4
    continuity: float = 1.8
    tolerance: float = 0.1

    @property
    def turn(self) -> float:
        """The most that a paddle turns from the last one, in radians."""
        return math.pi / 2 / self.continuity


GEOMETRIES = {
    32: Geometry(32, 1, 7, 2, 0.5, (1.0,), 1.5, 0.75, 5, continuity=1.0),
    64: Geometry(64, 1, 12, 5, 1.0, (1.0,), 2.5, 0.8, 5),
    128: Geometry(128, 1, 20, 5, 1.5, (2.0, 3.0), 3.0, 0.9, 8),
    256: Geometry(256, 22, 27, 5, 2.0, (3.0,), 5.0, 1.0, 7),
}


def smaller(geometry: Geometry, size: int, contour: int, distractors: int) -> Geometry:
    """The same lines, gaps and dots on a smaller canvas with shorter contours.

    Short contours are nearly straight, so that here the distance of the dots tells something: for
    four paddles six labels of ten. For training, not for testing.
    """
    scale = size / geometry.size
    return replace(
        geometry,
        size=size,
        padding=min(geometry.padding, max(1.0, geometry.padding * scale)),
        seed_distance=max(geometry.seed_distance * scale, 2 * geometry.paddle),
        contour=contour,
        distractors=distractors,
    )


@dataclass(frozen=True)
class Images:
    """Images and what they were drawn from.

    Attributes:
        pixels: uint8 (images, size, size).
        labels: int64 (images,), 1 where one contour joins the dots.
        traces: uint8 (images, size, size): 0 background, then lines of a contour with 0, 1 and 2
            dots as 1, 2 and 3.
        paddles: float32 (images, paddles, 4): x and y of both ends; the long contours' first, in
            turns; FAR where there is none.
        dots: float32 (images, 2, 2): x and y.
        gaps: float32 (images,), between paddles of a contour.
    """

    pixels: Tensor
    labels: Tensor
    traces: Tensor
    paddles: Tensor
    dots: Tensor
    gaps: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def generate(geometry: Geometry, count: int, generator: torch.Generator) -> Images:
    """Draws images, half of each label on average, independent of each other.

    Args:
        geometry: what they look like.
        count: how many.
        generator: of the random numbers; its device is where all is computed. The same state gives
            the same images on the same kind of device.

    Raises:
        ValueError: the contours do not fit.
    """
    parts: list[Images] = []
    have = 0
    kind = generator.device.type
    chunk = min(CHUNK_PIXELS[kind] // geometry.size**2, LARGEST_CHUNK[kind])
    while have < count:
        grown = _Canvas(geometry, chunk, generator)
        grown.grow_targets()
        choice = grown.choose_dots()
        grown.grow_distractors()
        parts.append(_draw(geometry, grown, *choice))
        have += len(parts[-1])
        if not have and len(parts) == 30:
            raise ValueError(f"no room for two contours of {geometry.contour} in {geometry}")
    names = Images.__dataclass_fields__
    return Images(**{n: torch.cat([getattr(p, n) for p in parts])[:count] for n in names})


class _Canvas:
    """Images while they grow: paddles as (tail, head) and as points along them."""

    def __init__(self, geometry: Geometry, count: int, generator: torch.Generator):
        self.geometry, self._generator, self.device = geometry, generator, generator.device
        margins = torch.tensor(geometry.margins, device=self.device)
        self.margin = margins[(self._uniform(count) * len(margins)).long()]
        points = max(2, math.ceil(geometry.paddle / 1.7) + 1)
        self._along = torch.linspace(0, geometry.paddle, points, device=self.device)
        # Quantiles of cos(x)^2 on [-pi/2, pi/2], the weight of a turn.
        x = torch.linspace(-math.pi / 2, math.pi / 2, 2049, device=self.device)
        cdf = x / math.pi + 0.5 + torch.sin(x) * torch.cos(x) / math.pi
        even = torch.linspace(0, 1, 1025, device=self.device)
        self._turns = x[torch.searchsorted(cdf, even).clamp(max=2048)] * (
            geometry.turn * 2 / math.pi
        )
        self.tails = torch.empty(count, 0, 2, device=self.device)
        self.heads = torch.empty(count, 0, 2, device=self.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def _keep(self, alive: Tensor) -> None:
        self.tails, self.heads = self.tails[alive], self.heads[alive]
        self.margin = self.margin[alive]

    def _points(self, tails: Tensor, heads: Tensor) -> Tensor:
        """(images, n, 2) twice -> (images, n * points, 2)."""
        share = self._along / self.geometry.paddle
        points = tails[:, :, None] + (heads - tails)[:, :, None] * share[:, None]
        return points.flatten(1, 2)

    def _fit(
        self, tails: Tensor, angles: Tensor, others: Tensor, steer: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first of some paddles that is inside and free of the others.

        Args:
            tails: (images, tries or 1, 2).
            angles: (images, tries).
            others: (images, points, 2).
            steer: leave room to turn away from the border.

        Returns:
            tail (images, 2), head (images, 2), and whether there is one (images,).
        """
        geometry, (count, tries) = self.geometry, angles.shape
        tails = tails.expand(count, tries, 2)
        direction = torch.stack((angles.cos(), angles.sin()), -1)
        reach = self._along.expand(count, -1)
        reach = torch.cat((reach, geometry.paddle + self.margin[:, None]), 1)  # and the room ahead
        points = tails[:, :, None] + direction[:, :, None] * reach[:, None, :, None]
        low, high = geometry.padding, geometry.size - 1 - geometry.padding
        fits = ((points >= low) & (points <= high)).flatten(2).all(2)
        if steer:  # a contour that cannot turn in time would be thrown away
            radius = (geometry.paddle + 2 * self.margin)[:, None, None] / (TURN * geometry.turn)
            side = torch.stack((-direction[..., 1], direction[..., 0]), -1)
            ahead = points[:, :, -1]
            centres = torch.stack((ahead + radius * side, ahead - radius * side), 2)
            radius = radius[..., None]
            fits &= ((centres >= low + radius) & (centres <= high - radius)).all(3).any(2)
        some = torch.sort(fits.byte(), dim=1, descending=True, stable=True).indices[:, :CHECKED]
        points, fits = (_rows(x, some) for x in (points, fits))
        tails, direction = (_rows(x, some) for x in (tails, direction))
        if others.shape[1]:
            # Dilated by the margin, lines of other contours do not touch; lines have a thickness.
            clearance = 2 * self.margin + geometry.thickness + 0.5
            distance = _squared_distances(points.flatten(1, 2), others).amin(2)
            free = distance.view(points.shape[:3]).amin(2) >= clearance[:, None].square()
            fits &= free
        which = fits.int().argmax(1)
        row = torch.arange(count, device=self.device)
        tail = tails[row, which]
        return tail, tail + direction[row, which] * geometry.paddle, fits.any(1)

    def _extend(
        self, tail: Tensor, head: Tensor, others: Tensor, steer: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The paddle after (tail, head), each (images, 2); as _fit."""
        last = head - tail
        start = head + last / self.geometry.paddle * 2 * self.margin[:, None]
        index = (self._uniform(len(tail), TRIES) * (len(self._turns) - 1)).long()
        angles = torch.atan2(last[:, 1], last[:, 0])[:, None] + self._turns[index]
        return self._fit(start[:, None], angles, others, steer)

    def _append(self, tail: Tensor, head: Tensor, ok: Tensor) -> None:
        self.tails = torch.cat((self.tails, tail[:, None]), 1)
        self.heads = torch.cat((self.heads, head[:, None]), 1)
        self._keep(ok)

    def grow_targets(self) -> None:
        """The two long contours; images where they do not fit are dropped."""
        geometry = self.geometry
        steer = geometry.contour > STEERED
        border = min(geometry.padding + 2 * geometry.seed_distance, geometry.size / 2 - 2)
        count = len(self.margin)
        start = border + self._uniform(count, TRIES, 2) * (geometry.size - 1 - 2 * border)
        angles = 2 * math.pi * self._uniform(count, TRIES)
        self._append(*self._fit(start, angles, start[:, :0], steer))
        count = len(self.margin)
        direction = 2 * math.pi * self._uniform(count, TRIES)
        apart = torch.stack((direction.cos(), direction.sin()), -1) * geometry.seed_distance
        angles = 2 * math.pi * self._uniform(count, TRIES)
        others = self._points(self.tails, self.heads)
        starts = self.tails[:, :1] + apart
        self._append(*self._fit(starts, angles, others, steer))
        for index in range(2, 2 * geometry.contour):
            before = index - 2  # its own predecessor; a gap is closer than the clearance
            tails = torch.cat((self.tails[:, :before], self.tails[:, before + 1 :]), 1)
            heads = torch.cat((self.heads[:, :before], self.heads[:, before + 1 :]), 1)
            others = self._points(tails, heads)
            last = self.tails[:, before], self.heads[:, before]
            self._append(*self._extend(*last, others, steer))

    def choose_dots(self) -> tuple[Tensor, Tensor]:
        """Where the dots go, and labels; drops images whose distances would tell the label.

        Returns:
            (images, 2) whether the first and the second dot are on the second contour; labels.
        """
        apart = (self.heads[:, None, -2:] - self.tails[:, :2, None]).norm(dim=-1)
        same = torch.stack((apart[:, 0, 0], apart[:, 1, 1]), 1)[:, :, None]
        other = torch.stack((apart[:, 0, 1], apart[:, 1, 0]), 1)[:, None]
        tells = (same - other).abs() / ((same + other) / 2)
        least, pair = tells.flatten(1).min(1)  # pair: 2 * the one contour + the first of the two
        labels = (self._uniform(len(pair)) < 0.5).long()
        alive = least <= self.geometry.tolerance
        self._keep(alive)
        pair, labels = pair[alive], labels[alive]
        first = torch.where(labels == 1, pair // 2, pair % 2)
        return torch.stack((first, torch.where(labels == 1, first, 1 - first)), 1), labels

    def grow_distractors(self) -> None:
        """Short contours wherever they fit, as many as asked for or as there is room."""
        geometry, count = self.geometry, len(self.margin)
        if not geometry.distractors:
            return
        length, targets = geometry.distractor_contour, self.tails.shape[1]
        room = (geometry.distractors + 1) * length  # the last place takes what is too many
        empty = torch.full((count, room, 2), FAR, device=self.device)
        self.tails = torch.cat((self.tails, empty), 1)
        self.heads = torch.cat((self.heads, empty), 1)
        done = torch.zeros(count, dtype=torch.long, device=self.device)
        place = torch.arange(length, device=self.device)
        for _ in range(geometry.distractors + SPARE_DISTRACTORS):
            ink = self._points(self.tails, self.heads)
            start = self._uniform(count, TRIES, 2) * geometry.size
            angles = 2 * math.pi * self._uniform(count, TRIES)
            tail, head, ok = self._fit(start, angles, ink)
            tails, heads = [tail], [head]
            for index in range(1, length):
                own = ink[:, :0]
                if index > 1:
                    own = self._points(
                        torch.stack(tails[: index - 1], 1), torch.stack(heads[: index - 1], 1)
                    )
                tail, head, fits = self._extend(tail, head, torch.cat((ink, own), 1))
                tails.append(tail)
                heads.append(head)
                ok = ok & fits
            slot = (targets + done * length)[:, None] + place
            slot = slot[..., None].expand(-1, -1, 2)
            for kept, new in ((self.tails, tails), (self.heads, heads)):
                old = kept.gather(1, slot)
                kept.scatter_(1, slot, torch.where(ok[:, None, None], torch.stack(new, 1), old))
            done = (done + ok.long()).clamp(max=geometry.distractors)
            spare = targets + geometry.distractors * length
            self.tails[:, spare:] = FAR
            self.heads[:, spare:] = FAR
        self.tails, self.heads = self.tails[:, :spare], self.heads[:, :spare]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (images, n, ...), index (images, m) -> (images, m, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(images, m, 2), (images, n, 2) -> (images, m, n), as one matrix product."""
    ones_a, ones_b = torch.ones_like(a[..., :1]), torch.ones_like(b[..., :1])
    left = torch.cat((a.square().sum(-1, True), ones_a, -2 * a), -1)
    right = torch.cat((ones_b, b.square().sum(-1, True), b), -1)
    return left @ right.transpose(1, 2)


def _draw(geometry: Geometry, canvas: _Canvas, second: Tensor, labels: Tensor) -> Images:
    """Paddles and dots as pixels; `second` and `labels` as choose_dots gave them."""
    row = torch.arange(len(labels), device=labels.device)
    tails, heads, long = canvas.tails, canvas.heads, 2 * geometry.contour
    first_end = tails[row, second[:, 0]]
    dots = torch.stack((first_end, heads[row, long - 2 + second[:, 1]]), 1)

    turn = torch.arange(tails.shape[1], device=labels.device)
    contour = torch.where(turn < long, turn % 2, 2)
    count = (second[:, :, None] == contour).sum(1)  # dots of a paddle's contour

    pixels, ink = _strokes(geometry, tails, heads)
    size = len(labels), geometry.size * geometry.size
    traces = torch.zeros(size, dtype=torch.int32, device=labels.device)
    kind = torch.where(ink > 0.4 * geometry.contrast, count[:, :, None] + 1, 0)
    traces.scatter_reduce_(1, pixels.flatten(1), kind.int().flatten(1), "amax")
    image = torch.zeros(size, device=labels.device)
    image.scatter_reduce_(1, pixels.flatten(1), ink.flatten(1), "amax")
    pixels, ink = _strokes(geometry, dots, dots)
    image.scatter_reduce_(1, pixels.flatten(1), ink.flatten(1), "amax")
    shape = (len(labels), geometry.size, geometry.size)
    return Images(
        (image * 255).round().to(torch.uint8).view(shape),
        labels,
        traces.to(torch.uint8).view(shape),
        torch.cat((tails, heads), -1),
        dots,
        2 * canvas.margin,
    )


def _strokes(geometry: Geometry, tails: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels around each line and what it leaves there; a line without length is a dot.

    Args:
        geometry: of the image.
        tails: (images, lines, 2); heads: the same.

    Returns:
        pixels (images, lines, n), row * size + column; ink from 0 to 1, 0 outside of the image.
    """
    dot = tails is heads
    width = 2 * geometry.marker_radius if dot else geometry.thickness
    half = math.ceil((0 if dot else geometry.paddle / 2) + width / 2 + 1)
    offsets = torch.arange(-half, half + 1, device=tails.device)
    grid = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), -1).view(-1, 2)
    pixel = ((tails + heads) / 2).round()[:, :, None] + grid
    line = (heads - tails)[:, :, None]
    from_tail = pixel - tails[:, :, None]
    share = (from_tail * line).sum(-1) / line.square().sum(-1).clamp(min=1e-6)
    distance = (from_tail - share.clamp(0, 1)[..., None] * line).norm(dim=-1)
    ink = (width / 2 + 0.5 - distance).clamp(0, min(1.0, width))
    ink = ink if dot else ink * (geometry.contrast / min(1.0, width))
    inside = ((pixel >= 0) & (pixel < geometry.size)).all(-1)
    pixel = torch.where(inside[..., None], pixel, 0).long()
    return pixel[..., 1] * geometry.size + pixel[..., 0], torch.where(inside, ink, 0)
