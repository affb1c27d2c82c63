"""Ways to Path-X and Path-256: stages, each of which goes on with the weights of the one before.

    labels    only "joined or not", on canvases and contours that grow
    pretrain  first hidden pixels are guessed (self-pretraining on the task's own images, Amos et
              al. 2024), then as labels
    traced    as labels, with the generator's own map of contours as a second target: more than
              the task gives, so a demonstration of attention, not an entry for the task
    paper     FlashAttention's (appendix E.3): Path-64 from labels, then Path-X with the position
              embeddings stretched to the larger grid

The small canvases of the first three have Path-X's lines, gaps and dots: only the canvas and the
contours are shorter, so that what is learnt of a pixel's surroundings holds on the large one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import hf_flash_patch as hfp

from .pathfinder import GEOMETRIES, Geometry, smaller
from .tracer import Shape


@dataclass(frozen=True)
class Stage:
    """One piece of training.

    Attributes:
        name: of the row in the CSV.
        geometry: of the images, with the longest contours.
        shortest: paddles of the contours at the start; they grow over the first 60% of the stage.
        goal: "pixels", "labels" or "traces" (with labels).
        minutes: of training.
        batch: images.
        learning_rate: at the peak.
        rows: of pixels that a pixel sees on either side, by layer, in turns; None for all.
        stretch: Tracer.fit's.
    """

    name: str
    geometry: Geometry
    shortest: int
    goal: str
    minutes: float
    batch: int
    learning_rate: float
    rows: tuple[int | None, ...] = (None,)
    stretch: float = 1.0

    def masks(self, shape: Shape) -> list[hfp.masks.Pattern | None]:
        """What each layer sees: a band of rows and the tokens that belong to no pixel."""
        size, everyone = self.geometry.size, hfp.masks.global_tokens(shape.prefix)
        patterns = [
            None if rows is None else hfp.masks.sliding_window(rows * size + 1) | everyone
            for rows in self.rows
        ]
        return [patterns[layer % len(patterns)] for layer in range(shape.layers)]

    def density(self, shape: Shape) -> float:
        """The part of all pairs that its layers see, on average."""
        tokens = shape.prefix + self.geometry.size**2
        parts = [1.0 if m is None else float(m.density(tokens)) for m in self.masks(shape)]
        return sum(parts) / len(parts)


_X, _64, _256 = GEOMETRIES[128], GEOMETRIES[64], GEOMETRIES[256]
_FAR = (8, 8, 8, 32)  # rows: three layers look near, the fourth far


def _growing(goal: str, start: float) -> list[Stage]:
    """Canvases of 32 to 128 pixels; `start`, minutes of the first."""
    return [
        Stage("canvas 32", smaller(_X, 32, 2, 1), 2, goal, start, 256, 1e-3),
        Stage("canvas 64", smaller(_X, 64, 6, 2), 2, goal, 5, 128, 1e-3, (8, 8, 8, None)),
        Stage("canvas 96", smaller(_X, 96, 10, 4), 3, goal, 5, 64, 7e-4, _FAR),
        Stage("Path-X", _X, 6, goal, 10, 32, 5e-4, _FAR),
    ]


_PATH_256 = Stage("Path-256", _256, 14, "labels", 8, 8, 2e-4, (6, 6, 6, 20))

ROUTES: dict[str, list[Stage]] = {
    "labels": [*_growing("labels", 3), _PATH_256],
    "pretrain": [
        Stage("pixels, canvas 64", smaller(_X, 64, 6, 2), 4, "pixels", 3, 128, 1e-3, _FAR),
        Stage("pixels, Path-X", _X, 14, "pixels", 3, 32, 5e-4, _FAR),
        *_growing("labels", 2),
        _PATH_256,
    ],
    "traced": [*_growing("traces", 2), replace(_PATH_256, goal="traces")],
    "paper": [
        Stage("Path-64", _64, 14, "labels", 10, 128, 1e-3),
        Stage("Path-X", _X, 14, "labels", 15, 32, 5e-4, stretch=2.0),
    ],
}


def tiny(route: list[Stage]) -> list[Stage]:
    """A route with the same goals on canvases of 16 pixels, seconds of training."""
    geometry = smaller(GEOMETRIES[32], 16, 2, 1)
    return [
        replace(
            stage,
            geometry=geometry,
            shortest=2,
            minutes=0.03,
            batch=16,
            rows=tuple(None if rows is None else 2 for rows in stage.rows),
        )
        for stage in route
    ]
