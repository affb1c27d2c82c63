"""torch.compile(fullgraph=True): no graph break, same numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, StaticCache

import hf_flash_patch as hfp
from tests.integration.tiny import (
    assert_close,
    logits_and_gradients,
    padding,
    tiny_model,
    token_ids,
)

AUTO = {
    "bert": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "mistral": AutoModelForCausalLM,
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_exported_for_other_lengths(family):
    model = _one_layer(family)
    model.config.use_cache = False
    batch, seqlen = torch.export.Dim("batch", min=2), torch.export.Dim("seqlen", min=33, max=64)
    hfp.patch(model)

    def inputs(size, length):
        real = torch.ones(size, length, dtype=torch.long)
        real[0, :-3] = family == "llama"  # which tells documents by positions, so without a mask
        ids = token_ids(size, length)
        return (ids,) if family == "llama" else (ids, real)

    example = inputs(2, 40)
    shapes = tuple({0: batch, 1: seqlen} for _ in example)
    exported = torch.export.export(model, example, dynamic_shapes=shapes).module()
    other = inputs(3, 50)
    assert_close(exported(*other).logits, model(*other).logits, "logits")


def _one_layer(family, **overrides):
    """Compiling takes time by the layer."""
    overrides |= {"n_layer": 1} if family == "gpt2" else {}
    auto = AUTO.get(family, AutoModelForCausalLM)
    return tiny_model(auto, family, num_hidden_layers=1, **overrides)


@pytest.mark.parametrize(
    "family, kind",
    [("llama", "none"), ("llama", "left"), ("gpt2", "left"), ("bert", "left"), ("mistral", "left")],
)
def test_training_step(family, kind):
    model = _one_layer(family)
    ids, mask = token_ids(), padding(kind)
    extra = {"use_cache": False} if family != "bert" else {}
    expected, expected_gradients = logits_and_gradients(
        lambda: model(ids, attention_mask=mask, **extra).logits, model, mask
    )
    with hfp.patched(model):
        compiled = _compiled(model)
        actual, gradients = logits_and_gradients(
            lambda: compiled(ids, attention_mask=mask, **extra).logits, model, mask
        )
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


@pytest.mark.parametrize("family", sorted(AUTO))
def test_packed(family):
    """Here transformers' own document mask cannot be read symbolically; it must not vanish."""
    model = _one_layer(family)
    ids = token_ids()
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].expand(2, -1)
    extra = {"use_cache": False} if family != "bert" else {}
    with torch.no_grad(), hfp.patched(model):
        expected = torch.cat(
            [model(part, **extra).logits for part in torch.split(ids, [7, 5], dim=1)], dim=1
        )
        actual = _compiled(model)(ids, position_ids=positions, **extra).logits
    assert_close(actual, expected, "logits")


def test_packed_and_chunked():
    """Chunks count from the start of the row, whatever is packed in it."""
    model = _one_layer("llama4_text", attention_chunk_size=4)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].expand(2, -1)
    inputs = {"input_ids": token_ids(), "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        with hfp.patched(model):
            actual = _compiled(model)(**inputs).logits
    assert_close(actual, expected, "logits")


def test_sinks():
    model = _one_layer("gpt_oss")
    ids, mask = token_ids(), padding("left")
    with torch.no_grad(), hfp.patched(model):
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        actual = _compiled(model)(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(actual, expected, "logits")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_decoding_with_a_static_cache(family):
    """As generate() does it: the mask is made outside and handed to the compiled forward."""
    model = tiny_model(AutoModelForCausalLM, family)
    ids = token_ids()
    mask = padding("left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    with hfp.patched(model):
        forward = model.forward
        model.forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        try:
            actual = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
            )
        finally:
            del model.forward
    assert actual.tolist() == expected.tolist()


def test_steps_of_a_static_cache_share_one_graph():
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids(2, 16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), hfp.patched(model):
        cache = StaticCache(config=model.config, max_cache_len=20)
        model(ids[:, :10], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend=backend)
        parts = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10, 16)]
        expected = model(ids).logits[:, 10:]
    assert_close(torch.cat(parts, dim=1), expected, "logits")
    assert len(graphs) == 1


def test_output_attentions_is_refused_while_compiling():
    model = _one_layer("llama")
    with hfp.patched(model), pytest.raises(Exception, match="output_attentions"):
        torch.compile(model, backend="aot_eager")(token_ids(), output_attentions=True)


def test_layers_compiled_one_by_one():
    """Models of one class share their layers' graphs, whichever of them have a mask."""
    ids = token_ids()
    logits = []
    near = hfp.masks.from_mask_mod(lambda b, h, q, k: q - k < 3)  # which no config tells of
    for settings in ({}, {"mask": near}):
        model = _one_layer("llama")
        hfp.patch(model, **settings)
        expected = model(ids, use_cache=False).logits
        model.model.layers[0].compile(fullgraph=True, backend="eager")
        assert_close(model(ids, use_cache=False).logits, expected, "logits")
        logits.append(expected)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
