"""The compiled kernels against the specification: features, pairs, shapes, head dims, dropout."""

from __future__ import annotations

import random

import pytest
import torch

from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.dropout import dropout_keep_mask, new_rng_state
from hf_flash_patch.ops.functional import flash_attn_func
from hf_flash_patch.testing.reference import attention_reference
from hf_flash_patch.testing.tolerance import assert_close_to_reference
from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    SEED,
    check,
    check_what_lies_behind,
    make_problem,
    make_varlen_problem,
    pairs,
    run,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
HEAD_DIMS = (1, 8, 20, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 255, 256)
# Around every tile height in use.
EDGES = (1, 31, 33, 63, 64, 65, 127, 128, 129, 192)
FEATURES = (*COMMON, *DENSE_ONLY)


@pytest.mark.parametrize("features", pairs(FEATURES), ids="+".join)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim", "dtype"),
    [(200, 200, 64, BF16), (113, 203, 128, FP16), (203, 113, 40, BF16)],
    ids=["200x200-d64-bf16", "113x203-d128-fp16", "203x113-d40-bf16"],
)
def test_features_and_their_pairs(features, seqlen_q, seqlen_k, head_dim, dtype):
    problem = make_problem(
        features,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
    )
    check(problem, backend="cuda")


@pytest.mark.parametrize("seqlen_k", EDGES)
@pytest.mark.parametrize("seqlen_q", EDGES)
def test_edges_of_tiles(seqlen_q, seqlen_k):
    for features in ((), ("causal", "gqa"), ("window", "padding"), ("seqused", "left_window")):
        for head_dim in (32, 64, 128):
            problem = make_problem(
                features,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                head_dim=head_dim,
                dtype=BF16,
                device="cuda",
            )
            check(problem, backend="cuda")


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(113, 203), (799, 3), (3, 799), (1088, 1088), (1, 2048), (2048, 1)]
)
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_uneven_shapes(seqlen_q, seqlen_k, head_dim):
    for features in ((), ("causal",), ("causal", "window", "mqa"), ("softcap", "holes")):
        problem = make_problem(
            features,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            dtype=BF16,
            device="cuda",
        )
        check(problem, backend="cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    for features in (
        (),
        ("causal", "gqa", "strided"),
        ("softcap", "alibi"),
        ("dropout", "holes", "left_window"),
    ):
        problem = make_problem(
            features, seqlen_q=150, seqlen_k=170, head_dim=head_dim, dtype=dtype, device="cuda"
        )
        check(problem, backend="cuda")


def raise_logits(problem, nats):
    """Adds `nats`, of shape (seqlen_k,), to the logits of each key."""
    head_dim, dtype = problem.q.shape[-1], problem.q.dtype
    direction = torch.nn.functional.normalize(torch.randn(head_dim, device="cuda"), dim=0)
    slope = direction * nats[:, None, None] * head_dim**0.5 / 8
    problem.q = (problem.q + 8 * direction).to(dtype)
    problem.k = (problem.k + slope).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("rise", [2.0, 8.0, 60.0, -60.0])
def test_logits_that_rise(rise, head_dim, dtype):
    """By so much every 128 keys, towards the first, where kernels end; also past any exponent."""
    cases = ((), ("causal", "gqa"), ("dropout", "holes"))
    for features, seqlen_k in (*((f, 700) for f in cases), ((), 2300), (("causal", "gqa"), 2300)):
        shape = {"seqlen_q": 300, "seqlen_k": seqlen_k, "head_dim": head_dim}
        problem = make_problem(features, dtype=dtype, device="cuda", **shape)
        raise_logits(problem, rise * (700 - torch.arange(seqlen_k, device="cuda")).relu() / 128)
        check(problem, backend="cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [20, 32, 40, 64, 88, 96, 128, 256])
def test_keys_that_draw_everything(head_dim, dtype):
    """Some that come late, by less than an exponent, more, and far more."""
    for features in ((), ("causal", "gqa"), ("left_window",), ("holes", "strided")):
        shape = {"seqlen_q": 300, "seqlen_k": 2300, "head_dim": head_dim}
        problem = make_problem(features, dtype=dtype, device="cuda", **shape)
        nats = torch.zeros(2300, device="cuda")
        nats[1600:1610], nats[900:910], nats[3] = 12.0, 120.0, 300.0
        raise_logits(problem, nats)
        check(problem, backend="cuda")


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
def test_a_row_is_its_own_affair(head_dim):
    """Logits that rise late in one row change no bit of the others."""
    shape = {"seqlen_q": 300, "seqlen_k": 2300, "head_dim": head_dim}
    problem = make_problem(dtype=BF16, device="cuda", **shape)
    nats = torch.zeros(2300, device="cuda")
    nats[900:910] = 20.0
    raise_logits(problem, nats)
    dout = torch.randn_like(problem.q)
    plain = run(problem, dout, None, backend="cuda")
    problem.q[:, 3:] = torch.randn_like(problem.q[:, 3:])
    other = run(problem, dout, None, backend="cuda")
    assert torch.equal(plain.out[:, :3], other.out[:, :3])
    assert torch.equal(plain.lse[..., :3], other.lse[..., :3])


# What goes without a variant of its own; documents need as many queries as keys.
PLAIN = ("causal", "left_window", "scale", "gqa", "strided", "seqused", "padding", "holes")


@pytest.mark.parametrize("features", pairs(PLAIN), ids="+".join)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_keys(features, head_dim):
    """From 2048 keys on some kernels look for no maximum once all rows have seen one."""
    shape = {"seqlen_q": 330, "seqlen_k": 2345, "head_dim": head_dim}
    check(make_problem(features, dtype=BF16, device="cuda", **shape), backend="cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_many_keys_and_head_dims(head_dim, dtype):
    for features in ((), ("causal", "gqa", "strided"), ("holes", "seqused")):
        shape = {"seqlen_q": 150, "seqlen_k": 2345, "head_dim": head_dim}
        check(make_problem(features, dtype=dtype, device="cuda", **shape), backend="cuda")
    # Without an edge, 2048 rows of 96 columns have three consumers and blocks of 96 keys.
    for features in ((), ("gqa", "strided"), ("padding",), ("holes", "seqused")):
        shape = {"seqlen_q": 2050, "seqlen_k": 2345, "head_dim": head_dim}
        check(make_problem(features, dtype=dtype, device="cuda", **shape), backend="cuda")
    documents = make_problem(
        ("documents", "causal"), seqlen_q=2100, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    check(documents, backend="cuda")


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_see(seqlen_q, seqlen_k):
    problem = make_problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=BF16, device="cuda")
    result = check(problem, backend="cuda")
    assert not any(x.any() for x in (result.out, result.dq, result.dk, result.dv))
    assert (result.lse == float("-inf")).all()


def test_an_empty_batch():
    problem = make_problem(seqlen_q=5, seqlen_k=300, batch=0, dtype=BF16, device="cuda")
    result = run(problem, torch.empty_like(problem.q), None, backend="cuda")
    assert result.out.shape == problem.q.shape and result.dk.shape == problem.k.shape


def test_rows_that_see_nothing():
    """More queries than keys under causal, and a sequence of nothing but padding."""
    problem = make_problem(("causal",), seqlen_q=300, seqlen_k=100, dtype=BF16, device="cuda")
    result = check(problem, backend="cuda")
    assert not result.out[:, :200].any() and not result.dq[:, :200].any()

    problem = make_problem(seqlen_q=100, dtype=BF16, device="cuda")
    key_range = torch.tensor([[0, 0], [40, 60]], dtype=torch.int32, device="cuda")
    problem.mask = MaskArguments(key_range=key_range)
    result = check(problem, backend="cuda")
    assert not result.out[0].any()
    assert not result.dk[1, :40].any() and not result.dv[1, 60:].any()


RAGGED = [
    ([5, 0, 33, 64, 0, 129], [40, 3, 33, 0, 0, 300]),
    ([128, 128], [128, 128]),
    ([1], [700]),
    ([0, 200, 1], [0, 64, 513]),
]


@pytest.mark.parametrize("features", pairs(COMMON), ids="+".join)
def test_variable_length(features):
    for lengths_q, lengths_k in RAGGED:
        problem = make_varlen_problem(
            features,
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            head_dim=64,
            dtype=BF16,
            device="cuda",
        )
        check(problem, backend="cuda")


@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_random_ragged_batches(head_dim):
    for _ in range(10):
        lengths = [(random.randint(0, 260), random.randint(0, 260)) for _ in range(5)]
        lengths_q, lengths_k = map(list, zip(*[*lengths, (7, 9)], strict=True))
        problem = make_varlen_problem(
            ("causal", "gqa"),
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            head_dim=head_dim,
            dtype=FP16,
            device="cuda",
        )
        check(problem, backend="cuda")


@pytest.mark.parametrize("features", [(), ("causal", "dropout"), ("softcap", "gqa", "padding")])
@pytest.mark.parametrize("with_dlse", [True, False])
def test_deterministic_gradients_are_bit_identical(features, with_dlse):
    problem = make_problem(
        features, seqlen_q=1500, head_dim=64, num_heads=8, dtype=BF16, device="cuda"
    )
    check(problem, with_dlse=with_dlse, backend="cuda", deterministic=True)
    dout = torch.randn_like(problem.q)
    first = run(problem, dout, None, backend="cuda", deterministic=True)
    for _ in range(5):
        again = run(problem, dout, None, backend="cuda", deterministic=True)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_a_thousand_repeats_are_bit_equal(head_dim, deterministic):
    """A race shows as a difference in one of many runs. dQ is only summed in order on demand."""
    torch.manual_seed(SEED)
    q, k, v = (
        torch.randn(2, 900, 16 // shared, head_dim, device="cuda", dtype=BF16).requires_grad_()
        for shared in (1, 2, 2)
    )
    dout = torch.randn_like(q)

    def once():
        options = {"causal": True, "deterministic": deterministic, "return_lse": True}
        out, lse = flash_attn_func(q, k, v, backend="cuda", **options)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        return [out, lse, dk, dv, *([dq] if deterministic else [])]

    first = once()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        for a, b in zip(first, once(), strict=True):
            same &= (a == b).all()
    assert same


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout_drops_exactly_the_specified_pairs(head_dim, dropout_p):
    """q = 0 makes every probability 1/seqlen_k, and one-hot values show which of them are kept."""
    batch, num_heads, seqlen = 2, 3, 2 * head_dim
    q = torch.zeros(batch, seqlen, num_heads, head_dim, dtype=FP16, device="cuda")
    torch.manual_seed(SEED)
    keep = dropout_keep_mask(new_rng_state(q.device), dropout_p, batch, num_heads, seqlen, seqlen)
    for half in range(2):
        positions = slice(half * head_dim, (half + 1) * head_dim)
        one_hot = torch.zeros_like(q)
        one_hot[:, positions] = torch.eye(head_dim, device="cuda", dtype=FP16)[None, :, None]
        v = one_hot.clone().requires_grad_()
        torch.manual_seed(SEED)
        out = flash_attn_func(q, q, v, dropout_p=dropout_p, backend="cuda")
        assert torch.equal(out.permute(0, 2, 1, 3) > 0, keep[..., positions])

        # dv[j] = sum over i of kept P[i, j] dout[i].
        (dv,) = torch.autograd.grad(out, v, one_hot)
        assert torch.equal(dv.permute(0, 2, 3, 1) > 0, keep[..., positions, :])


def test_dropout_of_everything():
    problem = make_problem(("dropout",), seqlen_q=100, dtype=BF16, device="cuda")
    problem.options["dropout_p"] = 1.0
    result = check(problem, backend="cuda")
    assert not any(x.any() for x in (result.out, result.dv))


def test_out_past_2_31_elements():
    """Offsets are 64 bits: q, out and their gradients have more elements than 32 bits can count."""
    seqlen, num_heads, head_dim = 2**16 + 64, 512, 64
    q = torch.randn(1, seqlen, num_heads, head_dim, dtype=BF16, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.randn(1, 70, 1, head_dim, dtype=BF16, device="cuda") for _ in range(2))
    q.requires_grad_()
    out = flash_attn_func(q, k, v, backend="cuda")
    dout = torch.randn_like(out)
    (dq,) = torch.autograd.grad(out, q, dout)
    last = (slice(None), slice(-130, None), slice(-2, None))
    assert_rows_close(q.detach()[last], k, v, out.detach()[last], dq[last], dout[last])


@pytest.mark.parametrize("axis", ["rows", "batch", "heads"])
def test_strides_past_2_31_elements(axis):
    """The same for strides, along each axis."""
    head_dim = 64
    shape = {"rows": (1, 256, 2), "batch": (3, 70, 2), "heads": (1, 70, 4)}[axis]
    stride = {"rows": 2**24, "batch": 2**31 - 2**20, "heads": 3 * 2**29}[axis]
    strides = {
        "rows": (0, stride, 4 * head_dim, 1),
        "batch": (stride, 8 * head_dim, head_dim, 1),
        "heads": (0, 2 * head_dim, stride, 1),
    }[axis]
    extent = 1 + sum((n - 1) * s for n, s in zip((*shape, head_dim), strides, strict=True))
    assert extent > 2**31
    buffer = torch.empty(extent, dtype=BF16, device="cuda")
    q = buffer.as_strided((*shape, head_dim), strides)
    q.copy_(torch.randn(q.shape, device="cuda"))
    packed = q.clone(memory_format=torch.contiguous_format)
    dout = torch.randn_like(packed)
    results = []
    for x in (q, packed):
        leaves = [x.detach().requires_grad_() for _ in range(3)]
        out = flash_attn_func(*leaves, causal=True, deterministic=True, backend="cuda")
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


def assert_rows_close(q, k, v, out, dq, dout):
    """Rows of a larger problem without a mask, against the specification."""
    results = []
    for dtype in (torch.float64, q.dtype):
        leaf = q.to(dtype).requires_grad_()
        expected, _ = attention_reference(leaf, k, v, dtype=dtype)
        results.append((expected.detach(), torch.autograd.grad(expected, leaf, dout.to(dtype))[0]))
    (out_ref, dq_ref), (out_peer, dq_peer) = results
    assert_close_to_reference(out, out_ref, out_peer, name="out")
    assert_close_to_reference(dq, dq_ref, dq_peer, name="dq")


@pytest.mark.parametrize("features", [(f,) for f in FEATURES], ids="+".join)
def test_torch_engine_on_the_gpu(features):
    problem = make_problem(features, seqlen_q=150, head_dim=40, dtype=BF16, device="cuda")
    check(problem, backend="torch")
    if features[0] in COMMON:
        lengths_q, lengths_k = RAGGED[0]
        problem = make_varlen_problem(
            features, lengths_q=lengths_q, lengths_k=lengths_k, dtype=BF16, device="cuda"
        )
        check(problem, backend="torch")


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_what_lies_behind_a_sequence_is_not_multiplied(head_dim):
    """Not even by 0."""
    for features in ((), ("causal", "gqa"), ("dropout",), ("softcap",)):
        check_what_lies_behind(features, head_dim=head_dim, device="cuda", backend="cuda")
