"""benchmarks/long_context.py, in small."""

import csv
import sys
from pathlib import Path

import pytest

import hf_flash_patch as hfp
from tests.training.processes import run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import long_context  # noqa: E402


def test_every_technique(tmp_path, capsys):
    files = {name: str(tmp_path / f"out.{name}") for name in ("csv", "png")}
    rows = long_context.main(
        long_context.Arguments(tiny=True, steps=1, csv=files["csv"], figure=files["png"])
    )
    assert [row.technique for row in rows[::2]] == list(long_context.TECHNIQUES)
    assert all(row.outcome == "ok" and row.seconds > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out
    with open(files["csv"]) as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 10
    assert Path(files["png"]).stat().st_size > 10_000


def test_no_time_and_no_memory(monkeypatch):
    arguments = long_context.Arguments(tiny=True, techniques=["plain", "loss"], budget=0.0)
    rows = long_context.main(arguments)
    assert [(row.length, row.outcome) for row in rows] == [(128, "no time left")] * 2

    def out_of_memory(device):
        raise long_context.torch.OutOfMemoryError

    monkeypatch.setattr(long_context, "check", lambda *_: None)
    monkeypatch.setattr(long_context, "_peak", out_of_memory)
    rows = long_context.main(long_context.Arguments(tiny=True, techniques=["plain"]))
    assert [(row.length, row.outcome, row.loss) for row in rows] == [(128, "out of memory", None)]


def test_a_technique_that_changes_the_loss_is_found_out(monkeypatch):
    chunked_loss = hfp.memory.chunked_loss

    def spoilt(model):
        model.get_output_embeddings().weight.data.mul_(100)
        return chunked_loss(model)

    monkeypatch.setattr(hfp.memory, "chunked_loss", spoilt)
    with pytest.raises(SystemExit, match="loss gives the loss"):
        long_context.main(long_context.Arguments(tiny=True, techniques=["loss"]))


def test_results_kept(capsys):
    arguments = long_context.Arguments(tiny=True, steps=1, keep_attention=True)
    rows = long_context.main(arguments)
    assert len(rows) == 10 and all(row.outcome == "ok" for row in rows)
    assert "attention's results kept" in capsys.readouterr().out


def shared():
    arguments = long_context.Arguments(tiny=True, techniques=["tile"], share="ring")
    return [(row.outcome, row.loss) for row in long_context.main(arguments)]


def test_two_processes_share(monkeypatch):
    alone = long_context.Arguments(tiny=True, techniques=["tile"])
    monkeypatch.setattr(long_context.os, "environ", {"WORLD_SIZE": "1"})
    monkeypatch.setattr(long_context.dist, "init_process_group", lambda: None)
    expected = [row.loss for row in long_context.main(alone)]
    monkeypatch.undo()
    for found in run(2, shared):
        assert all(outcome == "ok" for outcome, _ in found)
        assert [loss for _, loss in found] == pytest.approx(expected, rel=1e-5)
