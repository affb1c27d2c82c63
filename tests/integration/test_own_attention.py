"""Attention that is not ours beside attention that is: masks that both are given, and modules whose
arguments mean something else."""

import functools
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BridgeTowerConfig,
    BridgeTowerModel,
    GitConfig,
    GitForCausalLM,
    InformerConfig,
    InformerModel,
)
from transformers.masking_utils import sliding_window_causal_mask_function

import hf_flash_patch as hfp
from hf_flash_patch.integration.attention import hfp_attention
from hf_flash_patch.integration.masking import hfp_mask
from tests.integration.tiny import VOCAB_SIZE, assert_close, padding, tiny_model, token_ids


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neox_japanese", "xglm"])
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_a_model_that_computes_attention_itself_adds_our_mask(model_type, kind):
    model = tiny_model(AutoModelForCausalLM, model_type)
    inputs = {"input_ids": token_ids(), "attention_mask": padding(kind)}
    real = slice(None) if kind == "none" else inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        model.config._attn_implementation = "hfp"
        assert_close(model(**inputs).logits[real], expected, "logits")


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("longformer", {"attention_window": [4, 4]}), ("mpt", {}), ("mra", {})],
)
def test_a_model_that_does_more_with_its_mask_gets_eagers(model_type, sizes, kind):
    model = tiny_model(AutoModel, model_type, **sizes)
    inputs = {"input_ids": token_ids(), "attention_mask": padding(kind)}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.config._attn_implementation = "hfp"
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_informer_beside_attention_that_is_not_ours():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"context_length": 8, "prediction_length": 4, "lags_sequence": [1, 2]}
    config = InformerConfig(num_time_features=1, num_parallel_samples=1, **sizes, **lengths)
    torch.manual_seed(0)
    model = InformerModel._from_config(config, attn_implementation="eager").eval()
    past, future = torch.randn(2, 10, 2), torch.randn(2, 4, 2)

    def forward():
        np.random.seed(0)
        torch.manual_seed(0)  # ProbSparse attention samples keys
        return model(
            past_values=past[..., 0],
            past_time_features=past[..., 1:],
            past_observed_mask=torch.ones(2, 10),
            future_values=future[..., 0],
            future_time_features=future[..., 1:],
        ).last_hidden_state

    with torch.no_grad():
        expected = forward()
        with pytest.warns(UserWarning, match="4 modules keep"), hfp.patched(model, strict=False):
            assert_close(forward(), expected, "hidden states")


def test_a_mask_becomes_what_eager_attention_adds():
    mask = hfp_mask(2, 5, 5, attention_mask=padding("left", 5).bool())
    added = mask.to(torch.bfloat16)
    assert added.dtype == torch.bfloat16 and added.shape == (2, 1, 5, 5)
    visible = mask.materialise()
    assert not added[visible].any()
    assert (added[~visible] == torch.finfo(torch.bfloat16).min).all()
    assert torch.equal(mask.to("cpu", torch.float32), mask.to(dtype=torch.float32))
    with pytest.raises(hfp.UnsupportedModelError, match="converts its mask to torch.bool"):
        mask.to(torch.bool)
    assert mask.to() is mask and mask.to(device="cpu").shape == mask.shape
    scores = torch.randn(2, 3, 5, 5)
    assert torch.equal(scores + mask, scores + mask.to(torch.float32))
    assert torch.equal(mask + scores, scores + mask)
    assert torch.equal(scores.clone().add_(mask), scores + mask)


@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_modules_left_alone_see_what_they_saw(kind):
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = GitConfig(vocab_size=VOCAB_SIZE, vision_config=vision, pad_token_id=0, **sizes)
    model = GitForCausalLM._from_config(config, attn_implementation="eager").eval()
    mask = padding(kind)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        expected = model(token_ids(), attention_mask=mask).logits[real]
        with pytest.raises(hfp.UnsupportedModelError, match="GitSelfAttention computes attention"):
            hfp.patch(model)
        with hfp.patched(model, strict=False):
            assert_close(model(token_ids(), attention_mask=mask).logits[real], expected, "logits")


def attend(seqlen_q, seqlen_k, name="Attention", mask=None, *, module=None, **options):
    """`hfp_attention` of random tensors, as a module of that name calls it."""
    generator = torch.Generator().manual_seed(seqlen_q)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in (seqlen_q, seqlen_k, seqlen_k))
    caller = type(name, (nn.Module,), {})()
    vars(caller).update(module or {})
    return hfp_attention(caller, q, k, v, mask, **options)[0]


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_the_mask_of_one_query_is_every_querys(kind):
    seen = padding(kind)
    seen = None if seen is None else seen.bool()
    one = hfp_mask(2, 1, 12, q_offset=11, attention_mask=seen)
    dense = torch.ones(2, 1, 1, 12, dtype=torch.bool) if seen is None else seen[:, None, None]
    assert_close(attend(12, 12, mask=one), attend(12, 12, mask=dense), "output")
    sliding = sliding_window_causal_mask_function(4)
    window = hfp_mask(
        2, 1, 12, q_offset=11, mask_function=sliding, attention_mask=seen, local_size=4
    )
    near = dense & (torch.arange(12) >= 8)
    assert_close(attend(12, 12, mask=window), attend(12, 12, mask=near), "output")
    with pytest.raises(hfp.MaskError, match="reuses a mask for another attention"):
        attend(12, 12, mask=hfp_mask(2, 5, 12, q_offset=7, attention_mask=seen))


def test_positions_on_an_axis_of_time_are_no_documents():
    still = torch.tensor([[0, 1, 2, 2, 2, 2, 3, 4]])
    packed = attend(8, 8, position_ids=still, module={"is_causal": True})
    alone = attend(8, 8, module={"is_causal": True})
    assert (packed - alone).abs().max() > 1e-3
    cosmos = attend(8, 8, "Cosmos3EdgeTextAttention", position_ids=still)
    assert torch.equal(cosmos, alone)


def test_what_is_no_decoder_sees_everything():
    everything = attend(4, 9, mask=torch.ones(2, 1, 4, 9, dtype=torch.bool))
    kosmos = attend(4, 9, module={"is_causal": True, "is_decoder": False})
    assert_close(kosmos, everything, "output")
    with pytest.raises(hfp.MaskError, match="does not say which keys are older"):
        attend(4, 9, module={"is_causal": True, "is_decoder": True})


def test_torchs_own_module_is_named_for_what_it_is():
    config = BridgeTowerConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        text_config=dict(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40
        ),
        vision_config=dict(hidden_size=64, num_hidden_layers=2, patch_size=16, image_size=32),
    )
    patch = hfp.patch(BridgeTowerModel._from_config(config, attn_implementation="eager"))
    (row,) = [r for r in patch.to_dict()["modules"] if r["class_name"] == "MultiheadAttention"]
    assert row["after"] == "own" and row["reason"].startswith("torch's own module")


def attends_by_itself(self, hidden_states, **others):
    q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    repeats = q.shape[-1] // k.shape[-1]
    k, v = k.repeat(1, 1, repeats), v.repeat(1, 1, repeats)
    return self.o_proj((q @ k.mT).softmax(dim=-1) @ v), None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("class", "OwnAttention overrides the code that calls"),
        ("module", "LlamaAttention has a forward of its own"),
        ("no config", "LlamaAttention has no `config`"),
    ],
)
def test_modules_of_ones_own_are_judged_by_what_runs(how, reason):
    model = tiny_model(AutoModelForCausalLM, "llama")
    module = model.model.layers[1].self_attn
    hfp.patch(model).restore()
    if how == "class":
        module.__class__ = type("OwnAttention", (type(module),), {"forward": attends_by_itself})
    elif how == "module":
        module.forward = types.MethodType(attends_by_itself, module)
    else:
        del module.config
    with pytest.raises(hfp.UnsupportedModelError, match=reason):
        hfp.patch(model)
    others = "hfp" if how == "no config" else "own"
    with pytest.warns(UserWarning, match=reason):
        rows = hfp.patch(model, strict=False).reports[0].modules
    assert sorted(row.after for row in rows) == sorted((others, "own"))
    # One config cannot name two attentions.
    assert others == "hfp" or any("shares its config with" in row.reason for row in rows)


def test_a_subclass_that_calls_its_base_is_served():
    model = tiny_model(AutoModelForCausalLM, "llama")
    module = model.model.layers[1].self_attn

    class Logged(type(module)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module.__class__ = Logged
    module.forward = functools.wraps(module.forward)(functools.partial(module.forward))
    assert {row.after for row in hfp.patch(model).reports[0].modules} == {"hfp"}
