"""benchmarks/paper/attention_tables.py and training_speed.py, in small."""

import csv

import pytest
import torch

from benchmarks.paper import attention_tables
from benchmarks.paper import attention_tables_report as tables_report
from benchmarks.paper.records import Records


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Attention.


@pytest.fixture
def silent(monkeypatch):
    """No figure, which takes a second."""
    monkeypatch.setattr(tables_report, "conclude", lambda *_: "")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Folder of a run in two pieces, of which the first one stops after a cell."""
    folder = tmp_path_factory.mktemp("tables")
    settings = {"settings": ["padding"], "output": str(folder), "tiny": True}
    arguments = attention_tables.Arguments(**settings)
    with pytest.MonkeyPatch.context() as patch:
        clock = iter(range(100))
        patch.setattr(attention_tables.time, "monotonic", lambda: next(clock))
        stopped = attention_tables.Arguments(**settings, budget=1.5)
        assert attention_tables.main(stopped) == attention_tables.BUDGET_SPENT
    assert {row["seqlen"] for row in rows(folder / "attention-tables-tiny.csv")} == {"128"}
    assert attention_tables.main(arguments) == 0
    return folder, arguments


def test_tables_have_every_cell_once(tables):
    folder, _ = tables
    found = rows(folder / "attention-tables-tiny.csv")
    names = ["eager", "sdpa", "hfp", "butterfly", "local_global"]
    assert [(r["seqlen"], r["contestant"]) for r in found] == [
        (seqlen, name) for seqlen in ("128", "256") for name in names
    ]
    for row in found:
        assert row["outcome"] == "ok"
        assert all(float(row[f"{direction}_ms"]) > 0 for direction in ("fwd", "bwd", "both"))
    assert (folder / "attention-tables-tiny.svg").stat().st_size > 0
    text = (folder / "attention-tables-tiny.md").read_text()
    assert "| butterfly |" in text and "Measured on" in text


def test_tables_measure_nothing_twice(tables, monkeypatch, silent):
    folder, arguments = tables
    before = rows(folder / "attention-tables-tiny.csv")
    monkeypatch.setattr(attention_tables.Tables, "measure", None)
    assert attention_tables.main(arguments) == 0
    assert rows(folder / "attention-tables-tiny.csv") == before


def run_one(tmp_path, **settings):
    settings = {"settings": ["none"], "contestants": ["eager"]} | settings
    arguments = attention_tables.Arguments(output=str(tmp_path), tiny=True, **settings)
    assert attention_tables.main(arguments) == 0
    return {row["outcome"] for row in rows(tmp_path / "attention-tables-tiny.csv")}


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch, silent):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention_tables, "eager_attention_forward", full)
    assert run_one(tmp_path) == {"out of memory"}


def test_what_is_wrong_or_slow_is_not_timed(tmp_path, monkeypatch, silent):
    assert run_one(tmp_path / "slow", limit=0) == {"over 0 s"}
    plain = attention_tables.eager_attention_forward

    def halved(*args, **kwargs):
        return (0.5 * plain(*args, **kwargs)[0], None)

    monkeypatch.setattr(attention_tables, "eager_attention_forward", halved)
    assert all(o.startswith("wrong: Wrong: out is off by") for o in run_one(tmp_path / "wrong"))


def test_dropout_and_padding(tmp_path, silent):
    settings = ["dropout+padding"]
    assert run_one(tmp_path, settings=settings, contestants=["hfp"]) == {"ok"}


def test_ours_has_to_be_right(tmp_path, monkeypatch, silent):
    monkeypatch.setattr(attention_tables, "attention", lambda q, k, v, **_: 0.9 * q)
    with pytest.raises(RuntimeError, match="hfp fails at"):
        run_one(tmp_path, contestants=["hfp"])


def test_patterns_have_the_papers_density():
    for seqlen in (2048, 65536):
        butterfly = attention_tables.block_layout("butterfly", seqlen)
        assert butterfly.float().mean().item() == 256 / seqlen
        local = attention_tables.block_layout("local_global", seqlen)
        n = seqlen // 128
        assert local.sum().item() == 3 * n - 2 and local[0].all() and local[:, 0].all()


def test_padding_is_the_papers():
    cell = attention_tables.paper_cell("padding", 4096, tiny=False)
    assert len(cell.lengths) == 16 and all(4076 <= length <= 4096 for length in cell.lengths)
    assert min(cell.lengths) < 4096
    assert min(attention_tables.paper_cell("padding", 128, tiny=False).lengths) >= 108


def test_tables_conclusion(tmp_path):
    """Against numbers by hand."""
    base = {"setting": "none", "batch": 16, "num_heads": 8, "head_dim": 64, "outcome": "ok"}
    numbers = dict.fromkeys(tables_report.NUMBERS, 1.0)
    records = Records(tmp_path / "a.csv")

    def add(seqlen, contestant, both, memory, density=1.0):
        row = {"seqlen": seqlen, "contestant": contestant, "density": density}
        records.add(base | row | numbers | {"both_ms": both, "memory_mb": memory})

    for seqlen in (1024, 4096):
        add(seqlen, "eager", 6.0, 2100.0)
        add(seqlen, "sdpa", 1.2, 100.0)
        add(seqlen, "sdpa_cudnn", 1.04, 100.0)
        add(seqlen, "hfp", 1.0, 100.0)
    add(65536, "hfp", 1000.0, 100.0)
    add(65536, "butterfly", 6.0, 100.0, 256 / 65536)
    said = tables_report.conclude(records.rows, tmp_path / "a").splitlines()
    assert said[0].endswith("1k 6.00, 4k 6.00; target >= 5 everywhere: reached.")
    assert said[1].endswith("1k 1.04, 4k 1.04; target >= 1.05 everywhere: missed.")
    assert "21.0 times less memory than eager" in said[2] and said[2].endswith("reached.")
    assert "166.7 times as fast" in said[3] and "65% of the ideal" in said[3]
    assert said[3].endswith(">= 58%: reached.")
