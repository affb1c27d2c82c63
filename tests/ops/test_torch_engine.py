"""The torch engine against the specification: features, pairs, and the edges of its tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash_patch.ops import torch_engine, torch_mask
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.functional import attention
from hf_flash_patch.ops.torch_engine import Tiling
from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    TORCH_ONLY,
    check,
    check_what_lies_behind,
    make_problem,
    make_varlen_problem,
    pairs,
    run,
)

TILE = 32
EDGES = (1, TILE - 1, TILE, TILE + 1, 3 * TILE)
SHAPES = [(a, b) for a in EDGES for b in EDGES] + [(113, 203), (799, 3), (3, 799), (192, 192)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that short sequences have several, and chunks of one head."""
    tiling = Tiling(rows=TILE, keys=TILE, elements=2 * TILE * TILE)
    monkeypatch.setattr(torch_engine, "HOST_TILING", tiling)


@pytest.fixture
def unreadable(monkeypatch):
    """Tensors as on a GPU, where the engine must not read them."""
    monkeypatch.setattr(torch_mask, "host_readable", lambda device: False)


@pytest.mark.parametrize("features", pairs((*COMMON, *DENSE_ONLY, *TORCH_ONLY)), ids="+".join)
def test_features_and_their_pairs(features, small_tiles):
    check(make_problem(features, seqlen_q=70), backend="torch")


@pytest.mark.parametrize("features", pairs((*COMMON, *DENSE_ONLY)), ids="+".join)
def test_pairs_in_bf16_where_nothing_is_readable(features, small_tiles, unreadable):
    check(make_problem(features, seqlen_q=40, dtype=torch.bfloat16), backend="torch")


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SHAPES)
@pytest.mark.parametrize("features", [(), ("causal", "gqa"), ("window", "dropout", "padding")])
def test_shapes(features, seqlen_q, seqlen_k, small_tiles):
    check(make_problem(features, seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=torch.float64))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_see(seqlen_q, seqlen_k):
    result = check(make_problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k))
    assert not result.out.any()
    assert not any(gradient.any() for gradient in (result.dq, result.dk, result.dv))
    assert (result.lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 40, 128, 256, 300])
def test_dtypes_and_head_dims(dtype, head_dim):
    result = check(make_problem(("causal", "gqa"), seqlen_q=65, head_dim=head_dim, dtype=dtype))
    assert result.out.dtype == result.dq.dtype == dtype
    assert result.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.out.is_contiguous()


def test_default_tiles():
    for features in ((), ("causal",), ("padding", "dropout"), ("documents", "gqa")):
        check(make_problem(features, seqlen_q=600, num_heads=2))


def test_gradient_of_lse_where_a_row_sees_nothing():
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (6, 4, 4))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    for value in (1.0, float("inf"), float("nan")):
        dlse = torch.where(lse == float("-inf"), value, 0.5)
        grads = torch.autograd.grad(lse, (q, k, v), dlse, retain_graph=True)
        assert all(x.isfinite().all() for x in grads)
        assert not grads[0][:, :2].any()


def test_rows_hidden_by_the_smallest_number(small_tiles):
    """finfo.min hides a key, but a row of nothing else sees all of them alike, as in eager."""
    problem = make_problem(seqlen_q=70)
    hidden = torch.rand(2, 1, 70, 70) < 0.5
    hidden[:, :, :20] = True
    bias = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    problem.mask = MaskArguments(attn_bias=bias)
    result = check(problem, with_dlse=False)
    torch.testing.assert_close(result.out[:, :20], problem.v.mean(1, True).expand(-1, 20, -1, -1))


VARLEN = [
    (),
    *((feature,) for feature in COMMON),
    ("causal", "dropout"),
    ("window", "gqa", "alibi"),
]


@pytest.mark.parametrize("features", VARLEN, ids="+".join)
@pytest.mark.parametrize("on_host", [True, False], ids=["readable", "unreadable"])
def test_variable_length(features, on_host, small_tiles, request):
    if not on_host:
        request.getfixturevalue("unreadable")
    check(
        make_varlen_problem(features, lengths_q=[5, 0, 33, 64, 0], lengths_k=[40, 3, 33, 0, 0]),
        backend="torch",
    )


LENGTHS = st.lists(
    st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6
).filter(lambda lengths: any(q for q, _ in lengths))


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, features=st.sets(st.sampled_from(COMMON), max_size=3))
def test_ragged_batches(lengths, features):
    lengths_q, lengths_k = map(list, zip(*lengths, strict=True))
    features = tuple(sorted(features))
    if {"gqa", "mqa"} <= set(features):
        features = tuple(set(features) - {"mqa"})
    check(make_varlen_problem(features, lengths_q=lengths_q, lengths_k=lengths_k))


def test_variable_length_equals_each_sequence_alone():
    lengths = [7, 40, 1]
    problem = make_varlen_problem(("causal",), lengths_q=lengths)
    out = attention(problem.q, problem.k, problem.v, mask=problem.mask, causal=True)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = attention(
            *(x[None, rows] for x in (problem.q, problem.k, problem.v)),
            causal=True,
            return_lse=True,
        )[0]
        torch.testing.assert_close(out[None, rows], alone, rtol=0, atol=0)
        start += length


def test_bits_do_not_depend_on_the_tiling_of_masked_keys():
    """Keys nobody may see change nothing, not even a bit, whatever they hold."""
    problem = make_problem(("padding",), seqlen_q=70)
    first = attention(problem.q, problem.k, problem.v, mask=problem.mask)
    start, stop = problem.mask.key_range[0].tolist()
    problem.k[0, :start], problem.k[0, stop:] = 1e4, -1e4
    problem.v[0, :start], problem.v[0, stop:] = 1e4, -1e4
    second = attention(problem.q, problem.k, problem.v, mask=problem.mask)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("features", [("causal", "dropout", "gqa"), ("softcap", "batch_alibi")])
def test_gradients_by_finite_differences(features):
    problem = make_problem(features, seqlen_q=6, seqlen_k=9, head_dim=4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def function(q, k, v):
        torch.manual_seed(0)
        return attention(q, k, v, mask=problem.mask, return_lse=True, **problem.options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("features", [(), ("causal", "gqa"), ("dropout",)], ids="+".join)
@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
def test_what_lies_behind_a_sequence_is_not_multiplied(features, on_host, request):
    """Not even by 0."""
    if not on_host:
        request.getfixturevalue("unreadable")
    check_what_lies_behind(features, head_dim=16, device="cpu", backend="torch")


def test_gradients_are_bit_identical_from_run_to_run():
    problem = make_problem(("causal", "dropout", "gqa"), seqlen_q=90)
    dout = torch.randn_like(problem.q)
    first, second = (run(problem, dout, None, deterministic=True) for _ in range(2))
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_empty_blocks_are_skipped(monkeypatch, small_tiles):
    """A window costs what it lets through, not the square."""
    seen = 0
    original = torch_engine.Engine._logits

    def counting(self, tile, block, q, kc):
        nonlocal seen
        seen += (tile.rows.stop - tile.rows.start) * (block.end - block.begin)
        return original(self, tile, block, q, kc)

    monkeypatch.setattr(torch_engine.Engine, "_logits", counting)
    q = torch.randn(1, 1024, 1, 8)
    attention(q, q, q, causal=True, window_size=(31, 0), return_lse=True)
    assert seen <= 1024 * 3 * TILE

    seen = 0
    key_range = torch.tensor([[1000, 1024]], dtype=torch.int32)
    attention(q, q, q, mask=MaskArguments(key_range=key_range))
    assert seen <= 1024 * 2 * TILE
