"""Checkpoints on the host: the same step, with dropout replayed, and less on the device."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_flash_patch as hfp
from hf_flash_patch.memory import offload_checkpoints

from .conftest import FAMILIES, assert_same_step, batch, model_of, step

DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3},
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_step_with_dropout(family, patched):
    model = model_of(family, **DROPOUT[family])
    if patched:
        hfp.patch(model)
    torch.manual_seed(3)
    expected = step(model)
    with offload_checkpoints(model, min_bytes=0):
        torch.manual_seed(3)
        actual = step(model)
        torch.manual_seed(4)
        assert step(model)[0] != actual[0]
    assert_same_step(actual, expected)
    assert not model.is_gradient_checkpointing


def test_a_layer_keeps_only_its_input():
    """What is stored: one tensor a layer, however wide the layer is."""
    model = model_of("llama", num_hidden_layers=4)
    hfp.patch(model)
    with offload_checkpoints(model, min_bytes=0):
        layer = model.model.layers[0]
        packed = []
        run = layer._gradient_checkpointing_func
        original = run._pack
        run._pack = lambda tensor: packed.append(original(tensor)) or packed[-1]
        loss = model(**batch()).loss
        # Before torch 2.13 an empty tensor comes along.
        packed = [x for x in packed if not isinstance(x, torch.Tensor) or x.numel() > 0]
        assert [type(x).__name__ for x in packed] == ["_Stored"] * 4
        assert [x.before is not None and x.before() is not None for x in packed] == [0, 1, 1, 1]
        loss.backward()


def test_no_more_host_memory_than_allowed():
    """Three inputs (2, 24, 32) in fp32 are 6144 bytes each and take 8192 of pinned memory."""
    model = model_of("llama", num_hidden_layers=5)
    expected = step(model)
    with offload_checkpoints(model, min_bytes=0, max_host_bytes=3 * 8192):
        run = model.model.layers[0]._gradient_checkpointing_func
        for _ in range(2):  # what the first step stored is gone
            loss = model(**batch()).loss
            assert len(run._stored) == 3
            loss.backward()
            del loss
        assert_same_step(step(model), expected)


def test_with_lora_and_frozen_embeddings():
    model = get_peft_model(model_of("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    expected = step(model)
    with offload_checkpoints(model, min_bytes=0):
        assert_same_step(step(model), expected)


def test_the_state_before_comes_back():
    model = model_of("gpt2")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    technique = offload_checkpoints(model)
    assert "inputs of" in str(technique)
    copied = copy.deepcopy(model)
    technique.restore()
    technique.restore()
    after = {n: dict(vars(m)) for n, m in model.named_modules()}
    for name, state in before.items():
        for flag in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            assert state.get(flag) == after[name].get(flag), (name, flag)
    assert_same_step(step(copied), step(model))


@pytest.mark.parametrize("keep_attention", [False, True])
def test_a_pickled_model_has_it_too(keep_attention, engine):
    model = model_of("llama")
    hfp.patch(model)
    offload_checkpoints(model, min_bytes=0, keep_attention=keep_attention)
    again = pickle.loads(pickle.dumps(model))
    expected = step(model)
    engine.clear()
    assert_same_step(step(again), expected)
    assert len(engine) == len(again.model.layers) * (1 if keep_attention else 2)


def test_a_model_without_checkpointing():
    from transformers import CTRLConfig, CTRLLMHeadModel

    model = CTRLLMHeadModel(CTRLConfig(vocab_size=9, n_embd=8, dff=8, n_layer=1, n_head=1))
    with pytest.raises(hfp.UnsupportedModelError, match="has no gradient checkpointing"):
        offload_checkpoints(model)
    with pytest.raises(hfp.UnsupportedModelError, match="holds 0"):
        offload_checkpoints(torch.nn.ReLU())


@pytest.mark.gpu
def test_on_the_device():
    """Equal to plain checkpointing bit for bit, and without the layers' inputs in its memory."""
    layers, width, tokens = 16, 512, 8192
    model = model_of(
        "llama", AutoModelForCausalLM, num_hidden_layers=layers, hidden_size=width, head_dim=64
    ).to("cuda", torch.bfloat16)
    hfp.patch(model)
    ids = torch.randint(0, 90, (1, tokens), device="cuda")

    def run():
        model.zero_grad(set_to_none=True)
        for _ in range(2):  # again with pinned memory that was used before
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            loss = model(input_ids=ids, labels=ids).loss
            stored = torch.cuda.memory_allocated() - start
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        return loss.detach(), gradients, stored

    torch.use_deterministic_algorithms(True, warn_only=True)
    model.gradient_checkpointing_enable()
    loss, gradients, stored = run()
    model.gradient_checkpointing_disable()
    with offload_checkpoints(model):
        loss_, gradients_, stored_ = run()
    torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, loss_)
    assert all(map(torch.equal, gradients, gradients_))
    assert stored - stored_ >= (layers - 4) * tokens * width * 2
