"""Patterns, alone and in pairs, element by element against their rules; lowering against both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_flash_patch import MaskError, masks
from hf_flash_patch.masks.bits import pack_bits, unpack_bits
from hf_flash_patch.masks.grid import EMPTY, FULL, Grid
from tests.masks.catalogue import BY_NAME, CASES, brute_force

LENGTHS = [(64, 64), (131, 131), (50, 170), (1, 100), (200, 240)]


@pytest.fixture(scope="module")
def expected():
    """Each rule, pair by pair, for one pair of lengths."""
    return {case.name: brute_force(case, 90, 150) for case in CASES}


def same(pattern: masks.Pattern, wanted: torch.Tensor, block_size: int = 64) -> bool:
    """Whether a pattern's lists say what `wanted` (1, 2, seqlen_q, seqlen_k) does, both ways."""
    mask = pattern.block_mask(*wanted.shape[2:], 2, block_size=block_size)
    check_lists(mask)
    return bool((mask.dense() == wanted).all())


def check_lists(mask: masks.BlockMask) -> None:
    """Rows and columns list the same blocks, in order, and no block that is empty or cut."""
    offsets, entries = mask.row_offsets.flatten(0, 1).tolist(), mask.row_entries.tolist()
    by_row = [
        (number, row, *entries[e])
        for number, row_offsets in enumerate(offsets)
        for row in range(len(row_offsets) - 1)
        for e in range(row_offsets[row], row_offsets[row + 1])
    ]
    offsets, entries = mask.column_offsets.flatten(0, 1).tolist(), mask.column_entries.tolist()
    by_column = [
        (number, entries[e][0], column, entries[e][1])
        for number, column_offsets in enumerate(offsets)
        for column in range(len(column_offsets) - 1)
        for e in range(column_offsets[column], column_offsets[column + 1])
    ]
    assert by_row == sorted(by_row) == sorted(by_column)
    assert by_column == sorted(by_column, key=lambda entry: (entry[0], entry[2], entry[1]))
    bits = unpack_bits(mask.tiles)
    assert torch.equal(bits.transpose(1, 2), unpack_bits(mask.tiles_t))
    assert bits.any(dim=2).any(dim=1).all()
    assert len(mask.tiles.flatten(1).unique(dim=0)) == len(mask.tiles)
    assert {entry[3] for entry in by_row} <= {-1, *range(len(mask.tiles))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_patterns_alone(case):
    for lengths in LENGTHS:
        wanted = brute_force(case, *lengths)
        dense = case.pattern.dense(*lengths, num_heads=2)
        assert (dense == wanted).all(), lengths
        assert same(case.pattern, wanted), lengths
        assert same(~case.pattern, ~wanted), lengths


@pytest.mark.parametrize(
    "pair", list(itertools.combinations_with_replacement(CASES, 2)), ids=lambda p: p[0].name
)
def test_pairs(pair, expected):
    a, b = pair
    wanted, other = expected[a.name], expected[b.name]
    assert same(a.pattern & b.pattern, wanted & other)
    assert same(a.pattern | ~b.pattern, wanted | ~other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("block", [32, 96, 128])
def test_blocks_of_other_sizes(case, block):
    wanted = brute_force(case, 140, 140)
    assert same(case.pattern, wanted, block)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_part_of_a_longer_sequence(case):
    """Decode and sliding caches: positions of the first query and key of one's own."""
    whole = case.pattern.dense(200, num_heads=2)
    part = case.pattern.block_mask(30, 90, 2, q_start=130, k_start=70, block_size=32)
    assert (part.dense() == whole[:, :, 130:160, 70:160]).all()
    start = torch.tensor([130])
    assert (
        case.pattern.dense(30, 90, 2, q_start=start, k_start=70) == whole[:, :, 130:160, 70:160]
    ).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unequal_blocks_of_one_hash(case, monkeypatch):
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size, generator: torch.zeros(size).long()
    )
    assert same(case.pattern, brute_force(case, 131, 131))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_states_of_blocks_are_true(case):
    """What is called empty or full is; and little else is called partial."""
    for head in range(2):
        one = case.pattern.at(0, head, 2)
        for grid in (Grid(130, 170, 40, 0, 32), Grid(64, 64, 65, 33, 16)):
            row, column, state = one.runs(grid).blocks()
            states = torch.full((grid.rows, grid.columns), EMPTY, dtype=torch.uint8)
            states[row, column] = state
            q = torch.arange(grid.seqlen_q)[:, None] + grid.q_start
            seen = one.visible(q, torch.arange(grid.seqlen_k) + grid.k_start)
            seen = seen.expand(grid.seqlen_q, grid.seqlen_k)
            for i, j in itertools.product(range(grid.rows), range(grid.columns)):
                block = seen[i * grid.block :, j * grid.block :][: grid.block, : grid.block]
                if states[i, j] == EMPTY:
                    assert not block.any(), (grid, i, j)
                if states[i, j] == FULL:
                    assert block.all(), (grid, i, j)


@pytest.mark.parametrize(
    "name", ["causal", "window", "sinks", "butterfly", "layout", "fixed", "shifted_groups"]
)
def test_partial_means_partial(name):
    """No block is looked at in vain."""
    grid = Grid(240, 240, 0, 0, 32)
    for head in range(2):
        one = BY_NAME[name].pattern.at(0, head, 2)
        row, column, state = one.runs(grid).blocks()
        dense = one.visible(torch.arange(240)[:, None], torch.arange(240))
        for i, j, kind in zip(row.tolist(), column.tolist(), state.tolist(), strict=True):
            block = dense[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
            assert block.any() and (kind == FULL) == bool(block.all())


def test_batches():
    ids = torch.tensor([[0] * 40 + [1] * 60, [0] * 10 + [1] * 90])
    pattern = masks.documents(ids) & masks.sliding_window(30)
    mask = pattern.block_mask(100, block_size=32)
    near = (torch.arange(100)[:, None] - torch.arange(100)).abs() < 30
    assert (mask.dense()[:, 0] == ((ids[:, :, None] == ids[:, None]) & near)).all()
    modified = masks.from_mask_mod(lambda b, h, q, k: (q + b) % 2 == k % 2, batch=3)
    assert modified.block_mask(50).batch_size == 3
    with pytest.raises(MaskError, match="for 2 and for 3 sequences"):
        (pattern & modified).block_mask(50)


def test_heads_of_several_patterns():
    three = masks.per_head([masks.causal(), masks.full(), masks.sliding_window(3)])
    mask = (three & masks.shifted_groups(8)).block_mask(40, num_heads=12)
    assert mask.num_heads == 6
    dense = (three & masks.shifted_groups(8)).dense(40, num_heads=12)
    assert (mask.dense() == dense).all()
    with pytest.raises(MaskError, match="3 patterns among its heads, the call has 4"):
        three.block_mask(40, num_heads=4)


def test_density():
    assert masks.full().density(300) == 1.0
    assert masks.causal().density(100) == pytest.approx(5050 / 10000)
    pattern = masks.sliding_window(20) | masks.sinks(3)
    assert pattern.density(70, 90) == pytest.approx(pattern.dense(70, 90).double().mean().item())


def test_from_dense_and_back():
    seen = torch.rand(2, 3, 70, 100) < 0.5
    seen[0, 0, :32, :32] = True
    seen[1, 1, 32:64] = False
    mask = masks.BlockMask.from_dense(seen, 32)
    assert torch.equal(mask.dense(), seen)
    assert (mask.row_entries[:, 1] == -1).sum() == 1
    assert mask.row_offsets.diff(dim=2)[1, 1, 1] == 0


@pytest.mark.parametrize("pattern", [masks.full(), masks.causal() & masks.sinks(3)])
def test_dense_reads_nothing(pattern):
    """Of lists on a device: it is part of a forward where a pattern meets a model's own mask."""
    for mask in (pattern.block_mask(70, 90), masks.BlockMask.from_dense(pattern.dense(70, 90))):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert mask.dense().shape == (1, 1, 70, 90)
        assert torch.equal(mask.dense(), pattern.dense(70, 90))


def test_stack():
    parts = [masks.causal().block_mask(*lengths, block_size=32) for lengths in ((40, 40), (3, 90))]
    mask = masks.BlockMask.stack(parts)
    dense = mask.dense()
    assert mask.batch_size == 2
    for b, part in enumerate(parts):
        assert torch.equal(dense[b, 0, : part.seqlen_q, : part.seqlen_k], part.dense()[0, 0])


def test_stack_of_lists_with_room_to_spare():
    """Lists made without asking their length have entries past the end, which mean nothing."""
    parts = [torch.rand(1, 2, *lengths) < 0.3 for lengths in ((40, 96), (97, 40), (1, 70))]
    for part in parts:
        part[:, 1, :, 32:64] = False
    mask = masks.BlockMask.stack([masks.BlockMask.from_dense(part, 32) for part in parts])
    mask.verify()
    for dense, part in zip(mask.dense(), parts, strict=True):
        assert torch.equal(dense[:, : part.shape[2], : part.shape[3]], part[0])
        assert dense.sum() == part.sum()


def test_bits():
    blocks = torch.rand(5, 64, 96) < 0.5
    assert torch.equal(unpack_bits(pack_bits(blocks)), blocks)
    words = pack_bits(torch.arange(64) == 33)
    assert words.tolist() == [0, 2] and words.dtype == torch.int32


def test_numpys_integers():
    pattern = masks.sliding_window(np.int64(3)) | masks.global_tokens(np.arange(2))
    assert pattern == masks.sliding_window(3) | masks.global_tokens([0, 1])
    assert str(pattern) == "sliding_window(3) | global_tokens(2)"


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing(seqlen_q, seqlen_k):
    mask = masks.causal().block_mask(seqlen_q, seqlen_k)
    assert mask.dense().shape == (1, 1, seqlen_q, seqlen_k)
    assert len(mask.row_entries) == 0 and mask.density() == 0.0


@pytest.mark.parametrize("shape", [(0, 1, 5, 5), (1, 1, 0, 5), (1, 2, 5, 0)])
def test_from_dense_of_nothing(shape):
    mask = masks.BlockMask.from_dense(torch.ones(shape, dtype=torch.bool))
    mask.verify()
    assert mask.dense().shape == shape


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: masks.sliding_window(0), "sliding_window's size is 0"),
        (lambda: masks.sliding_window(2.5), "has to be an int >= 1"),
        (lambda: masks.global_tokens([-1]), "an index of global_tokens is -1"),
        (lambda: masks.global_tokens(1.0), "global_tokens' number is 1.0"),
        (lambda: masks.fixed(4, 5), "globals_ is 5, its block 4"),
        (lambda: masks.bigbird(2, 1, 1), "has to be odd"),
        (lambda: masks.shifted_groups(7), "has to be even"),
        (lambda: masks.per_head([]), "got no patterns"),
        (lambda: masks.per_head([masks.shifted_groups(8)]), "the same for all heads"),
        (lambda: masks.documents(), "one of them"),
        (lambda: masks.documents(cu_seqlens=[1, 2]), "has to start at 0"),
        (lambda: masks.documents(torch.rand(3)), "has to be int"),
        (lambda: masks.from_block_layout(torch.ones(3, 3), 64), "has to be bool"),
        (lambda: masks.from_block_layout(torch.ones(4, 3).bool(), 64), "4 rows and 3 columns"),
        (lambda: masks.from_mask_mod(3), "takes a function"),
        (
            lambda: masks.from_mask_mod(lambda b, h, q, k: True).block_mask(9),
            "mask_mod returned a bool",
        ),
        (lambda: masks.from_flex(3), "from_flex got a int"),
        (lambda: masks.causal() & 3, "a pattern & a int"),
        (lambda: masks.causal().block_mask(64, block_size=48), "block_size is 48"),
        (lambda: masks.documents([0, 1]).block_mask(3), "documents describe 2 tokens"),
        (
            lambda: masks.from_block_layout(torch.ones(2, 2).bool(), 64).block_mask(129),
            "2 x 2 blocks of 64 tokens",
        ),
        (
            lambda: masks.from_block_layout(torch.ones(1, 2).bool(), 64).block_mask(100, 128),
            "1 x 2 blocks of 64 tokens",
        ),
        (lambda: masks.BlockMask.from_dense(torch.ones(3, 3)), "has to be bool"),
        (
            lambda: masks.BlockMask.stack(
                [masks.full().block_mask(9), masks.full().block_mask(9, block_size=32)]
            ),
            "are stacked",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(MaskError, match=text):
        make()
