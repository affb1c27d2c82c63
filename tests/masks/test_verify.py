"""`BlockMask.verify`: lists as they should be, and in every way as they should not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_flash_patch import MaskError, masks
from hf_flash_patch.masks import BlockMask
from tests.masks.catalogue import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_lowered_is_right(case):
    case.pattern.block_mask(150, 200, 2, block_size=32).verify()


def test_others_are_right():
    q = torch.randn(2, 150, 4, 8)
    masks.top_k_blocks(2, block_size=32).select(q, q, causal=True).verify()
    BlockMask.from_dense(torch.rand(2, 3, 50, 70) < 0.1, 32).verify()
    masks.full().block_mask(0, 9).verify()
    lengths = [(3, 3), (64, 90)]
    BlockMask.stack([masks.causal().block_mask(*pair) for pair in lengths]).verify()


def _changed(name: str, index: tuple, value: int) -> BlockMask:
    mask = (masks.causal() | masks.sinks(3)).block_mask(200, block_size=32)
    tensor = getattr(mask, name).clone()
    tensor[index] = value
    return replace(mask, **{name: tensor})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: _changed("row_offsets", (0, 0, 0), 1), "has to start at 0"),
        (lambda: _changed("row_offsets", (0, 0, 2), 99), "has to start at 0"),
        (lambda: _changed("row_entries", (1, 0), 7), "names block 7"),
        (lambda: _changed("row_entries", (1, 0), -1), r"names block 6 \(least -1\)"),
        (lambda: _changed("column_entries", (0, 1), 5), "names tile 5"),
        (lambda: _changed("row_entries", (2, 0), 0), "do not rise, or one block twice"),
        (lambda: _changed("row_entries", (2, 1), -1), "are not the same ones"),
        (lambda: _changed("tiles_t", (0, 0, 0), 5), "are not the transposed tiles"),
        (lambda: replace(_changed("tiles", (0, 0, 0), 1), num_heads=2), r"int32 \(1, 2, 8\)"),
        (
            lambda: replace(masks.causal().block_mask(64), tiles=torch.zeros(1, 64, 2)),
            "tiles has dtype torch.float32",
        ),
        (lambda: replace(masks.causal().block_mask(64), block_size=100), "block_size is 100"),
    ],
)
def test_what_is_wrong(make, text):
    with pytest.raises(MaskError, match=text):
        make().verify()


def test_bits_past_the_end():
    mask = masks.from_block_layout(torch.eye(2, dtype=torch.bool), 10).block_mask(20, block_size=32)
    longer = masks.full().block_mask(32, block_size=32)
    full = torch.full_like(mask.tiles, -1)
    entries = mask.row_entries.clone()
    wrong = replace(longer, seqlen_q=20, seqlen_k=20, tiles=full, tiles_t=full)
    wrong = replace(wrong, row_entries=entries, column_entries=entries)
    with pytest.raises(MaskError, match="bits past the end of a sequence of 20"):
        wrong.verify()
