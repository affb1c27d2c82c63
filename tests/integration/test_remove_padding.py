"""patch(remove_padding=True): encoders on real tokens alone, equal to the padded run at these."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import hf_flash_patch as hfp
from hf_flash_patch.families import ENCODERS
from hf_flash_patch.ops import functional
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    padding,
    tiny_model,
    token_ids,
)

TYPES = [model_type for types in ENCODERS.values() for model_type in types]
MORE = {"roc_bert": {"enable_pronunciation": False, "enable_shape": False}}


@pytest.fixture
def layouts(monkeypatch):
    """Shapes of q in every call of ops."""
    seen = []
    attention = functional.attention

    def spy(q, *args, **kwargs):
        seen.append(tuple(q.shape))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr("hf_flash_patch.integration.attention.attention", spy)
    return seen


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("kind", ["left", "right", "holes", "mixed"])
def test_equal_to_the_padded_run(model_type, kind, layouts):
    """Hidden states and gradients, at real tokens; RoBERTa's positions come from the token 0."""
    model = tiny_model(AutoModel, model_type, **MORE.get(model_type, {}))
    real = padding(kind)
    ids = token_ids().masked_fill(real == 0, 0)
    patch = assert_same_as_eager(
        model,
        lambda: model(ids, attention_mask=real).last_hidden_state,
        real,
        remove_padding=True,
    )
    assert "padding: removed" in str(patch)
    assert {shape[0] for shape in layouts} == {int(real.sum())} and len(layouts[0]) == 3


@pytest.mark.parametrize(
    "mask",
    [
        hfp.masks.sliding_window(3),
        hfp.masks.sliding_window(2) | hfp.masks.global_tokens(1),
        hfp.masks.per_head([hfp.masks.sliding_window(i) for i in (1, 2, 3, 4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind, packed", [("right", True), ("left", False), ("holes", False)])
def test_patterns_count_real_tokens_from_the_start(mask, kind, packed, layouts):
    """A pattern is of positions in the padded row; only right padding leaves them as they are."""
    model = tiny_model(AutoModel, "bert")
    real = padding(kind)
    ids = token_ids()
    with hfp.patched(model, mask=mask):
        expected = model(ids, attention_mask=real).last_hidden_state[real.bool()]
    layouts.clear()
    with hfp.patched(model, mask=mask, remove_padding=True):
        found = model(ids, attention_mask=real).last_hidden_state[real.bool()]
    assert_close(found, expected, kind)
    assert all(len(shape) == (3 if packed else 4) for shape in layouts)


def test_chosen_blocks_stay_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    mask, real = hfp.masks.top_k_blocks(2, block_size=32), padding("right")
    with hfp.patched(model, mask=mask, remove_padding=True):
        model(token_ids(), attention_mask=real)
    assert all(len(shape) == 4 for shape in layouts)


@pytest.mark.parametrize("real", [None, torch.ones(2, 12, dtype=torch.long)])
def test_without_padding_nothing_happens(real, layouts):
    model = tiny_model(AutoModel, "bert")
    with hfp.patched(model, remove_padding=True):
        model(token_ids(), attention_mask=real)
    assert layouts == [(2, 12, 4, 8)] * 2


def test_padding_is_zero_and_tuples_too():
    model = tiny_model(AutoModel, "bert")
    real = padding("mixed")
    with hfp.patched(model, remove_padding=True):
        whole = model(token_ids(), attention_mask=real)
        hidden, pooled = model(token_ids(), attention_mask=real, return_dict=False)
    assert not whole.last_hidden_state[real == 0].any()
    assert torch.equal(hidden, whole.last_hidden_state)
    assert torch.equal(pooled, whole.pooler_output)


def test_hidden_states_of_each_layer_are_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    real = padding("right")
    expected = model(token_ids(), attention_mask=real, output_hidden_states=True).hidden_states
    with hfp.patched(model, remove_padding=True):
        found = model(token_ids(), attention_mask=real, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours[real == 1], theirs[real == 1], "hidden states")


def test_settings_survive(tmp_path, layouts):
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
    )
    model = BertForSequenceClassification(config).eval()
    patch = hfp.patch(model, remove_padding=True)
    real = padding("right")
    expected = model(token_ids(), attention_mask=real).logits
    model.save_pretrained(tmp_path)
    assert_close(copy.deepcopy(model)(token_ids(), attention_mask=real).logits, expected, "copy")
    patch.restore()
    assert not model.bert.encoder._forward_pre_hooks and not model.bert.encoder._forward_hooks
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    layouts.clear()
    with hfp.patched(again):
        assert_close(again(token_ids(), attention_mask=real).logits, expected, "reloaded")
    assert {len(shape) for shape in layouts} == {3}
    layouts.clear()
    with hfp.patched(again, remove_padding=False):
        again(token_ids(), attention_mask=real)
    assert {len(shape) for shape in layouts} == {4}


@pytest.mark.parametrize("reentrant", [True, False])
def test_training(reentrant):
    """Checkpointed, with a loss, under autocast-free fp32: the padded run's loss and gradients."""
    real = padding("mixed")
    ids = token_ids()
    labels = ids.masked_fill(real == 0, -100)
    results = []
    for settings in ({}, {"remove_padding": True}):
        model = tiny_model(AutoModelForMaskedLM, "bert").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hfp.patch(model, **settings)
        loss = model(ids, attention_mask=real, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (expected, theirs), (loss, ours) = results
    assert_close(loss, expected, "loss")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)


def test_compiled():
    """With a break in the graph before and behind the encoder."""
    model = tiny_model(AutoModel, "bert")
    real = padding("right")
    expected = model(token_ids(), attention_mask=real).last_hidden_state[real == 1]
    with hfp.patched(model, remove_padding=True):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            found = compiled(token_ids(), attention_mask=real).last_hidden_state
            assert_close(found[real == 1], expected, "compiled")
        torch._dynamo.reset()


def test_refused():
    with pytest.raises(hfp.UnsupportedModelError, match="encoders like BERT"):
        hfp.patch(tiny_model(AutoModelForCausalLM, "llama"), remove_padding=True)
    with pytest.raises(hfp.UnsupportedModelError, match="encoders like BERT"):
        hfp.patch(tiny_model(AutoModelForCausalLM, "bert", is_decoder=True), remove_padding=True)
    model = tiny_model(AutoModel, "bert", chunk_size_feed_forward=4)
    with pytest.raises(hfp.UnsupportedModelError, match="chunk_size_feed_forward"):
        hfp.patch(model, remove_padding=True)
    assert not hasattr(model.config, "hfp")
