"""generate() with dynamic, static and sliding caches, greedy and beam, padded prompts."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

import hf_flash_patch as hfp
from tests.integration.tiny import assert_close, padding, tiny_model, token_ids

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "phi3"]


def _generate(model, mask, **options):
    torch.manual_seed(0)
    return model.generate(
        token_ids(),
        attention_mask=mask,
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def _assert_same_text(model, mask, **options):
    expected = _generate(model, mask, **options)
    with hfp.patched(model):
        actual = _generate(model, mask, **options)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_close(ours, theirs, f"logits of step {step}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy(family, kind, cache):
    model = tiny_model(AutoModelForCausalLM, family)
    mask = padding(kind) if kind == "left" else torch.ones(2, 12, dtype=torch.long)
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    _assert_same_text(model, mask, **options)


@pytest.mark.parametrize("kind", ["none", "left"])
def test_chunked_attention(kind):
    """transformers 5.17 cannot make chunked masks for a static cache itself."""
    model = tiny_model(AutoModelForCausalLM, "llama4_text", attention_chunk_size=6)
    _assert_same_text(model, padding(kind))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_beam(family, kind):
    model = tiny_model(AutoModelForCausalLM, family)
    _assert_same_text(model, padding(kind), num_beams=3)


@pytest.mark.parametrize("family", ["bart", "t5", "marian"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder(family, beams):
    model = tiny_model(AutoModelForSeq2SeqLM, family)
    model.generation_config.decoder_start_token_id = 1
    _assert_same_text(model, padding("mixed"), num_beams=beams)


def test_encoder_decoder_with_a_static_cache():
    model = tiny_model(AutoModelForSeq2SeqLM, "t5")
    model.generation_config.decoder_start_token_id = 1
    _assert_same_text(model, padding("right"), cache_implementation="static", disable_compile=True)


def test_without_a_cache():
    model = tiny_model(AutoModelForCausalLM, "llama")
    _assert_same_text(model, padding("left"), use_cache=False)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_chunks_of_a_prompt(family, cache_class):
    """Several queries at once against a cache, past the sliding window."""
    model = tiny_model(AutoModelForCausalLM, family)
    ids, mask = token_ids(), padding("left")

    def cache():
        if cache_class is DynamicCache:
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=20)

    def run():
        kept, parts = cache(), []
        for begin, end in [(0, 5), (5, 6), (6, 9), (9, 12)]:
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=kept)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)[mask.bool()]

    with torch.no_grad():
        expected = run()
        with hfp.patched(model):
            actual = run()
    assert_close(actual, expected, "logits")


def test_assisted_generation():
    """Speculative decoding crops the cache and sends several tokens at once."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    assistant = tiny_model(AutoModelForCausalLM, "llama", seed=1)
    ids = token_ids(1)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    with hfp.patched(model), hfp.patched(assistant):
        actual = model.generate(ids, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert actual.tolist() == expected.tolist()


def test_a_cache_whose_first_layer_keeps_no_keys():
    """MiniMax makes the mask of a decode step for a single key, and it is broadcast."""
    layers = ["linear_attention", "full_attention"]
    model = tiny_model(AutoModelForCausalLM, "minimax", layer_types=layers, block_size=4)
    _assert_same_text(model, torch.ones(2, 12, dtype=torch.long))


def _in_one_batch(model, prompts, config):
    """Texts by continuous batching: prompts in chunks, decoding next to prefill."""
    batching = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=16)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, warmup=False
    )
    return [outputs[f"req_{index}"] for index in range(len(prompts))]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_continuous_batching(family):
    """Windows shorter than a text, softcap and sinks included."""
    model = tiny_model(AutoModelForCausalLM, family)
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (23, 5, 11, 2)]
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    with hfp.patched(model):
        outputs = _in_one_batch(model, prompts, config)
        assert model.config._attn_implementation == "hfp"
    assert [output.generated_tokens for output in outputs] == expected


def test_continuous_batching_under_a_mask_is_refused():
    model = tiny_model(AutoModelForCausalLM, "llama")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with hfp.patched(model, mask=hfp.masks.sliding_window(4)):
        (output,) = _in_one_batch(model, [[5, 6, 7]], config)
    assert "patched with a mask" in output.error


def test_paged_attention_without_pages_is_refused():
    model = tiny_model(AutoModelForCausalLM, "llama")
    with hfp.patched(model):
        model.set_attn_implementation("paged|hfp")
        with pytest.raises(hfp.UnsupportedModelError, match="generate_batch"):
            model(token_ids())
