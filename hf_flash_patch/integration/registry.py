"""Registers the attention name with transformers; touches no model."""

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .attention import hfp_attention
from .masking import hfp_mask
from .paged import hfp_paged_attention

# Any name with "flash", "sdpa" or "flex_attention" in it is treated by transformers as one of its
# own, "/" as a kernel of the hub, so the package's own name cannot be used.
ATTENTION_NAME = "hfp"


def register() -> None:
    """Register `ATTENTION_NAME` in AttentionInterface and AttentionMaskInterface; idempotent.

    Both are needed: to an attention function without a mask function, transformers passes no mask
    at all, silently.
    """
    AttentionInterface.register(ATTENTION_NAME, hfp_attention)
    # What continuous batching turns the name into; it makes no mask for names it does not know.
    AttentionInterface.register(f"paged|{ATTENTION_NAME}", hfp_paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, hfp_mask)
