"""Documents packed in a row: found from position_ids and cu_seq_lens, kept apart in every model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorWithFlattening,
    DynamicCache,
)

import hf_flash_patch as hfp
from hf_flash_patch.integration import packing
from tests.integration.tiny import assert_close, logits_and_gradients, tiny_model, token_ids

FAMILIES = {
    "bert": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "mistral": AutoModelForCausalLM,
    "roberta": AutoModelForMaskedLM,
}


def _positions(lengths, start=0):
    return torch.cat([torch.arange(start, start + length) for length in lengths])


def _ranges_by_hand(lengths):
    rows, start = [], 0
    for length in lengths:
        rows += [[start, start + length]] * length
        start += length
    return torch.tensor([rows], dtype=torch.int32)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_ranges_from_position_ids_and_cu_seqlens(lengths, start):
    expected = _ranges_by_hand(lengths)
    positions = _positions(lengths, start)[None]
    boundary = packing.boundaries_from_position_ids(positions)
    torch.testing.assert_close(packing.ranges_from_boundaries(boundary), expected)
    everything_real = torch.ones_like(positions, dtype=torch.bool)
    boundary = packing.boundaries_from_position_ids(positions, everything_real)
    torch.testing.assert_close(packing.ranges_from_boundaries(boundary), expected)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths)
    torch.testing.assert_close(packing.ranges_from_cu_seqlens(cu_seqlens, total), expected)


@pytest.mark.parametrize(
    "positions, real",
    [
        ([1, 1, 1, 0, 1, 2, 3], [0, 0, 0, 1, 1, 1, 1]),  # left padding in generate
        ([0, 1, 2, 3, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]),  # right padding, filled with 1
        ([0, 1, 2, 3, 4, 5, 6], [1, 1, 0, 0, 1, 0, 1]),  # holes counted
        ([0, 1, 1, 1, 2, 1, 3], [1, 1, 0, 0, 1, 0, 1]),  # holes not counted
        ([0, 1, 0, 0, 2, 0, 3], [1, 1, 0, 0, 1, 0, 1]),  # holes filled with 0
        ([5, 9, 12, 40, 41, 60, 61], [1, 1, 1, 1, 1, 1, 1]),  # positions spread out
    ],
)
def test_padding_is_not_mistaken_for_documents(positions, real):
    boundary = packing.boundaries_from_position_ids(
        torch.tensor([positions]), torch.tensor([real], dtype=torch.bool)
    )
    assert not boundary.any()


def test_documents_next_to_padding_are_told_apart():
    positions = torch.tensor([[2, 3, 4, 1, 1, 2, 3, 2, 1]])
    real = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    boundary = packing.boundaries_from_position_ids(positions, real)
    assert boundary.nonzero()[:, 1].tolist() == [5, 7]


def _separately(model, ids, lengths, start=0):
    """Logits of every document by itself, put side by side."""
    parts = torch.split(ids, lengths, dim=1)
    return torch.cat(
        [
            model(part, position_ids=_positions([part.shape[1]], start)[None]).logits
            for part in parts
        ],
        dim=1,
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("cached", [False, True])
def test_packed_equals_separate(family, cached):
    """Two rows packed differently; a cache is in the way of transformers' own detection."""
    model = tiny_model(FAMILIES[family], family)
    start = 2 if family == "roberta" else 0
    ids = token_ids()
    lengths = [[5, 4, 3], [1, 9, 2]]
    positions = torch.stack([_positions(row, start) for row in lengths])
    expected, expected_gradients = logits_and_gradients(
        lambda: torch.cat(
            [_separately(model, ids[i : i + 1], lengths[i], start) for i in range(2)]
        ),
        model,
        None,
    )
    extra = {}
    if FAMILIES[family] is AutoModelForCausalLM:
        extra = {"use_cache": cached}
    with hfp.patched(model):
        actual, gradients = logits_and_gradients(
            lambda: model(ids, position_ids=positions, **extra).logits, model, None
        )
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_positions_that_jump_under_a_mask_are_one_document():
    model = tiny_model(FAMILIES["llama"], "llama")
    ids, positions = token_ids(), torch.tensor([[0, 1, 2, 3, 9, 10, 11, 20, 21, 22, 23, 24]])
    real = torch.ones_like(ids)
    with torch.no_grad():
        # Eager attention knows no documents where there is a mask.
        expected = model(ids, attention_mask=real, position_ids=positions).logits
        with hfp.patched(model):
            actual = model(ids, attention_mask=real, position_ids=positions).logits
            apart = model(ids, position_ids=positions, use_cache=False).logits
    assert_close(actual, expected, "one document")
    assert (apart - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_packed_and_padded(family):
    """Two documents, then padding; and the same with a hole between them."""
    model = tiny_model(FAMILIES[family], family)
    ids = token_ids()
    positions = torch.tensor(
        [[0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 1, 2, 3, 4, 5, 0]]
    )
    real = torch.ones(2, 12, dtype=torch.long)
    real[0, 8:] = 0
    real[1, 3:5] = 0
    real[1, 11] = 0
    with torch.no_grad():
        first = _separately(model, ids[:1, :8], [4, 4])
        second = _separately(model, ids[1:, :3], [3]), _separately(model, ids[1:, 5:11], [6])
        with hfp.patched(model):
            actual = model(ids, attention_mask=real, position_ids=positions).logits
    assert_close(actual[:1, :8], first, "padding after")
    assert_close(actual[1:, :3], second[0], "before the hole")
    assert_close(actual[1:, 5:11], second[1], "after the hole")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert"])
@pytest.mark.parametrize("padding_mask", [False, True])
def test_cu_seq_lens(family, padding_mask):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes."""
    model = tiny_model(FAMILIES[family], family)
    ids = token_ids(1)
    lengths = [5, 4, 3]
    documents = [{"input_ids": part[0].tolist()} for part in torch.split(ids, lengths, dim=1)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator(documents, return_tensors="pt")
    batch.pop("labels")
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 9, 12]
    if padding_mask:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, -1] = 0
    if family == "gpt2":
        batch["use_cache"] = False
    expected, _ = logits_and_gradients(lambda: _separately(model, ids, lengths), model, None)
    with hfp.patched(model):
        actual, gradients = logits_and_gradients(lambda: model(**batch).logits, model, None)
    # The last document lost a token; earlier ones must not notice.
    real = slice(0, 9) if padding_mask else slice(None)
    assert_close(actual[:, real], expected[:, real], "logits")
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_packed_and_chunked():
    """Chunks count from the start of the row, whatever is packed in it."""
    model = tiny_model(AutoModelForCausalLM, "llama4_text", attention_chunk_size=4)
    ids, positions = token_ids(), _positions([7, 5])[None].expand(2, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        with hfp.patched(model):
            actual = model(ids, position_ids=positions, use_cache=False).logits
    assert_close(actual, expected, "logits")


def test_cached_continuation_is_not_packing():
    """Positions that go on from a cache change nothing."""
    model = tiny_model(AutoModelForCausalLM, "llama")
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits[:, 7:]
        with hfp.patched(model):
            cache = DynamicCache(config=model.config)
            model(ids[:, :7], past_key_values=cache)
            actual = model(ids[:, 7:], past_key_values=cache).logits
    assert_close(actual, expected, "logits")


def test_ranges_are_computed_once_per_forward(monkeypatch):
    model = tiny_model(AutoModelForCausalLM, "llama", num_hidden_layers=4)
    calls = []
    original = packing.ranges_from_boundaries

    def counted(boundary):
        calls.append(boundary)
        return original(boundary)

    monkeypatch.setattr(packing, "ranges_from_boundaries", counted)
    with torch.no_grad(), hfp.patched(model):
        model(token_ids(), position_ids=_positions([5, 7])[None])
    assert len(calls) == 1
