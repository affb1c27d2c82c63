"""More tiles than multiprocessors: every thread block works on several, one behind the other."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    Problem,
    check,
    check_forward,
    make_problem,
    run,
    run_forward,
    with_random_blocks,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
EACH = ((), *((feature,) for feature in (*COMMON, *DENSE_ONLY)))


def problem_of(features: tuple[str, ...], **shape: object) -> Problem:
    """As many key heads as multiprocessors."""
    heads_k = 1 if "mqa" in features else 2 if "gqa" in features else 4
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    fixed = {"batch": processors // heads_k, "num_heads": 4, "dtype": BF16, "device": "cuda"}
    return make_problem(features, **{**fixed, **shape})


@pytest.mark.parametrize("features", EACH, ids="+".join)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim", "dtype"),
    [(330, 330, 64, BF16), (150, 300, 128, FP16), (300, 150, 96, BF16), (200, 200, 32, BF16)],
    ids=["330x330-d64", "150x300-d128-fp16", "300x150-d96", "200x200-d32"],
)
def test_features(features, seqlen_q, seqlen_k, head_dim, dtype):
    shape = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "dtype": dtype}
    check(problem_of(features, **shape), backend="cuda")


@pytest.mark.parametrize("seqlen_k", [1, 128, 129, 257])
@pytest.mark.parametrize("seqlen_q", [1, 64, 65, 128, 129, 257])
def test_lengths(seqlen_q, seqlen_k):
    for features in ((), ("causal", "gqa"), ("window", "padding"), ("seqused", "left_window")):
        for head_dim in (40, 64, 128):
            shape = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim}
            check(problem_of(features, **shape), backend="cuda")


@pytest.mark.parametrize("features", [(), ("causal",), ("padding",), ("seqused", "left_window")])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_many_keys(features, head_dim):
    check(problem_of(features, seqlen_q=200, seqlen_k=2200, head_dim=head_dim), backend="cuda")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen", [120, 431, 625])
def test_documents_of_a_cache(seqlen, deterministic):
    """A document may end before the keys that its rows would see behind the diagonal begin."""
    for features in (("seqused",), ("seqused", "padding"), ("seqused", "window"), ("padding",)):
        for head_dim in (64, 128, 256):
            problem = problem_of(
                ("documents", "causal", *features), seqlen_q=seqlen, head_dim=head_dim
            )
            check(problem, backend="cuda", deterministic=deterministic)


@pytest.mark.parametrize("features", [(), ("causal", "gqa"), ("dropout",), ("holes", "window")])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_block_lists(features, head_dim):
    """Random blocks of four by four: half a list's entries are live, some rows have none."""
    for lists in ((1, 1), (1, 4)):
        problem = problem_of(features, seqlen_q=500, head_dim=head_dim)
        check(with_random_blocks(problem, *lists, 128), backend="cuda")


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("seqlen_k", [1, 128, 257])
def test_short_tiles(seqlen_k, head_dim):
    """Of a few blocks of keys: what belongs to the next is asked for as soon as it can be."""
    for features in ((), ("causal",), ("window", "padding")):
        problem = problem_of(features, seqlen_q=257, seqlen_k=seqlen_k, head_dim=head_dim)
        for _ in range(5):
            check_forward(problem, backend="cuda")
        first = run_forward(problem, backend="cuda")
        for _ in range(50):
            again = run_forward(problem, backend="cuda")
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_tiles_that_see_nothing(head_dim):
    """A row of them, as of padding on the left, among others; into memory full of NaN."""
    for features in (("causal", "padding"), ("window", "padding", "gqa"), ("causal", "seqused")):
        problem = problem_of(features, seqlen_q=900, head_dim=head_dim)
        poison = [torch.full_like(problem.q, float("nan")) for _ in range(8)]
        del poison
        check_forward(problem, backend="cuda")
    problem = problem_of(("causal",), seqlen_q=900, head_dim=head_dim)
    check_forward(with_random_blocks(problem, 1, 4, 128), backend="cuda")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_are_the_same_every_time(head_dim):
    """Also of the queries, undemanded: whole heads are owned."""
    problem = problem_of(("causal",), seqlen_q=300, head_dim=head_dim)
    dout = torch.randn_like(problem.q)
    first = run(problem, dout, None, backend="cuda")
    for _ in range(200):
        again = run(problem, dout, None, backend="cuda")
        assert torch.equal(again.dq, first.dq)
        assert torch.equal(again.dk, first.dk)
        assert torch.equal(again.dv, first.dv)
