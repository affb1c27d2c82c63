"""Grey images of ten kinds of shapes, 32 x 32: a stand-in for the arena's grey CIFAR-10.

Each has one shape of its kind, of any place, size, angle and brightness, on a background of waves,
with two thin lines across it and noise.
"""

from __future__ import annotations

import math

import numpy as np

SIZE = 32
KINDS = (
    "disk",
    "ring",
    "square",
    "frame",
    "triangle",
    "star",
    "cross",
    "crescent",
    "bar",
    "two disks",
)


def _shape(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the shape is, negative inside; x and y are in its own frame, of radius about 1."""
    r, box = np.hypot(x, y), np.maximum(abs(x), abs(y))
    angle = np.arctan2(y, x)
    if kind == 0:
        return r - 0.9
    if kind == 1:
        return abs(r - 0.75) - 0.22
    if kind == 2:
        return box - 0.8
    if kind == 3:
        return abs(box - 0.7) - 0.2
    if kind == 4:
        third = np.cos((angle + math.pi) % (2 * math.pi / 3) - math.pi / 3)
        return r * third - 0.6
    if kind == 5:
        return r - 0.65 - 0.4 * np.cos(5 * angle)
    if kind == 6:
        return np.maximum(np.minimum(abs(x), abs(y)) - 0.25, box - 0.95)
    if kind == 7:
        return np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y))
    if kind == 8:
        return np.maximum(abs(x) - 1.1, abs(y) - 0.3)
    return np.minimum(np.hypot(x - 0.6, y), np.hypot(x + 0.6, y)) - 0.42


def shapes(seed: int | str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws images.

    Returns:
        pixels, uint8 (count, 32, 32); kinds, uint8 (count,), drawn from KINDS.
    """
    draw = np.random.default_rng(list(str(seed).encode()))
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    pixels = np.empty((count, SIZE, SIZE), np.uint8)
    kinds = draw.integers(0, len(KINDS), count).astype(np.uint8)
    for index, kind in enumerate(kinds.tolist()):
        radius = draw.uniform(5, 11)
        turn = draw.uniform(0, 2 * math.pi)
        left, top = draw.uniform(radius, SIZE - radius, 2)
        x, y = (columns - left) / radius, (rows - top) / radius
        c, s = math.cos(turn), math.sin(turn)
        distance = _shape(kind, c * x + s * y, c * y - s * x)
        inside = np.clip(0.5 - distance * radius / 2, 0, 1)
        wave, phase = draw.normal(0, 0.25, 2), draw.uniform(0, 2 * math.pi)
        image = 0.5 + 0.12 * np.sin(wave[0] * columns + wave[1] * rows + phase)
        brightness = draw.uniform(0.15, 0.4) * draw.choice((-1, 1))
        image += inside * brightness
        for _ in range(2):
            lean = draw.uniform(0, math.pi)
            across = (columns - 16) * math.cos(lean) + (rows - 16) * math.sin(lean)
            line = np.clip(1 - abs(across - draw.uniform(-12, 12)), 0, 1)
            image += line * draw.uniform(-0.4, 0.4)
        image += draw.normal(0, 0.06, image.shape)
        pixels[index] = np.clip(image * 255, 0, 255)
    return pixels, kinds
