"""FlexAttention's block masks: from and to, element by element, and its own result."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from hf_flash_patch import MaskError, masks
from tests.masks.catalogue import CASES, brute_force


def _mod(b, h, q, k):
    return ((q // 7 + k // 5 + h + b) % 3 == 0) | (k < 20)


@pytest.mark.parametrize("block", [32, 128, (64, 128)])
@pytest.mark.parametrize(("batch", "heads"), [(None, None), (2, 3)])
def test_from_flex(block, batch, heads):
    flex = create_block_mask(_mod, batch, heads, 130, 200, device="cpu", BLOCK_SIZE=block)
    wanted = create_mask(_mod, batch, heads, 130, 200, device="cpu")
    pattern = masks.from_flex(flex)
    mask = pattern.block_mask(130, 200, heads, block_size=64)
    assert torch.equal(mask.dense(), wanted)
    assert torch.equal(
        (~pattern & masks.causal()).dense(130, 200, heads)[0, 0],
        (~wanted[0, 0] & masks.causal().dense(130, 200)[0, 0]),
    )
    with pytest.raises(MaskError, match="for seqlen_q 130 and seqlen_k 200"):
        pattern.block_mask(130, 201, heads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_to_flex_and_back(case):
    mask = case.pattern.block_mask(100, 170, 2, block_size=64)
    flex = mask.to_flex(2)
    wanted = brute_force(case, 100, 170)
    assert torch.equal(create_mask(flex.mask_mod, 1, 2, 100, 170, device="cpu"), wanted)
    again = masks.from_flex(flex).block_mask(100, 170, 2, block_size=128)
    assert torch.equal(again.dense().expand_as(wanted), wanted)
