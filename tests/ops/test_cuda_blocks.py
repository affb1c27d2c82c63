"""The compiled kernels under block lists, with every other feature, against the specification."""

from __future__ import annotations

import pytest
import torch

from hf_flash_patch import masks
from hf_flash_patch.masks import BlockMask
from hf_flash_patch.ops.functional import flash_attn_func
from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    Problem,
    check,
    make_problem,
    make_varlen_problem,
    run,
    with_random_blocks,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
LISTS = ((1, 1), (2, 4), (1, 2))  # batch, heads


def problem_of(features: tuple[str, ...], **shape: object) -> Problem:
    return make_problem(features, **{"dtype": BF16, "device": "cuda", **shape})


def check_lists(problem: Problem, lists: tuple[int, int]) -> None:
    check(with_random_blocks(problem, *lists, 128), backend="cuda")


@pytest.mark.parametrize("feature", (*COMMON, *DENSE_ONLY))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_features(feature, head_dim):
    for lists in LISTS:
        check_lists(problem_of((feature,), seqlen_q=500, head_dim=head_dim), lists)


@pytest.mark.parametrize(
    "features",
    [
        ("causal", "gqa", "dropout", "padding"),
        ("window", "mqa", "softcap", "holes", "alibi"),
        ("causal", "seqused", "dropout"),
        ("documents", "causal", "gqa", "batch_alibi"),
    ],
)
def test_features_together(features):
    for head_dim in (64, 128, 256):
        for lists in LISTS:
            check_lists(problem_of(features, seqlen_q=400, head_dim=head_dim), lists)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [20, 32, 64, 80, 96, 128, 160, 256])
def test_head_dims(head_dim, dtype):
    for features in ((), ("causal", "gqa"), ("dropout",), ("softcap",)):
        problem = problem_of(features, seqlen_q=333, head_dim=head_dim, dtype=dtype)
        check_lists(problem, (1, 4))


@pytest.mark.parametrize("seqlen_k", [1, 127, 128, 129, 640])
@pytest.mark.parametrize("seqlen_q", [1, 64, 127, 129, 640])
def test_lengths(seqlen_q, seqlen_k):
    for features in ((), ("causal", "gqa"), ("left_window",)):
        for head_dim in (64, 128):
            shape = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim}
            check_lists(problem_of(features, **shape), (2, 2))


@pytest.mark.parametrize("features", [(), ("causal", "gqa", "dropout"), ("alibi", "softcap")])
def test_varlen(features):
    lengths = [300, 1, 0, 129, 512]
    for lists in ((1, 1), (5, 4)):
        problem = make_varlen_problem(
            features, lengths_q=lengths, head_dim=64, dtype=BF16, device="cuda"
        )
        check_lists(problem, lists)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic(head_dim):
    """dQ too is bit-equal from run to run, whatever blocks meet a tile."""
    for features in ((), ("causal", "gqa"), ("window",)):
        problem = problem_of(features, seqlen_q=1500, head_dim=head_dim)
        problem = with_random_blocks(problem, 1, 4, 128)
        problem.options["deterministic"] = True
        dout = torch.randn_like(problem.q)
        first = run(problem, dout, None, backend="cuda")
        for _ in range(5):
            again = run(problem, dout, None, backend="cuda")
            for name in ("out", "lse", "dq", "dk", "dv"):
                assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_a_dense_mask_as_a_list(head_dim):
    """Everything, and causal, as lists: the same numbers as without."""
    q, k, v = (torch.randn(2, 700, 4, head_dim, dtype=BF16, device="cuda") for _ in range(3))
    for pattern, causal in ((masks.full(), False), (masks.causal(), True)):
        out = flash_attn_func(q, k, v, block_mask=pattern, backend="cuda")
        dense = flash_attn_func(q, k, v, causal=causal, backend="cuda")
        # Where the two take blocks of different widths they round P at different maxima, and the
        # first rows of a causal mask are near 1: a unit in the last place of either is 2^-8.
        torch.testing.assert_close(out, dense, rtol=0.016, atol=2**-8)


def test_lists_that_hide_everything():
    q = torch.randn(1, 300, 2, 64, dtype=BF16, device="cuda", requires_grad=True)
    mask = BlockMask.from_dense(torch.zeros(1, 1, 300, 300, dtype=torch.bool, device="cuda"))
    out, lse = flash_attn_func(q, q, q, block_mask=mask, return_lse=True, backend="cuda")
    out.sum().backward()
    assert not out.any() and (lse == float("-inf")).all() and not q.grad.any()
