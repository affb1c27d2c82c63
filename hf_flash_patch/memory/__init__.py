"""What limits length once attention is linear: logits, stored hidden states, activations of layers.

And what checkpoints would compute again: `keep_attention`, also an option of `offload_checkpoints`.

Each function changes a transformers model for training and returns a `Technique` that undoes it.
Results stay those of the plain model, up to the rounding of the dtype. Apply them after peft and
before `torch.compile`, DDP and FSDP.

Source: the other three are those of ALST (arXiv 2506.13996), sections 3.1 and 3.3.
"""

from collections.abc import Callable

from .chunked_loss import chunked_loss
from .keep import keep_attention
from .linear_loss import linear_cross_entropy
from .offload import offload_checkpoints
from .technique import Technique
from .tile_layers import tile_layers

# By the name under which an option may ask for them.
TECHNIQUES: dict[str, Callable[..., Technique]] = {
    "loss": chunked_loss,
    "offload": offload_checkpoints,
    "tile": tile_layers,
}

__all__ = [
    "TECHNIQUES",
    "Technique",
    "chunked_loss",
    "keep_attention",
    "linear_cross_entropy",
    "offload_checkpoints",
    "tile_layers",
]
