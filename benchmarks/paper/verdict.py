"""What a conclusion says about a target, and about where its numbers are from."""

from __future__ import annotations

from collections.abc import Iterable

ON_A_CPU = "Measured on a CPU, which shows that the script runs; no target speaks of it."


def verdict(value: float, target: float, says: str) -> str:
    """ "target >= 5: reached", or "missed".

    Args:
        value: measured; at least `target` reaches it.
        target: of the same unit.
        says: a format of the target.
    """
    return f"target {says.format(target)}: {'reached' if value >= target else 'missed'}"


def conclusion(claims: Iterable[str], rows: list[dict[str, str]]) -> str:
    """The claims, a line each; of a CPU's numbers there are none.

    Args:
        claims: lines.
        rows: of the CSV.
    """
    if any(row["device"] == "CPU" for row in rows):
        return ON_A_CPU
    return "\n".join(claims) or "Nothing is measured that a target speaks of."


def measured_on(rows: Iterable[dict[str, str]]) -> str:
    """`provenance_line`, and of a CPU's rows that no target speaks of them."""
    rows = list(rows)
    said = [provenance_line(rows), *[ON_A_CPU] * any(row["device"] == "CPU" for row in rows)]
    return " ".join(said).strip()


def provenance_line(rows: list[dict[str, str]]) -> str:
    """Devices, versions and commits of rows, in a sentence."""
    found = {tuple(row[name] for name in ("device", "torch", "version", "commit")) for row in rows}
    texts = [
        f"{device}, torch {torch}, hf_flash_patch {version} ({commit or 'no checkout'})"
        for device, torch, version, commit in sorted(found)
    ]
    return f"Measured on {'; '.join(texts)}." if texts else ""
