"""Rows, table, figure and conclusion of long_documents.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .fit import Spent
from .loop import wilson
from .records import Records
from .verdict import measured_on

if TYPE_CHECKING:
    from .long_documents import Study

TARGET = 4.0  # points of the second length over the first
Z = 1.96  # standard deviations of a 95% interval


def open_log(study: Study) -> Records:
    """The rows so far; each preset but "h200" has a file of its own."""
    return Records(_path(study, ".csv"))


def _path(study: Study, ending: str) -> Path:
    preset = study.arguments.preset
    name = "long-documents" + ("" if preset == "h200" else f"-{preset}")
    return Path(study.arguments.output) / f"{name}{ending}"


def _conditions(study: Study) -> dict[str, Any]:
    """What rows have in common that may be compared."""
    p, text = study.preset, study.documents
    return {
        "preset": study.arguments.preset,
        "window_epochs": p.window_epochs,
        "epochs": p.epochs,
        "train_documents": len(text.train),
        "test_documents": len(text.test),
    }


def done(study: Study, length: int, seed: int) -> bool:
    """Whether a length and seed is in the rows."""
    return study.log.has(**_conditions(study), length=length, seed=seed)


def record(study: Study, length: int, seed: int, right: Tensor, spent: Spent) -> None:
    """Adds the row of a length and seed.

    Args:
        study: whose it is.
        length: tokens.
        seed: of weights and order.
        right: bool (test documents,).
        spent: of fine-tuning.
    """
    count, total = int(right.sum()), len(right)
    low, high = wilson(count, total)
    bits = "".join(str(int(bit)) for bit in right)
    study.log.add(
        {
            **_conditions(study),
            "length": length,
            "seed": seed,
            "accuracy": count / total,
            "low": low,
            "high": high,
            "steps_per_second": spent.per_second(1),
            "gib": spent.gib,
            "answers": f"{int(bits, 2):0{-(-total // 4)}x}",  # a bit a document, 1 for right
        }
    )


def _answers(row: dict[str, Any]) -> Tensor:
    count = int(row["test_documents"])
    bits = f"{int(row['answers'], 16):0{count}b}"
    return torch.tensor([float(bit) for bit in bits])


def _rows(study: Study) -> list[dict[str, str]]:
    return study.log.where(**_conditions(study))


def pooled(study: Study) -> dict[int, dict[int, Tensor]]:
    """length -> seed -> float (test documents,), 1 for right; the rows of these conditions."""
    found: dict[int, dict[int, Tensor]] = {}
    for row in _rows(study):
        found.setdefault(int(row["length"]), {})[int(row["seed"])] = _answers(row)
    return dict(sorted(found.items()))


def conclude(study: Study) -> str:
    """Draws, writes and returns what the rows say so far."""
    study.log.refresh()
    found = pooled(study)
    if not found:
        return "Nothing is measured yet."
    said = _claim(study, found)
    table = [
        "| tokens | accuracy | 95% interval | by seed |",
        "| ---: | ---: | --- | --- |",
        *(_line(length, seeds) for length, seeds in found.items()),
    ]
    figure = _path(study, ".png")
    _draw(found, figure)
    text = [
        "# Which package a source file is from, by what is read of it",
        said,
        "\n".join(table),
        f"{study.documents}. {measured_on(_rows(study))}",
        "Names of packages and modules, imports, license headers, comments, addresses and file "
        "names are taken out: `benchmarks/paper/masked_sources.py`. Intervals: Wilson's, over test "
        "documents. How models are trained: `benchmarks/paper/long_documents.py`.",
        f"![Accuracy by length]({figure.name})",
    ]
    _path(study, ".md").write_text("\n\n".join(text) + "\n")
    return said


def _line(length: int, seeds: dict[int, Tensor]) -> str:
    share, low, high = _share(seeds)
    each = ", ".join(f"{seed}: {100 * right.mean():.1f}" for seed, right in sorted(seeds.items()))
    return f"| {length:,} | {100 * share:.1f} | {100 * low:.1f} to {100 * high:.1f} | {each} |"


def _share(seeds: dict[int, Tensor]) -> tuple[float, float, float]:
    """Mean accuracy over seeds, and its interval for as many trials as there are documents."""
    right = torch.stack(list(seeds.values())).mean(0)
    return (right.mean().item(), *wilson(right.sum().item(), len(right)))


def _claim(study: Study, found: dict[int, dict[int, Tensor]]) -> str:
    short, long = study.preset.lengths[:2]
    seeds = sorted(set(found.get(short, {})) & set(found.get(long, {})))
    if not seeds:
        return f"No seed has both {short:,} and {long:,} tokens yet."
    means = [torch.stack([found[n][seed] for seed in seeds]).mean(0) for n in (short, long)]
    gain = 100 * (means[1] - means[0])  # a document's, in points
    mean, half = gain.mean().item(), Z * gain.std().item() / len(gain) ** 0.5
    verdict = "reached" if mean >= TARGET else "missed"
    return (
        f"{long:,} tokens: {100 * means[1].mean():.1f}% right, {short:,} tokens: "
        f"{100 * means[0].mean():.1f}%; {mean:+.1f} points (95% interval {mean - half:+.1f} to "
        f"{mean + half:+.1f}, paired over {len(gain)} documents; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}). "
        f"Target {TARGET:+.0f} points: {verdict}."
    )


def _draw(found: dict[int, dict[int, Tensor]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    shares = [_share(seeds) for seeds in found.values()]
    middle = [100 * share for share, _, _ in shares]
    sides = [
        [100 * (share - low) for share, low, _ in shares],
        [100 * (high - share) for share, _, high in shares],
    ]
    axis.errorbar(list(found), middle, yerr=sides, marker="o", capsize=3, label="mean of seeds")
    for length, seeds in found.items():
        for right in seeds.values():
            axis.plot(length, 100 * right.mean().item(), ".", color="#999999")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(found), [f"{length:,}" for length in found])
    axis.set(xlabel="tokens read of a document", ylabel="accuracy (%)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
