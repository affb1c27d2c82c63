"""Who takes part: ours, PyTorch's kernels, FlexAttention, and the flash-attn packages.

Each is used where it can be imported. A contestant that does not compute a cell says so by an
error, which leaves its place empty.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.functional import attention
from .cells import TILE
from .problem import Attend, Problem

OURS = "hfp"

# Not contestants: what the time is held against. Ours on equal lengths, or without a block mask,
# scaled to as many tiles; a copy from memory to memory, bytes read and written.
DENSE, COPY = "hfp_dense", "copy"
YARDSTICKS = (DENSE, COPY)

MASK_BYTES = 2**32  # that FlexAttention may take to prepare its mask


class Refusal(Exception):
    """The contestant has no such mask, layout or dropout."""


@dataclass(frozen=True)
class Contestant:
    """One that can be imported.

    Attributes:
        name: what columns call it.
        version: of the package that it comes from.
        bind: makes the callable that computes a problem's q, k, v; raises what keeps it.
    """

    name: str
    version: str
    bind: Callable[[Problem], Attend]


def ours(version: str) -> Contestant:
    """Our compiled kernels, as a patched model calls them."""
    return Contestant(OURS, version, _ours)


def find_peer(name: str) -> Contestant | str:
    """A name of `PEERS`, imported; or, in a sentence, why it is not there."""
    try:
        return Contestant(name, *PEERS[name]())
    except Exception as error:  # A broken install raises anything.
        return reason(error)


def reason(error: Exception) -> str:
    """The first line of an error, cut to fit a line of the output."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 120 else f"{text[:117]}..."


def _ours(problem: Problem) -> Attend:
    cell = problem.cell
    options: dict[str, Any] = {"mask": problem.mask, "causal": cell.causal, "backend": "cuda"}
    options |= {"window_size": cell.window_size, "dropout_p": cell.dropout}
    return cast(Attend, partial(attention, **options))


def _sdpa(backend: SDPBackend) -> tuple[str, Callable[[Problem], Attend]]:
    def bind(problem: Problem) -> Attend:
        cell = problem.cell
        if cell.ragged or cell.window or cell.density:
            raise Refusal("no mask but causal in linear memory")
        options: dict[str, Any] = {
            "dropout_p": cell.dropout,
            "is_causal": cell.causal,
            "enable_gqa": cell.num_heads != cell.num_heads_k,
        }

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

        return attend

    version = str(torch.__version__)
    if backend == SDPBackend.CUDNN_ATTENTION:
        version += f", cuDNN {torch.backends.cudnn.version()}"
    return version, bind


def _flex() -> tuple[str, Callable[[Problem], Attend]]:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

    def bind(problem: Problem) -> Attend:
        cell = problem.cell
        if cell.dropout:
            raise Refusal("no dropout")
        rules = _mask_mods(problem)
        seqlen = problem.documents.numel() if cell.packed else cell.seqlen
        block_mask = None
        if cell.density and problem.mask and problem.mask.block_mask:
            block_mask = problem.mask.block_mask.to_flex(cell.num_heads)
        if rules:
            batch = cell.batch if cell.layout == "padded" else None
            device = str(problem.q.device)
            # Uncompiled it makes the whole mask, 64 GiB for 16 padded sequences of 65536.
            large = (batch or 1) * seqlen**2 > MASK_BYTES
            create = torch.compile(create_block_mask) if large else create_block_mask
            block_mask = create(and_masks(*rules), batch, None, seqlen, seqlen, device)
        # One compilation a shape. Without the reset the ninth would silently run uncompiled, and
        # with donated buffers a backward cannot be repeated.
        torch._functorch.config.donated_buffer = False
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        gqa = cell.num_heads != cell.num_heads_k

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
        ) -> torch.Tensor:
            if cell.packed:
                q, k, v = q[None], k[None], v[None]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa, **options)
            out = out.transpose(1, 2)
            return out[0] if cell.packed else out

        return partial(attend, kernel_options=_fitting_options(problem, attend))

    return str(torch.__version__), bind


def _fitting_options(problem: Problem, attend: Callable[..., torch.Tensor]) -> dict[str, int]:
    """FlexAttention's own choice of stages; with a block mask, which may exceed the GPU's shared
    memory then, the largest number that its kernels fit with."""
    torch._dynamo.reset()
    if not (problem.cell.density and problem.q.is_cuda):
        return {}
    for options in ({}, {"num_stages": 2}):
        try:
            problem.gradients(attend(problem.q, problem.k, problem.v, kernel_options=options))
            return options
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            torch._dynamo.reset()
    return {"num_stages": 1}


def _mask_mods(problem: Problem) -> list[Callable[..., torch.Tensor]]:
    """FlexAttention's form of the mask: (batch, head, query, key) -> visible, all of them."""
    cell, window = problem.cell, problem.cell.window
    rules: list[Callable[..., torch.Tensor]] = []
    if cell.causal:
        rules.append(lambda b, h, i, j: i >= j)
    if window:
        rules.append(lambda b, h, i, j: i - j < window)
    if cell.packed:
        documents = problem.documents
        rules.append(lambda b, h, i, j: documents[i] == documents[j])
    if cell.layout == "padded":
        real = problem.real
        rules.append(lambda b, h, i, j: real[b, j])
    return rules


def _flash_attn(
    module: str, distribution: str, *, dropout: bool = False, blocks: bool = False
) -> tuple[str, Callable[[Problem], Attend]]:
    package = importlib.import_module(module)
    # The package of another generation may own the same top-level name.
    if not hasattr(package, "flash_attn_func"):
        raise ImportError(f"{module} has no flash_attn_func")
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:  # Built in place.
        version = "of unknown version"
    return version, partial(_bind_flash_attn, package, dropout, blocks)


def _bind_flash_attn(package: ModuleType, dropout: bool, blocks: bool, problem: Problem) -> Attend:
    cell = problem.cell
    if cell.dropout and not dropout:
        raise Refusal("no dropout")
    if cell.density and not blocks:
        raise Refusal("no block mask")
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.density:
        options |= _block_options(problem)
    if cell.window:
        options["window_size"] = cell.window_size
    if cell.dropout:
        options["dropout_p"] = cell.dropout
    if cell.ragged:
        longest = max(cell.lengths)
        options |= {"cu_seqlens_q": problem.cu_seqlens, "cu_seqlens_k": problem.cu_seqlens}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        call = package.flash_attn_varlen_func
    elif cell.decode and hasattr(package, "flash_attn_with_kvcache"):
        call = package.flash_attn_with_kvcache
    else:
        call = package.flash_attn_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = call(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    if cell.layout == "padded":
        return _unpadded(attend, problem.real.flatten().nonzero()[:, 0])
    return attend


def _block_options(problem: Problem) -> dict[str, Any]:
    """FlashAttention-4's form of a block mask: how many blocks a row has and which, and the same
    by column for backward; none of them partial."""
    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")

    def listed(blocks: torch.Tensor) -> Any:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        count = blocks.sum(dim=-1).int()
        lists = (torch.zeros_like(count), torch.zeros_like(order), count, order)
        return sparsity.BlockSparseTensorsTorch(*lists, block_size=(TILE, TILE))

    blocks = problem.cell.blocks[None].to(problem.q.device)
    return {"block_sparse_tensors": listed(blocks), "block_sparse_tensors_bwd": listed(blocks.mT)}


def _unpadded(attend: Attend, real: torch.Tensor) -> Attend:
    """Padding is taken out and put back around every call, which is what transformers does."""

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = q.flatten(0, 1)
        out = attend(*(x.flatten(0, 1).index_select(0, real) for x in (q, k, v)))
        return torch.zeros_like(flat).index_copy(0, real, out).view_as(q)

    return padded


PEERS: dict[str, Callable[[], tuple[str, Callable[[Problem], Attend]]]] = {
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
    "fa2": partial(_flash_attn, "flash_attn", "flash-attn", dropout=True),
    "fa3": partial(_flash_attn, "flash_attn_interface", "flash-attn-3"),
    "fa4": partial(_flash_attn, "flash_attn.cute", "flash-attn-4", blocks=True),
}
