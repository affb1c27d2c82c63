"""Checkpoints that keep attention's results: the same bits, and no engine in a recomputation."""

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_flash_patch as hfp
from hf_flash_patch.memory import chunked_loss, keep_attention, offload_checkpoints, tile_layers
from hf_flash_patch.memory.keep import Kept, _Checkpoint
from hf_flash_patch.ops import library
from tests.integration.tiny import token_ids
from tests.training.processes import run as run_processes

from .conftest import (
    FAMILIES,
    SEQLEN,
    assert_same_bits,
    assert_same_step,
    batch,
    model_of,
    one_step,
    step,
)
from .test_offload import DROPOUT

MLA = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4}
KINDS = ("reentrant", "not reentrant", "offload")
SPARSE = hfp.masks.sliding_window(5) | hfp.masks.global_tokens(2)


def full():
    found = batch()
    return {name: found[name] for name in ("input_ids", "labels")}


def packed():
    """Documents of 7, 11 and 6 tokens, told apart by their positions."""
    ids = token_ids(1, SEQLEN)
    positions = torch.cat([torch.arange(n) for n in (7, 11, 6)])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


def varlen():
    """The same documents, told apart by their lengths."""
    edges = torch.tensor([0, 7, 18, 24], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    return packed() | lengths | {"max_length_q": 11, "max_length_k": 11}


def long():
    ids = token_ids(1, 96)
    return {"input_ids": ids, "labels": ids.clone()}


# Family, its config, the patch, the batch. None of them is PyTorch's attention.
CASES = {
    "causal, GQA, dropout": ("llama", DROPOUT["llama"], {}, full),
    "gpt2, dropout": ("gpt2", DROPOUT["gpt2"], {}, batch),
    "bert, dropout": ("bert", DROPOUT["bert"], {}, batch),
    "padded": ("llama", {}, {}, batch),
    "packed": ("llama", {}, {}, packed),
    "cu_seqlens": ("llama", DROPOUT["llama"], {}, varlen),
    "padding removed": ("bert", DROPOUT["bert"], {"remove_padding": True}, batch),
    "window": ("llama", {}, {"mask": hfp.masks.sliding_window(5)}, full),
    "model's window": ("mistral", {"sliding_window": 5}, {}, full),
    "blocks": ("llama", {}, {"mask": SPARSE}, batch),
    "top k": (
        "llama",
        {"max_position_embeddings": 96},
        {"mask": hfp.masks.top_k_blocks(2, block_size=32)},
        long,
    ),
    "sinks": ("gpt_oss", {"attention_dropout": 0.3}, {}, full),
    "head_dim of v": ("deepseek_v2", MLA | {"v_head_dim": 8}, {"mask": SPARSE}, full),
}


def patched(case="window", lora=False):
    family, overrides, settings, _ = CASES[case]
    model = model_of(family, None if family in FAMILIES else AutoModelForCausalLM, **overrides)
    hfp.patch(model, **settings)
    return with_lora(model) if lora else model


def with_lora(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def checkpointed(model, kind, keep):
    """What makes a model's layers checkpoints, to be restored."""
    if kind == "offload":
        return offload_checkpoints(model, min_bytes=0, keep_attention=keep)
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    return keep_attention(model) if keep else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_and_half_the_engines_calls(case, kind, engine):
    model, inputs = patched(case), CASES[case][-1]()
    other = copy.deepcopy(model)
    checkpointed(other, kind, keep=False)
    expected = one_step(other, inputs)
    layers = model.config.num_hidden_layers
    assert len(engine) == 2 * layers
    engine.clear()
    checkpointed(model, kind, keep=True)
    assert_same_bits(one_step(model, inputs), expected)
    assert len(engine) == layers


@pytest.mark.parametrize("kind", KINDS)
def test_with_lora(kind, engine):
    model = patched(lora=True)
    checkpointed(model, kind, keep=False)
    other = patched(lora=True)
    checkpointed(other, kind, keep=True)
    engine.clear()
    expected = one_step(model, full())
    assert_same_bits(one_step(other, full()), expected)
    assert expected[1] and len(engine) == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("kind", KINDS)
def test_batches_interleave(kind, engine):
    """Forwards before backwards, in both orders, with an evaluation between, in training mode."""
    model = patched("causal, GQA, dropout")
    inputs = [full(), batch(), packed()]

    def run(order):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        losses = [model(**x).loss for x in inputs]
        with torch.no_grad():
            model(**inputs[1])
        for index in order:
            losses[index].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        return torch.stack(losses).detach(), gradients, torch.get_rng_state()

    technique = checkpointed(model, kind, keep=False)
    expected = [run(order) for order in ((0, 1, 2), (2, 0, 1))]
    if technique is not None:
        technique.restore()
    checkpointed(model, kind, keep=True)
    engine.clear()
    for order, known in zip(((0, 1, 2), (2, 0, 1)), expected, strict=True):
        assert_same_bits(run(order), known)
    assert len(engine) == 2 * 4 * 2


@pytest.mark.parametrize("kind", ["not reentrant", "offload"])
def test_a_second_backward(kind, engine):
    model = patched("causal, GQA, dropout")
    loss = model(**full()).loss
    loss.backward()
    checkpointed(model, kind, keep=True)
    model.zero_grad()
    loss = model(**full()).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert len(engine) == 4


def test_a_backward_on_another_thread(engine):
    """As of a GPU; this thread may be in the middle of a checkpoint."""
    model = patched("causal, GQA, dropout")
    checkpointed(model, "not reentrant", keep=True)
    expected = one_step(model, full())
    engine.clear()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(**full()).loss
    x = torch.ones(1, requires_grad=True)

    def meanwhile(x):
        backward = threading.Thread(target=loss.backward)
        backward.start()
        backward.join()
        return x * x

    _Checkpoint(partial(checkpoint, use_reentrant=False))(meanwhile, x)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert_same_bits((loss, gradients, expected[2]), expected)
    assert len(engine) == 2


def test_what_a_layer_needs_comes_back_while_the_next_is_recomputed(monkeypatch):
    """Each layer's results begin to come back when those of the layer after it are taken."""
    model = model_of("llama", num_hidden_layers=3)
    hfp.patch(model, mask=hfp.masks.sliding_window(5))
    offload_checkpoints(model, min_bytes=0, keep_attention=True)
    stored, events = [], []
    init, fetch = Kept.__init__, Kept.fetch

    def made(self, *arguments):
        stored.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Kept, "__init__", made)
    monkeypatch.setattr(
        Kept, "fetch", lambda self: events.append(stored.index(self)) or fetch(self)
    )
    model(**full()).loss.backward()
    # Layer 2 asks for its own, then for those of layer 1 ahead, and so on.
    assert events == [2, 1, 1, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_loss_that_is_dropped(kind):
    model = patched()
    checkpointed(model, kind, keep=True)
    made = []
    original = Kept.__init__

    def noted(self, *arguments):
        made.append(weakref.ref(self))
        original(self, *arguments)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kept, "__init__", noted)
            for backward in (False, True):
                loss = model(**full()).loss
                assert [kept() is not None for kept in made] == [True] * 2
                if backward:
                    loss.backward()
                del loss
                assert [kept() for kept in made] == [None] * 2
                made.clear()
            with torch.no_grad():
                model(**full())
            assert made == []
    finally:
        gc.enable()


def test_what_is_on_the_host():
    """Inputs (2, 24, 32), out as large, lse (2, 4, 24), in fp32; two layers."""
    model = patched()
    with offload_checkpoints(model, min_bytes=0, keep_attention=True) as technique:
        assert "results of 2 attention modules on the host" in str(technique)
        run = model.model.layers[0]._gradient_checkpointing_func
        loss = model(**full()).loss
        assert sorted(stored.host_bytes for stored in run._stored) == [1024] * 2 + [8192] * 4
        loss.backward()
        del loss
        assert len(run._stored) == 0
    expected = one_step(model, full())
    with offload_checkpoints(model, min_bytes=0, max_host_bytes=3 * 8192, keep_attention=True):
        run = model.model.layers[0]._gradient_checkpointing_func
        loss = model(**full()).loss
        assert 2 * 8192 < sum(stored.host_bytes for stored in run._stored) <= 3 * 8192
        loss.backward()
        del loss
        assert_same_bits(one_step(model, full()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_techniques(kind, engine):
    model = patched("padded")
    expected = step(model)
    engine.clear()
    checkpointed(model, kind, keep=True)
    chunked_loss(model, chunk=5)
    tile_layers(model, tile=7)
    assert_same_step(step(model), expected)
    assert len(engine) == 2


def test_autocast(engine):
    found = []
    for keep in (False, True):
        model = patched("causal, GQA, dropout")
        checkpointed(model, "not reentrant", keep)
        engine.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(one_step(model, full()))
    assert_same_bits(*found)
    assert len(engine) == 2


def test_switched_on_later_and_the_state_before(engine):
    """By the Trainer for example, also of an adapter's model; and on a part of the model."""
    model = patched(lora=True)
    technique = keep_attention(model)
    assert "results of 2 attention modules" in str(technique)
    for owner in (model, model.base_model.model.model):
        for reentrant in (True, False):
            owner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            engine.clear()
            one_step(model, full())
            assert len(engine) == 2
    copied = copy.deepcopy(model)
    technique.restore()
    technique.restore()
    engine.clear()
    expected = one_step(model, full())
    assert len(engine) == 4
    assert_same_bits(one_step(copied, full()), expected)
    assert len(engine) == 6
    assert not any("_set_gradient_checkpointing" in vars(m) for m in model.modules())
    function = model.base_model.model.model.layers[0]._gradient_checkpointing_func
    assert isinstance(function, partial) and function.func is checkpoint


def test_a_pickled_model():
    """It can be, and checkpoints as ever."""
    model = patched()
    keep_attention(model)
    again = pickle.loads(pickle.dumps(model))
    again.gradient_checkpointing_enable()
    assert_same_bits(one_step(again, full()), one_step(model, full()))


def test_pytorchs_attention_is_as_ever(engine):
    model = model_of("llama")
    hfp.patch(model)
    model.gradient_checkpointing_enable()
    expected = one_step(model, full())
    with keep_attention(model):
        assert_same_bits(one_step(model, full()), expected)
    assert engine == []


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind, engine):
    """Checkpointed layers of a compiled model run as they are; a compiled layer is refused."""
    model = patched()
    expected = step(model)
    checkpointed(model, kind, keep=True)
    engine.clear()
    loss, found = step(torch.compile(model, backend="aot_eager"))
    gradients = {name.removeprefix("_orig_mod."): found[name] for name in found}
    assert_same_step((loss, gradients), expected)
    assert len(engine) == 2
    for layer in model.model.layers:
        layer.self_attn.compile(backend="aot_eager")
    with pytest.raises(hfp.UnsupportedKernelError, match="is in a compiled part"):
        model(**full())


def test_a_learned_bias_is_refused():
    model = model_of("t5", AutoModelForSeq2SeqLM)
    hfp.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    keep_attention(model)
    with pytest.raises(hfp.UnsupportedModelError, match="learned position bias.*keep_attention"):
        model(input_ids=token_ids(2, 9), labels=token_ids(2, 7))


def test_what_it_is_not_for(monkeypatch):
    model = model_of("llama")
    with pytest.raises(hfp.UnsupportedModelError, match="has no attention of this package.*patch"):
        keep_attention(model)
    with pytest.raises(hfp.UnsupportedModelError, match="has no attention of this package"):
        offload_checkpoints(model, keep_attention=True)
    hfp.patch(model)
    with offload_checkpoints(model):
        with pytest.raises(
            hfp.UnsupportedModelError, match="has offload_checkpoints.*with keep_attention=True"
        ):
            keep_attention(model)
    with keep_attention(model):
        with pytest.raises(
            hfp.UnsupportedModelError, match="has keep_attention.*pass keep_attention=True"
        ):
            offload_checkpoints(model)
    model.config.hfp = {"backend": "flash_attn"}
    with pytest.raises(hfp.UnsupportedModelError, match='backend="flash_attn".*"auto"'):
        keep_attention(model)


def shared(method):
    """One of two processes: with results kept and without, and the engine's calls."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = model_of("llama", max_position_embeddings=64)
    hfp.patch(model)
    hfp.parallel.sequence_parallel(model, method=method)
    ids = token_ids(2, 32)
    calls, found = [], []
    forward = library._forward
    library._forward = lambda *inputs: calls.append(0) or forward(*inputs)
    for keep in (False, True):
        with offload_checkpoints(model, min_bytes=0, keep_attention=keep):
            calls.clear()
            found.append(one_step(model, {"input_ids": ids, "labels": ids}))
            found[-1] += (len(calls),)
    assert_same_bits(found[1], found[0])
    return [step[-1] for step in found]


def test_a_ring():
    """The ring's result is kept, not those of its parts, and no keys go round again."""
    for plain, kept in run_processes(2, shared, "ring"):
        assert plain == 2 * kept > 0


@pytest.mark.gpu
def test_on_the_device(engine):
    """Bits of plain checkpoints, half of the engine's calls; on the host, little on the device."""
    layers, width, tokens = 8, 512, 8192
    model = model_of(
        "llama", num_hidden_layers=layers, hidden_size=width, num_attention_heads=8, head_dim=64,
        attention_dropout=0.1,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    hfp.patch(model, backend="cuda")
    ids = torch.randint(0, 90, (1, tokens), device="cuda")
    out = tokens * width * 2

    def run():
        for _ in range(2):  # again with pinned memory that was used before
            torch.manual_seed(3)
            model.zero_grad(set_to_none=True)
            loss = None  # whose graph holds what was kept for it
            start = torch.cuda.memory_allocated()
            loss = model(input_ids=ids, labels=ids).loss
            torch.cuda.synchronize()
            stored = torch.cuda.memory_allocated() - start
            engine.clear()
            loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        return (loss.detach(), gradients, torch.cuda.get_rng_state()), stored, len(engine)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            expected, plain, calls = run()
            assert calls == layers
            with keep_attention(model):
                actual, stored, calls = run()
            assert_same_bits(actual, expected)
            assert calls == 0 and stored - plain >= layers * out
        model.gradient_checkpointing_disable()
        with offload_checkpoints(model):
            plain = run()[1]
        with offload_checkpoints(model, keep_attention=True):
            actual, stored, calls = run()
        assert_same_bits(actual, expected)
        assert calls == 0 and stored - plain <= 2 * out
    finally:
        torch.use_deterministic_algorithms(False)
