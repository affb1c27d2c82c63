"""What a script measured: rows of a CSV file, which tell a later start what is done already."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import hf_flash_patch as hfp

from .loop import alone

_PLACE = Path(__file__).resolve().parent


class Records:
    """Rows of one file, written as they come; every row says where it was measured.

    Several processes may add to one file, each on a GPU of its own, say.

    Args:
        path: the file; rows that it has are kept. A row that a kill cut short is dropped.

    Attributes:
        path: the file.
        rows: what it has, as text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, str]] = []
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes added."""
        if self.path.exists():
            with self.path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
            self.rows = [row for row in whole if None not in row]

    def where(self, **key: Any) -> list[dict[str, str]]:
        """The rows that have these values, compared as text."""
        wanted = {name: _text(value) for name, value in key.items()}
        return [row for row in self.rows if wanted.items() <= row.items()]

    def has(self, **key: Any) -> bool:
        """Whether a row has these values."""
        return bool(self.where(**key))

    def add(self, row: dict[str, Any]) -> None:
        """A row, with the `provenance` behind it; on the disk when this returns.

        Args:
            row: values by column; None is an empty cell. Of the same columns as earlier ones.

        Raises:
            ValueError: the file has other columns.
        """
        self.extend([row])

    def extend(self, rows: list[dict[str, Any]]) -> None:
        """Rows that belong together, as `add`: all are on the disk, or none of them is."""
        place = provenance()
        found = [{name: _text(value) for name, value in (r | place).items()} for r in rows]
        with alone(self.path.parent):
            self.refresh()
            for texts in found:
                columns = list((self.rows or found)[0])
                if columns != list(texts):
                    raise ValueError(
                        f"{self.path} has columns {columns}, this row has {list(texts)}; give "
                        "another file."
                    )
            self.rows += found
            partial = self.path.with_suffix(".partial")
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)
            partial.replace(self.path)


def provenance() -> dict[str, str]:
    """Where and with what a row is measured: device, versions, commit, command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "torch": torch.__version__,
        "version": hfp.__version__,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str:
    """Of the checkout that this file is in; empty outside of one."""
    command = ["git", "-C", str(_PLACE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)
