"""Few queries against many keys: the compiled decode kernel against the specification.

Between 16 and 64 rows (queries times the heads that share their keys) decode takes a call only from
1024 keys on, which is why such problems have as many here.
"""

from __future__ import annotations

import random

import pytest
import torch

from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.functional import attention
from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    Problem,
    check,
    check_forward,
    make_problem,
    make_varlen_problem,
    pairs,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
FEATURES = tuple(f for f in (*COMMON, *DENSE_ONLY) if f not in ("dropout", "documents"))
VARLEN_FEATURES = tuple(f for f in COMMON if f != "dropout")


@pytest.mark.parametrize("features", pairs(FEATURES), ids="+".join)
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "head_dim", "dtype"),
    [(2, 1, 777, 128, BF16), (3, 5, 1025, 64, FP16), (2, 40, 1100, 128, BF16)],
    ids=["1x777-d128-bf16", "5x1025-d64-fp16", "40x1100-d128-bf16"],
)
def test_features_and_their_pairs(features, batch, seqlen_q, seqlen_k, head_dim, dtype):
    problem = make_problem(
        features,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
    )
    check_forward(problem, backend="cuda")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 24])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 16, 17, 64])
def test_heads_that_share_keys(seqlen_q, group):
    for features in (("causal",), ("left_window", "holes", "alibi")):
        for head_dim in (64, 128):
            problem = make_problem(
                features,
                seqlen_q=seqlen_q,
                seqlen_k=1090,
                num_heads=2 * group,
                heads_k=2,
                head_dim=head_dim,
                dtype=BF16,
                device="cuda",
            )
            check_forward(problem, backend="cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [1, 8, 20, 32, 40, 64, 72, 80, 96, 112, 128, 160, 255, 256])
def test_head_dims(head_dim, dtype):
    for seqlen_q in (1, 30):
        for features in (("causal",), ("causal", "gqa", "strided"), ("softcap", "seqused")):
            problem = make_problem(
                features,
                seqlen_q=seqlen_q,
                seqlen_k=1041,
                head_dim=head_dim,
                dtype=dtype,
                device="cuda",
            )
            check_forward(problem, backend="cuda")


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
@pytest.mark.parametrize("seqlen_k", [256, 257, 1024, 5000])
def test_shares_of_the_work(batch, seqlen_k):
    """From a block a thread block to several tiles a thread block, with lengths that vary."""
    for features in (("causal",), ("seqused", "causal"), ("padding", "left_window")):
        for seqlen_q in (1, 9):
            problem = make_problem(
                features,
                batch=batch,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                num_heads=6,
                heads_k=2,
                head_dim=64,
                dtype=BF16,
                device="cuda",
            )
            check_forward(problem, backend="cuda")


@pytest.mark.parametrize(("seqlen_q", "heads_k"), [(1, 1), (4, 4), (64, 4)])
def test_long_cache(seqlen_q, heads_k):
    problem = make_problem(
        ("causal",),
        batch=1,
        seqlen_q=seqlen_q,
        seqlen_k=131_072,
        heads_k=heads_k,
        head_dim=128,
        dtype=BF16,
        device="cuda",
    )
    check_forward(problem, backend="cuda")


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"seqlen_q": 1}, True),
        ({"seqlen_q": 16, "seqlen_k": 256}, True),
        ({"seqlen_q": 64}, True),
        ({"seqlen_q": 1, "seqlen_k": 255}, False),
        ({"seqlen_q": 65}, False),
        ({"seqlen_q": 64, "batch": 64}, False),
        ({"seqlen_q": 1, "features": ("dropout",)}, False),
    ],
)
def test_who_takes_a_call(options, taken):
    problem = make_problem(
        **{"seqlen_k": 4096, "head_dim": 64, "dtype": BF16, "device": "cuda", **options}
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attention(
            problem.q, problem.k, problem.v, mask=problem.mask, **problem.options, backend="cuda"
        )
        torch.cuda.synchronize()
    ours = [event.key for event in profile.key_averages() if "hfp::" in event.key]
    assert ours
    assert any("decode_kernel" in name for name in ours) == taken


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_static_cache(head_dim, heads_first):
    """Keys in use at the front of a longer cache, in either layout; the rest is not read."""
    batch, max_len, heads_k, num_heads = 5, 3000, 2, 8
    for used in ([1, 0, 3000, 64, 65], [0] * 5, [2048] * 5):
        caches = []
        for _ in range(2):
            shape = (batch, max_len, heads_k, head_dim)
            if heads_first:
                shape = (batch, heads_k, max_len, head_dim)
            cache = torch.randn(shape, device="cuda").to(BF16)
            caches.append(cache.transpose(1, 2) if heads_first else cache)
        for seqlen_q in (1, 4):
            seqused_k = torch.tensor(used, dtype=torch.int32, device="cuda")
            q = torch.randn(batch, seqlen_q, num_heads, head_dim, device="cuda").to(BF16)
            mask = MaskArguments(seqused_k=seqused_k)
            clean = Problem(q, *caches, mask, {"causal": True})
            out, lse = check_forward(clean, backend="cuda")
            for b, length in enumerate(used):
                assert length or not out[b].any()
                for cache in caches:
                    cache[b, length:] = float("nan")
            again = attention(q, *caches, mask=mask, causal=True, return_lse=True, backend="cuda")
            assert all(map(torch.equal, (out, lse), again))
            for cache in caches:
                cache.nan_to_num_(0.5)


@pytest.mark.parametrize("features", pairs(VARLEN_FEATURES), ids="+".join)
def test_variable_length(features):
    for lengths_q, lengths_k in (
        ([1, 1, 1, 1], [700, 1, 0, 64]),
        ([1, 0, 33, 64], [513, 300, 1, 2000]),
    ):
        problem = make_varlen_problem(
            features,
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            head_dim=64,
            dtype=BF16,
            device="cuda",
        )
        check_forward(problem, backend="cuda")


@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_random_ragged_batches(head_dim):
    for longest in (1, 4, 64):
        for _ in range(5):
            lengths = [(random.randint(0, longest), random.randint(0, 900)) for _ in range(20)]
            lengths_q, lengths_k = map(list, zip(*[*lengths, (1, 300)], strict=True))
            problem = make_varlen_problem(
                ("causal",),
                lengths_q=lengths_q,
                lengths_k=lengths_k,
                num_heads=5,
                head_dim=head_dim,
                dtype=BF16,
                device="cuda",
            )
            check_forward(problem, backend="cuda")


@pytest.mark.parametrize("features", [("causal",), ("dropout", "gqa"), ("softcap", "padding")])
def test_gradients(features):
    problem = make_problem(
        features, seqlen_q=3, seqlen_k=500, head_dim=64, dtype=BF16, device="cuda"
    )
    check(problem, backend="cuda")


def test_results_are_bit_identical():
    problem = make_problem(
        ("seqused",), batch=9, seqlen_k=4000, seqlen_q=2, head_dim=128, dtype=BF16, device="cuda"
    )
    first = check_forward(problem, backend="cuda")
    for _ in range(20):
        assert all(map(torch.equal, first, check_forward(problem, backend="cuda")))


def test_graph_follows_the_lengths():
    """Lengths are read on the device: one captured graph serves a growing cache."""
    problem = make_problem(
        ("seqused", "gqa"), seqlen_q=1, seqlen_k=2000, head_dim=128, dtype=BF16, device="cuda"
    )

    def step():
        return attention(
            problem.q, problem.k, problem.v, mask=problem.mask, causal=True, backend="cuda"
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in (0, 1, 63, 64, 65, 1500, 2000):
        problem.mask.seqused_k.copy_(torch.tensor([length, 2000 - length]))
        graph.replay()
        assert torch.equal(captured, step())
