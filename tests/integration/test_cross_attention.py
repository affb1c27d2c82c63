"""Encoder-decoder attention: queries and keys of different lengths, never packed."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertGenerationEncoder,
    EncoderDecoderModel,
)

import hf_flash_patch as hfp
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    padding,
    tiny_model,
    token_ids,
)


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta"])
def test_decoder_with_cross_attention(family):
    overrides = {"add_cross_attention": True}
    if family != "gpt2":
        overrides["is_decoder"] = True
    model = tiny_model(AutoModelForCausalLM, family, **overrides)
    ids, mask = token_ids(), padding("left")
    states = torch.randn(2, 7, 32)
    states_mask = padding("right", 7)
    assert_same_as_eager(
        model,
        lambda: (
            model(
                ids,
                attention_mask=mask,
                encoder_hidden_states=states,
                encoder_attention_mask=states_mask,
            ).logits
        ),
        mask,
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("seqlen_k", [7, 12])
def test_cross_attention_of_a_packed_decoder(family, seqlen_k):
    """BERT hands the decoder's position_ids to its cross-attention as well."""
    overrides = {"is_decoder": True} if family == "bert" else {}
    model = tiny_model(AutoModelForCausalLM, family, add_cross_attention=True, **overrides)
    ids = token_ids(1)
    states = torch.randn(1, seqlen_k, 32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        parts = [
            model(part, encoder_hidden_states=states).logits
            for part in torch.split(ids, [5, 7], dim=1)
        ]
        with hfp.patched(model):
            packed = model(ids, position_ids=positions, encoder_hidden_states=states).logits
    assert_close(packed, torch.cat(parts, dim=1), "logits")


def _encoder_decoder():
    torch.manual_seed(0)
    small = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(intermediate_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = BertGenerationEncoder(BertGenerationConfig(**small))
    decoder = BertGenerationDecoder(
        BertGenerationConfig(**small, is_decoder=True, add_cross_attention=True)
    )
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.set_attn_implementation("eager")
    return model


def test_encoder_decoder_of_two_models():
    model = _encoder_decoder()
    ids, mask = token_ids(), padding("mixed")
    targets = token_ids(2, 7, seed=1)

    def forward():
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits

    assert_same_as_eager(model, forward)
    assert model.config.encoder._attn_implementation == "eager"
    assert model.config.decoder._attn_implementation == "eager"


def test_one_half_can_be_patched():
    model = _encoder_decoder()
    with hfp.patched(model.encoder):
        assert model.encoder.config._attn_implementation == "hfp"
        assert model.decoder.config._attn_implementation == "eager"
        with pytest.raises(hfp.UnsupportedModelError, match="patched already"):
            hfp.patch(model)


def test_whisper():
    model = tiny_model(
        AutoModelForSpeechSeq2Seq, "whisper", max_source_positions=20, num_mel_bins=16
    )
    sound = torch.randn(2, 16, 40)
    ids = token_ids(2, 7)
    assert_same_as_eager(model, lambda: model(input_features=sound, decoder_input_ids=ids).logits)


def test_config_of_a_composite_model_is_switched_everywhere():
    model = _encoder_decoder()
    patch = hfp.patch(model)
    assert {module.after for module in patch.reports[0].modules} == {"hfp"}
    assert sum(module.count for module in patch.reports[0].modules) == 6
    patch.restore()
