"""A patched model in transformers' Trainer, with peft, packing, compiling, resuming."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithFlattening

import hf_flash_patch as hfp

from .corpus import AUTO, curve, masked, model_of, padded, train, trainer_of
from .processes import reset

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LONGLORA = {**LORA, "modules_to_save": ["embed_tokens", "norm", "input_layernorm"]}


@pytest.fixture(autouse=True)
def alone():
    reset()


def with_adapter(model, **config):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**config))


def assert_same_curve(ours, theirs, most=0.005):
    """Mean difference of the losses, relative; and there was something to learn."""
    assert theirs[-5:].mean() < theirs[:5].mean() - 0.05
    assert ((ours - theirs).abs() / theirs).mean() <= most


RUNS = {
    "gpt2": ("gpt2", {}, {}),
    "llama": ("llama", {}, {}),
    "llama-lora": ("llama", LORA, {"learning_rate": 3e-2}),
    "llama-longlora": ("llama", LONGLORA, {"learning_rate": 1e-2}),
    "bert": ("bert", {}, {"learning_rate": 1e-2}),
    "accumulation": ("llama", {}, {"gradient_accumulation_steps": 2, "max_steps": 15}),
    "lora-reentrant": (
        "llama",
        LORA,
        {
            "learning_rate": 3e-2,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    "longlora-checkpoints": (
        "llama",
        LONGLORA,
        {"learning_rate": 1e-2, "gradient_checkpointing": True, "bf16": True},
    ),
    "bf16": ("llama", {}, {"bf16": True}),
    "checkpoints": ("gpt2", {}, {"gradient_checkpointing": True}),
    "reentrant": (
        "gpt2",
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_sdpa(name, tmp_path):
    """30 steps; the difference is the rounding of fp32 or bf16, far below 0.5%."""
    family, adapter, settings = RUNS[name]
    collator = masked if family == "bert" else padded
    curves = []
    for patched in (False, True):
        model = model_of(family)
        if patched:
            hfp.patch(model)
        if adapter:
            model = with_adapter(model, **adapter)
        curves.append(train(model, tmp_path, collator, **settings))
    assert_same_curve(curves[1], curves[0])


def test_compiled(tmp_path):
    """By the Trainer's option; rows of one length, since each length is compiled anew."""

    def collator(rows):
        return padded([{name: ids[:5] for name, ids in row.items()} for row in rows])

    curves = []
    for settings in ({}, {"torch_compile_backend": "aot_eager"}):
        model = model_of("llama", num_hidden_layers=1)
        hfp.patch(model)
        curves.append(train(model, tmp_path, collator, max_steps=3, **settings))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)


def test_packing_is_padding_without_the_padding(tmp_path):
    """DataCollatorWithFlattening on a patched model, against padded rows under sdpa."""
    model = model_of("llama")
    theirs = train(copy.deepcopy(model), tmp_path)
    hfp.patch(model)
    for flash_kwargs in (False, True):
        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs)
        ours = train(copy.deepcopy(model), tmp_path, flatten)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_accumulated_packing(tmp_path):
    """Two packed rows of two documents make the step of one with four."""
    model, curves = model_of("llama"), []
    hfp.patch(model)
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        curves.append(train(copy.deepcopy(model), tmp_path, flatten, max_steps=10, **settings))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_all_memory_techniques(bf16, tmp_path):
    """Of hfp.memory, in small chunks and tiles, on packed rows: the same losses."""
    model = model_of("llama")
    theirs = train(copy.deepcopy(model), tmp_path, bf16=bf16)
    hfp.patch(model)
    hfp.memory.chunked_loss(model, chunk=13)
    hfp.memory.offload_checkpoints(model, min_bytes=0)
    hfp.memory.tile_layers(model, tile=17)
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    ours = train(model, tmp_path, flatten, bf16=bf16)
    torch.testing.assert_close(ours, theirs, rtol=2e-3 if bf16 else 1e-4, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_and_the_best_model(smoothing, tmp_path):
    """With a metric of all logits, and a loss that Trainer takes of them: as with sdpa."""

    def accuracy(predictions):
        right = predictions.predictions.argmax(-1)[:, :-1] == predictions.label_ids[:, 1:]
        return {"accuracy": right.mean().item()}

    settings = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 10, "save_steps": 5}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    settings |= {"label_smoothing_factor": smoothing, "save_strategy": "steps"}
    found = []
    for patched in (False, True):
        model = model_of("llama")
        if patched:
            hfp.patch(model)
            hfp.memory.chunked_loss(model, chunk=13)
        trainer = trainer_of(model, tmp_path, **settings)
        trainer.compute_metrics = accuracy
        trainer.train()
        assert trainer.state.best_model_checkpoint is not None
        log = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
        metrics = [[entry["eval_loss"], entry["eval_accuracy"]] for entry in log]
        found.append((curve(trainer), torch.tensor(metrics)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2},
    "llama": {"attention_dropout": 0.2},
    "bert": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_replayed(family, tmp_path):
    """Under each kind of checkpoint the numbers drawn, and so the losses, are those without."""
    curves = []
    for kind in (None, False, True, "offload", "tile", "keep"):
        model = model_of(family, **DROPOUT[family])
        hfp.patch(model)
        settings = {}
        if isinstance(kind, bool):
            settings = {"gradient_checkpointing": True}
            settings |= {"gradient_checkpointing_kwargs": {"use_reentrant": kind}}
        if kind == "offload":
            hfp.memory.offload_checkpoints(model, min_bytes=0)
        if kind == "keep":
            settings = {"gradient_checkpointing": True}
            hfp.memory.keep_attention(model)
        if kind == "tile":  # larger than a batch: the order of drawing is the same
            hfp.memory.tile_layers(model, tile=1000)
        collator = masked if family == "bert" else padded
        curves.append(train(model, tmp_path, collator, max_steps=4, **settings))
    for other in curves[1:]:
        torch.testing.assert_close(other, curves[0], rtol=1e-5, atol=0)


def long_llama(model):
    hfp.patch(model, max_length=128, rope="yarn", mask=hfp.masks.sliding_window(16))


def long_gpt2(model):
    hfp.patch(model, max_length=128, positions="interpolate", mask=hfp.masks.sliding_window(16))


def long_bert(model):
    hfp.patch(model, max_length=128, positions="tile", mask=hfp.masks.sliding_window(16))


# Model, adapter, how it is extended. The adapters of GPT-2 and BERT carry their position tables.
STOPPED = {
    "lora": ("llama", LORA, long_llama),
    "longlora": ("llama", LONGLORA, long_llama),
    "gpt2": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wpe"]},
        long_gpt2,
    ),
    "bert": (
        "bert",
        {"r": 4, "target_modules": ["query"], "modules_to_save": ["position_embeddings"]},
        long_bert,
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_and_gone_on(name, tmp_path):
    """An adapter on an extended model with a mask: resumed, reloaded, merged."""
    family, adapter, extend = STOPPED[name]

    def model():
        base = model_of(family)
        extend(base)
        return with_adapter(base, **adapter)

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    collator = masked if family == "bert" else padded
    whole = trainer_of(model(), tmp_path, collator, **settings)
    whole.train()
    resumed = trainer_of(model(), tmp_path, collator, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(curve(whole), curve(resumed))
    pairs = zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)

    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        expected = resumed.model.eval()(ids).logits
        resumed.save_model(tmp_path / "adapter")
        base = model_of(family).eval()
        extend(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, expected)
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        stock = AUTO[family].from_pretrained(tmp_path / "merged")
        report = hfp.patch(stock)  # the mask and the length stand in its config
        torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert "sliding_window(16)" in str(report)
