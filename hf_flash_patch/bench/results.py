"""What was measured: a row each in a CSV file, ratios, and the tables that are printed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from .cells import Cell
from .contestants import OURS, YARDSTICKS

BEST, SDPA = "best peer", "best of SDPA"


@dataclass(frozen=True)
class Result:
    """One contestant in one cell and direction.

    Attributes:
        cell, direction: what was timed, direction "fwd" or "bwd".
        contestant, version: who; a yardstick has no version.
        milliseconds: of one call.
        spread: the slowest round over the fastest, minus 1.
        rate: work per second in the cell's unit, TFLOP/s or GB/s.
        dtype, device: of the tensors, and the GPU's name.
    """

    cell: Cell
    direction: str
    contestant: str
    version: str
    milliseconds: float
    spread: float
    rate: float
    dtype: str
    device: str


Key = tuple[Cell, str]
_PARSE: dict[Any, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
}
_CELL = {field.name: _PARSE[field.type] for field in fields(Cell)}
_RESULT = {field.name: _PARSE[field.type] for field in fields(Result) if field.name != "cell"}
COLUMNS = [*_CELL, *_RESULT, "unit"]


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """One row a result, replacing the file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow(row.pop("cell") | row | {"unit": result.cell.unit})


def read_csv(path: Path) -> list[Result]:
    """What `write_csv` wrote.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}; a file that hfp bench --csv wrote "
                f"has {COLUMNS}."
            )
        return [Result(Cell(**_parsed(row, _CELL)), **_parsed(row, _RESULT)) for row in reader]


def by_cell(results: Iterable[Result]) -> dict[Key, dict[str, Result]]:
    """(cell, direction) -> contestant -> result, in the order of the results."""
    table: dict[Key, dict[str, Result]] = {}
    for result in results:
        table.setdefault((result.cell, result.direction), {})[result.contestant] = result
    return table


def rival(entries: dict[str, Result], against: str) -> Result | None:
    """Whom ours is held against: a contestant by its name, `BEST` or `SDPA`; None if absent."""
    if against == BEST:
        names = [name for name in entries if name not in (OURS, *YARDSTICKS)]
    elif against == SDPA:
        names = [name for name in entries if name.startswith("sdpa_")]
    else:
        names = [name for name in entries if name == against]
    return max((entries[name] for name in names), key=lambda result: result.rate, default=None)


def ratio(entries: dict[str, Result], against: str) -> float | None:
    """Our rate over the rival's; above 1 where ours is faster; None if either is absent."""
    other = rival(entries, against)
    if other is None or OURS not in entries:
        return None
    return entries[OURS].rate / other.rate


def header(contestants: Iterable[str]) -> str:
    """The line above those of `line`."""
    columns = "".join(f"{name:>11}" for name in contestants)
    return f"{'cell':<34}dir {columns}  ours over the best peer"


def line(key: Key, entries: dict[str, Result], contestants: Iterable[str]) -> str:
    """A cell and direction: everyone's rate, our ratio to the best peer and to the yardstick."""
    cell, direction = key
    text = f"{cell.name:<34}{direction} "
    for name in contestants:
        text += f"{entries[name].rate:11.1f}" if name in entries else f"{'-':>11}"
    best, ours = rival(entries, BEST), ratio(entries, BEST)
    text += f"  {ours:.2f} {best.contestant}" if best and ours else "  -"
    for name in YARDSTICKS:
        if against := ratio(entries, name):
            text += f", {against:.2f} of {name} ({entries[name].rate:.0f})"
    return text if cell.unit == "TFLOP/s" else f"{text}, {cell.unit}"


def summary(results: list[Result]) -> list[str]:
    """Lines: for each group, direction and rival, geometric mean and worst of our ratios."""
    if not results:
        return []
    table = by_cell(results)
    names = dict.fromkeys(name for entries in table.values() for name in entries if name != OURS)
    lines = []
    for group in dict.fromkeys(cell.group for cell, _ in table):
        for direction in ("fwd", "bwd"):
            keys = [key for key in table if key[0].group == group and key[1] == direction]
            for against in (BEST, SDPA, *names):
                found = {k: r for k in keys if (r := ratio(table[k], against)) is not None}
                if found:
                    worst = min(found, key=lambda key: found[key])
                    lines.append(
                        f"{group:<10}{direction}  against {against:<13}{len(found):3} cells  mean "
                        f"{geometric_mean(found.values()):.3f}  worst {found[worst]:.3f} at "
                        f"{worst[0].name}"
                    )
    spreads = [result.spread for result in results]
    lines.append(f"rounds differ by {median(spreads):.1%} (median), {max(spreads):.1%} at most")
    return lines


def _parsed(row: dict[str, str], parsers: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    return {name: parse(row[name]) for name, parse in parsers.items()}
