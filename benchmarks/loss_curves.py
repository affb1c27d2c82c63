"""Loss curves of patched models against sdpa's: GPT-2, LLaMA with LoRA, BERT.

    python -m benchmarks.loss_curves --output docs/results   # one GPU, a minute a model
    python -m benchmarks.loss_curves --tiny                  # a minute, on a CPU

Three curves a model: sdpa; patched, of the same seed; sdpa, of another seed. All three see the same
tokens, in bf16 autocast (on a CPU in fp32); a seed is of the weights that training starts from and
of dropout. LLaMA is trained for some steps first, as a whole, and its LoRA is the seed's.

The claim: over all steps the patched losses differ from sdpa's by at most 0.5 % in the mean, and by
no more than the other seed's do. Attention has no dropout here, for which the kernels draw numbers
of their own; elsewhere GPT-2 and BERT have it, and draw the same with either attention.
On a CPU the torch engine calls SDPA for such rows, dense and without padding: --tiny shows that the
script runs, and no more.

Stopped at any time, the same command goes on with the next curve. It leaves a CSV of all losses, a
figure and a conclusion in --output; the exit status is 0 if the claim holds, else 1.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.utils import logging

import hf_flash_patch as hfp
from benchmarks.paper.records import Records
from examples.study.data import Corpus, corpus
from examples.study.training import Batches, Recipe, precision

LIMIT = 0.005  # mean absolute difference, relative to sdpa's loss
SEED, OTHER_SEED = 0, 1
CURVES = {  # attention, seed
    "sdpa": ("sdpa", SEED),
    "patched": ("hfp", SEED),
    "sdpa, other seed": ("sdpa", OTHER_SEED),
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True)
class Case:
    """A model and its training.

    Attributes:
        title: for figure and conclusion.
        config: class and settings.
        recipe: of the curves.
        base: LoRA is trained, on what this trained; None: all weights, from random ones.
    """

    title: str
    config: tuple[Any, dict[str, Any]]
    recipe: Recipe
    base: Recipe | None = None

    @property
    def masked(self) -> bool:
        """BERT's task."""
        return self.config[0] is BertConfig

    def tiny(self) -> "Case":
        """The same for a CPU, in seconds."""
        cls, settings = self.config
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {} if cls is GPT2Config else {"intermediate_size": 128}
        sizes |= {"num_key_value_heads": 2} if cls is LlamaConfig else {}
        small = {"length": 64, "batch": 4, "learning_rate": 3e-3}
        return replace(
            self,
            config=(cls, settings | sizes),
            recipe=replace(self.recipe, **small),
            base=self.base and replace(self.base, **small),
        )


# Sizes of gpt2 and bert-base-uncased; the LLaMA has GQA and about 100 M parameters.
CASES = {
    "gpt2": Case(
        "GPT-2 small",
        (GPT2Config, {"attn_pdrop": 0.0}),
        Recipe(steps=200, length=1024, batch=16, learning_rate=6e-4, warmup=20),
    ),
    "llama": Case(
        "LLaMA with LoRA",
        (
            LlamaConfig,
            {
                "hidden_size": 768,
                "intermediate_size": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
            },
        ),
        Recipe(steps=200, length=1024, batch=16, learning_rate=2e-3, warmup=20),
        base=Recipe(steps=200, length=1024, batch=16, learning_rate=6e-4, warmup=20),
    ),
    "bert": Case(
        "BERT base (MLM)",
        (BertConfig, {"attention_probs_dropout_prob": 0.0}),
        Recipe(steps=200, length=512, batch=32, learning_rate=2e-4, warmup=40),
    ),
}


@dataclass
class Arguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: list(CASES), metadata={"choices": list(CASES)}
    )
    tiny: bool = field(default=False, metadata={"help": "small models, on a CPU"})
    steps: int = field(default=200, metadata={"help": "of a curve, and of LLaMA before"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    backend: str | None = field(
        default=None, metadata={"help": "of hfp.patch; by default cuda, or torch on a CPU"}
    )
    work: str = field(
        default="loss_curves_output", metadata={"help": "folder for text, weights and curves"}
    )
    output: str = field(
        default="loss_curves_output", metadata={"help": "folder for CSV, figure and conclusion"}
    )


def main(arguments: Arguments) -> int:
    """Measures what is not there yet and writes the report; the exit status."""
    logging.set_verbosity_error()
    if arguments.tiny:
        arguments.device = "cpu"
    name = "loss-curves-tiny" if arguments.tiny else "loss-curves"
    records = Records(Path(arguments.output, f"{name}.csv"))
    for model in arguments.models:
        if not records.has(model=model, step=arguments.steps):
            study = Study(model, arguments)
            curves = {curve: study.losses(curve) for curve in CURVES}
            steps = range(1, arguments.steps + 1)
            rows = zip(steps, *curves.values(), strict=True)
            columns = ("model", "step", *CURVES, "backend")
            records.extend(
                [dict(zip(columns, (model, *row, study.backend), strict=True)) for row in rows]
            )
    found = {
        model: {
            curve: [float(row[curve]) for row in records.rows if row["model"] == model]
            for curve in CURVES
        }
        for model in CASES
        if records.has(model=model)
    }
    draw(found, records.path.with_suffix(".svg"))
    text, holds = conclusion(found, records.rows[-1])
    records.path.with_suffix(".md").write_text(text)
    print(text)
    return 0 if holds else 1


class Study:
    """A model's curves, each kept in a file until all are in the CSV.

    Args:
        model: of `CASES`.
        arguments: where, and how many steps.

    Attributes:
        backend: of the patch.
    """

    def __init__(self, model: str, arguments: Arguments):
        case = CASES[model].tiny() if arguments.tiny else CASES[model]
        steps = arguments.steps
        self._case = replace(
            case,
            recipe=replace(case.recipe, steps=steps),
            base=case.base and replace(case.base, steps=steps),
        )
        self._device = torch.device(arguments.device)
        self.backend = arguments.backend or ("cuda" if self._device.type == "cuda" else "torch")
        work = Path(arguments.work, "tiny" if arguments.tiny else "")
        self._folder = work / f"{model}-{steps}-{self.backend}"
        self._corpus = _text(work, arguments.tiny)

    def losses(self, curve: str) -> list[float]:
        """Of every step."""
        attention, seed = CURVES[curve]
        path = self._folder / f"{attention}-{seed}.pt"
        return _kept(path, lambda: self._run(attention, seed))

    def _run(self, attention: str, seed: int) -> list[float]:
        case = self._case
        if case.base is None:
            model = self._model(seed)
        else:
            model = self._model(SEED)
            model.load_state_dict(_kept(self._folder / "base.pt", self._base))
        if attention == "hfp":
            hfp.patch(model, backend=self.backend)
        trained = model
        if case.base is not None:
            torch.manual_seed(seed)
            trained = get_peft_model(model, LoraConfig(**LORA))
        torch.manual_seed(seed)  # of dropout, whatever making the model drew
        return fit(trained, Batches(self._corpus, case.recipe, case.masked, SEED), case.recipe)

    def _base(self) -> dict[str, torch.Tensor]:
        case, model = self._case, self._model(SEED)
        fit(model, Batches(self._corpus, case.base, case.masked, OTHER_SEED), case.base)
        return model.state_dict()

    def _model(self, seed: int) -> PreTrainedModel:
        cls, settings = self._case.config
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        length = {"max_position_embeddings": self._case.recipe.length}
        config = cls(vocab_size=len(self._corpus.tokenizer), **settings, **length, **ids)
        auto = AutoModelForMaskedLM if self._case.masked else AutoModelForCausalLM
        torch.manual_seed(seed)
        return auto.from_config(config, attn_implementation="sdpa").to(self._device)


def fit(model: torch.nn.Module, batches: Batches, recipe: Recipe) -> list[float]:
    """Trains, and gives the loss of every step; AdamW, gradients clipped to a norm of 1."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    masked = batches(0)[1].min() < 0  # only BERT's labels leave some out
    model.train()
    losses = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        inputs, labels, _ = batches(step)
        inputs = inputs.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True) if masked else inputs
        with precision(device):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())  # reading it here would wait for the device
    return torch.stack(losses).tolist()


def _text(work: Path, tiny: bool) -> Corpus:
    if tiny:
        return corpus(work, megabytes=2, documents=1, document_tokens=64, vocab_size=512)
    return corpus(work, megabytes=40, documents=1, document_tokens=1024, vocab_size=16384)


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is in the file; if there is none, what `make` makes, kept there."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(made, partial)
        partial.replace(path)
    return torch.load(path, map_location="cpu")


def difference(losses: list[float], expected: list[float]) -> float:
    """Mean over the steps of the absolute difference, relative to what is expected."""
    return statistics.fmean(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


def conclusion(
    found: dict[str, dict[str, list[float]]], provenance: dict[str, str]
) -> tuple[str, bool]:
    """Markdown that says whether the claim holds, and whether it does.

    Args:
        found: model -> curve -> losses.
        provenance: a row of `Records`.
    """
    lines, missed = [], []
    for model, curves in found.items():
        sdpa, ours, other = curves.values()
        gap, noise = difference(ours, sdpa), difference(other, sdpa)
        if not gap <= min(LIMIT, noise):
            missed.append(CASES[model].title)
        bias = math.fsum(ours) / math.fsum(sdpa) - 1
        last = " / ".join(f"{statistics.fmean(c[-20:]):.4f}" for c in (sdpa, ours, other))
        lines.append(
            f"| {CASES[model].title} | {len(sdpa)} | {gap:.4%} | {bias:+.4%} | {noise:.4%} | "
            f"{sdpa[0]:.3f} | {last} |"
        )
    head = f"Within seed noise, and within {LIMIT:.1%}: {', '.join(CASES[m].title for m in found)}."
    if missed:
        head = f"Beyond seed noise or {LIMIT:.1%}: {', '.join(missed)}."
    where = ", ".join(provenance[name] for name in ("device", "torch", "version", "commit"))
    text = f"""{head}

Relative to sdpa's losses, over all steps: mean absolute difference of the patched model's, mean
signed one, mean absolute one of sdpa's own with another seed. Then the loss of the first step and
of the last 20, of sdpa, patched and with another seed. Backend {provenance["backend"]}; {where}.

| model | steps | patched | signed | other seed | first loss | last losses |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""
    return "\n".join([text + "\n".join(lines), ""]), not missed


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Above the losses, below their differences from sdpa's; a column a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, height_ratios=(2, 1), sharex="col")
    for column, (model, curves) in enumerate(found.items()):
        above, below = axes[:, column]
        for (curve, losses), style in zip(curves.items(), ("-", "--", ":"), strict=True):
            above.plot(range(1, len(losses) + 1), losses, style, label=curve)
        for curve, colour in (("sdpa, other seed", "C2"), ("patched", "C1")):
            gaps = [100 * (a / b - 1) for a, b in zip(curves[curve], curves["sdpa"], strict=True)]
            below.plot(range(1, len(gaps) + 1), gaps, color=colour, linewidth=0.8)
        for side in (-LIMIT, LIMIT):
            below.axhline(100 * side, color="black", linewidth=0.6, linestyle=":")
        above.set(title=CASES[model].title, ylabel="loss" if column == 0 else None)
        below.set(xlabel="step", ylabel="from sdpa (%)" if column == 0 else None)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(*HfArgumentParser(Arguments).parse_args_into_dataclasses()))
