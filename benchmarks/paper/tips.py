"""How much of Pathfinder's label the dots' surroundings alone tell.

Smooth contours that join two dots leave them in directions that fit together. So the directions of
the two lines under the dots, relative to each other's place, tell far more than chance, in any
image made by the published rules, without a contour being followed. Whoever follows contours is
also right where these directions mislead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .pathfinder import Geometry, Images


def features(images: Images, geometry: Geometry) -> Tensor:
    """Directions at the dots, distance of the dots and mean brightness.

    Returns:
        float32 (images, 13), the last of them 1.
    """
    first, second = images.dots.unbind(1)
    apart = second - first
    distance = apart.norm(dim=-1, keepdim=True)
    along = apart / distance
    long = images.paddles[:, : 2 * geometry.contour]
    cosines, sines = [], []
    for dot, ends in ((first, long[..., :2]), (second, long[..., 2:])):
        nearest = (ends - dot[:, None]).norm(dim=-1).argmin(1)
        paddle = long[torch.arange(len(long), device=long.device), nearest]
        line = (paddle[:, 2:] - paddle[:, :2]) / geometry.paddle
        cosines.append((line * along).sum(-1))
        sines.append(line[:, 0] * along[:, 1] - line[:, 1] * along[:, 0])
    (c1, c2), (s1, s2) = cosines, sines
    d = distance[:, 0] / geometry.size
    bright = images.pixels.flatten(1).float().mean(1) / 255
    known = [c1, c2, c1 * c2, s1 * s2, c1 * c1, c2 * c2, d, c1 * d, c2 * d, c1 * c2 * d]
    return torch.stack([*known, s1 * s2 * d, bright, torch.ones_like(d)], 1)


def guesses(train: Images, test: Images, geometry: Geometry) -> Tensor:
    """Labels of `test`, int64, by logistic regression on the features of `train`."""
    x, y = features(train, geometry), train.labels.float()
    middle, spread = x.mean(0), x.std(0)
    middle[-1], spread[-1] = 0, 1
    x = (x - middle) / spread
    weights = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(x @ weights, y) + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x = (features(test, geometry) - middle) / spread
    return (x @ weights.detach() > 0).long()
