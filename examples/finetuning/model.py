"""The model of a run: loaded or new, patched and extended, with or without LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_flash_patch as hfp
from hf_flash_patch.families import family_of

from .options import ModelOptions


def config_of(options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The config of the model that the options name; a new one has the tokenizer's vocabulary."""
    if options.scratch is None:
        return AutoConfig.from_pretrained(options.model)
    settings = json.loads(options.scratch)
    if tokenizer is not None:
        settings["vocab_size"] = len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            settings[name] = getattr(tokenizer, name)
    return AutoConfig.for_model(**settings)


def is_masked(config: PreTrainedConfig) -> bool:
    """Whether a model learns masked tokens, as BERT, rather than the next one."""
    family = family_of(config)
    return family is not None and not family.causal and not getattr(config, "is_decoder", False)


def first_position(config: PreTrainedConfig) -> int:
    """The position of a document's first token; RoBERTa-like models keep rows before it."""
    family = family_of(config)
    reserved = family is not None and family.reserved == "padding_idx"
    return config.pad_token_id + 1 if reserved else 0


def load(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, hfp.Patch | None]:
    """The model with its weights, extended, patched and masked as the options say.

    Returns:
        the model, and the patch on it; None with --no_patch.
    """
    config = config_of(options, tokenizer)
    auto = AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.model is not None:
        model = auto.from_pretrained(options.model, dtype=dtype)
    else:
        model = auto.from_config(config, dtype=torch.float32 if dtype == "auto" else dtype)
    extension = {"rope": options.rope, "positions": options.positions, "tokenizer": tokenizer}
    if options.max_length is None:
        extension = {}
    if options.patch:
        mask = None if options.mask is None else hfp.masks.parse(options.mask)
        return model, hfp.patch(
            model, max_length=options.max_length, mask=mask, backend=options.backend, **extension
        )
    if options.mask is not None:
        raise SystemExit("--mask needs the patch: leave --no_patch out.")
    if options.max_length is not None:
        hfp.extend_context(model, options.max_length, **extension)
    model.set_attn_implementation("sdpa")
    return model, None


def with_lora(model: PreTrainedModel, options: ModelOptions) -> PreTrainedModel | PeftModel:
    """The model with adapters as the options say; with "full", the model itself.

    "longlora" is LongLoRA's recipe (arXiv 2309.12307, section 3.3): embeddings and norms, a small
    share of the parameters, are trained as they are.
    """
    if options.tune == "full":
        return model
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_targets or attention_layers(model),
        modules_to_save=embeddings_and_norms(model) if options.tune == "longlora" else None,
    )
    # Adapters in the dtype of the weights they stand by: FSDP shards what is of one dtype.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def with_memory(model: nn.Module, options: ModelOptions) -> list[hfp.memory.Technique]:
    """Applies the memory techniques of the options, and tells which."""
    settings: dict[str, dict] = {name: {} for name in options.memory}
    if "offload" in settings:
        settings["offload"] = {"keep_attention": options.keep_attention}
    found = [hfp.memory.TECHNIQUES[name](model, **more) for name, more in settings.items()]
    if options.keep_attention and "offload" not in settings:
        found.append(hfp.memory.keep_attention(model))
    return found


def attention_layers(model: PreTrainedModel) -> list[str]:
    """The linear layers in the model's attention: projections of q, k, v and the output."""
    kinds = ("Linear", "Conv1D")
    return _in_layers(
        name
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and any("att" in part for part in name.split(".")[:-1])
    )


def embeddings_and_norms(model: PreTrainedModel) -> list[str]:
    """The embeddings and the norms."""
    return _in_layers(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
    )


def _in_layers(names: Iterable[str]) -> list[str]:
    """Paths from inside a layer, which stand for the same place in each; others are whole."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})


def save_merged(options: ModelOptions, adapter: Path, folder: Path) -> None:
    """Loads the base once more, on the CPU, with the adapter merged into its weights; saves that.

    Args:
        options: of the run.
        adapter: what the run saved, tokenizer included.
        folder: where to.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base, patch = load(options, tokenizer)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
