"""The dtype an attention module computes in."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.arguments import DTYPES


def to_compute_dtype(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 tensors in the dtype the model computes in; anything else as it is.

    Norms or rotary embeddings kept in fp32 (peft, autocast) turn q, k or v to fp32 although the
    projections around them are bf16 or fp16. The rule is that of transformers' flash attention:
    autocast's dtype, else that of the module's own weights.
    """
    if torch.float32 not in (query.dtype, key.dtype, value.dtype):
        return query, key, value
    device_type = query.device.type
    target: torch.dtype | None
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        target = torch.get_autocast_dtype(device_type)
    else:
        target = _weight_dtype(module)
    if target is None:
        return query, key, value
    return query.to(target), key.to(target), value.to(target)


def _weight_dtype(module: nn.Module) -> torch.dtype | None:
    config = getattr(module, "config", None)
    if hasattr(config, "_is_quantized"):
        return getattr(config, "dtype", None)
    # GPT-2 has no Linear but Conv1D: any matrix will do, unless its values are only stored so.
    for parameter in module.parameters():
        if parameter.ndim >= 2 and parameter.dtype in DTYPES:
            return parameter.dtype
    return None
