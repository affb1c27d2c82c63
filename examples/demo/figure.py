"""The figure: tokens/s and peak memory over context."""

from __future__ import annotations

from pathlib import Path

from .throughput import ATTENTIONS, Measurement

COLOURS = {"eager": "#999999", "sdpa": "#4477aa", "patched": "#cc3311"}


def save(measured: list[Measurement], path: Path, device: str, dtype: str) -> Path:
    """Draws a column for each model and saves a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(m.model for m in measured))
    size = (4.2 * len(models), 6.4)
    figure, axes = plt.subplots(2, len(models), figsize=size, squeeze=False, sharex="col")
    for column, model in enumerate(models):
        for name in ATTENTIONS:
            points = [
                m for m in measured if m.model == model and m.attention == name and m.peak_mib
            ]
            contexts = [m.context for m in points]
            style = {"color": COLOURS[name], "marker": "o", "label": name}
            axes[0, column].plot(contexts, [m.tokens_per_second for m in points], **style)
            axes[1, column].plot(contexts, [m.peak_mib for m in points], **style)
        for row, label in enumerate(("tokens/s", "peak memory (MiB)")):
            axis = axes[row, column]
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(model)
        axes[1, column].set_xlabel("context (tokens)")
    axes[0, 0].legend()
    figure.suptitle(f"One training step, forward and backward, {dtype} on {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
