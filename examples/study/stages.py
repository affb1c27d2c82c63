"""The stages of a study, each done once: what is measured is in results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import hf_flash_patch as hfp

from . import evaluation, training
from .data import corpus
from .presets import Preset

Row = dict[str, Any]


class Study:
    """One model, from its training to the last number.

    Args:
        preset: what to do.
        folder: for the checkpoints and the results; the corpus goes beside it, for other studies.
        device: where to compute.
        seed: of weights and batches.
        clock: says when to stop.
        tune: methods to fine-tune instead of the preset's.

    Attributes:
        results: a row for every number measured so far.
    """

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        device: torch.device,
        seed: int,
        clock: training.Clock,
        tune: tuple[str, ...] = (),
    ):
        self.preset, self.folder, self._device = preset, folder, device
        self._seed, self._clock, self._tune = seed, clock, tune or preset.tune
        self._file = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        text = f"text-{preset.megabytes:g}MB-{preset.vocab_size}-{preset.documents}"
        self.results: list[Row] = json.loads(self._file.read_text()) if self._file.exists() else []
        self._corpus = corpus(
            folder.parent / f"{text}x{preset.document_tokens}",
            preset.megabytes,
            preset.documents,
            preset.document_tokens,
            preset.vocab_size,
        )

    @property
    def conditions(self) -> str:
        """What the numbers are measured on, in words."""
        test, p = self._corpus.test, self.preset
        tokens = sum(map(len, self._corpus.train)) / 1e6
        text = (
            f"{len(test)} test documents of {test.shape[1]} tokens, from the sources of "
            f"{', '.join(sorted(set(self._corpus.sources)))}; trained on {tokens:.1f} M tokens of "
            f"{len(self._corpus.train)} other packages."
        )
        if p.masked:
            return f"{text} The same {training.MASKED_SHARE:.0%} masked at every length."
        return (
            f"{text} Perplexity: sliding windows, stride {evaluation.stride_of(p.lengths[0])}, "
            f"{p.windows} a document, the same tokens at every length. Pass keys: {p.trials} a "
            "depth and length."
        )

    def run(self) -> None:
        """Everything that is not done yet.

        Raises:
            OutOfTime: the time is over; what is done is saved.
        """
        p, base = self.preset, self.folder / "base"
        if not base.exists():
            torch.manual_seed(self._seed)
            model = self._auto.from_config(p.model_config(len(self._corpus.tokenizer)))
            self._train(model.to(self._device), p.base, "training", base)
        for method in p.methods:
            self._measure("extended", method, base)
        for method in self._tune:
            tuned = self.folder / f"tuned-{method}"
            if not tuned.exists():
                model = self._extended(self._load(base), method)
                self._train(model, p.tuning, f"fine-tuning {method}", tuned)
            self._measure("tuned", method, tuned)

    @property
    def _auto(self) -> Any:
        return AutoModelForMaskedLM if self.preset.masked else AutoModelForCausalLM

    def _load(self, path: Path) -> PreTrainedModel:
        return self._auto.from_pretrained(path).to(self._device)

    def _extended(self, model: PreTrainedModel, method: str) -> PreTrainedModel:
        torch.manual_seed(self._seed)  # the method "random" draws
        hfp.extend_context(model, self.preset.new, **{self.preset.argument: method})
        return model

    def _train(
        self, model: PreTrainedModel, recipe: training.Recipe, what: str, path: Path
    ) -> None:
        state = self.folder / f"{path.name}.state"
        batches = training.Batches(self._corpus, recipe, self.preset.masked, self._seed)
        name = f"{self.preset.name}, {what}"
        with hfp.patched(model):
            training.train(model, batches, recipe, state, self._clock, name)
        partial = path.with_suffix(".partial")
        model.save_pretrained(partial)
        partial.rename(path)
        state.unlink(missing_ok=True)

    def _measure(self, stage: str, method: str, path: Path) -> None:
        """Every number of one model that is not there yet."""
        p = self.preset
        # Without an extension, a table has no rows for more than the old length.
        longest = p.old if method == "none" and p.argument == "positions" else p.new
        done = {
            (row["metric"], row["length"], row["depth"])
            for row in self.results
            if (row["stage"], row["method"]) == (stage, method)
        }
        cells = [(m, n, d) for n in p.lengths if n <= longest for m, d in self._metrics()]
        todo = [cell for cell in cells if cell not in done]
        if not todo:
            return
        model = self._load(path).eval()
        if stage == "extended" and method != "none":
            model = self._extended(model, method)
        with hfp.patched(model):
            for metric, length, depth in todo:
                value = self._value(model, metric, length, depth)
                row = {"stage": stage, "method": method, "metric": metric}
                self.results.append({**row, "length": length, "depth": depth, "value": value})
                self._file.write_text(json.dumps(self.results, indent=0))

    def _metrics(self) -> list[tuple[str, float | None]]:
        if self.preset.masked:
            return [("masked loss", None)]
        return [("perplexity", None), *(("pass key", depth) for depth in self.preset.depths)]

    def _value(
        self, model: PreTrainedModel, metric: str, length: int, depth: float | None
    ) -> float:
        p, text, clock = self.preset, self._corpus, self._clock
        if metric == "masked loss":
            return evaluation.masked_loss(model, text, length, p.batch_tokens, clock)
        if depth is None:
            return evaluation.perplexity(
                model, text.test, length, p.lengths, p.windows, p.batch_tokens, clock
            )
        return evaluation.passkey(model, text, length, depth, p.trials, p.batch_tokens, clock)
