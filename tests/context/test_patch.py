"""patch(max_length=...), the way back, and peft."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, ByT5Tokenizer

import hf_flash_patch as hfp
from hf_flash_patch.integration import switch as switch_module
from tests.context.test_extend import _logits, _state
from tests.integration.tiny import assert_close, tiny_model

CASES = {
    "llama": (AutoModelForCausalLM, [{"rope": r} for r in ("yarn", "dynamic", "longrope")]),
    "gemma3_text": (AutoModelForCausalLM, [{"rope": "linear"}]),
    "bert": (AutoModelForMaskedLM, [{"positions": "tile"}, {"positions": "interpolate"}]),
    "roberta": (AutoModelForMaskedLM, [{}]),
    "gpt2": (AutoModelForCausalLM, [{"positions": "hierarchical"}]),
    "opt": (AutoModelForCausalLM, [{}]),
}


@pytest.fixture
def bert():
    return tiny_model(AutoModelForMaskedLM, "bert")


@pytest.fixture
def llama():
    return tiny_model(AutoModelForCausalLM, "llama")


@pytest.mark.parametrize("model_type", CASES)
def test_one_line_extends_patches_and_takes_both_back(model_type):
    auto, settings = CASES[model_type]
    model = tiny_model(auto, model_type, vocab_size=300)
    tokenizer = ByT5Tokenizer(extra_ids=0, model_max_length=64)
    before = _state(model)
    for arguments in settings:
        with hfp.patched(model, max_length=256, tokenizer=tokenizer, **arguments) as patch:
            ours = _logits(model, 200)
            assert tokenizer.model_max_length == 256
            assert model.config._attn_implementation == "hfp"
            assert patch.to_dict()["context"]["after"] == 256
            assert " -> 256 tokens (" in str(patch) and " -&gt; 256" in patch._repr_html_()
        # Same values; the modules' frequencies and tables are the very objects that were there.
        assert _state(model) == before
        assert tokenizer.model_max_length == 64
        eager = copy.deepcopy(model)
        hfp.extend_context(eager, 256, **arguments)
        assert_close(ours, _logits(eager, 200), "logits")


@pytest.mark.parametrize("argument", [{"rope": "yarn"}, {"positions": "tile"}, {"tokenizer": 1}])
def test_how_without_how_far(llama, argument):
    before = _state(llama)
    with pytest.raises(
        hfp.ContextExtensionError, match=rf"patch\({next(iter(argument))}=.* needs m"
    ):
        hfp.patch(llama, **argument)
    assert _state(llama) == before


def test_an_error_after_the_extension_undoes_it(llama, bert, monkeypatch):
    monkeypatch.setattr(switch_module, "calls_us", lambda module: False)
    for model in (llama, bert):
        before = _state(model)
        with pytest.raises(hfp.UnsupportedModelError, match="does not call the attention"):
            hfp.patch(model, max_length=256)
        assert _state(model) == before


def test_restore_refuses_a_table_under_an_optimizer(bert):
    before = _state(bert)
    patch = hfp.patch(bert, max_length=256)
    extended = _state(bert)
    optimizer = torch.optim.SGD(bert.parameters(), lr=0.1)
    with pytest.raises(hfp.ContextExtensionError, match=r"position_embeddings.*optimizer \(SGD\)"):
        patch.restore()
    assert _state(bert) == extended
    del optimizer
    patch.restore()
    assert _state(bert) == before


def test_restore_refuses_a_trained_table(bert):
    patch = hfp.patch(bert, max_length=256)
    ids = torch.ones(1, 100, dtype=torch.long)
    bert(ids).logits.sum().backward()
    with pytest.raises(hfp.ContextExtensionError, match="trained or loaded since"):
        patch.restore()
    bert.zero_grad()
    with torch.no_grad():
        bert.bert.embeddings.position_embeddings.weight[70] += 1
    with pytest.raises(hfp.ContextExtensionError, match="trained or loaded since"):
        patch.restore()
    assert bert.config.max_position_embeddings == 256


def test_restore_follows_the_dtype_that_the_model_has_now(llama, bert):
    for model in (llama, bert):
        patch = hfp.patch(model, max_length=256)
        model.to(torch.bfloat16)
        patch.restore()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        _logits(model, 64)


def test_frequencies_go_back_under_an_optimizer(llama):
    short = _logits(llama, 60)
    patch = hfp.patch(llama, max_length=256, rope="yarn")
    optimizer = torch.optim.SGD(llama.parameters(), lr=0.1)
    patch.restore()
    assert torch.equal(_logits(llama, 60), short)
    del optimizer


def test_extending_a_patched_model_outlives_the_patch(llama):
    patch = hfp.patch(llama, backend="torch")
    hfp.extend_context(llama, 256, rope="dynamic")
    assert llama.config.hfp["backend"] == "torch"
    ours = _logits(llama, 200)
    patch.restore()
    assert list(llama.config.hfp) == ["context"]
    assert_close(ours, _logits(llama, 200), "logits")
    with pytest.raises(hfp.ContextExtensionError, match="below the 256"):
        hfp.extend_context(llama, 128)


def test_reload_and_patch_without_arguments(llama, tmp_path):
    hfp.patch(llama, max_length=256, backend="torch")
    expected = _logits(llama, 200)
    llama.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    patch = hfp.patch(reloaded)
    assert patch.backend == "torch" and patch.reports[0].max_length == 256
    assert torch.equal(_logits(reloaded, 200), expected)
    assert hfp.extend_context(reloaded, 512).before == 256


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("order", ["extend, then adapt", "adapt, then extend"])
def test_lora_on_an_extended_llama(order, llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    if order == "extend, then adapt":
        hfp.extend_context(llama, 256, rope="yarn")
        model = get_peft_model(llama, LORA)
    else:
        model = get_peft_model(llama, LORA)
        hfp.extend_context(model, 256, rope="yarn")
    expected = _logits(model.eval(), 200)
    model.save_pretrained(tmp_path / "adapter")
    # The adapter knows nothing of the base's length: extend the base again, the same way, first.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    hfp.extend_context(base, 256, rope="yarn")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(_logits(reloaded, 200), expected)


def test_an_adapter_that_carries_the_table(bert, tmp_path):
    bert.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        target_modules=["query"], modules_to_save=["position_embeddings"], init_lora_weights=False
    )
    hfp.extend_context(bert, 256)
    model = get_peft_model(bert, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "position" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = _logits(model, 200)
    model.save_pretrained(tmp_path / "adapter")

    def base():
        return AutoModelForMaskedLM.from_pretrained(tmp_path / "base", attn_implementation="eager")

    with pytest.raises(RuntimeError, match="size mismatch"):  # the base has to be extended first
        PeftModel.from_pretrained(base(), tmp_path / "adapter")
    extended = base()
    hfp.extend_context(extended, 256)
    reloaded = PeftModel.from_pretrained(extended, tmp_path / "adapter").eval()
    assert torch.equal(_logits(reloaded, 200), expected)

    hfp.extend_context(reloaded, 300)  # the adapter's copy grows with the original
    assert _logits(reloaded, 300).isfinite().all()
    sizes = {len(p) for name, p in reloaded.named_parameters() if "position" in name}
    assert sizes == {300}


def test_an_adapter_on_the_table_itself_is_refused():
    model = tiny_model(AutoModelForCausalLM, "gpt2")
    adapted = get_peft_model(model, LoraConfig(target_modules=["wpe"]))
    with pytest.raises(hfp.ContextExtensionError, match="wpe carries an adapter of its length"):
        hfp.extend_context(adapted, 256)


def test_a_longer_context_and_a_mask_in_one_line(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")  # writes into the config
    before, window = _state(llama), hfp.masks.sliding_window(16)
    patch = hfp.patch(llama, max_length=256, rope="yarn", mask=window)
    expected = _logits(llama, 200)
    assert set(llama.config.hfp) == {"backend", "mask", "context"}
    llama.save_pretrained(tmp_path / "long")
    patch.restore()
    assert _state(llama) == before
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    hfp.patch(reloaded)
    assert torch.equal(_logits(reloaded, 200), expected)
    hfp.unpatch(reloaded)
    unmasked = _logits(reloaded, 200)
    assert_close(unmasked[:, :16], expected[:, :16], "within the window")
    assert not torch.allclose(unmasked, expected)


def test_a_reloaded_model_says_how_far_it_goes(llama, tmp_path):
    """Dynamic scaling leaves max_position_embeddings; the report knows better."""
    with hfp.patched(llama, max_length=128, rope="dynamic"):
        llama.save_pretrained(tmp_path)
    text = str(hfp.patch(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert "context    128 tokens (unchanged)" in text
