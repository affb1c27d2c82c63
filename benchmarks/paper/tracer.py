"""The model that reads Pathfinder images: stock transformers, a token a pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

SHORTEST_PERIOD = 4.0  # pixels, of the rotary positions; the longest is 64 times that
TRACES = 4  # kinds of pixels: pathfinder.Images.traces


@dataclass(frozen=True)
class Shape:
    """Size of the model.

    Attributes:
        hidden: of a token.
        layers: pre-norm, with a feed-forward part of twice the hidden size.
        heads: of attention.
        registers: tokens beside the class token that belong to no pixel.
    """

    hidden: int = 128
    layers: int = 8
    heads: int = 4
    registers: int = 15

    @property
    def prefix(self) -> int:
        """Tokens before the pixels: they see all and are seen by all under a mask."""
        return 1 + self.registers


class Tracer(nn.Module):
    """DINOv3's encoder with patches of one pixel, and three linear heads.

    Rotary positions turn by row and column. They have no table, so that a larger grid needs no new
    weights: it either continues the smaller one pixel by pixel or, with a `stretch` of n, gives n
    pixels the room of one, which is the paper's up-sampling of position embeddings.

    Args:
        shape: of the encoder.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        config = DINOv3ViTConfig(
            image_size=32,  # only a default: the encoder takes images of any size
            patch_size=1,
            num_channels=1,
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_register_tokens=shape.registers,
            pos_embed_rescale=None,
        )
        self.encoder = DINOv3ViTModel(config)
        self._spread()
        self.pixel = nn.Linear(shape.hidden, 1)
        self.trace = nn.Linear(shape.hidden, TRACES)
        self.label = nn.Linear(2 * (shape.hidden + TRACES), 1)

    @torch.no_grad()
    def _spread(self) -> None:
        """Starts with weights of the size that keeps a token's.

        DINOv3's own, 0.02, are for tokens of 1024: of 64, every layer begins as next to nothing.
        And a norm takes the brightness out of a pixel that is one number times one vector, without
        a bias: lines and dots begin alike. On canvases of 16 pixels, 4 layers, a model of that kind
        is right 54 times in 100 after 200 steps of 32 images, this one 61.
        """
        embeddings = self.encoder.embeddings
        pixel = embeddings.patch_embeddings
        for start in (pixel.weight, pixel.bias, embeddings.cls_token, embeddings.register_tokens):
            nn.init.normal_(start)
        for name, weight in self.encoder.model.layer.named_parameters():
            if weight.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))  # to what is there
                nn.init.normal_(weight, std=(0.5 if adds else 1.0) * weight.shape[1] ** -0.5)

    def fit(self, size: int, stretch: float = 1.0) -> None:
        """Sets the positions for images of size x size pixels.

        Args:
            size: of a side.
            stretch: pixels that take the room of one.
        """
        frequencies = self.encoder.rope_embeddings.inv_freq
        spread = torch.linspace(0, 1, len(frequencies))
        periods = SHORTEST_PERIOD * stretch * 64**spread
        frequencies.copy_(size / (2 * periods))  # of coordinates that go from -1 to 1

    def forward(self, pixels: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        """Reads images.

        Args:
            pixels: uint8 (batch, size, size).
            hidden: bool (batch, size * size), pixels to hide.

        Returns:
            the logit of brightness (batch, size * size), of TRACES (batch, size * size, TRACES),
            and that the dots are joined (batch,).
        """
        image = pixels[:, None].float() / 255
        found = self.encoder(pixel_values=image, bool_masked_pos=hidden).last_hidden_state
        found = found[:, self.shape.prefix :]
        traces = self.trace(found)
        known = torch.cat((found, traces), -1)
        joined = self.label(torch.cat((known.amax(1), known.mean(1)), -1))
        return self.pixel(found)[..., 0], traces, joined[:, 0]
