"""`torch_forward` and `torch_backward`: the torch engine behind the operators' schema.

With cu_seqlens on the CPU there is one engine call per sequence, since reading lengths costs
nothing there. Elsewhere nothing is read on the host: sequences are padded to the longest by a
gather, computed with their lengths as tensors, and packed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ..errors import MaskError
from . import torch_mask
from .torch_engine import Call, Engine


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch_forward`: out in q's layout and dtype, lse fp32 (fp64 for fp64).

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        *arguments: the fields of `Call`, in order.

    Raises:
        MaskError: cu_seqlens, on the CPU, does not describe q and k.
    """
    call = Call(*arguments)
    with _without_autocast(q.device):
        if call.cu_seqlens_q is None:
            return Engine(q, k, v, call).forward()
        if not torch_mask.host_readable(q.device):
            packing = _Packing(q, k, call)
            engine = Engine(*packing.pad_inputs(q, k, v), packing.call)
            out, lse = engine.forward()
            return packing.pack_q(out), packing.pack_q(lse.transpose(1, 2)).t().contiguous()
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_dtype)
        for rows, keys, sequence in _sequences(q, k, call):
            engine = Engine(q[None, rows], k[None, keys], v[None, keys], sequence)
            out[None, rows], lse[None, :, rows] = engine.forward()
        return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch_backward`: gradients of q, k and v in their dtypes, contiguous.

    Args:
        dout, dlse: gradients of out and lse; dlse may be None.
        q, k, v, out, lse: what forward took and gave.
        *arguments: the fields of `Call`, in order, then `deterministic`, which this engine always
        is.
    """
    call = Call(*arguments[:-1])
    with _without_autocast(q.device):
        if call.cu_seqlens_q is None:
            return Engine(q, k, v, call).backward(dout, dlse, out, lse)
        if not torch_mask.host_readable(q.device):
            packing = _Packing(q, k, call)
            engine = Engine(*packing.pad_inputs(q, k, v), packing.call)
            lse = packing.pad_q(lse.t()).transpose(1, 2)
            dlse = None if dlse is None else packing.pad_q(dlse.t()).transpose(1, 2)
            dq, dk, dv = engine.backward(packing.pad_q(dout), dlse, packing.pad_q(out), lse)
            return packing.pack_q(dq), packing.pack_k(dk), packing.pack_k(dv)
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for rows, keys, sequence in _sequences(q, k, call):
            engine = Engine(q[None, rows], k[None, keys], v[None, keys], sequence)
            dq[None, rows], dk[None, keys], dv[None, keys] = engine.backward(
                dout[None, rows],
                None if dlse is None else dlse[None, :, rows],
                out[None, rows],
                lse[None, :, rows],
            )
        return dq, dk, dv


def _without_autocast(device: torch.device) -> AbstractContextManager:
    # Autocast would round the engine's fp32 products to its own dtype.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _sequences(q: torch.Tensor, k: torch.Tensor, call: Call) -> Iterator[tuple[slice, slice, Call]]:
    """Each sequence's rows of q, its rows of k, and the call it makes by itself."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    edges_q = _checked_edges("cu_seqlens_q", call.cu_seqlens_q, q.shape[0], call.max_seqlen_q)
    edges_k = _checked_edges("cu_seqlens_k", call.cu_seqlens_k, k.shape[0], call.max_seqlen_k)
    dense = replace(call, cu_seqlens_q=None, cu_seqlens_k=None)
    for b in range(len(edges_q) - 1):
        rows, keys = slice(edges_q[b], edges_q[b + 1]), slice(edges_k[b], edges_k[b + 1])
        slopes = call.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        if rows.start < rows.stop or keys.start < keys.stop:
            yield rows, keys, replace(dense, alibi_slopes=slopes, first_sequence=b)


def _checked_edges(name: str, cu_seqlens: torch.Tensor, total: int, longest: int) -> list[int]:
    edges = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
    tensor = "q" if name.endswith("q") else "k"
    if edges[0] != 0 or edges[-1] != total or min(lengths) < 0:
        shown = edges if len(edges) <= 16 else [*edges[:8], "...", *edges[-4:]]
        raise MaskError(
            f"{name} is {shown}; it has to start at 0, never decrease, and end at {total}, the "
            f"number of tokens in {tensor}."
        )
    if max(lengths) > longest:
        raise MaskError(
            f"max_seqlen_{tensor} is {longest}, but {name} holds a sequence of {max(lengths)} "
            "tokens; pass the longest length or any larger number."
        )
    return edges


class _Packing:
    """Between (total, ...) and (batch, max_seqlen, ...), by gathers on the device.

    Padded rows repeat some token; lengths as tensors hide them.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, call: Call):
        assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
        self.gather_q, self.place_q, lengths_q = _placement(
            call.cu_seqlens_q, call.max_seqlen_q, q.shape[0]
        )
        self.gather_k, self.place_k, lengths_k = _placement(
            call.cu_seqlens_k, call.max_seqlen_k, k.shape[0]
        )
        self.call = replace(
            call,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            lengths_q=lengths_q,
            lengths_k=lengths_k,
        )

    def pad_inputs(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.pad_q(q), _pad(k, self.gather_k), _pad(v, self.gather_k)

    def pad_q(self, x: torch.Tensor) -> torch.Tensor:
        return _pad(x, self.gather_q)

    def pack_q(self, x: torch.Tensor) -> torch.Tensor:
        return _pack(x, self.place_q)

    def pack_k(self, x: torch.Tensor) -> torch.Tensor:
        return _pack(x, self.place_k)


def _placement(
    cu_seqlens: torch.Tensor, longest: int, total: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token of each padded place, padded place of each token, and the lengths."""
    edges = cu_seqlens.long()
    position = torch.arange(longest, device=edges.device)
    gather = (edges[:-1, None] + position).clamp(max=max(total - 1, 0))  # (batch, longest)
    token = torch.arange(total, device=edges.device)
    sequence = torch.searchsorted(edges[1:].contiguous(), token, right=True)
    sequence = sequence.clamp(max=edges.shape[0] - 2)
    within = (token - edges[sequence]).clamp(max=max(longest - 1, 0))
    return gather, sequence * longest + within, edges[1:] - edges[:-1]


def _pad(x: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((*gather.shape, *x.shape[1:]))
    return x[gather]


def _pack(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1)
    if flat.shape[0] == 0:
        return x.new_zeros((place.shape[0], *x.shape[2:]))
    return flat[place].contiguous()
