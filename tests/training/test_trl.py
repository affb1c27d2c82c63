"""A patched model in trl's SFTTrainer, where trl is installed."""

import pytest
import torch
from peft import LoraConfig
from transformers import ByT5Tokenizer

import hf_flash_patch as hfp

from .corpus import curve, documents, model_of
from .processes import reset

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

FREE = {"padding_free": True, "max_length": None}

# Settings of SFTConfig, techniques of hfp.memory, and whether with LoRA.
RUNS = {
    "padded": ({}, [], False),
    "padding-free": (FREE, [], False),
    "packed": ({"packing": True, "max_length": 64}, [], False),
    "reentrant": ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, [], False),
    "lora": ({"packing": True, "max_length": 64}, [], True),
    "memory": ({"packing": True, "max_length": 64}, ["loss", "tile"], False),
    "offload": ({"gradient_checkpointing": False}, ["offload"], True),
}


def losses(folder, patched, settings, techniques, lora):
    """Losses of 8 steps of a tiny LLaMA on `documents`."""
    reset()
    model = model_of("llama")
    if patched:
        hfp.patch(model)
        sizes = {"loss": {"chunk": 13}, "tile": {"tile": 17}, "offload": {"min_bytes": 0}}
        for name in techniques:
            hfp.memory.TECHNIQUES[name](model, **sizes[name])
    rows = [{"input_ids": row["input_ids"]} for row in documents(48)]
    common = {"max_steps": 8, "logging_steps": 1, "learning_rate": 3e-3, "bf16": False}
    common |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), dataloader_pin_memory=False, **(common | settings)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=ByT5Tokenizer(extra_ids=0),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    trainer.train()
    return curve(trainer)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_sdpa(name, tmp_path):
    settings, techniques, lora = RUNS[name]
    theirs = losses(tmp_path, False, settings, [], lora)
    ours = losses(tmp_path, True, settings, techniques, lora)
    assert len(ours) == 8
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_packing_is_padding_without_the_padding(tmp_path):
    """Documents in one row do not see each other: the losses of padded rows."""
    padded = losses(tmp_path, True, {}, [], False)
    free = losses(tmp_path, True, FREE, [], False)
    torch.testing.assert_close(free, padded, rtol=1e-4, atol=0)
