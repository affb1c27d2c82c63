"""The compiled kernels in company: syncs, graphs, compile, streams, memory, checkpointing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_flash_patch.ops.backends import resolve_backend
from hf_flash_patch.ops.functional import attention, flash_attn_func
from hf_flash_patch.ops.padding import pack_key_padding
from tests.ops.cases import COMMON, DENSE_ONLY, Problem, make_problem, make_varlen_problem

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
RICH = [("causal", "dropout", "gqa"), ("holes", "softcap", "alibi"), ("documents", "seqused")]


@contextmanager
def no_syncs():
    """Any host synchronisation is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_backward(problem: Problem, **options) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse = attention(
        *leaves, mask=problem.mask, return_lse=True, **{**problem.options, **options}
    )
    return torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))


def differences(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[str]:
    """Of dq, dk and dv: how many elements differ, where the first few are, and by how much."""
    found = []
    for name, a, b in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        if not torch.equal(a, b):
            at, most = (a != b).nonzero(), (a - b).abs().max().item()
            found.append(f"{name}: {len(at)} of {a.numel()}, by up to {most}: {at[:4].tolist()}")
    return found


def test_auto_takes_the_compiled_kernels():
    device = torch.device("cuda", 0)
    assert resolve_backend("auto", device=device, dtype=BF16, head_dim=64)[0] == "cuda"
    assert resolve_backend("auto", device=device, dtype=torch.float32, head_dim=64)[0] == "torch"


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_no_host_syncs(backend):
    for feature in (*COMMON, *DENSE_ONLY):
        problem = make_problem((feature,), seqlen_q=130, dtype=BF16, device="cuda")
        forward_backward(problem, backend=backend)
        with no_syncs():
            forward_backward(problem, backend=backend)
    problem = make_varlen_problem(
        ("causal", "dropout"), lengths_q=[3, 0, 200], dtype=BF16, device="cuda"
    )
    with no_syncs():
        forward_backward(problem, backend=backend)
    padding = torch.rand(2, 130, device="cuda") > 0.5
    with no_syncs():
        pack_key_padding(padding)


@pytest.mark.parametrize("features", RICH, ids="+".join)
def test_cuda_graph(features):
    problem = make_problem(features, seqlen_q=200, dtype=BF16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(problem, backend="cuda", deterministic=True)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(problem, backend="cuda", deterministic=True)
    # A capture begins with setting torch's seed for graphs, on its own stream, for which no replay
    # waits: on a busy GPU that may come after the first replay has set its own.
    torch.cuda.synchronize()
    torch.manual_seed(3)
    graph.replay()
    first = tuple(x.clone() for x in captured)
    graph.replay()
    second = tuple(x.clone() for x in captured)
    if "dropout" in features:
        # Every replay draws a new mask, and a seed brings it back.
        assert not torch.equal(first[2], second[2])
        torch.manual_seed(3)
        graph.replay()
        second = captured
    else:
        eager = forward_backward(problem, backend="cuda", deterministic=True)
        assert not differences(eager, first)
    assert not differences(second, first)


@pytest.mark.parametrize("features", RICH, ids="+".join)
def test_compile_without_graph_breaks(features):
    problem = make_problem(features, seqlen_q=130, dtype=BF16, device="cuda")
    options = {**problem.options, "backend": "cuda", "deterministic": True}

    def step(q, k, v):
        return attention(q * 1.0, k, v, mask=problem.mask, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        torch.manual_seed(0)
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(map(torch.equal, *results))


def test_opcheck():
    problem = make_problem(("causal", "gqa"), seqlen_q=40, seqlen_k=50, dtype=BF16, device="cuda")
    q, k, v = problem.q, problem.k, problem.v
    masks = (None, None, 40, 50, *[None] * 6)
    scalars = (0.25, True, -1, -1, 0.0, 0.0)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ops = torch.ops.hf_flash_patch
    torch.library.opcheck(
        ops.attention.default, (*leaves, *masks, *[None] * 9, *scalars, True, "cuda")
    )
    torch.library.opcheck(ops.cuda_forward.default, (q, k, v, *masks, *scalars))
    out, lse = ops.cuda_forward(q, k, v, *masks, *scalars)
    torch.library.opcheck(
        ops.cuda_backward.default,
        (out, lse, q, k, v, out, lse, *masks, *scalars, True),
    )


def test_any_thread():
    """A thread that has not used CUDA yet, such as one of autograd's, has no context."""
    problem = make_problem(("causal",), seqlen_q=130, head_dim=64, dtype=BF16, device="cuda")
    expected = forward_backward(problem, backend="cuda", deterministic=True)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(forward_backward, problem, backend="cuda", deterministic=True)
        assert all(map(torch.equal, task.result(), expected))


def test_any_stream():
    problem = make_problem(("causal",), seqlen_q=500, dtype=BF16, device="cuda")
    expected = forward_backward(problem, backend="cuda", deterministic=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        # Keeps the stream busy, so that a kernel on the wrong one would run too early.
        late = Problem(*(x * 1.0 for x in (problem.q, problem.k, problem.v)), problem.mask)
        late.options = problem.options
        actual = forward_backward(late, backend="cuda", deterministic=True)
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_dropout(use_reentrant):
    problem = make_problem(("dropout", "causal"), seqlen_q=200, dtype=BF16, device="cuda")

    def block(q, k, v):
        return flash_attn_func(
            q, k, v, dropout_p=0.3, causal=True, deterministic=True, backend="cuda"
        )

    results = []
    for function in (block, lambda *x: checkpoint(block, *x, use_reentrant=use_reentrant)):
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        torch.manual_seed(0)
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        results.append((out, *(leaf.grad for leaf in leaves)))
    assert all(map(torch.equal, *results))


def test_autocast_leaves_dtypes_alone():
    q = torch.randn(1, 64, 2, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert flash_attn_func(q, q, q).dtype == torch.float32
        assert flash_attn_func(*[q.to(BF16)] * 3, backend="cuda").dtype == BF16


def host_us(call: Callable[[], object]) -> float:
    """Host time of a call in microseconds: the fastest of ten rounds, too short to fill a queue."""
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        rounds.append((time.perf_counter() - start) / 200)
    return 1e6 * min(rounds)


def test_host_cost():
    """To notice one more layer of Python: the slowest process seen took 40 us for the op."""
    q, k, v = torch.randn(3, 1, 128, 2, 64, dtype=BF16, device="cuda")
    arguments = (None, None, 128, 128, *[None] * 6, 0.125, True, -1, -1, 0.0, 0.0)
    op = torch.ops.hf_flash_patch.cuda_forward
    assert host_us(lambda: op(q, k, v, *arguments)) < 60
    assert host_us(lambda: flash_attn_func(q, k, v, causal=True)) < 90
    q.requires_grad_()
    assert host_us(lambda: flash_attn_func(q, k, v, causal=True)) < 150


def peak_bytes(seqlen: int, **options) -> int:
    """Peak of forward and backward of GPT-2-small's attention, inputs and gradients included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    q, k, v = (
        torch.randn(1, seqlen, 12, 64, dtype=BF16, device="cuda", requires_grad=True)
        for _ in range(3)
    )
    out = flash_attn_func(q, k, v, causal=True, backend="cuda", **options)
    out.backward(torch.ones_like(out))
    return torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"dropout_p": 0.1}], ids=str)
def test_memory_is_linear(options):
    half, whole = peak_bytes(2**15, **options), peak_bytes(2**16, **options)
    assert whole < 2e9
    assert whole < 2.1 * half
