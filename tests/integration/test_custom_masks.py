"""Masks the user or the model brings: 4-D tensors and overlays of mask functions."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache
from transformers.masking_utils import create_causal_mask

import hf_flash_patch as hfp
from hf_flash_patch import masks
from hf_flash_patch.masks import block_mask
from tests.integration.tiny import assert_close, assert_same_as_eager, tiny_model, token_ids


def _random_mask(seqlen_q, seqlen_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(2, 1, seqlen_q, seqlen_k, generator=generator) < 0.5
    return visible | torch.eye(seqlen_q, seqlen_k, dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_float_mask(family):
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model = tiny_model(auto, family)
    ids = token_ids()
    mask = torch.where(_random_mask(12, 12), 0.0, torch.finfo(torch.float32).min)
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits)


def test_finite_float_mask_is_a_bias():
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    mask = torch.randn(2, 1, 12, 12)
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits)


def test_mask_of_every_head():
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    mask = torch.randn(2, 4, 12, 12)
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits)


def test_bool_mask():
    """Eager adds a bool mask as 0 and 1; sdpa is the reference."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    model.set_attn_implementation("sdpa")
    ids = token_ids()
    mask = _random_mask(12, 12)
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 2)], ids=["all", "each", "groups"])
def test_bool_mask_of_heads_and_wider_than_the_keys(shape):
    """As sdpa has it, where that takes the shape; (1, 2) is one list for two heads each."""
    from hf_flash_patch.integration.attention import hfp_attention

    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    mask = _random_mask(12, 20)[:1].expand(*shape, -1, -1) & (torch.rand(*shape, 12, 20) < 0.8)
    mask |= torch.eye(12, 20, dtype=torch.bool)
    seen = mask[..., :12].repeat_interleave(4 // shape[1], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    out, _ = hfp_attention(torch.nn.Linear(4, 4), q, k, v, mask)
    assert_close(out, expected.transpose(1, 2), "out")


def test_bool_mask_becomes_lists_once(monkeypatch):
    """One making for all layers and later forwards, another where the mask has changed."""
    made = []
    from_dense = block_mask.BlockMask.from_dense

    def spy(mask, *args):
        made.append(mask)
        return from_dense(mask, *args)

    monkeypatch.setattr(block_mask.BlockMask, "from_dense", spy)
    model = tiny_model(AutoModelForCausalLM, "llama", num_hidden_layers=3)
    model.set_attn_implementation("sdpa")
    ids, mask = token_ids(), _random_mask(12, 12)

    def logits():
        return model(ids, attention_mask=mask).logits

    first = logits()
    with hfp.patched(model):
        assert_close(logits(), first, "logits")
        assert_close(logits(), first, "logits again")
        assert len(made) == 1
        mask[:, :, 5:, 2] ^= True
        second = logits()
        assert len(made) == 2
    with hfp.patched(model, mask=masks.sliding_window(5)):
        logits()
        logits()
        assert len(made) == 3  # under the pattern, once for all layers
    with hfp.patched(model):
        with torch.inference_mode():
            mask = _random_mask(12, 12, seed=1)
            third = logits()
            mask[:, :, 5:, 2] ^= True
            fourth = logits()
    with torch.no_grad():
        assert_close(fourth, logits(), "a mask of inference mode, changed")
        mask = _random_mask(12, 12, seed=1)
        assert_close(third, logits(), "a mask of inference mode")
        mask = _random_mask(12, 12)
        mask[:, :, 5:, 2] ^= True
        assert_close(second, logits(), "a mask that has changed")


def test_training_under_a_mask_that_inference_mode_saw_first():
    model, mask, ids = tiny_model(AutoModelForCausalLM, "llama"), _random_mask(12, 12), token_ids()
    hfp.patch(model)
    with torch.inference_mode():
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask, labels=ids).loss.backward()


@pytest.mark.parametrize("heads", [1, 4])
def test_bool_mask_of_one_query(heads):
    """In decode: bits of keys, if all heads have the same."""
    from hf_flash_patch.integration.attention import hfp_attention
    from hf_flash_patch.integration.request import Request

    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 12, 8)
    mask = torch.rand(2, heads, 1, 12) < 0.5
    mask[..., 3] = True
    found, _ = Request(2, 1, 12, q.device).resolve(mask, False, None)
    assert (found.key_bits is None) == (heads > 1) == (found.dense is not None)
    out, _ = hfp_attention(torch.nn.Linear(4, 4), q, k, k, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)
    assert_close(out, expected.transpose(1, 2), "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_repeated_positions_under_an_own_mask_are_no_documents(dtype):
    """A tree of drafts: branches share positions, the mask says who follows whom."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    model.set_attn_implementation("sdpa")
    ids = token_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 2, 3, 3]])
    mask = torch.eye(6, dtype=torch.bool)
    for node, parent in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3)]:
        mask[node] |= mask[parent]
    mask = mask[None, None]
    if dtype == torch.float32:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    assert_same_as_eager(model, lambda: model(**inputs).logits)


def test_trained_float_mask():
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    mask = torch.randn(1, 1, 12, 12, requires_grad=True)
    gradients = []
    for patched in (False, True):
        mask.grad = None
        with hfp.patched(model) if patched else torch.enable_grad():
            model(ids, attention_mask=mask).logits.square().sum().backward()
        gradients.append(mask.grad)
    assert_close(gradients[1], gradients[0], "gradient of the mask")


@pytest.mark.parametrize(
    "shape", [(2, 12, 12), (2, 1, 11, 12), (2, 1, 12, 11)], ids=["3-D", "queries", "keys"]
)
def test_a_mask_that_does_not_fit_is_refused(shape):
    from hf_flash_patch.integration.attention import hfp_attention

    module = torch.nn.Linear(4, 4)
    q = torch.randn(2, 4, 12, 8)
    with pytest.raises(hfp.MaskError, match="attention_mask"):
        hfp_attention(module, q, q, q, torch.ones(shape, dtype=torch.bool))


def test_a_mask_of_another_attention_is_refused():
    from hf_flash_patch.integration.attention import hfp_attention
    from hf_flash_patch.integration.masking import hfp_mask

    q = torch.randn(2, 4, 12, 8)
    with pytest.raises(hfp.MaskError, match=r"\(2, 5, 5\).*\(2, 12, 12\)"):
        mask = hfp_mask(batch_size=2, q_length=5, kv_length=5)
        hfp_attention(torch.nn.Linear(4, 4), q, q, q, mask)


def test_causal_without_a_mask_must_be_square():
    from hf_flash_patch.integration.attention import hfp_attention

    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 12, 8)
    with pytest.raises(hfp.MaskError, match="3 queries to 12 keys"):
        hfp_attention(torch.nn.Linear(4, 4), q, k, k, None, is_causal=True)


def _with_overlay(model, ids, attention_mask, **overlay):
    """A forward whose mask carries an overlay, as multimodal models make it."""
    embeddings = model.get_input_embeddings()(ids)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        past_key_values=None,
        **overlay,
    )
    hidden, position_ids = embeddings, torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, position_ids)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "overlay",
    [
        {"or_mask_function": lambda b, h, q, k: k < 4},
        {"and_mask_function": lambda b, h, q, k: (q - k) % 3 != 1},
        {"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2]] * 2)},
    ],
    ids=["or", "and", "blocks"],
)
def test_overlay(overlay, padded):
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    attention_mask = None
    if padded:
        attention_mask = torch.ones_like(ids)
        attention_mask[0, 10:] = 0
    assert_same_as_eager(
        model, lambda: _with_overlay(model, ids, attention_mask, **overlay), attention_mask
    )


def test_gemma3_image_tokens_see_each_other():
    """A family whose own forward puts an overlay on its masks."""
    model = tiny_model(AutoModelForCausalLM, "gemma3_text", use_bidirectional_attention=True)
    ids = token_ids()
    assert_same_as_eager(model, lambda: model(ids).logits)


def _overlay(batch, head, query, key):
    return ((query - key) % 3 != 1) | (key < 2)


def _overlaid(model, ids, past=None):
    embeddings = model.get_input_embeddings()(ids)
    seen = 0 if past is None else past.get_seq_length()
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=embeddings,
        attention_mask=torch.ones(len(ids), seen + ids.shape[1], dtype=torch.long),
        past_key_values=past,
        and_mask_function=_overlay,
    )
    return model(ids, attention_mask=mask, past_key_values=past, use_cache=past is not None).logits


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_an_overlay_is_lists_of_blocks(chunk, monkeypatch):
    """Made a few rows at a time, under a pattern of ours, and in decode as bits of keys."""
    monkeypatch.setattr(block_mask, "_CHUNK", chunk)
    model = tiny_model(AutoModelForCausalLM, "llama", max_position_embeddings=512)
    ids = token_ids(2, 300)
    with torch.no_grad():
        expected = _overlaid(model, ids)
        window = masks.from_mask_mod(_overlay) & masks.sliding_window(9) & masks.causal()
        dense = torch.where(window.dense(300), 0.0, float("-inf")).expand(2, 1, -1, -1)
        both = model(ids, attention_mask=dense).logits
        with hfp.patched(model):
            assert_close(_overlaid(model, ids), expected, "logits")
            past = DynamicCache(config=model.config)
            parts = (ids[:, :290], ids[:, 290:299], ids[:, 299:])
            in_parts = torch.cat([_overlaid(model, part, past) for part in parts], dim=1)
            assert_close(in_parts, expected, "logits in parts")
        with hfp.patched(model, mask=masks.sliding_window(9)):
            assert_close(_overlaid(model, ids), both, "logits under both")


def test_an_overlay_is_compiled():
    model = tiny_model(AutoModelForCausalLM, "llama", num_hidden_layers=1)
    ids = token_ids(2, 40)
    with hfp.patched(model), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda ids: _overlaid(model, ids), fullgraph=True, backend="aot_eager", dynamic=True
        )
        assert_close(compiled(ids), _overlaid(model, ids), "logits")
