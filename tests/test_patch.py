"""patch(), unpatch(), patched() and Patch: atomic, verified, reversible."""

import copy
import gc
import json
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import hf_flash_patch as hfp
from hf_flash_patch.integration import switch as switch_module
from hf_flash_patch.integration.survey import calls_us, configs_of, survey
from tests.integration.tiny import assert_close, tiny_config, tiny_model, token_ids

# The name in the package is the function's.
patch_module = sys.modules["hf_flash_patch.patch"]

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning:transformers")


@pytest.fixture
def llama():
    return tiny_model(AutoModelForCausalLM, "llama")


@pytest.fixture
def bloom():
    return AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    ).eval()


def _state(model):
    """Everything a patch could change, comparable."""
    configs = [(id(config), copy.deepcopy(vars(config))) for config in configs_of(model)]
    modules = [
        (name, {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]
    return repr(configs), modules


def test_restore_gives_the_exact_prior_state_back(llama):
    before = _state(llama)
    patch = hfp.patch(llama)
    assert _state(llama) != before
    patch.restore()
    assert _state(llama) == before
    patch.restore()  # again: nothing
    assert _state(llama) == before
    hfp.patch(llama).restore()  # and it can be patched anew
    assert _state(llama) == before


@pytest.mark.parametrize("before", ["eager", "sdpa", "hfp"])
def test_restores_what_was_there(llama, before):
    llama.set_attn_implementation(before)
    llama.config.hfp = {"backend": "torch"}
    with hfp.patched(llama) as patch:
        assert patch.backend == "torch"
        assert patch.reports[0].modules[0].before == before
    assert llama.config._attn_implementation == before
    assert llama.config.hfp == {"backend": "torch"}


def test_context_managers_restore_after_an_error(llama):
    before = _state(llama)
    with pytest.raises(ZeroDivisionError), hfp.patched(llama):
        1 / 0  # noqa: B018
    assert _state(llama) == before
    with pytest.raises(ZeroDivisionError), hfp.patch(llama):
        1 / 0  # noqa: B018
    assert _state(llama) == before


def test_unpatch(llama):
    before = _state(llama)
    hfp.patch(llama)
    hfp.unpatch(llama)
    assert _state(llama) == before
    with pytest.raises(hfp.UnsupportedModelError, match="LlamaForCausalLM is not patched"):
        hfp.unpatch(llama)


def test_unpatch_finds_patched_parts():
    """What patch() says of a model with a patched part: "call unpatch(model) first"."""
    model = tiny_model(AutoModelForSeq2SeqLM, "t5")
    before = _state(model)
    hfp.patch(model.encoder)
    hfp.patch(model.decoder)
    with pytest.raises(hfp.UnsupportedModelError, match=r"unpatch\(model\), first"):
        hfp.patch(model)
    hfp.unpatch(model)
    assert _state(model) == before
    hfp.patch(model)
    with pytest.raises(hfp.UnsupportedModelError, match="part of a T5ForConditionalGeneration"):
        hfp.unpatch(model.encoder)
    hfp.unpatch(model)
    assert _state(model) == before


def test_a_second_patch_names_the_first(llama):
    hfp.patch(llama, backend="torch")
    state = _state(llama)
    for target in (llama, llama.model, torch.nn.Sequential(llama)):
        with pytest.raises(
            hfp.UnsupportedModelError,
            match=r"patched already, by Patch\(LlamaForCausalLM, backend='torch'\)",
        ):
            hfp.patch(target)
    assert _state(llama) == state


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backend_reaches_the_attention_call(llama, backend, monkeypatch):
    from hf_flash_patch.integration import attention as integration

    seen = []
    original = integration.attention

    def spy(*tensors, **options):
        seen.append(options["backend"])
        return original(*tensors, **options)

    monkeypatch.setattr(integration, "attention", spy)
    other = tiny_model(AutoModelForCausalLM, "llama")
    with hfp.patched(llama, backend=backend), hfp.patched(other):
        llama(token_ids())
        assert seen == [backend] * 2
        other(token_ids())
        assert seen == [backend] * 2 + ["auto"] * 2


def test_unknown_backend(llama):
    with pytest.raises(hfp.UnsupportedKernelError, match="backend='triton'; allowed are 'auto'"):
        hfp.patch(llama, backend="triton")


@pytest.mark.parametrize("name", ["strict", "remove_padding"])
def test_a_flag_that_is_a_text(llama, name):
    with pytest.raises(ValueError, match=f"{name}='no'; it has to be True or False"):
        hfp.patch(llama, **{name: "no"})


def test_cuda_backend_without_the_extension(llama, monkeypatch):
    from hf_flash_patch.ops.library import ExtensionStatus

    before = _state(llama)
    monkeypatch.setattr(
        patch_module, "extension_status", lambda: ExtensionStatus(False, "no nvcc here.")
    )
    with pytest.raises(hfp.UnsupportedKernelError, match="compiled kernels: no nvcc here"):
        hfp.patch(llama, backend="cuda")
    assert _state(llama) == before
    llama.config.hfp = {"backend": "cuda"}
    with pytest.raises(hfp.UnsupportedKernelError, match="no nvcc here.*stands in model.config.hf"):
        hfp.patch(llama)


def test_flash_attn_backend_without_the_package(llama, monkeypatch):
    monkeypatch.setattr(patch_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hfp.UnsupportedKernelError, match="flash-attn, which is not installed"):
        hfp.patch(llama, backend="flash_attn")


def test_an_error_while_applying_leaves_the_model_unchanged(llama, monkeypatch):
    before = _state(llama)
    monkeypatch.setattr(switch_module, "calls_us", lambda module: False)
    with pytest.raises(hfp.UnsupportedModelError, match="self_attn .LlamaAttention. does not call"):
        hfp.patch(llama)
    assert _state(llama) == before
    monkeypatch.undo()
    hfp.patch(llama)


def test_an_error_of_transformers_leaves_the_model_unchanged(llama, monkeypatch):
    before = _state(llama)

    def fail(self, name):
        self.config._attn_implementation = name
        raise ValueError("not today")

    monkeypatch.setattr(type(llama), "set_attn_implementation", fail)
    with pytest.raises(ValueError, match="not today"):
        hfp.patch(llama)
    monkeypatch.undo()
    assert _state(llama) == before


def test_verification_sees_a_local_override_of_the_interface(llama):
    from transformers.models.llama import modeling_llama

    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS
    before = _state(llama)
    interface["hfp"] = lambda *args, **kwargs: None
    try:
        with pytest.raises(hfp.UnsupportedModelError, match="does not call the attention"):
            hfp.patch(llama)
    finally:
        del interface["hfp"]
    assert _state(llama) == before


def test_compiled_models_are_refused(llama):
    for compiled in (torch.compile(llama), torch.nn.Sequential(torch.compile(llama.model))):
        with pytest.raises(hfp.UnsupportedModelError, match="compiled; patch the model first"):
            hfp.patch(compiled)
    llama.compile()
    with pytest.raises(hfp.UnsupportedModelError, match="LlamaForCausalLM is compiled"):
        hfp.patch(llama)


def test_sharded_models_are_refused(llama):
    class FSDPModule:
        """Stands in for torch.distributed.fsdp's class, which fully_shard mixes in by name."""

    layer = llama.model.layers[0]
    layer.__class__ = type("FSDPLlamaDecoderLayer", (FSDPModule, type(layer)), {})
    with pytest.raises(hfp.UnsupportedModelError, match=r"model.layers.0 is sharded by FSDP"):
        hfp.patch(llama)


def test_what_is_not_a_model_is_refused():
    with pytest.raises(hfp.UnsupportedModelError, match="Linear is not a transformers model"):
        hfp.patch(torch.nn.Linear(2, 2))
    with pytest.raises(hfp.UnsupportedModelError, match="str is not a transformers .* is loaded"):
        hfp.patch("a/checkpoint")
    with pytest.raises(hfp.UnsupportedModelError, match="str is not patched"):
        hfp.unpatch("a/checkpoint")


def test_wrappers_are_looked_through(llama):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    patch = hfp.patch(Wrapper(Wrapper(llama)))
    assert llama.config._attn_implementation == "hfp"
    assert patch.to_dict()["model"] == "LlamaForCausalLM"
    hfp.unpatch(Wrapper(llama))
    assert llama.config._attn_implementation == "eager"


def test_several_models_in_one_module(llama, bloom):
    bert = tiny_model(AutoModel, "bert")
    with hfp.patched(torch.nn.ModuleList([llama, bert])) as patch:
        assert [model["model"] for model in patch.to_dict()["models"]] == [
            "LlamaForCausalLM",
            "BertModel",
        ]
    before = _state(llama)
    with pytest.raises(hfp.UnsupportedModelError, match="Bloom"):
        hfp.patch(torch.nn.ModuleList([llama, bloom]))
    assert _state(llama) == before


def test_a_part_of_a_model_may_be_patched():
    """The parent's config object is the part's, too: no copy, no warning."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch = hfp.patch(model.model)
    assert model.config is model.model.config and model.config._attn_implementation == "hfp"
    patch.restore()


def test_configs_a_model_copied_for_its_parts():
    """set_attn_implementation does not reach the config that T5 copies for its encoder."""
    model = tiny_model(AutoModelForSeq2SeqLM, "t5")
    assert model.encoder.config is not model.config
    with hfp.patched(model):
        served = [m for m in survey(model) if m.status == "served"]
        assert len(served) == 6 and all(calls_us(m.module) for m in served)
    assert {config._attn_implementation for config in configs_of(model)} == {"eager"}


def _llava():
    vision = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, image_size=16)
    vision |= dict(num_attention_heads=4, patch_size=4, model_type="clip_vision_model")
    config = LlavaConfig(
        vision_config=vision, text_config=tiny_config("llama").to_dict(), image_token_index=98
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def test_vision_text_model():
    model = _llava()
    ids = torch.cat([torch.full((1, 16), 98), token_ids(1)], dim=1)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        before = _state(model)
        with hfp.patched(model) as patch:
            actual = model(input_ids=ids, pixel_values=pixels).logits
    assert_close(actual, expected, "logits")
    assert _state(model) == before
    classes = {row.class_name: row.after for row in patch.reports[0].modules}
    assert classes == {"CLIPAttention": "hfp", "LlamaAttention": "hfp"}


def test_two_towers():
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = CLIPConfig(
        text_config=sizes | dict(vocab_size=99, eos_token_id=2),
        vision_config=sizes | dict(image_size=16, patch_size=4),
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": token_ids(), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        with hfp.patched(model):
            assert_close(model(**inputs).logits_per_image, expected, "logits")


def _bert_and_bloom(bloom):
    bert = tiny_model(AutoModel, "bert")
    model = EncoderDecoderModel.__new__(EncoderDecoderModel)
    torch.nn.Module.__init__(model)
    model.encoder, model.decoder, model.config = bert, bloom, BertConfig()
    return model


def test_strict_refuses_a_model_with_one_foreign_part(bloom):
    model = _bert_and_bloom(bloom)
    before = _state(model)
    with pytest.raises(hfp.UnsupportedModelError, match="BloomAttention computes attention itself"):
        hfp.patch(model)
    assert _state(model) == before


def test_not_strict_patches_the_rest_and_says_so(bloom):
    model = _bert_and_bloom(bloom)
    before = _state(model)
    own = bloom.config._attn_implementation
    with pytest.warns(UserWarning, match="2 modules keep their own attention") as caught:
        patch = hfp.patch(model, strict=False)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert model.encoder.config._attn_implementation == "hfp"
    assert bloom.config._attn_implementation == own
    rows = {row.class_name: row for row in patch.reports[0].modules}
    assert rows["BertSelfAttention"].after == "hfp" and not rows["BertSelfAttention"].reason
    assert rows["BloomAttention"].after == "own" and "itself" in rows["BloomAttention"].reason
    assert "BloomAttention" in str(patch)
    patch.restore()
    assert _state(model) == before


def test_a_warning_turned_into_an_error_leaves_the_model_unchanged(bloom):
    model = _bert_and_bloom(bloom)
    before = _state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            hfp.patch(model, strict=False)
    assert _state(model) == before


def test_not_strict_on_a_model_that_is_all_foreign(bloom):
    ids = token_ids()
    with torch.no_grad():
        expected = bloom(ids).logits
        with pytest.warns(UserWarning, match="BloomAttention"):
            hfp.patch(bloom, strict=False)
        torch.testing.assert_close(bloom(ids).logits, expected, rtol=0, atol=0)


def test_a_pooling_head_of_its_own_is_kept_and_reported():
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = SiglipVisionModel(config).eval()
    model.set_attn_implementation("eager")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels).pooler_output
        patch = hfp.patch(model)
        assert_close(model(pixels).pooler_output, expected, "pooled")
    rows = {row.class_name: row for row in patch.reports[0].modules}
    assert rows["SiglipAttention"].after == "hfp"
    assert rows["MultiheadAttention"].after == "own" and rows["MultiheadAttention"].reason


def test_settings_are_json_in_the_config(llama, tmp_path):
    hfp.patch(llama, backend="torch")
    llama.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["hfp"] == {"backend": "torch"}
    assert "_attn_was_changed" not in json.dumps(stored)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_round_trip_through_a_file(family, tmp_path):
    auto = {
        "bert": AutoModelForMaskedLM,
        "gpt2": AutoModelForCausalLM,
        "t5": AutoModelForSeq2SeqLM,
    }[family]
    model = tiny_model(auto, family)
    hfp.patch(model, backend="torch")
    model.save_pretrained(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert hfp.patch(reloaded).backend == "torch"
    inputs = {"input_ids": token_ids()}
    if family == "t5":
        inputs["decoder_input_ids"] = token_ids(2, 5)
    with torch.no_grad():
        assert_close(reloaded(**inputs).logits, model(**inputs).logits, "logits")


def test_native_loading_needs_no_patch(tmp_path):
    model = tiny_model(AutoModelForCausalLM, "llama")
    model.save_pretrained(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hfp")
    assert native.config._attn_implementation == "hfp"
    with torch.no_grad():
        assert_close(native(token_ids()).logits, model(token_ids()).logits, "logits")


@pytest.mark.parametrize(
    ("auto", "model_type", "settings"),
    [
        (AutoModelForCausalLM, "llama", {}),
        (AutoModelForCausalLM, "llama", {"mask": "sliding_window(4)"}),
        (AutoModelForCausalLM, "llama", {"max_length": 128}),
        (AutoModelForCausalLM, "gpt2", {"max_length": 128}),
        (AutoModelForMaskedLM, "bert", {"remove_padding": True}),
    ],
    ids=["plain", "mask", "rope", "table", "padding"],
)
def test_a_patch_keeps_no_model_alive(auto, model_type, settings):
    model = tiny_model(auto, model_type)
    patch = hfp.patch(model, **settings)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    patch.restore()  # nothing left to do, and no error


def test_patched_models_can_be_copied_and_pickled(llama):
    hfp.patch(llama)
    ids = token_ids()
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        with torch.no_grad():
            assert_close(twin(ids).logits, llama(ids).logits, "logits")
        assert twin.config._attn_implementation == "hfp"
        hfp.patch(twin).restore()
    assert llama.config._attn_implementation == "hfp"


def test_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert "on meta" in str(hfp.patch(model))
    assert model(token_ids().to("meta")).logits.shape == (2, 12, 99)


def test_transformers_verbosity_is_left_alone(llama):
    import transformers

    level = transformers.logging.get_verbosity()
    hfp.patch(llama)
    assert transformers.logging.get_verbosity() == level


def test_public_names():
    for name in hfp.__all__:
        assert hasattr(hfp, name)
    for error in ("ContextExtensionError", "MaskError", "UnsupportedKernelError"):
        assert issubclass(getattr(hfp, error), ValueError)
    assert hfp.__version__.count(".") == 2
