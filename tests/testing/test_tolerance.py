"""What the tolerance lets through and what it reports."""

from __future__ import annotations

import pytest
import torch

from hf_flash_patch.testing.tolerance import assert_close_to_reference, assert_lse_close

BF16 = torch.bfloat16


def test_twice_the_peers_error_and_a_rounding():
    reference = torch.randn(3, 50, dtype=torch.float64)
    rounded = reference.to(BF16)
    assert_close_to_reference(rounded, reference, reference)
    peer = reference.clone()
    peer[0, 0] += 0.1
    actual = reference.float()
    actual[2, 3] += 0.199
    assert_close_to_reference(actual, reference, peer)
    actual[2, 3] += 0.01
    with pytest.raises(AssertionError, match=r"dq is off by 2.09.e-01 at \(2, 3\) of \(3, 50\)"):
        assert_close_to_reference(actual, reference, peer, name="dq")


@pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("inf", r"\+inf"), ("-inf", "-inf")])
def test_nonfinite_values(value, kind):
    reference = torch.zeros(2, 3, dtype=torch.float64)
    actual = reference.float()
    actual[1, 2] = float(value)
    text = rf"out and its reference differ in {kind} at 1 of 6 positions, first at \(1, 2\)"
    with pytest.raises(AssertionError, match=text):
        assert_close_to_reference(actual, reference, reference, name="out")
    assert_close_to_reference(actual, actual.double(), actual)


def test_a_peer_that_overflows_allows_nothing():
    reference = torch.ones(4, dtype=torch.float64)
    peer = torch.full((4,), float("inf"))
    with pytest.raises(AssertionError, match="off by"):
        assert_close_to_reference(torch.full((4,), 1.1), reference, peer)


def test_shapes():
    with pytest.raises(AssertionError, match=r"lse has shape \(2,\), expected \(3,\)"):
        assert_lse_close(torch.zeros(2), torch.zeros(3), BF16)
    assert_close_to_reference(*[torch.zeros(0, 4)] * 3)


def test_lse():
    reference = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert_lse_close(torch.tensor([1.0009, float("-inf")]), reference, BF16)
    with pytest.raises(AssertionError, match="lse is off by"):
        assert_lse_close(torch.tensor([1.002, float("-inf")]), reference, BF16)
    with pytest.raises(AssertionError, match="differ in -inf"):
        assert_lse_close(torch.tensor([1.0, -1e30]), reference, BF16)
