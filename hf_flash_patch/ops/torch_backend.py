"""The engine in Python."""

from __future__ import annotations

import torch


def _reference(q, k, v, args, bias, scalars):
    from ..testing.reference import attention_reference
    from .arguments import MaskArguments

    cq, ck, mq, mk, used, kr, kb, dr, slopes, rng = args
    scale, causal, left, right, softcap, p = scalars
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return attention_reference(
        q,
        k,
        v,
        mask=MaskArguments(cq, ck, mq, mk, used, kr, kb, dr, bias),
        causal=causal,
        window_size=(left, right),
        softmax_scale=scale,
        softcap=softcap,
        alibi_slopes=slopes,
        dropout_p=p,
        rng_state=rng,
        dtype=dtype,
    )


def forward(q, k, v, *rest):
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _reference(q, k, v, rest[:10], rest[10], rest[11:])
    return out.to(q.dtype).contiguous(), lse.contiguous()


def backward(dout, dlse, q, k, v, out, lse, *rest):
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, l = _reference(*leaves, rest[:10], rest[10], rest[11:-1])
        total = (o * dout).sum()
        if dlse is not None:
            total = total + torch.where(l > float("-inf"), l * dlse, 0.0).sum()
        return tuple(
            g.to(x.dtype).contiguous() for g, x in zip(torch.autograd.grad(total, leaves), leaves)
        )
