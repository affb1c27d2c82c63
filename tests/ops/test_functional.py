"""The public functions and their operator: SDPA where it is exact, compile, opcheck, autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_flash_patch import UnsupportedKernelError
from hf_flash_patch.ops import functional, library
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.functional import attention, flash_attn_func, flash_attn_varlen_func
from hf_flash_patch.ops.library import ExtensionStatus
from hf_flash_patch.testing.reference import attention_reference
from hf_flash_patch.testing.tolerance import assert_close_to_reference
from tests.ops.cases import Problem, make_problem, make_varlen_problem

OPS = torch.ops.hf_flash_patch


@pytest.fixture
def engine_calls(monkeypatch):
    """How SDPA was called: a list of is_causal."""
    calls = []
    original = functional._sdpa

    def recording(q, k, v, causal, scale):
        calls.append(causal)
        return original(q, k, v, causal, scale)

    monkeypatch.setattr(functional, "_sdpa", recording)
    return calls


def assert_right(problem: Problem, **options) -> None:
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = flash_attn_func(*leaves, **options)
    dout = torch.randn_like(out)
    actual = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    expected = []
    for dtype in (torch.float64, out.dtype):
        copies = [x.detach().to(dtype).requires_grad_() for x in leaves]
        reference, _ = attention_reference(*copies, dtype=dtype, **options)
        grads = torch.autograd.grad(reference, copies, dout.to(dtype))
        expected.append((reference.detach(), *grads))
    for name, a, r, p in zip(("out", "dq", "dk", "dv"), actual, *expected, strict=True):
        assert_close_to_reference(a, r, p, name=name)


SAME_AS_SDPA = [
    ({}, 40, 40, False),
    ({}, 7, 40, False),
    ({"causal": True}, 40, 40, True),
    ({"causal": True}, 1, 40, False),
    ({"window_size": (39, 39)}, 40, 40, False),
    ({"window_size": (39, 0)}, 40, 40, True),
    ({"causal": True, "window_size": (50, -1)}, 40, 40, True),
    ({"softmax_scale": 0.3}, 40, 40, False),
]


@pytest.mark.parametrize(("options", "seqlen_q", "seqlen_k", "is_causal"), SAME_AS_SDPA)
@pytest.mark.parametrize("features", [(), ("gqa",), ("strided",)])
def test_sdpa_where_it_says_the_same(
    options, seqlen_q, seqlen_k, is_causal, features, engine_calls
):
    problem = make_problem(features, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    assert_right(problem, **options)
    assert engine_calls == [is_causal]


NOT_SDPA = [
    ({"causal": True}, 7, 40),
    ({"causal": True}, 40, 7),
    ({"window_size": (38, -1)}, 40, 40),
    ({"window_size": (-1, 38)}, 40, 40),
    ({"softcap": 2.0}, 40, 40),
    ({"alibi_slopes": torch.ones(4)}, 40, 40),
]


@pytest.mark.parametrize(("options", "seqlen_q", "seqlen_k"), NOT_SDPA)
def test_the_engine_where_sdpa_says_something_else(options, seqlen_q, seqlen_k, engine_calls):
    assert_right(make_problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k), **options)
    assert not engine_calls


def test_public_functions_agree():
    problem = make_varlen_problem(lengths_q=[30, 30], num_heads=2)
    mask = problem.mask
    lengths = (mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k)
    q, k, v = problem.q, problem.k, problem.v
    packed, lse = flash_attn_varlen_func(q, k, v, *lengths, 0.0, None, True, return_lse=True)
    dense, dense_lse = flash_attn_func(
        *(x.view(2, 30, 2, 16) for x in (q, k, v)), 0.0, None, True, return_lse=True
    )
    torch.testing.assert_close(packed.view_as(dense), dense)
    torch.testing.assert_close(lse.view(2, 2, 30).transpose(0, 1), dense_lse)


FEATURES = [(), ("causal", "dropout"), ("holes", "softcap", "gqa"), ("documents", "alibi")]


@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_graph_breaks(features, dynamic, grad):
    torch._dynamo.reset()
    compiled = torch.compile(run_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (24, 40):
        problem = make_problem(features, seqlen_q=seqlen)
        results = []
        for function in (run_step, compiled):
            leaves = [x.detach().requires_grad_(grad) for x in (problem.q, problem.k, problem.v)]
            torch.manual_seed(0)
            out = function(*leaves, problem.mask, problem.options)
            grads = torch.autograd.grad(out.square().sum(), leaves) if grad else ()
            results.append((out, *grads))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def run_step(q, k, v, mask, options):
    return attention(q * 1.0, k, v, mask=mask, **options)


@pytest.mark.parametrize("loaded", [False, True])
def test_compile_of_the_public_functions(loaded, monkeypatch):
    """Also where the extension is not there, which is not looked for while tracing."""
    monkeypatch.setattr(library, "_EXTENSION_STATUS", ExtensionStatus(loaded, "for this test"))
    torch._dynamo.reset()
    q, k, v = (torch.randn(60, 2, 16, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 20, 60], dtype=torch.int32)
    padding = torch.rand(2, 30) > 0.3

    def step(q, k, v):
        packed = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 40, 40, causal=True)
        dense, lse = flash_attn_func(
            *(x.view(2, 30, 2, 16) for x in (q, k, v)), return_lse=True, key_padding_mask=padding
        )
        return packed.sum() + dense.sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v))
    compiled(q, k, v).backward()


@pytest.mark.parametrize(
    "features", [(), ("gqa", "dropout"), ("padding", "batch_alibi"), ("bias",)]
)
def test_opcheck(features):
    problem = make_problem(features, seqlen_q=12, seqlen_k=15, head_dim=8)
    q, k, v = problem.q, problem.k, problem.v
    mask, options = problem.mask, problem.options
    rng_state = torch.tensor([5, 0]) if "dropout" in features else None
    masks = (None, None, 12, 15, None, mask.key_range, mask.key_bits, None)
    rest = (options.get("alibi_slopes"), rng_state, mask.attn_bias, *[None] * 8)
    scalars = (0.25, True, -1, -1, 0.0, options.get("dropout_p", 0.0))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OPS.attention.default, (*leaves, *masks, *rest, *scalars, False, "torch"))
    torch.library.opcheck(OPS.torch_forward.default, (q, k, v, *masks, *rest, *scalars))
    out, lse = OPS.torch_forward(q, k, v, *masks, *rest, *scalars)
    backward = (out, lse, q, k, v, out, lse, *masks, *rest, *scalars, False)
    torch.library.opcheck(OPS.torch_backward.default, backward)


def test_opcheck_of_variable_length():
    problem = make_varlen_problem(lengths_q=[5, 0, 9], head_dim=8)
    mask = problem.mask
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    arguments = (
        *(mask.cu_seqlens_q, mask.cu_seqlens_k, 9, 9, *[None] * 15),
        *(0.25, True, -1, -1, 0.0, 0.0, False, "torch"),
    )
    torch.library.opcheck(OPS.attention.default, (*leaves, *arguments))


def test_gradient_of_lse_alone_and_of_out_alone():
    problem = make_problem(("causal",), seqlen_q=20)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse = attention(*leaves, causal=True, return_lse=True)
    expected_out, expected_lse = attention_reference(*leaves, causal=True)
    for actual, expected in ((out, expected_out), (lse, expected_lse)):
        for a, e in zip(
            torch.autograd.grad(actual.sum(), leaves, retain_graph=True),
            torch.autograd.grad(expected.sum(), leaves, retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


def test_second_order_gradients_are_refused():
    problem = make_problem(seqlen_q=8)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, _ = attention(*leaves, return_lse=True)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="Second-order gradients are not computed"):
        dq.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_dropout(use_reentrant):
    problem = make_problem(("dropout", "causal"), seqlen_q=40)

    def block(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.3, causal=True)

    results = []
    for function in (block, lambda *x: checkpoint(block, *x, use_reentrant=use_reentrant)):
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        torch.manual_seed(0)
        out = function(*leaves)
        out.sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (5, 0)}])
def test_autocast_changes_nothing(options):
    problem = make_problem(seqlen_q=40)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def step():
        out = flash_attn_func(*leaves, **options)
        return out, *torch.autograd.grad(out.sum(), leaves)

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        actual = step()
    assert all(map(torch.equal, actual, expected))


def test_inference_mode_and_no_grad():
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    expected = flash_attn_func(q, q, q, causal=True, softcap=5.0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = flash_attn_func(q, q, q, causal=True, softcap=5.0)
        assert not out.requires_grad
        assert torch.equal(out, expected)


def test_vmap_keeps_gradients():
    q = torch.randn(3, 1, 12, 2, 8, requires_grad=True)

    def step(q):
        return flash_attn_func(q, q, q, softcap=5.0)

    actual, expected = torch.func.vmap(step)(q), torch.stack([step(x) for x in q])
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), q)[0] for out in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("wrap", [lambda f: f, torch.func.vmap], ids=["alone", "in vmap"])
def test_gradients_of_torch_func_are_refused(wrap):
    q = torch.randn(3, 1, 12, 2, 8)

    def step(q):
        return flash_attn_func(q, q, q, softcap=5.0).sum()

    for function in (wrap(torch.func.grad(step)), torch.func.grad(lambda q: wrap(step)(q).sum())):
        with pytest.raises(UnsupportedKernelError, match="by torch.func"):
            function(q if wrap is torch.func.vmap else q[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_with_gradients():
    q = torch.randn(1, 12, 2, 8, requires_grad=True)

    def step(q):
        return flash_attn_func(q, q, q, causal=True, softcap=5.0)

    traced = torch.jit.trace(step, (q,), check_trace=False)
    other = torch.randn(1, 12, 2, 8, requires_grad=True)
    torch.testing.assert_close(traced(other), step(other))
    grads = [torch.autograd.grad(f(other).square().sum(), other)[0] for f in (traced, step)]
    torch.testing.assert_close(*grads)


def test_forward_mode_is_refused():
    """Whose derivatives would be lost in silence, and come out as zeros."""
    q = torch.randn(1, 12, 2, 8)

    def step(q):
        return flash_attn_func(q, q, q, softcap=5.0)

    with pytest.raises(UnsupportedKernelError, match="forward-mode"):
        torch.func.jvp(step, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(step(q), flash_attn_func(q, q, q, softcap=5.0))
        with pytest.raises(UnsupportedKernelError, match="forward-mode"):
            step(torch.autograd.forward_ad.make_dual(q, q))


def test_meta_tensors():
    q = torch.empty(2, 10, 4, 16, device="meta", dtype=torch.bfloat16)
    out, lse = flash_attn_func(q, q[:, :, :2], q[:, :, :2], causal=True, return_lse=True)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == "meta"
    assert lse.shape == (2, 4, 10) and lse.dtype == torch.float32


def test_non_contiguous_masks():
    problem = make_problem(("padding",), seqlen_q=40)
    strided = MaskArguments(
        key_range=problem.mask.key_range.t().contiguous().t(),
        key_bits=problem.mask.key_bits.t().contiguous().t(),
    )
    q, k, v = problem.q, problem.k, problem.v
    assert torch.equal(attention(q, k, v, mask=strided), attention(q, k, v, mask=problem.mask))


def test_grouped_heads_follow_the_convention():
    """Query head h uses key head h // (num_heads // num_heads_k), as in SDPA's enable_gqa."""
    q, k, v = torch.randn(1, 9, 6, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(flash_attn_func(q, k, v), expected)
    torch.testing.assert_close(flash_attn_func(q, k, v, return_lse=True)[0], expected)
