"""The tokenizer that follows an extension."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ContextExtensionError


def tokenizer_of(given: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one a processor holds.

    Raises:
        ContextExtensionError: neither.
    """
    tokenizer = getattr(given, "tokenizer", given)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ContextExtensionError(
            f"tokenizer={type(given).__name__}; it has to be a transformers tokenizer, or a "
            "processor that holds one."
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, root: PreTrainedModel) -> None:
    """Whether a tokenizer can be the model's: each knows the ids that the other uses.

    Raises:
        ContextExtensionError: it cannot.
    """
    name = type(root).__name__
    embedding = root.get_input_embeddings()
    rows, size = getattr(embedding, "num_embeddings", None), len(tokenizer)
    if rows is not None and size > rows:
        raise ContextExtensionError(
            f"the tokenizer ({type(tokenizer).__name__}) has {size} tokens and {name} embeds "
            f"{rows}: it is another model's. Pass the model's own, or none."
        )
    config = root.config.get_text_config()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        for index in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(index, int) and index >= size:
                raise ContextExtensionError(
                    f"{name} has {key} {index}, which the tokenizer ({type(tokenizer).__name__}, "
                    f"{size} tokens) does not have: it is another model's. Pass the model's own, "
                    "or none."
                )
