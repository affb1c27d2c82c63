"""benchmarks/paper/training_speed.py, in small."""

from benchmarks.paper import training_speed
from benchmarks.paper.records import Records


def run(folder, *extras, **more):
    options = {"tiny": True, "steps": 1, "output": str(folder), "extras": list(extras)}
    status = training_speed.main(training_speed.Arguments(**options, **more))
    return status, Records(folder / "training_speed.csv").rows


def test_it_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "none", budget=-1.0) == (3, [])
    assert "10 rows are left" in capsys.readouterr().out
    status, rows = run(tmp_path, "none")
    assert status == 0 and len(rows) == 10 and all(row["outcome"] == "ok" for row in rows)
    monkeypatch.setattr(training_speed, "measure", None)
    assert run(tmp_path, "none") == (0, rows)
    monkeypatch.undo()
    # The same data, the same weights, no more than dropout's numbers differ.
    losses = [float(row["last_loss"]) for row in rows if row["model"] == "tiny-gpt2"]
    assert len(losses) == 3 and max(losses) - min(losses) < 0.02 * losses[0]
    text = (tmp_path / "training_speed.md").read_text()
    assert "| tiny-bert | 64 | padded | none |" in text and "| tiny-gpt2 | 128 | full |" in text
    assert (tmp_path / "training_speed.svg").stat().st_size > 5000


def test_extras(tmp_path):
    _, rows = run(tmp_path, "loss", contestants=["ours", "ours, no padding"])
    assert [row["outcome"] for row in rows] == ["ok"] * 4
