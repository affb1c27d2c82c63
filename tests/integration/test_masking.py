"""The mask function against transformers' own dense masks, element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as mu

from hf_flash_patch.integration.attention_mask import AttentionMask
from hf_flash_patch.integration.masking import hfp_mask
from hf_flash_patch.integration.patterns import read_mask_function

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2, 3]])


def _dense(**request):
    return mu.sdpa_mask(**request, allow_is_causal_skip=False).expand(
        request["batch_size"], 1, request["q_length"], request["kv_length"]
    )


def _assert_same(mask, **request):
    assert isinstance(mask, AttentionMask)
    torch.testing.assert_close(mask.materialise(), _dense(**request))


FUNCTIONS = {
    "causal": mu.causal_mask_function,
    "bidirectional": mu.bidirectional_mask_function,
    "sliding": mu.sliding_window_causal_mask_function(3),
    "sliding of one": mu.sliding_window_causal_mask_function(1),
    "sliding bidirectional": mu.sliding_window_bidirectional_mask_function(2),
    "packed": mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(DOCUMENTS)),
    "packed sliding": mu.and_masks(
        mu.sliding_window_causal_mask_function(3), mu.packed_sequence_mask_function(DOCUMENTS)
    ),
    "chunked": mu.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "chunked packed": mu.and_masks(
        mu.chunked_causal_mask_function(4, torch.tensor([0, 0])),
        mu.packed_sequence_mask_function(DOCUMENTS),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_known_functions_stay_linear_in_memory(name, padded):
    padding = None
    if padded:
        padding = torch.ones(2, 9, dtype=torch.bool)
        padding[0, :2] = False
        padding[1, [4, 8]] = False
    request = {
        "batch_size": 2,
        "q_length": 9,
        "kv_length": 9,
        "mask_function": FUNCTIONS[name],
        "attention_mask": padding,
    }
    mask = hfp_mask(**request)
    assert mask.dense is None
    _assert_same(mask, **request)


@given(
    q_length=st.integers(1, 7),
    seen=st.integers(0, 9),
    dropped=st.integers(0, 9),
    spare=st.integers(0, 5),
    name=st.sampled_from(["causal", "sliding", "bidirectional", "chunked"]),
    static=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_caches(q_length, seen, dropped, spare, name, static, padded):
    """Dynamic, static, sliding caches: offsets as ints or tensors, unused slots, dropped keys."""
    dropped = min(dropped, seen)
    kv_length = seen - dropped + q_length + spare
    padding = None
    if padded:
        padding = torch.ones(2, seen + q_length, dtype=torch.bool)
        padding[0, : (seen + q_length) // 2] = False
    function = FUNCTIONS[name]
    if name == "chunked":
        function = mu.chunked_causal_mask_function(3, torch.tensor([1, 0]))
    request = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(seen) if static else seen,
        "kv_offset": dropped,
        "mask_function": function,
        "attention_mask": padding,
    }
    mask = hfp_mask(**request)
    expected = _dense(**request)
    if name == "bidirectional" and static:
        # transformers lets a query see the unused slots of a static cache; they hold nothing.
        expected = expected & (torch.arange(kv_length) < seen - dropped + q_length)
    torch.testing.assert_close(mask.materialise(), expected)


UNKNOWN = {
    "or-ed": mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: k < 3),
    "and-ed": mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
    "blockwise": mu.or_masks(
        mu.causal_mask_function,
        mu.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1]] * 2)),
    ),
    "strict": lambda b, h, q, k: k < q,
    "anti-causal": lambda b, h, q, k: k >= q,
    "shifted window": lambda b, h, q, k: k > q + 1 - 4,
    "one head": lambda b, h, q, k: (k <= q) & (h == 0),
    "other document": lambda b, h, q, k, ids=DOCUMENTS: ids[b, q] != ids[b, k],
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("use_vmap", [False, True])
def test_unknown_functions_are_materialised(name, use_vmap):
    request = {
        "batch_size": 2,
        "q_length": 9,
        "kv_length": 9,
        "mask_function": UNKNOWN[name],
        "use_vmap": use_vmap,
    }
    mask = hfp_mask(**request)
    assert mask.dense is None and mask.block_mask is not None
    _assert_same(mask, **request)


def test_a_callers_overlay_is_never_guessed():
    """A caller's overlay is materialised even if readable: its documents need not be contiguous."""
    ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, 0]] * 2)
    function = mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(ids))
    request = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function}
    mask = hfp_mask(**request, use_vmap=True)
    assert mask.dense is None and mask.block_mask is not None
    _assert_same(mask, **request)


def test_reading_says_what_a_function_means():
    pattern = read_mask_function(mu.sliding_window_causal_mask_function(5))
    assert (pattern.causal, pattern.window_left, pattern.window_right) == (True, 4, -1)
    pattern = read_mask_function(mu.sliding_window_bidirectional_mask_function(5))
    assert (pattern.causal, pattern.window_left, pattern.window_right) == (False, 5, 5)
    assert read_mask_function(lambda b, h, q, k: q > 0) is None
    assert read_mask_function(lambda b, h, q, k: 1 / 0) is None


def test_a_mask_that_comes_back_is_passed_on():
    """generate() makes the mask before a compiled forward, which asks for one again."""
    mask = hfp_mask(batch_size=2, q_length=1, kv_length=8, q_offset=torch.tensor(4))
    again = hfp_mask(batch_size=2, q_length=1, kv_length=8, attention_mask=mask)
    assert again is mask
    assert mask.ndim == 4 and mask.shape == (2, 1, 1, 8)


def test_models_may_edit_the_mask_as_if_it_were_dense():
    mask = hfp_mask(batch_size=2, q_length=4, kv_length=6, q_offset=2)
    dense = mask.materialise()
    torch.testing.assert_close(mask[:, :, :, :5], dense[..., :5])
    torch.testing.assert_close(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    torch.testing.assert_close(torch.cat([mask, dense], dim=2), torch.cat([dense, dense], dim=2))
    torch.testing.assert_close(mask.repeat(1, 3, 1, 1), dense.repeat(1, 3, 1, 1))
    torch.testing.assert_close(~mask, mask.logical_not())
    assert not hasattr(mask, "no_method_of_a_tensor")


def test_to_keeps_the_mask():
    padding = torch.tensor([[False, True, True, True]])
    mask = hfp_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=padding)
    torch.testing.assert_close(mask.to("cpu").materialise(), mask.materialise())
    assert mask.to("meta").key_bits.device.type == "meta"


def test_no_padding_is_found_out_on_the_cpu():
    padding = torch.ones(2, 4, dtype=torch.bool)
    mask = hfp_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=padding)
    assert mask.key_range is None and mask.key_bits is None
