"""Every interface family: logits and gradients, eager against patched, left and right padding."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from tests.integration.tiny import (
    VOCAB_SIZE,
    assert_same_as_eager,
    padding,
    tiny_model,
    token_ids,
)

_MLA = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

CAUSAL = {
    name: {}
    for name in """
    afmoe apertus arcee aria_text bert-generation bigbird_pegasus biogpt bitnet blenderbot cohere
    cohere2 cohere2_moe ctrl cwm deepseek_v4 diffllama doge ernie4_5 ernie4_5_moe exaone4
    exaone_moe flex_olmo fuyu gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_bigcode gpt_neox
    gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna lfm2 llama4_text mellum
    mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi
    nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper
    """.split()
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CAUSAL |= {
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "deepseek_v2": _MLA | {"head_dim": 4},
    "deepseek_v3": _MLA | {"head_dim": 4, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm4_moe_lite": _MLA | {"head_dim": 12},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": _MLA | {"head_dim": 12},
    "olmo_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "youtu": _MLA | {"head_dim": 4},
}
MASKED = """
    albert camembert data2vec-text distilbert electra ernie esm eurobert jina_embeddings_v3 layoutlm
    mobilebert modernbert nomic_bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl
""".split()
SEQ2SEQ = """
    bart blenderbot-small m2m_100 marian mbart mt5 nllb-moe pegasus plbart
    switch_transformers t5 umt5
""".split()
VISION = "beit deit dinov2 dinov2_with_registers ijepa vit vit_msn".split()
AUDIO = "hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer data2vec-audio".split()


def _tokens(model, seqlen=12):
    return {"input_ids": token_ids(2, seqlen), "attention_mask": padding("mixed", seqlen)}


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_causal_family_equals_eager(family):
    model = tiny_model(AutoModelForCausalLM, family, **CAUSAL[family])
    inputs = _tokens(model)
    assert_same_as_eager(model, lambda: model(**inputs).logits, inputs["attention_mask"])


@pytest.mark.parametrize("family", MASKED)
def test_masked_family_equals_eager(family):
    model = tiny_model(AutoModelForMaskedLM, family)
    inputs = _tokens(model)
    assert_same_as_eager(model, lambda: model(**inputs).logits, inputs["attention_mask"])


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_sequence_to_sequence_family_equals_eager(family):
    model = tiny_model(AutoModelForSeq2SeqLM, family)
    inputs = _tokens(model) | {"decoder_input_ids": token_ids(2, 7, seed=1)}
    assert_same_as_eager(model, lambda: model(**inputs).logits)


@pytest.mark.parametrize("family", VISION)
def test_vision_family_equals_eager(family):
    model = tiny_model(AutoModel, family)
    pixels = torch.randn(2, 3, 16, 16)
    assert_same_as_eager(model, lambda: model(pixel_values=pixels).last_hidden_state)


@pytest.mark.parametrize("family", AUDIO)
def test_audio_family_equals_eager(family):
    model = tiny_model(AutoModel, family)
    sound = torch.randn(2, 4000)
    assert_same_as_eager(model, lambda: model(input_values=sound).last_hidden_state)


def test_layers_of_two_head_dims_equal_eager():
    """Gemma 4's local layers and its global ones, which are wider than any kernel."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_kv_shared_layers=0,
        head_dim=8,
        global_head_dim=288,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=5,
    )
    model = Gemma4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:  # logits up to 288 would tell eager from sdpa, too
        layer.self_attn.q_norm.weight.data.mul_(0.1)
    inputs = _tokens(model)
    patch = assert_same_as_eager(model, lambda: model(**inputs).logits, inputs["attention_mask"])
    assert "heads of 288: more than the kernels' 256" in str(patch)


def test_convolution_that_reads_the_mask_equals_eager():
    """LASR's convolutions ask the mask which rows are padding."""
    model = tiny_model(AutoModel, "lasr_encoder", subsampling_conv_channels=16)
    features = torch.randn(2, 200, model.config.num_mel_bins)
    real = torch.ones(2, 200, dtype=torch.long)
    real[0, 120:] = 0
    inputs = {"input_features": features, "attention_mask": real}
    assert_same_as_eager(model, lambda: model(**inputs).last_hidden_state[:, :14])


def test_pooling_head_that_reshapes_the_mask_equals_eager():
    """SigLIP 2's images are padded to a number of patches, in its pooling head as well."""
    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_patches=16,
        patch_size=4,
    )
    model = Siglip2VisionModel._from_config(config, attn_implementation="eager").eval()
    real = torch.ones(2, 16, dtype=torch.long)
    real[0, 12:] = 0
    inputs = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": real,
        "spatial_shapes": torch.tensor([[3, 4], [4, 4]]),
    }
    assert_same_as_eager(model, lambda: model(**inputs).pooler_output)
