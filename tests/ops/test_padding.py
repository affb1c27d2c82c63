"""Packing a key padding mask into a range and bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flash_patch.errors import MaskError
from hf_flash_patch.ops.functional import flash_attn_func
from hf_flash_patch.ops.padding import pack_key_padding, unpack_key_bits


@given(st.integers(1, 3), st.integers(0, 100), st.floats(0, 1), st.integers(0, 2**31))
def test_bits_and_range_say_the_mask(batch, seqlen_k, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, seqlen_k, generator=generator) < density
    key_range, key_bits = pack_key_padding(mask)
    assert key_range.dtype == key_bits.dtype == torch.int32
    assert key_bits.shape == (batch, -(-seqlen_k // 32))
    bits = unpack_key_bits(key_bits, seqlen_k)
    for b in range(batch):
        real = mask[b].nonzero().flatten().tolist()
        start, stop = (real[0], real[-1] + 1) if real else (0, 0)
        assert key_range[b].tolist() == [start, stop]
        assert torch.equal(bits[b, start:stop], mask[b, start:stop])
        assert bits[b, :start].all() and bits[b, stop:].all()


def test_words():
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, [3, 31, 33]] = True
    _, key_bits = pack_key_padding(mask)
    # Bits before the first real key and behind the last are 1, so that full words stay full.
    assert [word & 0xFFFFFFFF for word in key_bits[0].tolist()] == [0x8000000F, 0xFFFFFFFE]


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(5, dtype=torch.bool)])
def test_wrong_masks(mask):
    with pytest.raises(MaskError, match=r"it has to be bool \(batch, seqlen_k\)"):
        pack_key_padding(mask)


def test_left_padding_equals_the_unpadded_batch():
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, :6] = False
    padded = flash_attn_func(q, k, v, causal=True, key_padding_mask=mask)
    alone = flash_attn_func(q[:, 6:], k[:, 6:], v[:, 6:], causal=True)
    torch.testing.assert_close(padded[:, 6:], alone)
    assert not padded[:, :6].any()
