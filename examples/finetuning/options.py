"""The options of finetune.py: three dataclasses, read from a file, the command line, or both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_flash_patch.memory import TECHNIQUES

TUNINGS = ("lora", "longlora", "full")


@dataclass
class ModelOptions:
    """Which model, and what is done to it before it is trained."""

    model: str | None = field(default=None, metadata={"help": "folder or name on the Hub"})
    scratch: str | None = field(
        default=None,
        metadata={"help": "JSON config with model_type, for random weights instead of --model"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "by default the model's; for --scratch one is trained"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, bfloat16, float32"})
    patch: bool = field(default=True, metadata={"help": "--no_patch trains with sdpa, to compare"})
    max_length: int | None = field(
        default=None, metadata={"help": "extend the model's context to this many tokens"}
    )
    rope: str = field(default="auto", metadata={"help": "how, for RoPE: linear, yarn, ..."})
    positions: str = field(default="auto", metadata={"help": "how, for a table: tile, ..."})
    mask: str | None = field(
        default=None,
        metadata={"help": 'pattern, such as "sliding_window(4096) | global_tokens(64)"'},
    )
    backend: str = field(default="auto", metadata={"help": "auto, cuda, torch or flash_attn"})
    tune: str = field(
        default="lora",
        metadata={"help": "lora; longlora (LoRA, embeddings and norms); full", "choices": TUNINGS},
    )
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "names of layers; by default all of attention"}
    )
    memory: list[str] = field(
        default_factory=list,
        metadata={
            "help": "for longer sequences: loss (in chunks), offload (checkpoints on the host), "
            "tile (MLPs and norms in tiles)",
            "choices": list(TECHNIQUES),
        },
    )
    keep_attention: bool = field(
        default=False,
        metadata={
            "help": "checkpoints (--memory offload, or --gradient_checkpointing) keep attention's "
            "results, which are then not computed again: less time, twice their memory"
        },
    )
    share: str = field(
        default="auto",
        metadata={
            "help": "how processes share a sequence, where accelerate's cp_size says how many: "
            "auto, ring, ulysses, both"
        },
    )
    merge: bool = field(
        default=False, metadata={"help": "at the end, also save the model with its LoRA merged in"}
    )


@dataclass
class DataOptions:
    """What is trained and evaluated on."""

    data: str = field(
        default="packages",
        metadata={
            "help": "a text or .jsonl file, a folder of them, a path or name for `datasets`, or "
            '"packages": the sources of the installed Python packages'
        },
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "likewise; by default 15%% of the text is held out"}
    )
    text_field: str = field(default="text", metadata={"help": "of .jsonl files and datasets"})
    megabytes: float = field(default=20.0, metadata={"help": 'of text to read from "packages"'})
    vocab_size: int = field(default=2048, metadata={"help": "of a tokenizer that is trained"})
    length: int | None = field(
        default=None,
        metadata={"help": "tokens of a row; by default --max_length, or the model's maximum"},
    )
    packing: bool = field(
        default=True,
        metadata={"help": "documents share rows, unseen by each other; --no_packing pads them"},
    )
    eval_lengths: list[int] = field(
        default_factory=list, metadata={"help": "tokens of context; by default that of training"}
    )
    eval_windows: int = field(default=32, metadata={"help": "that are evaluated, of each length"})


@dataclass
class TrainingOptions(TrainingArguments):
    """transformers' TrainingArguments; the defaults that differ are below."""

    output_dir: str = "finetune_output"
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 1
    save_steps: float = 100
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        """Refuses what would make a checkpoint be deleted before the next one is complete."""
        super().__post_init__()
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit={self.save_total_limit}: it takes 2, since a checkpoint counts "
                "only when the next is complete."
            )

    @property
    def device(self) -> torch.device:
        """Where a process computes; of several on a CPU not "cpu:0", which torch.load refuses."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


Options = tuple[ModelOptions, DataOptions, TrainingOptions]


def read(arguments: list[str]) -> Options:
    """Options from the command line; a first argument that ends in .yaml or .json is a file of
    them, which what follows it overrides.

    Args:
        arguments: without the name of the program.

    Raises:
        SystemExit: the file is not there, or the options contradict each other.
    """
    parser = HfArgumentParser([ModelOptions, DataOptions, TrainingOptions])
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml", ".json"):
        if not Path(arguments[0]).is_file():
            raise SystemExit(f"{arguments[0]}: there is no such file of options.")
        settings = yaml.safe_load(Path(arguments[0]).read_text()) or {}
        given = {argument.split("=")[0] for argument in arguments[1:]}
        for one, other in (("--model", "scratch"), ("--scratch", "model")):
            if one in given:
                settings.pop(other, None)
        arguments = [*_as_arguments(settings), *arguments[1:]]
    *options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise SystemExit(f"Unknown options: {' '.join(unknown)}. --help lists those there are.")
    _refuse_contradictions(*options)
    return tuple(options)


def _refuse_contradictions(
    model: ModelOptions, data: DataOptions, training: TrainingOptions
) -> None:
    if (model.model is None) == (model.scratch is None):
        raise SystemExit("Give --model, or --scratch for random weights: one of the two.")
    if "offload" in model.memory and training.gradient_checkpointing:
        raise SystemExit("--gradient_checkpointing would replace --memory offload; give one.")
    checkpoints = "offload" in model.memory or training.gradient_checkpointing
    if model.keep_attention and not (checkpoints and model.patch):
        raise SystemExit(
            "--keep_attention is for checkpoints of a patched model: give --memory offload or "
            "--gradient_checkpointing, and not --no_patch."
        )
    if any(length < 2 for length in data.eval_lengths):
        raise SystemExit("--eval_lengths: a token is predicted from another, so 2 at least.")


def _as_arguments(settings: dict) -> list[str]:
    """The command line that says the same; later arguments win over these."""
    found: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found.append(f"--{name}")
        found += [json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values]
    return found
