"""patch(mask=...): patterns on top of a model's own masks, against eager with the dense mask."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings

import accelerate
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import hf_flash_patch as hfp
from hf_flash_patch import MaskError, masks
from hf_flash_patch.integration import sparse
from hf_flash_patch.integration.attention_mask import AttentionMask
from tests.integration.tiny import (
    assert_close,
    logits_and_gradients,
    padding,
    tiny_model,
    token_ids,
)

MODELS = {
    "bert": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}
LONG = 70
PATTERNS = {
    "window": masks.sliding_window(5),
    "window_and_sinks": masks.sliding_window(3) | masks.sinks(2),
    "blocks": masks.butterfly(4) | masks.global_tokens([1]),
    "heads": masks.shifted_groups(6),
    "per_head": masks.per_head([masks.sliding_window(2), masks.strided(4)]),
    "none": masks.sliding_window(4) & ~masks.global_tokens([6]),
    "code": masks.from_mask_mod(lambda b, h, q, k: (q + k) % 3 != 0),
}


def model_of(family: str, **overrides):
    return tiny_model(MODELS[family], family, max_position_embeddings=128, **overrides)


def eager_mask(model, pattern, seqlen: int, real: torch.Tensor | None) -> torch.Tensor:
    """What the eager model gets: its own mask and the pattern's, float, 4-D, four heads."""
    seen = pattern.dense(seqlen, num_heads=4)
    seen = seen.repeat_interleave(4 // seen.shape[1], dim=1).expand(2, -1, -1, -1)
    if model.config.model_type != "bert":
        seen = seen & torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    if real is not None:
        seen = seen & real.bool()[:, None, None]
    return torch.where(seen, 0.0, float("-inf"))


def rows_that_see(bias: torch.Tensor) -> torch.Tensor:
    return (bias == 0).any(dim=-1).all(dim=1)  # (batch, seqlen)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_equals_eager_with_the_dense_mask(family, name, kind):
    model, pattern = model_of(family), PATTERNS[name]
    ids, real = token_ids(2, LONG), padding(kind, LONG)
    bias = eager_mask(model, pattern, LONG, real)
    blind = ~rows_that_see(bias)
    # transformers' eager softmax has no answer for a row that sees nothing: hide such tokens from
    # all others, and leave them out of the comparison.
    bias.masked_fill_(blind[:, None, None, :], float("-inf"))
    bias.masked_fill_(blind[:, None, :, None], 0.0)
    keep = ~blind if real is None else ~blind & real.bool()
    expected = logits_and_gradients(
        lambda: model(input_ids=ids, attention_mask=bias).logits, model, keep
    )
    hidden = masks.from_mask_mod(lambda b, h, q, k: ~blind[b, k], batch=2)
    with hfp.patched(model, mask=pattern & hidden):
        actual = logits_and_gradients(
            lambda: model(input_ids=ids, attention_mask=real).logits, model, keep
        )
    assert_close(actual[0], expected[0], "logits")
    for parameter, gradient in expected[1].items():
        assert_close(actual[1][parameter], gradient, f"gradient of {parameter}")


def test_a_mask_for_each_layer():
    model = model_of("llama")
    ids = token_ids(2, LONG)
    patterns = [masks.sliding_window(3), None]
    with torch.no_grad():
        plain = model(ids).logits
        with hfp.patched(model, mask=lambda layer: patterns[layer]) as patch:
            ours = model(ids).logits
            assert model.config.hfp["mask"] == {"0": "sliding_window(3)"}
            text = "mask       layers 0: sliding_window(3); layers 1: none of its own"
            assert text in str(patch)
            hfp.unpatch(model)
        again = _with_mask_in_layer(model, 0, masks.sliding_window(3), ids)
    assert_close(ours, again, "logits")
    assert (ours - plain).abs().max() > 1e-3


def _with_mask_in_layer(model, layer, pattern, ids):
    """Eager logits where one layer has a pattern of its own."""
    bias = eager_mask(model, pattern, ids.shape[1], None)
    attention = model.model.layers[layer].self_attn

    def replaced(module, args, kwargs):
        return args, {**kwargs, "attention_mask": bias}

    hook = attention.register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        return model(ids).logits
    finally:
        hook.remove()


GENERATED = [
    masks.sliding_window(6) | masks.sinks(2),
    masks.butterfly(4) | masks.global_tokens([0, 9]),
    masks.shifted_groups(8) | masks.sinks(1),
    masks.per_head([masks.sliding_window(5), masks.strided(3)]),
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pattern", GENERATED, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generate(family, pattern, cache):
    """Prefill and every decode step see what one forward over the whole text sees."""
    model = model_of(family)
    ids = token_ids(2, 21)
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
    }[cache]
    with hfp.patched(model, mask=pattern):
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    whole = generated.sequences
    with torch.no_grad():
        bias = eager_mask(model, pattern, whole.shape[1], None)
        expected = model(whole, attention_mask=bias).logits
    for step, logits in enumerate(generated.logits):
        assert_close(logits, expected[:, 20 + step], f"logits of step {step}")


def test_a_prefill_in_chunks():
    model = model_of("llama")
    pattern = masks.strided(5) | masks.sinks(3)
    ids = token_ids(2, 40)
    with torch.no_grad(), hfp.patched(model, mask=pattern):
        whole = model(ids).logits
        first = model(ids[:, :25], use_cache=True)
        rest = model(ids[:, 25:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat((first.logits, rest), dim=1), whole, "logits")


def test_packed_documents():
    """Documents of one row stay apart, under the pattern's positions in the row."""
    model = model_of("llama")
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    ids = token_ids(1, LONG)
    pattern = masks.sliding_window(6)
    with torch.no_grad(), hfp.patched(model, mask=pattern):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in (ids[:, :30], ids[:, 30:])]
    assert_close(packed, torch.cat(alone, dim=1), "logits")


def test_kept_in_the_config(tmp_path):
    model = model_of("gpt2")
    pattern = masks.sliding_window(6) | masks.bigbird(3, 1, 1, block=8)
    ids = token_ids(2, LONG)
    patch = hfp.patch(model, mask=pattern)
    assert f"mask       {pattern}" in str(patch) and patch.to_dict()["mask"] == str(pattern)
    assert "<td>mask</td>" in patch._repr_html_()
    assert json.loads(json.dumps(model.config.hfp)) == {"backend": "auto", "mask": str(pattern)}
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = hfp.patch(reloaded)
    assert again.to_dict()["mask"] == str(pattern)
    with torch.no_grad():
        assert_close(reloaded(ids).logits, model(ids).logits, "logits")
        patch.restore()
        assert "hfp" not in vars(model.config)
        assert (model(ids).logits - reloaded(ids).logits).abs().max() > 1e-3


def test_a_mask_for_each_layer_is_kept(tmp_path):
    model = model_of("bert")
    hfp.patch(model, mask=lambda layer: masks.sliding_window(3 + layer))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    hfp.patch(reloaded)
    assert reloaded.config.hfp["mask"] == {"0": "sliding_window(3)", "1": "sliding_window(4)"}
    ids = token_ids(2, LONG)
    with torch.no_grad():
        assert_close(reloaded(ids).logits, model(ids).logits, "logits")


def test_code_is_not_kept():
    model = model_of("llama")
    with hfp.patched(model, mask=PATTERNS["code"]) as patch:
        assert model.config.hfp == {"backend": "auto"}
        assert "mask: made of code" in str(patch)


def test_copies_and_pickles_keep_it():
    model = model_of("llama")
    ids = token_ids(2, LONG)
    with torch.no_grad(), hfp.patched(model, mask=masks.sliding_window(4)):
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(other(ids).logits, expected, "logits")


def test_restored_to_the_letter():
    model = model_of("llama")
    before = [dict(vars(module)) for module in model.modules()]
    hfp.patch(model, mask=masks.causal()).restore()
    assert [vars(module).keys() for module in model.modules()] == [b.keys() for b in before]


def test_a_copy_keeps_its_mask_through_a_patch_of_its_own():
    model = model_of("llama")
    ids = token_ids(2, LONG)
    with hfp.patched(model, mask=masks.sliding_window(4)), torch.no_grad():
        twin = copy.deepcopy(model)
        expected = twin(ids).logits
        with hfp.patched(twin, mask=masks.causal()):
            assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(twin(ids).logits, expected)
        with pytest.raises(hfp.UnsupportedModelError, match="a copy of a patched model"):
            hfp.unpatch(twin)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder(family):
    """Encoder and decoder have it, cross-attention does not."""
    model = tiny_model(AutoModelForSeq2SeqLM, family)
    pattern = masks.sliding_window(4)
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 9, seed=1)}
    near = pattern.dense(12)
    own = torch.where(near, 0.0, float("-inf")).expand(2, 1, -1, -1)
    decoder = pattern.dense(9) & masks.causal().dense(9)
    decoder = torch.where(decoder, 0.0, float("-inf")).expand(2, 1, -1, -1)
    model.train()
    with torch.no_grad():
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=own).last_hidden_state
        expected = model.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            attention_mask=decoder,
            encoder_hidden_states=encoded,
            use_cache=False,
        ).last_hidden_state
        with hfp.patched(model, mask=pattern) as patch:
            actual = model(**inputs, output_hidden_states=True, use_cache=False)
            assert "not for 2 modules that attend to another sequence" in str(patch)
    assert_close(actual.encoder_last_hidden_state, encoded, "encoder")
    assert_close(actual.decoder_hidden_states[-1], expected, "decoder")


@pytest.mark.parametrize("family", ["t5"])
def test_a_learned_bias_is_trained_under_it(family):
    model = tiny_model(AutoModelForSeq2SeqLM, family)
    ids = token_ids()
    near = torch.where(masks.sliding_window(4).dense(12), 0.0, float("-inf")).expand(2, 1, 12, 12)
    encoder = model.get_encoder()
    gradients = []
    for patched in (False, True):
        model.zero_grad()
        with hfp.patched(model, mask=masks.sliding_window(4)) if patched else torch.enable_grad():
            out = encoder(ids, attention_mask=None if patched else near).last_hidden_state
            out.square().sum().backward()
        table = encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        gradients.append(table.weight.grad.clone())
    assert_close(gradients[1], gradients[0], "gradient of the position bias")


def test_vision():
    """A model of images alone has its patches masked."""
    model = tiny_model(AutoModel, "vit")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(pixel_values=pixels).last_hidden_state
        with hfp.patched(model, mask=masks.full()):
            assert_close(model(pixel_values=pixels).last_hidden_state, plain, "all")
        with hfp.patched(model, mask=masks.sliding_window(2)):
            assert (model(pixel_values=pixels).last_hidden_state - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (object(), "mask is of type object"),
        ({0: masks.causal()}, "mask is of type dict"),
        (lambda layer: 3, "mask gave int for layer 0"),
        (masks.per_head([masks.causal()] * 3), "3 patterns among its heads, the call has 4"),
    ],
)
def test_errors_leave_the_model_alone(mask, text):
    model = model_of("llama")
    with pytest.raises(MaskError, match=text):
        hfp.patch(model, mask=mask)
    assert model.config._attn_implementation == "eager" and "hfp" not in vars(model.config)


def test_a_mask_for_another_length():
    model = model_of("llama")
    with hfp.patched(model, mask=masks.documents([0] * 30)), pytest.raises(MaskError, match="30"):
        model(token_ids(2, 31))


@pytest.mark.parametrize("name", ["window", "code"])
def test_training_after_inference_mode(name):
    model = model_of("llama")
    hfp.patch(model, mask=PATTERNS[name])
    ids = token_ids(1, 37)  # lists of this length are made in inference mode, and kept
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()


def test_compiled():
    model = model_of("llama", num_hidden_layers=1)
    ids = token_ids(2, 40)
    real = torch.ones_like(ids)
    with hfp.patched(model, mask=masks.sliding_window(6) | masks.shifted_groups(8)):
        expected = model(ids, attention_mask=real).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(ids, attention_mask=real).logits, expected, "logits")


def test_compiled_decode():
    """A static cache: where the query stands is known to the device alone."""
    model = model_of("llama", num_hidden_layers=1)
    ids = token_ids(2, 21)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    with hfp.patched(model, mask=masks.sliding_window(6) | masks.sinks(2)):
        expected = model.generate(ids, **options)
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize(
    "family", "afmoe cohere2 exaone4 gemma2 gemma3_text gpt_oss mistral olmo3 vaultgemma".split()
)
def test_windows_of_the_models_own_stay(family):
    """A pattern only takes away: inside of the model's windows it is all, outside nothing."""
    model = tiny_model(AutoModelForCausalLM, family)  # windows of 5 tokens, in some layers
    ids, real = token_ids(2, 12), padding("mixed", 12)
    near = masks.sliding_window(4).dense(12) & masks.causal().dense(12)
    near = near.expand(2, 1, -1, -1) & real.bool()[:, None, None]
    bias = torch.where(near, 0.0, torch.finfo(torch.float32).min)
    keep = real.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=bias).logits[keep]
        plain = model(ids, attention_mask=real).logits[keep]
        with hfp.patched(model, mask=masks.sliding_window(4)):
            assert_close(model(ids, attention_mask=real).logits[keep], expected, "logits")
        with hfp.patched(model, mask=masks.sliding_window(4) | masks.full()):
            assert_close(model(ids, attention_mask=real).logits[keep], plain, "logits of all")


def test_a_mask_that_the_name_alone_does_not_apply(tmp_path):
    """Saved with a mask: patch() applies it; loaded by the attention's name, a warning."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids(1, 40)
    with hfp.patch(model, mask=masks.sliding_window(4)):
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hfp").eval()
    with pytest.warns(UserWarning, match=r"keeps the mask sliding_window\(4\).*Call hf_flash_p"):
        by_name(input_ids=ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hfp.patch(again):
            assert_close(again(input_ids=ids).logits, expected, "logits")
        with hfp.patch(again, mask=lambda layer: masks.sliding_window(4) if layer else None):
            again(input_ids=ids)  # what has no mask on purpose is not warned of


def test_a_pattern_that_was_not_called():
    with pytest.raises(hfp.MaskError, match=r"call it: sliding_window\(\.\.\.\)"):
        hfp.patch(model_of("llama"), mask=masks.sliding_window)


def test_hooks_that_move_masks_leave_what_layers_share(monkeypatch):
    """As accelerate's under a device map do."""
    calls = []
    combine = sparse._combine
    monkeypatch.setattr(sparse, "_combine", lambda *given: (calls.append(1), combine(*given))[1])
    model = tiny_model(AutoModelForCausalLM, "llama", num_hidden_layers=4)
    hfp.patch(model, mask=masks.sliding_window(4))
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        names = (*parts, *(f"model.layers.{i}" for i in range(4)))
        places = dict.fromkeys(names, "cpu")
        model = accelerate.dispatch_model(model, places, force_hooks=True, main_device="cpu")
        assert torch.equal(model(ids).logits, expected)
    assert len(calls) == 2


def test_a_mask_is_moved_once_to_a_device():
    mask = AttentionMask(1, 4, 4, True, (-1, -1), torch.device("cpu"), seqused_k=torch.tensor([3]))
    moved = mask.to("meta")
    assert moved is mask.to(torch.device("meta"), non_blocking=True)
    assert moved.device.type == moved.seqused_k.device.type == "meta"
    assert mask.to("cpu") is mask
    assert mask.seqused_k.device.type == "cpu"


def test_pickled_models_work_where_this_package_is_not_imported(tmp_path):
    """In processes that are spawned to share work, for one."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    hfp.patch(model)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(*model(torch.arange(5)[None]).logits.shape, model.config.to_json_string())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("1 5 ")
    assert '"hfp": {' in printed
