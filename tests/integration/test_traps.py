"""The nine ways in which transformers makes a custom attention silently wrong; one test each."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    Trainer,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.generic import is_flash_attention_requested

import hf_flash_patch as hfp
from hf_flash_patch.integration.registry import ATTENTION_NAME
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    padding,
    tiny_config,
    tiny_model,
    token_ids,
)


def test_1_the_name_is_not_taken_for_one_of_transformers_own():
    assert not any(
        word in ATTENTION_NAME for word in ("flash", "sdpa", "flex_attention", "/", ":", "|")
    )
    assert not is_flash_attention_requested(requested_attention_implementation=ATTENTION_NAME)
    config = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    assert model.config._attn_implementation == ATTENTION_NAME


def test_2_a_mask_function_is_registered_so_that_padding_is_seen():
    assert ATTENTION_NAME in AttentionInterface._global_mapping
    assert ATTENTION_NAME in AttentionMaskInterface._global_mapping
    # The native way, without patch().
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids, mask = token_ids(), padding("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation(ATTENTION_NAME)
        actual = model(ids, attention_mask=mask).logits[mask.bool()]
        blind = model(ids).logits[mask.bool()]
    assert_close(actual, expected, "logits")
    assert (blind - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "left"])
def test_3_empty_slots_of_a_static_cache_are_not_attended_to(kind):
    model = tiny_model(AutoModelForCausalLM, "llama")
    options = dict(max_new_tokens=8, do_sample=False, disable_compile=True)
    options |= dict(attention_mask=padding(kind), cache_implementation="static")
    expected = model.generate(token_ids(), **options)
    with hfp.patched(model):
        assert model.generate(token_ids(), **options).tolist() == expected.tolist()


def test_4_a_model_outside_the_interface_is_refused_by_name():
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    accepted = BloomForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME)
    assert accepted.config._attn_implementation == ATTENTION_NAME  # and yet it never calls us
    model = BloomForCausalLM(copy.deepcopy(config))
    with pytest.raises(hfp.UnsupportedModelError, match="BloomForCausalLM.*BloomAttention"):
        hfp.patch(model)


def test_5_a_shared_config_does_not_switch_another_model():
    config = tiny_config("llama")
    config._attn_implementation = "eager"
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config
    ids = token_ids()
    with pytest.warns(UserWarning, match="shared its config object with LlamaForCausalLM"):
        patch = hfp.patch(first)
    assert first.config._attn_implementation == "hfp"
    assert all(m.config is first.config for m in first.modules() if hasattr(m, "config"))
    assert second.config is config and config._attn_implementation == "eager"
    assert not hasattr(config, "hfp")
    second(ids, output_attentions=True)  # would raise if it called us
    patch.restore()
    assert first.config is config and first.model.layers[0].self_attn.config is config
    del second


def test_5_a_shared_config_that_is_to_be_given_back_is_not_changed():
    config = tiny_config("llama")
    config._attn_implementation = "eager"
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="shared its config object"):
        one = hfp.patch(first)
    with pytest.warns(UserWarning, match="shared its config object"):
        other = hfp.patch(second, mask=hfp.masks.sliding_window(2))
    one.restore()
    assert first.config is config and config._attn_implementation == "eager"
    assert not hasattr(config, "hfp") and second.config._attn_implementation == "hfp"
    other.restore()
    assert second.config is first.config is config and not hasattr(config, "hfp")


def test_6_what_is_not_saved_is_restored_without_arguments(tmp_path):
    model = tiny_model(AutoModelForCausalLM, "llama")
    hfp.patch(model, backend="torch")
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation != "hfp"
    assert reloaded.config.hfp == {"backend": "torch"}
    patch = hfp.patch(reloaded)
    assert patch.backend == "torch"
    assert reloaded.config._attn_implementation == "hfp"
    ids = token_ids()
    with torch.no_grad():
        assert_close(reloaded(ids).logits, model(ids).logits, "logits")


def test_7_changes_of_rope_are_refused_instead_of_ignored():
    """Editing rope_parameters of a living model does nothing; extending on top of it says so."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    with torch.no_grad():
        before = model(ids).logits
        model.config.rope_parameters = dict(model.config.rope_parameters, rope_theta=7.0)
        assert_close(model(ids).logits, before, "logits")  # transformers ignores the edit
    with pytest.raises(hfp.ContextExtensionError, match="edited after loading"):
        hfp.patch(model, max_length=128)
    assert model.config._attn_implementation == "eager"


def test_8_rope_of_any_kind_reaches_attention_as_it_is():
    """rope_parameters with a theta, given at loading, are the right way."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_model(
        AutoModelForCausalLM, "llama", rope_parameters=rope, max_position_embeddings=256
    )
    assert model.model.rotary_emb.attention_scaling != 1.0
    ids, mask = token_ids(2, 100), padding("left", 100)
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)


def test_9_context_parallelism_of_the_trainer_refuses_us_itself():
    """Trainer's context parallelism works for "sdpa" only, and must not run with us unnoticed."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    hfp.patch(model)

    class _Trainer(Trainer):
        def __init__(self, model):
            self.model = model
            self.accelerator = type("Accelerator", (), {})()
            self.accelerator.parallelism_config = type(
                "Config", (), {"cp_enabled": True, "cp_size": 2, "cp_backend": "torch"}
            )()

    with pytest.raises(ValueError, match="sdpa|SDPA"):
        _Trainer(model)._prepare_context_parallel_inputs(model, {"input_ids": token_ids()})


def test_registration_survives_a_second_import_and_touches_no_model():
    config = AutoConfig.for_model("llama")
    assert config._attn_implementation is None
    model = AutoModel.from_config(tiny_config("llama"))
    assert model.config._attn_implementation != "hfp"
