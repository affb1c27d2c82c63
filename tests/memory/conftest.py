"""What the tests of memory techniques share: a step of a tiny model, and its largest tensor."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_flash_patch.ops import library
from tests.integration.tiny import assert_close, tiny_model, token_ids

FAMILIES = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
}
SEQLEN = 24


def model_of(family: str, auto_class=None, **overrides):
    """A tiny model in training mode."""
    return tiny_model(auto_class or FAMILIES[family], family, **overrides).train()


def batch():
    """Inputs (2, 24) with padding, and labels that leave some out."""
    ids = token_ids(2, SEQLEN)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3:9] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model, **more):
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch(), **more).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_same_step(actual, expected):
    """Equal up to fp32 rounding of sums in another order."""
    assert_close(actual[0], expected[0], "loss")
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        assert_close(gradient, expected[1][name], name)


def one_step(model, inputs):
    """Loss, gradients and the generator's state after a step that begins with a seed."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.get_rng_state()


def assert_same_bits(actual, expected):
    """Of `one_step`."""
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, expected[1][name]), name
    assert torch.equal(actual[2], expected[2])


@pytest.fixture
def engine(monkeypatch):
    """Shapes of q in calls of an engine's forward."""
    calls = []
    forward = library._forward

    def counted(*inputs):
        calls.append(inputs[0].shape)
        return forward(*inputs)

    monkeypatch.setattr(library, "_forward", counted)
    return calls


class Largest(TorchDispatchMode):
    """The most elements of any tensor made, of those with a last dimension of a size."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            is_real = isinstance(x, torch.Tensor) and x.device.type != "meta"
            if is_real and x.ndim and x.shape[-1] == self.width:
                self.rows = max(self.rows, x.numel() // self.width)
        return out
