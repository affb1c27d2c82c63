"""The models of the study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from .training import Recipe


@dataclass(frozen=True)
class Preset:
    """A model, and how to train, extend and measure it.

    Attributes:
        name: of the preset.
        argument: of extend_context that takes the methods.
        config: class and sizes of the model.
        old: tokens it is trained with.
        new: tokens to extend it to.
        methods: to compare without training; "none" is the model as it was, where it runs at all.
        tune: methods to fine-tune.
        base: training at the old length.
        tuning: fine-tuning at the new length.
        megabytes: text to read.
        vocab_size: of the tokenizer.
        documents: test documents at most.
        document_tokens: length of each.
        windows: of a document, for perplexity.
        trials: pass keys at each depth and length.
        depths: of pass keys.
        batch_tokens: tokens of a forward without gradients.
    """

    name: str
    argument: str
    config: tuple[Any, dict[str, Any]]
    old: int
    new: int
    methods: tuple[str, ...]
    tune: tuple[str, ...]
    base: Recipe
    tuning: Recipe
    megabytes: float = 80.0
    vocab_size: int = 4096
    documents: int = 16
    document_tokens: int = 65536
    windows: int = 16
    trials: int = 20
    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    batch_tokens: int = 65536

    @property
    def masked(self) -> bool:
        """BERT's task, and no pass keys."""
        return self.config[0] is BertConfig

    @property
    def lengths(self) -> list[int]:
        """Tokens of the inputs that are measured, by doubling up to the new maximum."""
        found = [self.old // 2]
        while found[-1] < self.new:
            found.append(2 * found[-1])
        return found

    def shrunk(self, factor: int) -> Preset:
        """The same with fewer steps and samples."""
        if factor == 1:
            return self
        return replace(
            self,
            base=replace(self.base, steps=max(1, self.base.steps // factor)),
            tuning=replace(self.tuning, steps=max(1, self.tuning.steps // factor)),
            megabytes=max(1.0, self.megabytes / factor),
            documents=max(1, self.documents // factor),
            windows=max(2, self.windows // factor),
            trials=max(1, self.trials // factor),
            depths=self.depths[:: min(factor, len(self.depths) - 1)],
        )

    def model_config(self, vocab_size: int) -> PreTrainedConfig:
        """The config of the model at the old length."""
        cls, sizes = self.config
        length = "n_positions" if cls is GPT2Config else "max_position_embeddings"
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return cls(vocab_size=vocab_size, **sizes, **{length: self.old}, **ids)


_TABLES = ("tile", "interpolate", "hierarchical", "random")
_SIZES = {"num_hidden_layers": 8, "num_attention_heads": 8, "hidden_size": 512}
_LLAMA = {
    **_SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "tie_word_embeddings": True,
}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

PRESETS = {
    "llama": Preset(
        "llama",
        "rope",
        config=(LlamaConfig, _LLAMA),
        old=1024,
        new=8192,
        methods=("none", "linear", "dynamic", "yarn", "longrope", "llama3"),
        tune=("yarn",),
        base=Recipe(2000, 1024, 64, 1e-3, 100, passkeys=0.25, key_weight=4.0),
        tuning=Recipe(400, 8192, 16, 3e-4, 20, passkeys=0.5, key_weight=4.0),
    ),
    "gpt2": Preset(
        "gpt2",
        "positions",
        config=(GPT2Config, {**_GPT2, "n_embd": 512, "n_layer": 8, "n_head": 8}),
        old=512,
        new=4096,
        methods=("none", *_TABLES),
        tune=_TABLES,
        base=Recipe(2000, 512, 128, 1e-3, 100, passkeys=0.25, key_weight=4.0),
        tuning=Recipe(500, 4096, 16, 3e-4, 20, passkeys=0.5, key_weight=4.0),
    ),
    "bert": Preset(
        "bert",
        "positions",
        config=(BertConfig, {**_BERT, **_SIZES, "intermediate_size": 2048}),
        old=512,
        new=4096,
        methods=("none", *_TABLES),
        tune=_TABLES,
        base=Recipe(4000, 512, 128, 1e-3, 200),
        tuning=Recipe(500, 4096, 16, 3e-4, 20),
    ),
}

_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
_TINY = {
    LlamaConfig: {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 128},
    GPT2Config: {**_GPT2, "n_embd": 64, "n_layer": 2, "n_head": 4},
    BertConfig: {**_BERT, **_SMALL, "intermediate_size": 128},
}


def tiny(preset: Preset) -> Preset:
    """A preset for a CPU: 128 tokens to 1024, seconds of training."""
    return replace(
        preset,
        config=(preset.config[0], _TINY[preset.config[0]]),
        old=128,
        new=1024,
        base=replace(preset.base, steps=120, length=128, batch=16, learning_rate=3e-3, warmup=10),
        tuning=replace(preset.tuning, steps=12, length=1024, batch=2, warmup=2),
        tune=preset.tune[:1],
        megabytes=2.0,
        vocab_size=512,
        documents=4,
        document_tokens=4096,
        windows=4,
        trials=4,
        depths=(0.0, 0.5, 1.0),
        batch_tokens=8192,
    )
