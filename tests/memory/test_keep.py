"""Checkpoints in checkpoints, and functions that are not what their results were kept of."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_flash_patch as hfp
from hf_flash_patch.memory.keep import _Checkpoint


def attend(x, causal=True):
    return x + hfp.flash_attn_func(x, x, x.sin(), causal=causal, window_size=(3, 0), dropout_p=0.2)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_checkpoints_in_checkpoints(inner, outer, engine):
    """Whatever is kept where; if everywhere, the engine runs once for each of four calls."""
    x = torch.randn(1, 9, 2, 8, requires_grad=True)

    def gradient(of_inner, of_outer):
        def both(x):
            return attend(of_inner(lambda x: attend(attend(x.cos())), attend(x)))

        torch.manual_seed(2)
        x.grad = None
        of_outer(both, x * 1).square().sum().backward()
        return x.grad

    expected = gradient(lambda f, x: f(x), lambda f, x: f(x))
    plain = [partial(checkpoint, use_reentrant=kind) for kind in (inner, outer)]
    engine.clear()
    kept = [_Checkpoint(function) for function in plain]
    assert torch.equal(gradient(*kept), expected)
    assert len(engine) == 4
    assert torch.equal(gradient(plain[0], kept[1]), expected)
    assert torch.equal(gradient(kept[0], plain[1]), expected)


def test_a_forward_that_does_something_else(engine):
    """Calls are told apart by shapes and options; and no call is made up."""
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    runs = []

    def fickle(x, more):
        runs.append(0)
        x = attend(x, causal=len(runs) == 1 or more)
        return attend(x) if more and len(runs) > 1 else x * x

    for more, said in ((False, "the forward was"), (True, "the forward made no further one")):
        runs.clear()
        out = _Checkpoint(partial(checkpoint, use_reentrant=True))(fickle, x * 1, more)
        with pytest.raises(hfp.UnsupportedModelError, match=said):
            out.sum().backward()


def test_an_output_that_is_written_over():
    x = torch.randn(1, 9, 2, 8, requires_grad=True)

    def spoils(x):
        return hfp.flash_attn_func(x, x, x, window_size=(3, 0)).mul_(2.0)

    out = _Checkpoint(partial(checkpoint, use_reentrant=True))(spoils, x * 1)
    with pytest.raises(hfp.UnsupportedModelError, match="changes attention's output in place"):
        out.sum().backward()
