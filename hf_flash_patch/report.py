"""What a patch did, as text, HTML and data."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleRow:
    """Attention modules of one class that were treated alike.

    Attributes:
        class_name: class of the modules.
        count: how many.
        shape: "heads/kv heads x head_dim", as far as the modules say.
        before: attention implementation they used.
        after: the one they use now.
        reason: why they were left alone; empty if they were not.
    """

    class_name: str
    count: int
    shape: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The report of one patch.

    Attributes:
        model: class name of the patched model.
        family: family name and how it encodes positions, or "not in the table".
        backend: the backend asked for, and what stands in the way of the compiled kernels, if
            anything.
        dtype: dtype of the weights.
        device: device of the weights.
        max_length: maximum context in tokens; None if the model has no limit of its own.
        modules: what happened to the attention modules.
        notes: anything else a user should know.
        mask: the pattern put on top of the model's own masks; None for none.
    """

    model: str
    family: str
    backend: str
    dtype: str
    device: str
    max_length: int | None
    modules: tuple[ModuleRow, ...]
    notes: tuple[str, ...] = ()
    mask: str | None = None

    def to_dict(self) -> dict:
        """The report as plain data (JSON)."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """Label and value of everything but the modules and the notes."""
        context = (
            "no limit of its own"
            if self.max_length is None
            else f"{self.max_length} tokens (unchanged)"
        )
        facts = [
            ("model", self.model),
            ("family", self.family),
            ("backend", self.backend),
            ("weights", f"{self.dtype} on {self.device}"),
            ("context", context),
        ]
        return facts if self.mask is None else [*facts, ("mask", self.mask)]

    def __str__(self) -> str:
        lines = [f"{label:<9}{value}" for label, value in self.facts()]
        for row in self.modules:
            what = (
                f"{row.before} -> {row.after}" if row.before != row.after else f"{row.after}, kept"
            )
            shape = f" ({row.shape})" if row.shape else ""
            lines.append(f"attention {row.count} x {row.class_name}{shape}: {what}")
            if row.reason:
                lines.append(f"          reason: {row.reason}")
        lines += [f"{'note':<9}{note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def cells(values: list[str], tag: str = "td") -> str:
            return (
                "<tr>"
                + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
                + "</tr>"
            )

        facts = "".join(cells([label, value]) for label, value in self.facts())
        header = cells(["modules", "class", "heads", "before", "after", "reason"], "th")
        rows = "".join(
            cells([str(row.count), row.class_name, row.shape, row.before, row.after, row.reason])
            for row in self.modules
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<table>{facts}</table><table>{header}{rows}</table>" + (
            f"<ul>{notes}</ul>" if notes else ""
        )
