"""The torch engine's memory is linear in seqlen, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flash_patch import masks
from hf_flash_patch.ops import torch_backend, torch_engine
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.torch_blocks import tensors_of
from hf_flash_patch.ops.torch_engine import Tiling
from tests.ops.cases import make_problem, make_varlen_problem


class LargestTensor(TorchDispatchMode):
    """The largest storage, in bytes, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def largest_tensor(problem) -> int:
    """Bytes of the largest tensor of a forward and backward."""
    mask, options = problem.mask, problem.options
    rng_state = torch.tensor([1, 0]) if "dropout_p" in options else None
    arguments = (
        mask.cu_seqlens_q,
        mask.cu_seqlens_k,
        mask.max_seqlen_q,
        mask.max_seqlen_k,
        mask.seqused_k,
        mask.key_range,
        mask.key_bits,
        mask.doc_range,
        options.get("alibi_slopes"),
        rng_state,
        None,
        *tensors_of(mask.block_mask),
        0.25,
        options.get("causal", False),
        *options.get("window_size", (-1, -1)),
        options.get("softcap", 0.0),
        options.get("dropout_p", 0.0),
    )
    q, k, v = problem.q, problem.k, problem.v
    with LargestTensor() as largest:
        out, lse = torch_backend.forward(q, k, v, *arguments)
        torch_backend.backward(out, lse, q, k, v, out, lse, *arguments, False)
    return largest.bytes


@pytest.mark.parametrize(
    "features",
    [(), ("causal", "dropout"), ("window", "alibi"), ("holes", "softcap"), ("documents", "gqa")],
    ids="+".join,
)
def test_no_tensor_grows_with_the_square(features, monkeypatch):
    monkeypatch.setattr(torch_engine, "HOST_TILING", Tiling(64, 64, 2**11))
    seqlen, num_heads, head_dim = 1024, 2, 8
    problem = make_problem(
        features, seqlen_q=seqlen, num_heads=num_heads, head_dim=head_dim, batch=1
    )
    # The inputs themselves, with room for a few numbers per row in 64 bits.
    assert largest_tensor(problem) <= 2 * seqlen * num_heads * head_dim * 4


def test_variable_length(monkeypatch):
    monkeypatch.setattr(torch_engine, "HOST_TILING", Tiling(64, 64, 2**11))
    problem = make_varlen_problem(lengths_q=[900, 100], num_heads=2, head_dim=8)
    assert largest_tensor(problem) <= 2 * 1000 * 2 * 8 * 4


def test_block_lists(monkeypatch):
    monkeypatch.setattr(torch_engine, "HOST_TILING", Tiling(64, 64, 2**11))
    problem = make_problem((), seqlen_q=1024, num_heads=2, head_dim=8, batch=1)
    mask = (masks.sliding_window(40) | masks.sinks(3)).block_mask(1024, block_size=32)
    problem.mask = MaskArguments(block_mask=mask)
    assert largest_tensor(problem) <= 2 * 1024 * 2 * 8 * 4
