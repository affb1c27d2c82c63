"""Every interface family: logits and gradients, eager against patched, left and right padding."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from tests.integration.tiny import assert_same_as_eager, padding, tiny_model, token_ids

_MLA = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

CAUSAL = {
    name: {}
    for name in """
    afmoe apertus arcee aria_text bigbird_pegasus biogpt bitnet blenderbot cohere cohere2 ctrl cwm
    diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe helium hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna lfm2 llama4_text mellum mimo_v2_flash
    minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    solar_open stablelm starcoder2 vaultgemma
    """.split()
}
CAUSAL |= {
    "deepseek_v2": _MLA | {"head_dim": 4},
    "deepseek_v3": _MLA | {"head_dim": 4, "first_k_dense_replace": 1},
    "minicpm3": _MLA | {"head_dim": 12},
}
MASKED = """
    albert camembert data2vec-text distilbert electra ernie esm eurobert layoutlm mobilebert
    modernbert nomic_bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl
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
