"""Dropout's bits: Philox itself, the layout of its bytes, statistics, independence of tiles."""

from __future__ import annotations

import pytest
import torch

from hf_flash_patch.ops import torch_engine
from hf_flash_patch.ops.dropout import (
    _philox,
    dropout_keep_mask,
    keep_scale,
    keep_threshold,
    keep_tile,
    new_rng_state,
)
from hf_flash_patch.ops.functional import flash_attn_func
from hf_flash_patch.ops.torch_engine import Tiling
from tests.ops.cases import SEED, make_problem, run

STATE = torch.tensor([0x0123456789ABCDEF, 7])


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-7 in Python's integers."""
    x, y, z, w = counter
    key_0, key_1 = key
    for _ in range(7):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (
            (b >> 32) ^ y ^ key_0,
            b & 0xFFFFFFFF,
            (a >> 32) ^ w ^ key_1,
            a & 0xFFFFFFFF,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return x, y, z, w


def kept_by_hand(i: int, j: int, head: int, threshold: int) -> bool:
    """The definition, for one pair."""
    seed, offset = STATE.tolist()
    counter = ((j // 16) * 4 + (j % 8) // 2, (i // 16) * 4 + (i % 8) // 2, head, offset)
    words = philox_by_hand(counter, (seed & 0xFFFFFFFF, seed >> 32))
    word = words[2 * (i % 2) + (i // 8) % 2]
    byte = 2 * (j % 2) + (j // 8) % 2
    return (word >> (8 * byte)) & 0xFF < threshold


def test_philox_known_answers():
    """The generator's published vectors, for 7 rounds."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ones,) * 4, (ones,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ):
        words = _philox(
            tuple(torch.tensor(x) for x in counter), tuple(torch.tensor(x) for x in key)
        )
        assert philox_by_hand(counter, key) == expected
        assert tuple(word.item() for word in words) == expected


def test_layout_of_bytes():
    batch, num_heads, seqlen_q, seqlen_k = 2, 3, 37, 70
    mask = dropout_keep_mask(STATE, 0.4, batch, num_heads, seqlen_q, seqlen_k)
    for b, h, i, j in torch.randint(10**6, (300, 4)).tolist():
        b, h, i, j = b % batch, h % num_heads, i % seqlen_q, j % seqlen_k
        expected = kept_by_hand(i, j, b * num_heads + h, keep_threshold(0.4))
        assert mask[b, h, i, j].item() == expected


def test_any_part_equals_the_whole():
    whole = dropout_keep_mask(STATE, 0.3, 1, 4, 100, 200)[0]
    heads = torch.tensor([1, 3])
    for rows, columns in (((0, 100), (0, 200)), ((5, 6), (199, 200)), ((17, 90), (33, 130))):
        part = keep_tile(STATE, 0.3, heads, *rows, *columns)
        assert torch.equal(part, whole[heads, slice(*rows), slice(*columns)])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_statistics(dropout_p):
    keep = dropout_keep_mask(STATE, dropout_p, 4, 4, 512, 512).double()
    probability = keep_threshold(dropout_p) / 256
    assert abs(probability - (1 - dropout_p)) <= 1 / 512
    # The scale undoes exactly the probability in use, so the mean is unbiased.
    assert keep_scale(dropout_p) * probability == 1.0

    def within(mean: torch.Tensor, count: int) -> bool:
        sigma = (probability * (1 - probability) / count) ** 0.5
        return bool(((mean - probability).abs() < 5 * sigma).all())

    assert within(keep.mean(), keep.numel())
    for axis in range(4):
        others = [x for x in range(4) if x != axis]
        assert within(keep.mean(dim=others), keep.numel() // keep.shape[axis])
    # Neighbours in any direction are independent.
    centred = keep - probability
    for axis in range(4):
        product = centred.narrow(axis, 0, keep.shape[axis] - 1) * centred.narrow(
            axis, 1, keep.shape[axis] - 1
        )
        sigma = probability * (1 - probability) / product.numel() ** 0.5
        assert abs(product.mean()) < 5 * sigma


def test_seed_and_offset_change_the_mask():
    first = dropout_keep_mask(torch.tensor([1, 0]), 0.5, 1, 1, 64, 64)
    for state in ([2, 0], [1, 1], [1 + 2**32, 0]):
        other = dropout_keep_mask(torch.tensor(state), 0.5, 1, 1, 64, 64)
        assert 0.4 < (first == other).double().mean() < 0.6


def test_rng_state_follows_manual_seed():
    torch.manual_seed(5)
    first, second = new_rng_state(torch.device("cpu")), new_rng_state(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, new_rng_state(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)


def test_tiles_do_not_matter(monkeypatch):
    problem = make_problem(("dropout", "causal"), seqlen_q=150, dtype=torch.float64)
    dout = torch.randn_like(problem.q)
    results = []
    for tiling in (Tiling(32, 64, 2**12), Tiling(96, 32, 2**20), Tiling(512, 512, 2**20)):
        monkeypatch.setattr(torch_engine, "HOST_TILING", tiling)
        results.append(run(problem, dout, None))
    for other in results[1:]:
        for name in ("out", "dq", "dk", "dv"):
            torch.testing.assert_close(getattr(other, name), getattr(results[0], name))


def test_output_shows_the_mask():
    """With q = 0 and one-hot values, out is the mask over seqlen_k."""
    seqlen = 40
    q = torch.zeros(2, seqlen, 3, seqlen)
    v = torch.eye(seqlen)[None, :, None].expand(2, -1, 3, -1)
    torch.manual_seed(SEED)
    out = flash_attn_func(q, q, v.contiguous(), dropout_p=0.3)
    torch.manual_seed(SEED)
    keep = dropout_keep_mask(new_rng_state(q.device), 0.3, 2, 3, seqlen, seqlen)
    expected = keep.permute(0, 2, 1, 3) * keep_scale(0.3) / seqlen
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("dropout_p", "expected"), [(1.0, 0.0), (0.999, 0.0), (1e-3, None)])
def test_extreme_probabilities(dropout_p, expected):
    problem = make_problem(seqlen_q=20)
    torch.manual_seed(0)
    out = flash_attn_func(problem.q, problem.k, problem.v, dropout_p=dropout_p)
    plain = flash_attn_func(problem.q, problem.k, problem.v, return_lse=True)[0]
    torch.testing.assert_close(out, plain if expected is None else plain * expected)


def test_lse_is_without_dropout():
    problem = make_problem(seqlen_q=30)
    _, lse = flash_attn_func(problem.q, problem.k, problem.v, dropout_p=0.5, return_lse=True)
    _, plain = flash_attn_func(problem.q, problem.k, problem.v, return_lse=True)
    assert torch.equal(lse, plain)
