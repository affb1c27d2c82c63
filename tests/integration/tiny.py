"""Tiny random models of any transformers family, and the eager-against-patched comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_flash_patch as hfp

TOLERANCE = 1e-5  # fp32, against eager, relative to the largest value where that exceeds 1

VOCAB_SIZE = 99

# Every size that some family's config knows; a config takes those it has.
_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 40,
    "n_inner": 40,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "ffn_dim": 40,
    "d_ff": 40,
    "hidden_dim": 40,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 5,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
}
_OPTIONAL = ("sliding_window", "q_lora_rank")  # None in a default config means "none of it"


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of `model_type` with sizes of a few dozens, and `overrides`."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    settings = {
        name: value
        for name, value in _SMALL.items()
        if hasattr(default, name)
        and not isinstance(getattr(config_class, name, None), property)
        and (name not in _OPTIONAL or getattr(default, name) is not None)
    }
    return config_class(**(settings | overrides))


def tiny_model(
    auto_class: Any, model_type: str, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny model in eval mode, fp32, eager attention, with reproducible random weights."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    model = auto_class.from_config(config, attn_implementation="eager").eval().float()
    # Biases, norms and position tables start at 0 or 1; make every parameter count.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def token_ids(batch_size: int = 2, seqlen: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 9, (batch_size, seqlen), generator=generator)


def padding(kind: str, seqlen: int = 12) -> torch.Tensor | None:
    """attention_mask int (2, seqlen): "none", "left", "right", "holes" or "mixed"."""
    mask = torch.ones(2, seqlen, dtype=torch.long)
    if kind == "none":
        return None
    if kind in ("left", "mixed"):
        mask[0, :4] = 0
    if kind in ("right", "mixed"):
        mask[1, -3:] = 0
    if kind == "holes":
        mask[0, [0, 3, 4, 9]] = 0
        mask[1, [5, 6, 11]] = 0
    return mask


def logits_and_gradients(
    forward: Callable[[], torch.Tensor], model: PreTrainedModel, real: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits at real tokens, and the gradients of a fixed random functional of them.

    Args:
        forward: returns logits (batch, seqlen, ...).
        model: whose parameters' gradients are taken.
        real: (batch, seqlen), 0 where a token is padding; None for none.
    """
    model.zero_grad(set_to_none=True)
    logits = forward()
    if real is not None:
        keep = real.bool()[(..., *(None,) * (logits.ndim - 2))]
        logits = torch.where(keep, logits, 0.0)
    generator = torch.Generator().manual_seed(1)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=0.0, atol=TOLERANCE * scale, msg=lambda text: f"{what}: {text}"
    )


def assert_same_as_eager(
    model: PreTrainedModel,
    forward: Callable[[], torch.Tensor],
    real: torch.Tensor | None = None,
    **settings: Any,
) -> hfp.Patch:
    """Logits and gradients of eager and patched `model` agree; returns the (restored) patch."""
    expected, expected_gradients = logits_and_gradients(forward, model, real)
    with hfp.patched(model, **settings) as patch:
        actual, gradients = logits_and_gradients(forward, model, real)
    assert_close(actual, expected, "logits")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], f"gradient of {name}")
    return patch
