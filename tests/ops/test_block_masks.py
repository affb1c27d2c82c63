"""The torch engine under block lists, with every other feature, against the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_flash_patch import MaskError, UnsupportedKernelError, masks
from hf_flash_patch.masks import BlockMask
from hf_flash_patch.ops import backends, torch_engine, torch_mask
from hf_flash_patch.ops.backends import kernel_obstacle
from hf_flash_patch.ops.functional import flash_attn_func, flash_attn_varlen_func
from hf_flash_patch.ops.library import ExtensionStatus
from hf_flash_patch.ops.torch_engine import Tiling
from tests.masks.catalogue import CASES
from tests.ops.cases import (
    COMMON,
    DENSE_ONLY,
    TORCH_ONLY,
    Problem,
    check,
    make_problem,
    make_varlen_problem,
    with_random_blocks,
)

BLOCK = 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough that short sequences have several."""
    tiling = Tiling(rows=2 * BLOCK, keys=2 * BLOCK, elements=4 * BLOCK * BLOCK)
    monkeypatch.setattr(torch_engine, "HOST_TILING", tiling)


@pytest.fixture
def unreadable(monkeypatch):
    """Lists as on a GPU that the host never saw."""
    monkeypatch.setattr(torch_mask, "host_readable", lambda device: False)
    monkeypatch.setattr(BlockMask, "host_lists", lambda self: None)


def with_mask(problem: Problem, batch: int = 1, heads: int = 1) -> Problem:
    return with_random_blocks(problem, batch, heads, BLOCK)


@pytest.mark.parametrize("feature", (*COMMON, *DENSE_ONLY, *TORCH_ONLY))
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 4), (1, 2)])
def test_features(feature, batch, heads):
    problem = make_problem((feature,), seqlen_q=100)
    check(with_mask(problem, batch, heads), backend="torch")


@pytest.mark.parametrize(
    "features",
    [
        ("causal", "gqa", "dropout", "padding"),
        ("window", "mqa", "softcap", "holes", "alibi"),
        ("causal", "seqused", "dropout", "bias"),
        ("documents", "causal", "gqa", "batch_alibi"),
    ],
)
def test_features_together(features):
    for batch, heads in ((1, 1), (2, 4), (2, 2)):
        problem = make_problem(features, seqlen_q=100, seqlen_k=None)
        check(with_mask(problem, batch, heads), backend="torch")


@pytest.mark.parametrize("features", [(), ("causal", "gqa", "dropout"), ("holes", "alibi")])
@pytest.mark.parametrize("lengths", [(1, 90), (33, 130), (130, 33), (96, 96)])
def test_lengths_and_what_cannot_be_read(features, lengths, unreadable):
    problem = make_problem(features, seqlen_q=lengths[0], seqlen_k=lengths[1])
    check(with_mask(problem, 2, 4), backend="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(with_mask(make_problem(("gqa",), seqlen_q=100, dtype=dtype), 2, 4), backend="torch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_patterns(case):
    """A pattern is what its dense mask says."""
    q, k, v = (torch.randn(2, 140, 4, 16, requires_grad=True) for _ in range(3))
    dense = case.pattern.dense(140, num_heads=4)
    dense = dense.repeat_interleave(4 // dense.shape[1], dim=1)
    out, lse = flash_attn_func(q, k, v, block_mask=case.pattern, return_lse=True)
    mask = BlockMask.from_dense(dense, 64)
    same, same_lse = flash_attn_func(q, k, v, block_mask=mask, return_lse=True)
    torch.testing.assert_close(out, same)
    torch.testing.assert_close(lse, same_lse)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=dense
    )
    some = dense.any(dim=-1).expand(2, 4, -1)
    torch.testing.assert_close(out.transpose(1, 2)[some], wanted[some])
    assert not out.transpose(1, 2)[~some].any()


def test_a_row_that_sees_nothing():
    q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))
    pattern = masks.sliding_window(5) & ~masks.global_tokens([40])
    out, lse = flash_attn_func(q, k, v, block_mask=pattern, return_lse=True)
    out.sum().backward()
    assert not out[:, 40].any() and (lse[:, :, 40] == float("-inf")).all()
    assert not q.grad[:, 40].any() and torch.isfinite(k.grad).all()


@pytest.mark.parametrize("pattern", [masks.sliding_window(20), masks.shifted_groups(16)], ids=str)
@pytest.mark.parametrize("features", [(), ("causal", "gqa", "dropout"), ("alibi", "softcap")])
def test_varlen(pattern, features, monkeypatch):
    lengths = [40, 1, 0, 97]
    problem = make_varlen_problem(features, lengths_q=lengths)
    assert problem.mask is not None
    one = pattern.block_mask(97, num_heads=4, block_size=BLOCK)
    stacked = BlockMask.stack(
        [pattern.block_mask(length, num_heads=4, block_size=BLOCK) for length in lengths]
    )
    torch.manual_seed(1)
    first = check(replace(problem, mask=replace(problem.mask, block_mask=one)))
    torch.manual_seed(1)
    second = check(replace(problem, mask=replace(problem.mask, block_mask=stacked)))
    torch.testing.assert_close(first.out, second.out)
    monkeypatch.setattr(torch_mask, "host_readable", lambda device: False)
    monkeypatch.setattr(BlockMask, "host_lists", lambda self: None)
    check(replace(problem, mask=replace(problem.mask, block_mask=stacked)))


def test_varlen_from_patterns():
    lengths_q, lengths_k = [3, 30, 70], [50, 30, 80]
    pattern = masks.causal() & (masks.sliding_window(8) | masks.sinks(2))
    problem = make_varlen_problem(lengths_q=lengths_q, lengths_k=lengths_k)
    mask = problem.mask
    options = (mask.cu_seqlens_q, mask.cu_seqlens_k, 70, 80)
    out = flash_attn_varlen_func(problem.q, problem.k, problem.v, *options, block_mask=pattern)
    stops = zip(mask.cu_seqlens_q.tolist()[1:], mask.cu_seqlens_k.tolist()[1:], strict=True)
    for (i, j), a, b in zip(stops, lengths_q, lengths_k, strict=True):
        q, k, v = problem.q[None, i - a : i], problem.k[None, j - b : j], problem.v[None, j - b : j]
        alone = flash_attn_func(q, k, v, block_mask=pattern)
        torch.testing.assert_close(out[i - a : i], alone[0])
    # One cu_seqlens for both: positions count from each start, so one list serves all.
    q = problem.k.clone()
    edges = mask.cu_seqlens_k
    out = flash_attn_varlen_func(q, problem.k, problem.v, edges, edges, 99, 99, block_mask=pattern)
    alone = flash_attn_func(
        q[None, :50], problem.k[None, :50], problem.v[None, :50], block_mask=pattern
    )
    torch.testing.assert_close(out[:50], alone[0])


def test_empty_blocks_are_left_out(monkeypatch):
    """Work follows the blocks that are there."""
    looked_at = []
    logits = torch_engine.Engine._logits

    def counted(self, tile, block, q, kc):
        looked_at.append((tile.rows.stop - tile.rows.start) * (block.end - block.begin))
        return logits(self, tile, block, q, kc)

    monkeypatch.setattr(torch_engine.Engine, "_logits", counted)
    q = torch.randn(1, 2048, 1, 8)
    mask = (masks.sliding_window(32) & masks.causal()).block_mask(2048, block_size=BLOCK)
    flash_attn_func(q, q, q, block_mask=mask)
    assert sum(looked_at) == BLOCK * BLOCK * (2 * 64 - 1)


def test_opcheck():
    from hf_flash_patch.ops.torch_blocks import tensors_of

    q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))
    mask = masks.strided(9).block_mask(70, block_size=BLOCK)
    arguments = (q, k, v, None, None, 70, 70, *[None] * 7, *tensors_of(mask))
    scalars = (0.25, True, -1, -1, 0.0, 0.0)
    ops = torch.ops.hf_flash_patch
    torch.library.opcheck(ops.attention.default, (*arguments, *scalars, False, "torch"))


@pytest.mark.parametrize(
    ("block_mask", "text"),
    [
        (3, "block_mask is of type int"),
        (masks.causal().block_mask(64), r"= \(64, 64\), the call has \(70, 70\)"),
        (masks.from_mask_mod(lambda b, h, q, k: q > k, batch=3), r"\(3, 1\)"),
        (BlockMask.from_dense(torch.ones(1, 3, 70, 70, dtype=torch.bool)), r"\(1, 3\)"),
        (masks.documents([0, 0]), "documents describe 2 tokens"),
    ],
)
def test_errors(block_mask, text):
    q = torch.randn(2, 70, 4, 16)
    with pytest.raises(MaskError, match=text):
        flash_attn_func(q, q, q, block_mask=block_mask)


def test_what_the_kernels_read(monkeypatch):
    monkeypatch.setattr(backends, "extension_status", lambda: ExtensionStatus(True, "there"))
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    kernel = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "head_dim": 64}
    assert kernel_obstacle(**kernel, block_size=128) is None
    assert "blocks of 64; 128 is supported" in (kernel_obstacle(**kernel, block_size=64) or "")
    q = torch.randn(2, 70, 4, 16)
    with pytest.raises(UnsupportedKernelError, match='backend="cuda" cannot serve'):
        flash_attn_func(q, q, q, block_mask=masks.causal(), backend="cuda")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """A pattern is lowered while torch traces; its lists are constants of the graph."""
    pattern = masks.sliding_window(9) & masks.shifted_groups(8)

    def call(q):
        return flash_attn_func(q, q, q, block_mask=pattern, causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (50, 70):
        q = torch.randn(1, seqlen, 2, 16, requires_grad=True)
        out = compiled(q)
        torch.testing.assert_close(out, call(q))
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), q), torch.autograd.grad(call(q).sum(), q)
        )
