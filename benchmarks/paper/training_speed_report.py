"""The figure and the lines of training_speed.py."""

from __future__ import annotations

from pathlib import Path

Rows = list[dict[str, str]]
PLACE = ("model", "seqlen", "batch")


def speeds(rows: Rows) -> dict[tuple[str, ...], dict[tuple[str, str], float]]:
    """(model, seqlen, batch) -> (contestant, extras) -> tokens a second, of rows that ended."""
    found: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["outcome"] == "ok":
            place = found.setdefault(tuple(row[name] for name in PLACE), {})
            place[row["contestant"], row["extras"]] = float(row["tokens_per_second"])
    return found


def lines(rows: Rows) -> list[str]:
    """A table: tokens a second, and what ours gains over eager alone and over sdpa with the same
    extras."""
    found = [
        "| model | seqlen | batch | extras | eager | sdpa | ours | ours, no padding "
        "| ours / sdpa | best of ours / eager alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for place, table in speeds(rows).items():
        best = max((v for (who, _), v in table.items() if who.startswith("ours")), default=None)
        alone = table.get(("eager", "none"))
        for extras in dict.fromkeys(extras for _, extras in table):
            got = {who: v for (who, with_), v in table.items() if with_ == extras}
            ours = max((v for who, v in got.items() if who.startswith("ours")), default=None)
            cells = [
                f"{got[who]:,.0f}" if who in got else "-"
                for who in ("eager", "sdpa", "ours", "ours, no padding")
            ]
            cells.append(f"{ours / got['sdpa']:.2f}" if ours and "sdpa" in got else "-")
            first = extras == "none" and best and alone
            cells.append(f"{best / alone:.2f}" if first else "")
            found.append("| " + " | ".join([*place, extras, *cells]) + " |")
    return found


def report(rows: Rows, folder: Path) -> None:
    """Writes training_speed.md and .svg.

    Args:
        rows: of the CSV.
        folder: where to.
    """
    if not rows:
        return
    conditions = f"{rows[-1]['device']}, torch {rows[-1]['torch']}, commit {rows[-1]['commit']}"
    text = ["# Training speed", "", f"Tokens a second; {conditions}; seed {rows[-1]['seed']}.", ""]
    text += lines(rows)
    text += ["", f"Command: `{rows[-1]['command']}`"]
    (folder / "training_speed.md").write_text("\n".join(text) + "\n")
    _draw(speeds(rows), folder / "training_speed.svg")


def _draw(table: dict[tuple[str, ...], dict[tuple[str, str], float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 2.2 * len(table)), 4), layout="constrained")
    axis = figure.subplots()
    kinds = list(dict.fromkeys(kind for entries in table.values() for kind in entries))
    width = 0.8 / max(len(kinds), 1)
    for number, kind in enumerate(kinds):
        at = [i + number * width for i, entries in enumerate(table.values()) if kind in entries]
        heights = [entries[kind] for entries in table.values() if kind in entries]
        axis.bar(at, heights, width, label=f"{kind[0]} ({kind[1]})")
    axis.set_xticks([i + 0.4 for i in range(len(table))], [" ".join(place) for place in table])
    axis.set_ylabel("tokens a second")
    axis.legend(fontsize=6, ncols=2)
    figure.savefig(path)
