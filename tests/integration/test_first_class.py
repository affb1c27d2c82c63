"""BERT, GPT-2 and LLaMA in depth: every kind of padding, packing, training features."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_flash_patch as hfp
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    logits_and_gradients,
    padding,
    tiny_model,
    token_ids,
)

FIRST_CLASS = {
    "bert": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


@pytest.fixture(params=sorted(FIRST_CLASS))
def model(request):
    return tiny_model(FIRST_CLASS[request.param], request.param)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes", "mixed"])
def test_equals_eager_with_padding(model, kind):
    mask = padding(kind)
    inputs = {"input_ids": token_ids(), "attention_mask": mask}
    assert_same_as_eager(model, lambda: model(**inputs).logits, mask)


@pytest.mark.parametrize("seqlen", [1, 2, 33, 64])
def test_equals_eager_at_other_lengths(model, seqlen):
    ids = token_ids(seqlen=seqlen)
    assert_same_as_eager(model, lambda: model(input_ids=ids).logits)


def test_all_real_padding_mask_changes_nothing(model):
    ids = token_ids()
    with torch.no_grad(), hfp.patched(model):
        without = model(input_ids=ids).logits
        with_mask = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(with_mask, without, rtol=0, atol=0)


def test_a_row_of_padding_only_is_finite(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    ids = token_ids()
    with hfp.patched(model):
        logits, gradients = logits_and_gradients(
            lambda: model(input_ids=ids, attention_mask=mask).logits, model, mask
        )
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    ids, mask = token_ids(), padding("left")
    model.train()

    def forward():
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    expected, expected_gradients = logits_and_gradients(forward, model, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with hfp.patched(model):
        actual, gradients = logits_and_gradients(forward, model, mask)
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_dropout_is_replayed_by_checkpointing_and_seeded():
    model = tiny_model(AutoModelForCausalLM, "llama", attention_dropout=0.3).train()
    ids = token_ids()

    def run():
        torch.manual_seed(3)
        return logits_and_gradients(lambda: model(input_ids=ids).logits, model, None)

    with hfp.patched(model):
        first, first_gradients = run()
        again, _ = run()
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        replayed, gradients = run()
        model.eval()
        without, _ = run()
    assert_close(replayed, first, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, first_gradients[name], name)
    assert (without - first).abs().max() > 1e-3


def test_gpt2_scales_by_layer_index():
    model = tiny_model(AutoModelForCausalLM, "gpt2", scale_attn_by_inverse_layer_idx=True)
    ids = token_ids()
    assert_same_as_eager(model, lambda: model(input_ids=ids).logits)


def test_gpt2_without_scaling():
    model = tiny_model(AutoModelForCausalLM, "gpt2", scale_attn_weights=False)
    ids = token_ids()
    assert_same_as_eager(model, lambda: model(input_ids=ids).logits)


def test_gpt2_reorder_and_upcast_is_honoured_and_reported():
    model = tiny_model(AutoModelForCausalLM, "gpt2", reorder_and_upcast_attn=True)
    ids = token_ids()
    patch = assert_same_as_eager(model, lambda: model(input_ids=ids).logits)
    assert "reorder_and_upcast_attn" in str(patch)


def test_bert_decoder_is_causal():
    model = tiny_model(AutoModelForCausalLM, "bert", is_decoder=True)
    ids, mask = token_ids(), padding("left")
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)


def test_llama_made_bidirectional_by_its_config():
    model = tiny_model(AutoModelForCausalLM, "llama")
    model.config.is_causal = False
    ids, mask = token_ids(), padding("right")
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)
    with torch.no_grad(), hfp.patched(model):
        changed = ids.clone()
        changed[:, 8] += 1
        before, after = (model(x, attention_mask=mask).logits[:, 2] for x in (ids, changed))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_sdpa(model, dtype):
    ids, mask = token_ids(), padding("mixed")
    real = mask.bool()
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits[real]
        model.to(dtype)
        model.set_attn_implementation("sdpa")
        sdpa = model(ids, attention_mask=mask).logits[real].float()
        with hfp.patched(model):
            ours = model(ids, attention_mask=mask).logits[real]
    assert ours.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.float() - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + rounding


def test_double_precision(model):
    model.double()
    # Left padding makes rows without keys, where LLaMA's eager attention is NaN in fp64.
    ids, mask = token_ids(), padding("right")
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)
