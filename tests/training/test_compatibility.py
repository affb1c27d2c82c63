"""A patched model in half precision, and with several of what training takes at once."""

import copy

import pytest
import torch

import hf_flash_patch as hfp
from tests.integration.tiny import assert_close

from .corpus import documents, flattened, model_of, padded
from .processes import reset

KINDS = {"none": None, "kept": False, "reentrant": True}  # of checkpoints: use_reentrant


@pytest.fixture(autouse=True)
def alone():
    reset()
    torch.compiler.reset()


def checkpointed(model, kind):
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
    return model


def losses(model, collator, dtype=None, steps=4):
    """Of SGD, the last step's gradients with them; autocast to dtype, scaled where it is fp16."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    rows, found = documents(4 * steps), []
    torch.manual_seed(5)  # of dropout
    for step in range(steps):
        batch = collator(rows[4 * step : 4 * step + 4])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(found), gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, kind):
    """Weights in fp32, fp16 with a GradScaler: as near to fp32 as sdpa, and its losses."""
    found = {}
    for name, precision in (("exact", None), ("sdpa", dtype), ("hfp", dtype)):
        model = checkpointed(model_of("llama"), kind)
        if name == "hfp":
            hfp.patch(model)
        found[name], gradients = losses(model, padded, precision)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    error, theirs = ((found[name] - found["exact"]).abs().max() for name in ("hfp", "sdpa"))
    assert error <= 2 * theirs + torch.finfo(dtype).eps * found["exact"].abs().max()
    assert ((found["hfp"] - found["sdpa"]) / found["sdpa"]).abs().mean() <= 0.005


MASKS = {
    "packed": (flattened, lambda: None),
    "packed window": (flattened, lambda: hfp.masks.sliding_window(5)),
    "blocks": (padded, lambda: hfp.masks.butterfly(4) | hfp.masks.global_tokens(2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_dropout_is_replayed_in_documents_and_masks(name):
    """Under both kinds of checkpoints, and not the numbers of the next batch."""
    collator, mask = MASKS[name]
    found = {}
    for kind in KINDS:
        model = model_of("llama", attention_dropout=0.3)
        hfp.patch(model, mask=mask())
        found[kind] = losses(checkpointed(model, kind), collator)
    for kind in ("kept", "reentrant"):
        torch.testing.assert_close(found[kind][0], found["none"][0], rtol=1e-5, atol=0)
        for parameter, gradient in found[kind][1].items():
            assert_close(gradient, found["none"][1][parameter], f"{kind}: {parameter}")
    model = model_of("llama")
    hfp.patch(model, mask=mask())
    assert (losses(model, collator)[0] - found["none"][0]).abs().max() > 1e-3


def test_compiled_under_checkpoints():
    """Packed documents, checkpoints, dropout and autocast, compiled at once."""
    dtype = torch.bfloat16
    model = model_of("llama", num_hidden_layers=1, attention_dropout=0.3)
    hfp.patch(model)
    checkpointed(model, "kept")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    expected, expected_gradients = losses(model, flattened, dtype, steps=1)
    found, gradients = losses(compiled, flattened, dtype, steps=1)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=0)
    assert len(gradients) == len(expected_gradients) > 0
    for name, gradient in gradients.items():
        theirs = expected_gradients[name.removeprefix("_orig_mod.")]
        assert (gradient - theirs).abs().max() <= rounding * max(1.0, theirs.abs().max()), name
