"""Random problems from names of features, their results by an engine and by the specification."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import torch

from hf_flash_patch.masks import BlockMask
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.dropout import new_rng_state
from hf_flash_patch.ops.functional import attention
from hf_flash_patch.ops.padding import pack_key_padding
from hf_flash_patch.testing.reference import attention_reference
from hf_flash_patch.testing.tolerance import assert_close_to_reference, assert_lse_close

# Features the compiled kernels and the torch engine share.
COMMON = (
    "causal",
    "window",
    "left_window",
    "softcap",
    "alibi",
    "batch_alibi",
    "dropout",
    "scale",
    "gqa",
    "mqa",
    "strided",
)
DENSE_ONLY = ("seqused", "padding", "holes", "documents")
TORCH_ONLY = ("bias", "bool_mask", "wide_v")
# Two ways to say the same thing, or a contradiction.
EXCLUSIVE = (
    {"window", "left_window"},
    {"alibi", "batch_alibi"},
    {"gqa", "mqa"},
    {"padding", "holes"},
    {"bias", "bool_mask"},
)

SEED = 1234


def pairs(features: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Nothing, every feature, and every pair that makes sense."""
    both = [p for p in itertools.combinations(features, 2) if set(p) not in EXCLUSIVE]
    return [(), *((f,) for f in features), *both]


@dataclass
class Problem:
    """One call of `attention`: tensors, mask, and the options an engine and the reference take."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: MaskArguments | None = None
    options: dict = field(default_factory=dict)

    @property
    def rng_state(self) -> torch.Tensor:
        """What a call right after torch.manual_seed(SEED) draws."""
        torch.manual_seed(SEED)
        return new_rng_state(self.q.device)


@dataclass
class Result:
    """Output, lse, and the gradients of q, k and v for given gradients of output and lse."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def make_problem(
    features: tuple[str, ...] = (),
    *,
    seqlen_q: int = 48,
    seqlen_k: int | None = None,
    head_dim: int = 16,
    batch: int = 2,
    num_heads: int = 4,
    heads_k: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """A problem in the dense layout with the given features; `heads_k` overrules gqa and mqa."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_k = heads_k or _heads_k(features, num_heads)
    q = _randn((batch, seqlen_q, num_heads, head_dim), features, dtype, device)
    k = _randn((batch, seqlen_k, heads_k, head_dim), features, dtype, device)
    head_dim_v = head_dim + 3 if "wide_v" in features else head_dim
    v = _randn((batch, seqlen_k, heads_k, head_dim_v), features, dtype, device)
    fields: dict = {}
    if "seqused" in features:
        fields["seqused_k"] = _ints(batch, 0, seqlen_k, device)
    if "padding" in features:
        # A run of real keys per sequence, which may be empty.
        real = torch.zeros(batch, seqlen_k, dtype=torch.bool)
        for b in range(batch):
            start, stop = sorted((random.randint(0, seqlen_k), random.randint(0, seqlen_k)))
            real[b, start:stop] = True
        fields["key_range"], fields["key_bits"] = pack_key_padding(real.to(device))
    if "holes" in features:
        real = torch.rand(batch, seqlen_k) > 0.3
        fields["key_range"], fields["key_bits"] = pack_key_padding(real.to(device))
    if "documents" in features and seqlen_q == seqlen_k:
        rows = [_documents(seqlen_q) for _ in range(batch)]
        fields["doc_range"] = torch.stack(rows).to(device)
    if "bias" in features:
        bias = torch.randn(1, num_heads, seqlen_q, seqlen_k)
        bias = bias.masked_fill(torch.rand(bias.shape) < 0.2, float("-inf"))
        fields["attn_bias"] = bias.to(device, dtype)
    if "bool_mask" in features:
        fields["attn_bias"] = (torch.rand(batch, 1, seqlen_q, seqlen_k) < 0.5).to(device)
    options = _options(features, batch, num_heads, head_dim, device)
    return Problem(q, k, v, MaskArguments(**fields), options)


def with_random_blocks(problem: Problem, batch: int, heads: int, block_size: int) -> Problem:
    """The problem under random blocks: empty, full and of random elements; a row sees nothing.

    `batch` and `heads` say how many lists there are; each sequence of a variable-length problem has
    the same.
    """
    assert problem.mask is not None
    seqlen_q, seqlen_k = problem.q.shape[-3], problem.k.shape[-3]
    if problem.mask.varlen:
        assert problem.mask.max_seqlen_q is not None and problem.mask.max_seqlen_k is not None
        seqlen_q, seqlen_k = problem.mask.max_seqlen_q, problem.mask.max_seqlen_k
    shape = (batch, heads, -(-seqlen_q // block_size), -(-seqlen_k // block_size))
    kind = torch.randint(3, shape)
    kind = kind.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
    kind = kind[:, :, :seqlen_q, :seqlen_k]
    seen = (kind == 2) | ((kind == 1) & (torch.rand(kind.shape) < 0.5))
    seen[:, :, seqlen_q // 2] = False
    mask = BlockMask.from_dense(seen, block_size).to(problem.q.device)
    return replace(problem, mask=replace(problem.mask, block_mask=mask))


def make_varlen_problem(
    features: tuple[str, ...] = (),
    *,
    lengths_q: list[int],
    lengths_k: list[int] | None = None,
    head_dim: int = 16,
    num_heads: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """A problem in the variable-length layout; lengths are tokens per sequence."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    heads_k = _heads_k(features, num_heads)
    mask = MaskArguments(
        cu_seqlens_q=cumulative(lengths_q, device),
        cu_seqlens_k=cumulative(lengths_k, device),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
    )
    q = _randn((sum(lengths_q), num_heads, head_dim), features, dtype, device)
    k, v = (_randn((sum(lengths_k), heads_k, head_dim), features, dtype, device) for _ in range(2))
    options = _options(features, len(lengths_q), num_heads, head_dim, device)
    return Problem(q, k, v, mask, options)


def cumulative(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    """cu_seqlens of lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def run(problem: Problem, dout: torch.Tensor, dlse: torch.Tensor | None, **options) -> Result:
    """The problem by `attention`, forward and backward."""
    leaves = _leaves(problem)
    torch.manual_seed(SEED)
    out, lse = attention(
        *leaves, mask=problem.mask, return_lse=True, **{**problem.options, **options}
    )
    return _differentiate(leaves, out, lse, dout, dlse)


def run_reference(
    problem: Problem, dout: torch.Tensor, dlse: torch.Tensor | None, dtype: torch.dtype
) -> Result:
    """The problem by the specification, computed in `dtype`."""
    leaves = _leaves(problem)
    rng_state = problem.rng_state if problem.options.get("dropout_p") else None
    out, lse = attention_reference(
        *leaves, mask=problem.mask, rng_state=rng_state, dtype=dtype, **problem.options
    )
    return _differentiate(leaves, out, lse, dout, dlse)


def check(problem: Problem, *, with_dlse: bool = True, **options) -> Result:
    """Compare `attention` with the specification, everything it returns and every gradient."""
    q, v = problem.q, problem.v
    dout = torch.randn(*q.shape[:-1], v.shape[-1], device=q.device).to(q.dtype)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    dlse = torch.randn(shape, device=q.device) if with_dlse else None
    actual = run(problem, dout, dlse, **options)
    # Leaves in fp64, so that the reference's gradients are not rounded to the dtype under test.
    exact = Problem(q.double(), problem.k.double(), v.double(), problem.mask, problem.options)
    reference = run_reference(exact, dout.double(), dlse, torch.float64)
    peer = run_reference(problem, dout, dlse, q.dtype)
    assert_lse_close(actual.lse, reference.lse, q.dtype)
    for name in ("out", "dq", "dk", "dv"):
        assert_close_to_reference(
            getattr(actual, name), getattr(reference, name), getattr(peer, name), name=name
        )
    return actual


def check_what_lies_behind(
    features: tuple[str, ...],
    *,
    head_dim: int,
    device: str,
    **options,
) -> None:
    """NaN in the unused part of a cache, and infinity in the next sequence, change nothing."""
    options["deterministic"] = True
    names = ("out", "dq", "dk", "dv")
    shape = {"seqlen_q": 128, "seqlen_k": 1024, "head_dim": head_dim}
    problem = make_problem(features, dtype=torch.bfloat16, device=device, **shape)
    used = torch.tensor([100, 777], dtype=torch.int32, device=device)
    problem.mask = MaskArguments(seqused_k=used)
    dout = torch.randn_like(problem.q)
    expected = run(problem, dout, None, **options)
    for b, n in enumerate(used.tolist()):
        problem.k[b, n:] = problem.v[b, n:] = float("nan")
    actual = run(problem, dout, None, **options)
    for name in ("lse", *names):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name

    lengths = [300, 77, 200]
    problem = make_varlen_problem(
        features, lengths_q=lengths, head_dim=head_dim, dtype=torch.bfloat16, device=device
    )
    dout = torch.randn_like(problem.q)
    expected = run(problem, dout, None, **options)
    for x in (problem.q, problem.k, problem.v, dout):
        x[300:377] = float("inf")
    actual = run(problem, dout, None, **options)
    for name in names:
        for part in (slice(0, 300), slice(377, None)):
            assert torch.equal(getattr(actual, name)[part], getattr(expected, name)[part]), name


def run_forward(problem: Problem, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the problem by `attention`, without gradients."""
    with torch.no_grad():
        return attention(
            problem.q,
            problem.k,
            problem.v,
            mask=problem.mask,
            return_lse=True,
            **{**problem.options, **options},
        )


def check_forward(problem: Problem, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare output and lse of `attention` without gradients with the specification."""
    out, lse = run_forward(problem, **options)
    with torch.no_grad():
        (out_ref, lse_ref), (out_peer, _) = (
            attention_reference(
                problem.q.to(dtype),
                problem.k.to(dtype),
                problem.v.to(dtype),
                mask=problem.mask,
                dtype=dtype,
                **problem.options,
            )
            for dtype in (torch.float64, problem.q.dtype)
        )
    assert_lse_close(lse, lse_ref, problem.q.dtype)
    assert_close_to_reference(out, out_ref, out_peer, name="out")
    return out, lse


def _differentiate(
    leaves: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> Result:
    outputs, gradients = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        gradients.append(dlse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    return Result(out.detach(), lse.detach(), *grads)


def _leaves(problem: Problem) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]


def _heads_k(features: tuple[str, ...], num_heads: int) -> int:
    return 1 if "mqa" in features else num_heads // 2 if "gqa" in features else num_heads


def _options(
    features: tuple[str, ...], batch: int, num_heads: int, head_dim: int, device: str
) -> dict:
    options: dict = {}
    if "causal" in features:
        options["causal"] = True
    if "window" in features:
        options["window_size"] = (11, 5)
    if "left_window" in features:
        options["window_size"] = (7, -1)
    if "softcap" in features:
        options["softcap"] = 3.0
    if "alibi" in features:
        options["alibi_slopes"] = (2.0 ** -torch.arange(1, num_heads + 1)).to(device)
    if "batch_alibi" in features:
        options["alibi_slopes"] = torch.rand(batch, num_heads).to(device)
    if "dropout" in features:
        options["dropout_p"] = 0.25
    if "scale" in features:
        options["softmax_scale"] = 0.7 * head_dim**-0.5
    return options


def _randn(
    shape: tuple[int, ...], features: tuple[str, ...], dtype: torch.dtype, device: str
) -> torch.Tensor:
    if "strided" not in features:
        return torch.randn(shape, device=device).to(dtype)
    # Heads before positions, and more columns than are used: only head_dim is contiguous.
    *rows, heads, head_dim = shape
    x = torch.randn(*rows[:-1], heads, rows[-1], head_dim + 5, device=device).to(dtype)
    return x[..., 2 : 2 + head_dim].transpose(-2, -3)


def _ints(count: int, low: int, high: int, device: str) -> torch.Tensor:
    return torch.randint(low, high + 1, (count,), dtype=torch.int32).to(device)


def _documents(seqlen: int) -> torch.Tensor:
    """int32 (seqlen, 2): start and stop of each token's document, for random documents."""
    edges = sorted({0, seqlen, *(random.randint(0, seqlen) for _ in range(3))})
    rows = [
        (start, stop)
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
        for _ in range(start, stop)
    ]
    return torch.tensor(rows, dtype=torch.int32).view(seqlen, 2)
