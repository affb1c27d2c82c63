"""The specification against PyTorch's own attention, and against itself by finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.testing.reference import attention_reference, visible
from tests.ops.cases import make_problem


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def test_equals_sdpa():
    problem = make_problem(("gqa",), seqlen_q=9, seqlen_k=13, dtype=torch.float64)
    q, k, v = problem.q, problem.k, problem.v
    out, lse = attention_reference(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 4
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    seen = torch.rand(2, 4, 9, 13) < 0.6
    seen[..., 0] = True
    out, _ = attention_reference(q, k, v, mask=MaskArguments(attn_bias=seen), softmax_scale=0.1)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=seen, scale=0.1))
    bias = torch.randn(1, 4, 9, 13, dtype=torch.float64)
    out, _ = attention_reference(q, k, v, mask=MaskArguments(attn_bias=bias))
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=bias.expand(2, -1, -1, -1)))
    out, _ = attention_reference(q, k[:, :9], v[:, :9], causal=True)
    torch.testing.assert_close(out, sdpa(q, k[:, :9], v[:, :9], is_causal=True))


def picture(seqlen_q: int, seqlen_k: int, used: int, **options) -> list[str]:
    options = {"causal": False, "window_size": (-1, -1), **options}
    seen = visible(seqlen_q, seqlen_k, used, **options)
    return ["".join(".#"[int(x)] for x in row) for row in seen]


def test_alignment():
    """Causal and windows, drawn: queries down, keys to the right."""
    assert picture(2, 4, 4, causal=True) == ["###.", "####"]
    assert picture(3, 2, 2, causal=True) == ["..", "#.", "##"]
    assert picture(2, 5, 4, causal=True) == ["###..", "####."]
    assert picture(3, 3, 3, window_size=(1, 0)) == ["#..", "##.", ".##"]
    assert picture(3, 3, 3, window_size=(0, 1)) == ["##.", ".##", "..#"]
    assert picture(2, 4, 4, window_size=(1, -1)) == [".###", "..##"]
    assert picture(3, 3, 0, causal=True) == ["...", "...", "..."]


def test_rules_on_keys():
    q = torch.randn(1, 3, 1, 4, dtype=torch.float64)

    def seen(**fields):
        # Values one-hot in the key: out is non-zero where a key is seen.
        out, _ = attention_reference(
            q, q, torch.eye(3)[None, :, None], mask=MaskArguments(**fields)
        )
        return ["".join(".#"[int(x > 0)] for x in row) for row in out[0, :, 0]]

    def ints(*values):
        return torch.tensor([values], dtype=torch.int32)

    assert seen(key_range=ints(1, 3)) == [".##"] * 3
    assert seen(key_bits=ints(0b101)) == ["#.#"] * 3
    assert seen(seqused_k=ints(2)[0]) == ["##."] * 3
    assert seen(doc_range=ints((0, 2), (0, 2), (2, 3))) == ["##.", "##.", "..#"]
    assert seen(seqused_k=ints(0)[0]) == ["..."] * 3


@pytest.mark.parametrize(
    "features", [("causal", "gqa", "softcap"), ("alibi", "holes"), ("bias", "dropout", "seqused")]
)
def test_gradients_by_finite_differences(features):
    problem = make_problem(features, seqlen_q=5, seqlen_k=7, head_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    rng_state = problem.rng_state

    def function(q, k, v):
        out, lse = attention_reference(
            q, k, v, mask=problem.mask, rng_state=rng_state, **problem.options
        )
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_rows_that_see_nothing():
    problem = make_problem(("causal",), seqlen_q=5, seqlen_k=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse = attention_reference(*leaves, causal=True)
    assert not out[:, :3].any() and (lse[..., :3] == float("-inf")).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert not dq[:, :3].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
