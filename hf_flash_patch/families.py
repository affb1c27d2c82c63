"""One table row per model family: what is causal, how positions enter, where their table is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a family of models has in common.

    Attributes:
        name: as people call it.
        model_types: `config.model_type` of its members.
        causal: whether a token sees earlier tokens only (a config may override: is_decoder,
            is_causal).
        positions: "learned" (an absolute table), "rope", "relative", "alibi" or "sinusoidal".
        table: path of the position table, or of the module that holds the rotary frequencies,
            below the model that owns it (encoder and decoder each own one).
        length: config attribute that states the length of the table.
        reserved: what says how many rows come before position 0: "" (none), "padding_idx" (up to
            the table's padding_idx, and `length` counts them) or "offset" (the table's offset, and
            `length` does not count them).
        buffers: paths of buffers as long as `length`, below the same model.
        fp32_scores: config attribute that asks for fp32 attention scores, which the kernels compute
            in any case.
    """

    name: str
    model_types: tuple[str, ...]
    causal: bool
    positions: str
    table: str
    length: str = "max_position_embeddings"
    reserved: str = ""
    buffers: tuple[str, ...] = ()
    fp32_scores: str | None = None


_BERT_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

FAMILIES = (
    Family(
        "BERT-like",
        (
            "bert",
            "electra",
            "albert",
            "ernie",
            "bert-generation",
            "mobilebert",
            "splinter",
            "layoutlm",
            "convbert",
            "megatron-bert",
            "rembert",
            "roc_bert",
            "squeezebert",
        ),
        causal=False,
        positions="learned",
        table="embeddings.position_embeddings",
        buffers=_BERT_BUFFERS,
    ),
    Family(
        "RoBERTa-like",
        (
            "roberta",
            "xlm-roberta",
            "xlm-roberta-xl",
            "camembert",
            "data2vec-text",
            "roberta-prelayernorm",
            "xmod",
            "mpnet",
            "longformer",
            "markuplm",
        ),
        causal=False,
        positions="learned",
        table="embeddings.position_embeddings",
        reserved="padding_idx",
        buffers=_BERT_BUFFERS,
    ),
    Family(
        "DistilBERT",
        ("distilbert",),
        causal=False,
        positions="learned",
        table="embeddings.position_embeddings",
        buffers=("embeddings.position_ids",),
    ),
    Family(
        "ModernBERT-like",
        ("modernbert", "eurobert", "nomic_bert"),
        causal=False,
        positions="rope",
        table="rotary_emb",
    ),
    Family(
        "GPT-2-like",
        ("gpt2", "gpt-sw3", "decision_transformer"),
        causal=True,
        positions="learned",
        table="wpe",
        length="n_positions",
        fp32_scores="reorder_and_upcast_attn",
    ),
    Family(
        "GPT-BigCode",
        ("gpt_bigcode",),
        causal=True,
        positions="learned",
        table="wpe",
        length="n_positions",
        buffers=("bias",),
    ),
    Family(
        "OPT-like",
        ("opt", "biogpt"),
        causal=True,
        positions="learned",
        table="embed_positions",
        reserved="offset",
    ),
    Family(
        "BART-like",
        ("bart", "mbart", "plbart", "mvp"),
        causal=False,
        positions="learned",
        table="embed_positions",
        reserved="offset",
    ),
    Family(
        "CLIP text",
        ("clip_text_model",),
        causal=True,
        positions="learned",
        table="embeddings.position_embedding",
        buffers=("embeddings.position_ids",),
    ),
    Family(
        "LLaMA-like",
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "olmo3",
            "cohere",
            "cohere2",
            "granite",
            "glm",
            "glm4",
            "starcoder2",
            "stablelm",
            "smollm3",
            "gpt_neox",
            "gpt_oss",
            "helium",
            "nemotron",
            "persimmon",
            "arcee",
            "ministral",
            "exaone4",
            "ernie4_5",
            "hunyuan_v1_dense",
            "seed_oss",
            "apertus",
            "deepseek_v3",
        ),
        causal=True,
        positions="rope",
        table="rotary_emb",
    ),
)

# Families without a maximum that a table or a rotary frequency sets.
UNBOUNDED = {
    "ALiBi": ("bloom", "mpt"),
    "relative buckets": ("t5", "mt5", "umt5", "longt5", "switch_transformers"),
    "relative positions": ("deberta", "deberta-v2", "xlnet"),
    "no positions": ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "jamba"),
    "sinusoidal positions": ("marian", "pegasus", "xglm", "m2m_100", "fsmt", "roformer"),
}

# Attribute of the model that runs all layers of its encoder, each of which treats tokens alone but
# for attention; positions have been added before. Tested type by type.
ENCODERS = {
    "encoder": (
        "bert",
        "electra",
        "albert",
        "bert-generation",
        "ernie",
        "mobilebert",
        "splinter",
        "roc_bert",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "data2vec-text",
        "roberta-prelayernorm",
    ),
    "transformer": ("distilbert",),
}

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

# Modules named for attention that are not attention from token to token, or of a few queries only;
# a model that otherwise goes through AttentionInterface keeps them as they are.
NOT_TOKEN_ATTENTION = ("Pool", "Deformable", "AttentionMap")

# Models with attention of their own that do other things to eager's mask than adding it to scores.
EAGER_MASK = ("informer", "longformer", "mpt", "mra")

# Modules whose position_ids are a time axis, on which an image stands still: no new document.
TIME_AXIS_ATTENTION = ("Cosmos3EdgeTextAttention",)


def family_of(config: Any) -> Family | None:
    """The row of the model that `config` describes; None if the table does not know it.

    Such a model is served all the same.
    """
    return _BY_MODEL_TYPE.get(getattr(config, "model_type", ""))


def encoder_of(config: Any) -> str:
    """Name in the model that `config` describes of what runs its encoder's layers; empty if
    `ENCODERS` has none."""
    model_type = getattr(config, "model_type", "")
    return next((path for path, types in ENCODERS.items() if model_type in types), "")
