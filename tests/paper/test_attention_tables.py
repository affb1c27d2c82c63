"""benchmarks/paper/attention_tables.py, in small."""

import pytest
import torch

from benchmarks.paper import attention_tables
from benchmarks.paper.records import Records


def test_it_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    arguments = {"tiny": True, "output": str(tmp_path), "masks": ["padding"]}
    run = attention_tables.main
    assert run(attention_tables.Arguments(**arguments, budget=-1.0)) == 3
    assert run(attention_tables.Arguments(**arguments)) == 0
    rows = Records(tmp_path / "attention_tables.csv").rows
    refused = [row for row in rows if row["outcome"] != "ok"]
    # FlexAttention has no dropout, and no backward on a CPU; once refused it is not asked again.
    assert [(row["contestant"], row["seqlen"]) for row in refused] == [("flex", "128")] * 2
    assert len(rows) == 2 * (2 * 6 - 1)
    monkeypatch.setattr(attention_tables, "measure", None)
    names = [name for name in attention_tables.CONTESTANTS if name != "flex"]
    assert run(attention_tables.Arguments(**arguments, contestants=names)) == 0
    text = (tmp_path / "attention_tables.md").read_text()
    assert "## Mask padding, dropout 0.1: MiB" in text and "of what a density of" in text
    assert (tmp_path / "attention_tables.svg").stat().st_size > 5000


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_all_compute_the_same(mask):
    problem = attention_tables.Problem(160, mask, 0.0, seed=1, tiny=True)
    inputs = [x.detach() for x in (problem.q, problem.k, problem.v)]
    found = {name: problem.call(name)(*inputs) for name in ("eager", "sdpa", "flex", "ours")}
    for name, out in found.items():
        torch.testing.assert_close(out, found["eager"], msg=name)


def test_conclusions():
    def row(milliseconds, mebibytes="", density="1.0"):
        cells = {"outcome": "ok", "both_ms": str(milliseconds), "density": density}
        return {**cells, "peak_mib": mebibytes}

    table = {
        "ours": {1024: row(1.0), 4096: row(2.0, "10")},
        "eager": {1024: row(4.0), 4096: row(18.0, "300")},
        "ours, butterfly": {4096: row(1.0, density="0.25")},
    }
    assert attention_tables.conclusions(table) == [
        "* 6.00 times as fast as eager from 1k to 8k (mean; at least 4.00).",
        "* 30.0 times less memory than eager at 4k.",
        "* ours, butterfly: 2.0 times as fast as dense at 4096, 50% of what a density of 25.00% "
        "would give.",
    ]
