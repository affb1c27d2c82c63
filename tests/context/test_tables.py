"""The four ways to grow a learned position table."""

import pytest
import torch

import hf_flash_patch as hfp
from hf_flash_patch.context.tables import ALPHA, KEEP_OLD_LENGTHS, METHODS, grow


@pytest.fixture
def table():
    return torch.randn(8, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reserved", [0, 2])
def test_shape_dtype_and_reserved_rows(table, method, dtype, reserved):
    weight = table.to(dtype)
    grown = grow(weight, reserved, 20, method)
    assert grown.shape == (reserved + 20, 5) and grown.dtype == dtype
    assert torch.equal(grown[:reserved], weight[:reserved])
    kept = torch.equal(grown[:8], weight)
    assert kept == (method in KEEP_OLD_LENGTHS)
    assert grown.isfinite().all()


def test_tile_repeats_what_follows_the_reserved_rows(table):
    grown = grow(table, 2, 13, "tile")
    for position in range(13):
        assert torch.equal(grown[2 + position], table[2 + position % 6])


def test_interpolate_is_linear_and_keeps_both_ends(table):
    grown = grow(table, 0, 15, "interpolate")
    assert torch.equal(grown[0], table[0]) and torch.equal(grown[-1], table[-1])
    torch.testing.assert_close(grown[::2], table)
    torch.testing.assert_close(grown[1::2], (table[1:] + table[:-1]) / 2)


def test_interpolate_of_a_single_position_repeats_it(table):
    assert torch.equal(grow(table[:1], 0, 3, "interpolate"), table[:1].expand(3, -1))


def test_hierarchical_follows_its_formula(table):
    u = (table - ALPHA * table[0]) / (1 - ALPHA)
    grown = grow(table, 0, 64, "hierarchical")
    for position in (8, 9, 23, 63):
        i, j = divmod(position, 8)
        torch.testing.assert_close(grown[position], ALPHA * u[i] + (1 - ALPHA) * u[j])
    distances = torch.cdist(grown, grown) + torch.eye(64)
    assert distances.min() > 1e-3  # no position has another's row


def test_hierarchical_ends_at_the_square(table):
    with pytest.raises(hfp.ContextExtensionError, match=r"reaches 8² = 64 tokens.*not 65"):
        grow(table, 0, 65, "hierarchical")


def test_random_has_the_spread_of_the_table():
    table = 3 + 0.02 * torch.randn(512, 64)
    new = grow(table, 0, 4096, "random")[512:]
    torch.testing.assert_close(new.mean(), table.mean(), rtol=0, atol=1e-3)
    torch.testing.assert_close(new.std(), table.std(), rtol=0.02, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_meta_tables_grow_without_values(method):
    grown = grow(torch.empty(8, 5, device="meta"), 2, 20, method)
    assert grown.is_meta and grown.shape == (22, 5)
