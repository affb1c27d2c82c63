"""Documents that a tiny model can learn, and models to learn them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from tests.integration.tiny import tiny_model

AUTO = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
}
IGNORED = -100


def model_of(family: str, **overrides: Any) -> torch.nn.Module:
    """A tiny model with sdpa attention, in training mode."""
    model = tiny_model(AUTO[family], family, **overrides).train()
    model.set_attn_implementation("sdpa")
    return model


def documents(count: int, longest: int = 40) -> list[dict[str, list[int]]]:
    """Arithmetic progressions modulo 89, of random lengths from 5 on; labels without the first."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        length, start, step = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((5, longest + 1), (0, 89), (1, 4))
        )
        ids = [3 + (start + i * step) % 89 for i in range(length)]
        found.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return found


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of documents, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    ids = column("input_ids", 0)
    return {
        "input_ids": ids,
        "labels": column("labels", IGNORED),
        "attention_mask": (ids != 0).long(),
    }


def masked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """BERT's task: every fifth token is asked for and hidden by the mask token, 1."""
    batch = padded(rows)
    asked = (torch.arange(batch["input_ids"].shape[1]) % 5 == 3) & (batch["input_ids"] != 0)
    batch["labels"] = torch.where(asked, batch["input_ids"], IGNORED)
    batch["input_ids"] = batch["input_ids"].masked_fill(asked, 1)
    return batch


def flattened(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The documents in one row, kept apart by their positions and cu_seq_lens."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows, return_tensors="pt")


def items_of(batch: dict[str, torch.Tensor], shifted: bool = True) -> torch.Tensor:
    """Tokens that a batch's loss counts: its labels, but a row's first where they are shifted."""
    return (batch["labels"][:, int(shifted) :] != IGNORED).sum()


def trainer_of(model: torch.nn.Module, folder: Any, collator: Any = padded, **more: Any) -> Trainer:
    """A Trainer of 96 documents on the CPU: batches of 4, a learning rate that teaches."""
    settings = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    settings |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 1}
    settings |= {"use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), dataloader_pin_memory=False, **(settings | more))
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=documents(96),
        eval_dataset=documents(12) if "eval_strategy" in more else None,
    )


def curve(trainer: Trainer) -> torch.Tensor:
    """The losses of all steps, float64 (steps,)."""
    log = trainer.state.log_history
    return torch.tensor([entry["loss"] for entry in log if "loss" in entry], dtype=torch.float64)


def train(model: torch.nn.Module, folder: Any, collator: Any = padded, **more: Any) -> torch.Tensor:
    """Trains with `trainer_of`; the losses."""
    trainer = trainer_of(model, folder, collator, **more)
    trainer.train()
    return curve(trainer)
