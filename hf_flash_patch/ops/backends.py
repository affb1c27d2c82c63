"""Which engine serves a call, and why."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ..errors import UnsupportedKernelError
from .arguments import KERNEL_BLOCK_SIZE, MAX_HEAD_DIM
from .library import extension_status

BACKENDS = ("auto", "cuda", "torch", "flash_attn")
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


_capability_of = functools.cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def _capability(device_index: int) -> tuple[int, int]:
    return _capability_of(device_index)


def kernel_obstacle(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int | None = None,
    attn_bias: bool = False,
    block_size: int | None = None,
) -> str | None:
    """What keeps the compiled kernels from serving a call, with the way out; None if they can.

    Args:
        device, dtype: of q, k and v.
        head_dim: of q and k.
        head_dim_v: of v, if it differs.
        attn_bias: whether a dense mask or bias is part of the call.
        block_size: of block lists, if there are any.
    """
    status = extension_status()
    if not status.loaded:
        return status.reason
    if device.type != "cuda":
        return f"the tensors are on {device}; move them to a CUDA device"
    capability = _capability(device.index if device.index is not None else 0)
    if capability < MIN_CAPABILITY:
        major, minor = capability
        return f"the GPU has compute capability {major}.{minor}; 8.0 or later is needed"
    if dtype not in KERNEL_DTYPES:
        return f"dtype is {dtype}; the kernels take bfloat16 and float16, nothing is cast silently"
    if head_dim_v is not None and head_dim_v != head_dim:
        return f"head_dim is {head_dim}, that of v {head_dim_v}; pad v with zeros to {head_dim}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}; 1 to {MAX_HEAD_DIM} is supported"
    if attn_bias:
        return "attn_bias is given; causal, window, key_range, key_bits and doc_range are served"
    if block_size is not None and block_size != KERNEL_BLOCK_SIZE:
        return (
            f"block_mask has blocks of {block_size}; {KERNEL_BLOCK_SIZE} is supported, and any "
            "pattern can be lowered to it"
        )
    return None


def resolve_backend(
    backend: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int | None = None,
    attn_bias: bool = False,
    block_size: int | None = None,
) -> tuple[str, str]:
    """The engine that serves a call, and the reason.

    Args:
        backend: "auto" (the compiled kernels where they can serve, else the torch engine), "cuda",
            "torch" or "flash_attn" (the package of that name).
        device, dtype, head_dim, head_dim_v, attn_bias, block_size: as in `kernel_obstacle`.

    Returns:
        ("cuda" | "torch" | "flash_attn", reason).

    Raises:
        UnsupportedKernelError: the backend is unknown, or cannot serve the call.
    """
    if backend not in BACKENDS:
        raise UnsupportedKernelError(
            f"backend is {backend!r}; it has to be one of {', '.join(map(repr, BACKENDS))}."
        )
    if backend == "torch":
        return "torch", "asked for"
    if backend == "flash_attn":
        if importlib.util.find_spec("flash_attn") is None:
            raise UnsupportedKernelError(
                'backend="flash_attn" needs the package flash-attn, which is not installed. '
                'Install it, or use backend="auto".'
            )
        return "flash_attn", "asked for"
    obstacle = kernel_obstacle(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        attn_bias=attn_bias,
        block_size=block_size,
    )
    if obstacle is None:
        return "cuda", "asked for" if backend == "cuda" else "the compiled kernels serve this call"
    if backend == "cuda":
        raise UnsupportedKernelError(
            f'backend="cuda" cannot serve this call: {obstacle.removesuffix(".")}. '
            'backend="torch" serves it on any device.'
        )
    return "torch", obstacle
