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
class ContextRow:
    """One position table, or the rotary frequencies of one config.

    Attributes:
        where: path below the model.
        kind: "learned positions" or "RoPE".
        method: how it was extended; "none" if nothing was to do.
        why: why "auto" took that; empty if it was asked for.
        before: maximum in tokens.
        after: the same, now.
        exact_up_to: inputs of up to this many tokens give bit for bit what they gave before.
        details: what changed, in words.
        notes: what a user should know.
    """

    where: str
    kind: str
    method: str
    why: str
    before: int
    after: int
    exact_up_to: int
    details: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContextReport:
    """What an extension of the context did.

    Attributes:
        model: class name of the model.
        before: maximum in tokens; the smallest, if the model has several.
        after: the same, now.
        parts: what changed, table by table.
        notes: anything else a user should know.
    """

    model: str
    before: int
    after: int
    parts: tuple[ContextRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        methods = ", ".join(dict.fromkeys(p.method for p in self.parts if p.method != "none"))
        if not methods:
            return f"{self.after} tokens (unchanged)"
        return f"{self.before} -> {self.after} tokens ({methods})"

    def to_dict(self) -> dict:
        """The report as plain data (JSON)."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of everything but the model and the summary."""
        found = []
        for part in self.parts:
            if part.method == "none":
                found.append(("kept", f"{part.where}: {part.after} tokens already"))
                continue
            why = f" ({part.why})" if part.why else ""
            found.append((part.kind, f"{part.where}: {part.method}{why}"))
            found += [("", detail) for detail in part.details]
            exact = "no length gives exactly what it gave before"
            if part.exact_up_to:
                exact = f"up to {part.exact_up_to} tokens bit for bit as before"
            found.append(("results", exact))
            found += [("note", note) for note in part.notes]
        return found + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        return self.text()

    def text(self, *more: tuple[str, str]) -> str:
        """The report, and more rows of a label and a text."""
        rows = [("model", self.model), ("context", self.summary), *self.lines(), *more]
        return _columns(rows)

    def _repr_html_(self) -> str:
        rows = [("model", self.model), ("context", self.summary), *self.lines()]
        cells = "".join(
            f"<tr><td>{html.escape(label)}</td><td>{html.escape(text)}</td></tr>"
            for label, text in rows
        )
        return f"<table>{cells}</table>"


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
        context: how the context was extended; None if it was not.
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
    context: ContextReport | None = None
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
        if self.context is not None:
            context = self.context.summary
        facts = [
            ("model", self.model),
            ("family", self.family),
            ("backend", self.backend),
            ("weights", f"{self.dtype} on {self.device}"),
            ("context", context),
            *(self.context.lines() if self.context is not None else ()),
        ]
        return facts if self.mask is None else [*facts, ("mask", self.mask)]

    def __str__(self) -> str:
        rows = self.facts()
        for row in self.modules:
            what = (
                f"{row.before} -> {row.after}" if row.before != row.after else f"{row.after}, kept"
            )
            shape = f" ({row.shape})" if row.shape else ""
            rows.append(("attention", f"{row.count} x {row.class_name}{shape}: {what}"))
            if row.reason:
                rows.append(("", f"reason: {row.reason}"))
        return _columns(rows + [("note", note) for note in self.notes])

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


def _columns(rows: list[tuple[str, str]]) -> str:
    """Labels and texts, a row a line."""
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)
