"""The operators `torch.ops.hf_flash_patch.*`: schemas, fakes, autograd, the compiled extension.

`attention` is the differentiable operator. It calls one of two engines of equal schema, each a
forward and a backward: `cuda_*`, compiled, registered by the extension, and `torch_*`, in Python.
Schemas live here so that they exist, and trace, where the extension does not. `call_attention` is
the operator for those who call from Python.

Conventions: layout (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with
cu_seqlens; lse natural log, (batch, num_heads, seqlen_q) or (num_heads, total_q), fp32 (fp64 for
fp64 inputs).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import UnsupportedKernelError
from . import keeper, torch_backend

NAMESPACE = "hf_flash_patch"
EXTENSION = Path(__file__).resolve().parent.parent / "_C.abi3.so"

_QKV = "Tensor q, Tensor k, Tensor v"
_MASK = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? "
    "seqused_k, Tensor? key_range, Tensor? key_bits, Tensor? doc_range, Tensor? alibi_slopes, "
    "Tensor? rng_state"
)
_BIAS = "Tensor? attn_bias"
# `BlockMask.tensors()` and, for the torch engine, `BlockMask.host_lists()`.
_BLOCKS = (
    "Tensor? row_offsets, Tensor? row_entries, Tensor? column_offsets, Tensor? column_entries, "
    "Tensor? tiles, Tensor? tiles_t, Tensor? host_offsets, Tensor? host_entries"
)
# The same where the compiled engine is told of them: operators of their own, because six more
# arguments cost every call a microsecond.
_LISTS = (
    "Tensor row_offsets, Tensor row_entries, Tensor column_offsets, Tensor column_entries, Tensor "
    "tiles, Tensor tiles_t"
)
_SCALARS = (
    "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    "float dropout_p"
)
_GRADS_IN = "Tensor dout, Tensor? dlse"

_SCHEMAS = {
    "attention": f"({_QKV}, {_MASK}, {_BIAS}, {_BLOCKS}, {_SCALARS}, bool deterministic, str "
    "backend) -> "
    "(Tensor, Tensor)",
    "cuda_forward": f"({_QKV}, {_MASK}, {_SCALARS}) -> (Tensor, Tensor)",
    "cuda_backward": f"({_GRADS_IN}, {_QKV}, Tensor out, Tensor lse, {_MASK}, {_SCALARS}, bool "
    "deterministic) -> (Tensor, Tensor, Tensor)",
    "cuda_block_forward": f"({_QKV}, {_MASK}, {_LISTS}, {_SCALARS}) -> (Tensor, Tensor)",
    "cuda_block_backward": f"({_GRADS_IN}, {_QKV}, Tensor out, Tensor lse, {_MASK}, {_LISTS}, "
    f"{_SCALARS}, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "torch_forward": f"({_QKV}, {_MASK}, {_BIAS}, {_BLOCKS}, {_SCALARS}) -> (Tensor, Tensor)",
    "torch_backward": f"({_GRADS_IN}, {_QKV}, Tensor out, Tensor lse, {_MASK}, {_BIAS}, "
    f"{_BLOCKS}, {_SCALARS}, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "cuda_instances": "() -> str",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)

_ops = getattr(torch.ops, NAMESPACE)

# Positions in `attention`'s argument list: tensors, but for the two lengths, then numbers.
_LENGTHS = slice(5, 7)
_RNG_STATE_AT = 12
_BIAS_AT = 13
_LISTS_AT = slice(_BIAS_AT + 1, _BIAS_AT + 7)
_SCALARS_AT = _BIAS_AT + 9
_DETERMINISTIC_AT = _SCALARS_AT + 6

# The engines' autograd kernels (`_no_gradient`) are Python and cost 7 us a call: not entered where
# no gradient of an engine can be asked for.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def _forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with _BelowAutograd():
        if inputs[-1] == "cuda":
            scalars = inputs[_SCALARS_AT:_DETERMINISTIC_AT]
            lists = inputs[_LISTS_AT]
            if lists[0] is None:
                return _ops.cuda_forward.default(*inputs[:_BIAS_AT], *scalars)
            return _ops.cuda_block_forward.default(*inputs[:_BIAS_AT], *lists, *scalars)
        return _ops.torch_forward.default(*inputs[:_DETERMINISTIC_AT])


def _operator(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if keeper.current() is not None:
        # A compiled graph may write over what an operator in it gave.
        raise UnsupportedKernelError(
            "attention is in a compiled part (a layer, or what is in it) of a checkpoint that is "
            "to keep its results. Compile the model as a whole, whose checkpointed layers then run "
            "as they are, or leave keep_attention out."
        )
    return _forward(*inputs)


torch.library.impl(f"{NAMESPACE}::attention", "default")(_operator)
torch.library.impl(f"{NAMESPACE}::torch_forward", "default")(torch_backend.forward)
torch.library.impl(f"{NAMESPACE}::torch_backward", "default")(torch_backend.backward)


@torch.library.register_fake(f"{NAMESPACE}::attention")
@torch.library.register_fake(f"{NAMESPACE}::cuda_forward")
@torch.library.register_fake(f"{NAMESPACE}::cuda_block_forward")
@torch.library.register_fake(f"{NAMESPACE}::torch_forward")
def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.register_fake(f"{NAMESPACE}::cuda_backward")
@torch.library.register_fake(f"{NAMESPACE}::cuda_block_backward")
@torch.library.register_fake(f"{NAMESPACE}::torch_backward")
def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[: _LENGTHS.start], *inputs[_LENGTHS.stop : _SCALARS_AT])
    ctx.lengths, ctx.numbers = inputs[_LENGTHS], inputs[_SCALARS_AT:]


def _backward(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    none = (None,) * (_SCALARS_AT - 3 + len(ctx.numbers))
    if dout is None and dlse is None:
        return (None, None, None, *none)
    out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, *others = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    rest = (cu_seqlens_q, cu_seqlens_k, *ctx.lengths, *others, *ctx.numbers)
    return (*call_backward(dout, dlse, q, k, v, out, lse, *rest), *none)


def call_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `call_attention(q, k, v, *rest)`, which gave out and lse.

    Or those of a part of its keys: then out and lse are of all keys, q's gradient is this part's
    share, and those of k and v are whole.
    """
    inputs = (q, k, v, *rest)
    mask, others = inputs[3:_BIAS_AT], inputs[_BIAS_AT:_SCALARS_AT]
    lists = others[1:7]
    *scalars, deterministic, backend = inputs[_SCALARS_AT:]
    tensors = (dout, dlse, q, k, v, out, lse, *mask)
    with nullcontext() if torch.is_grad_enabled() else _BelowAutograd():
        if backend != "cuda":
            return _ops.torch_backward.default(*tensors, *others, *scalars, deterministic)
        if lists[0] is None:
            return _ops.cuda_backward.default(*tensors, *scalars, deterministic)
        return _ops.cuda_block_backward.default(*tensors, *lists, *scalars, deterministic)


torch.library.register_autograd(f"{NAMESPACE}::attention", _backward, setup_context=_setup_context)


def _kept_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Any, ...]]:
    """`_forward`, or what a keeper has of it; and `rest` with the rng_state that it was made of."""
    if keeper.current() is None:
        return _forward(q, k, v, *rest), rest
    tensors, numbers = rest[: _SCALARS_AT - 3], rest[_SCALARS_AT - 3 :]
    at = _RNG_STATE_AT - 3
    given = tuple(tensor is not None for tensor in tensors)
    out, lse, rng_state = keeper.kept(
        (q.shape, k.shape, v.shape, q.dtype, given, numbers),
        lambda: (*_forward(q, k, v, *rest), rest[at]),
    )
    assert out is not None and lse is not None
    return (out, lse), (*rest[:at], rng_state, *rest[at + 1 :])


class _Attention(torch.autograd.Function):
    """The operator's autograd without the operator."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, rest: tuple[Any, ...]) -> Any:
        output, rest = _kept_forward(q, k, v, rest)
        _setup_context(ctx, (q, k, v, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return (*_backward(ctx, *grads)[:3], None)


def call_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `attention` where something traces or transforms; else the same without it.

    Autograd in Python adds 17 us of host time to a call of an operator, 140 us with a gradient.

    Raises:
        UnsupportedKernelError: a compiled part calls it in a checkpoint that keeps its results; or
            a forward-mode derivative, or one by torch.func, is asked for.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _ops.attention(q, k, v, *rest)
    if forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v)
    if torch._C._are_functorch_transforms_active():
        _refuse_func_grad()
        return _ops.attention(q, k, v, *rest)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, rest)
    return _kept_forward(q, k, v, rest)[0]


def _refuse_tangents(*tensors: torch.Tensor) -> None:
    # Autograd would ask no formula of an input that needs no gradient, and drop its tangent.
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedKernelError(
            "a forward-mode derivative (jvp) was asked for, which this attention does not compute. "
            "Use reverse mode, or eager attention."
        )


def _refuse_func_grad() -> None:
    # torch's autograd of an operator's Python formula has no form for it; vmap alone works.
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Grad for level in stack):
        raise UnsupportedKernelError(
            "a gradient by torch.func (grad, vjp, jacrev) was asked for, which this attention does "
            "not compute. Use torch.autograd, or eager attention."
        )


def _no_gradient(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise RuntimeError(
        "hf_flash_patch: a gradient was asked for of an engine's own forward or backward. "
        "Second-order gradients are not computed: leave create_graph=False, or use eager "
        "attention. First-order gradients come from flash_attn_func and "
        "torch.ops.hf_flash_patch.attention."
    )


for _name in _SCHEMAS.keys() - {"attention", "cuda_instances"}:
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _no_gradient)


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled kernels are there.

    Attributes:
        loaded: whether `torch.ops.hf_flash_patch.cuda_forward` has its CUDA implementation.
        reason: one sentence; if not loaded, what is missing and how to get it.
        instances: what is compiled, as "architecture direction dtype head_dim" each.
    """

    loaded: bool
    reason: str
    instances: tuple[str, ...] = ()


def extension_status() -> ExtensionStatus:
    """What came of loading the compiled extension."""
    return _EXTENSION_STATUS


def _load_extension() -> ExtensionStatus:
    if not EXTENSION.exists():
        return ExtensionStatus(
            False,
            f"{EXTENSION.name} is not in {EXTENSION.parent.name}/: it was installed without a CUDA "
            "compiler. Install nvcc (or set CUDA_HOME) and reinstall, or run `make build-cuda`.",
        )
    try:
        torch.ops.load_library(str(EXTENSION))
        instances = _ops.cuda_instances()
    except (OSError, RuntimeError) as error:
        return ExtensionStatus(
            False,
            f"{EXTENSION.name} does not load under torch {torch.__version__}: {error}. Rebuild it "
            "with `make build-cuda`.",
        )
    names = tuple(name.strip() for name in instances.split(";") if name.strip())
    return ExtensionStatus(True, f"{len(names)} kernels compiled", names)


# Loaded on import: a first call may come while torch.compile traces, which cannot load it.
_EXTENSION_STATUS = _load_extension()
