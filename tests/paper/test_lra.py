"""lra.py from start to end in small, in pieces, and what its report says."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

import hf_flash_patch as hfp
from benchmarks.paper import datasets, lra, lra_report


@pytest.fixture
def arguments(tmp_path):
    """A command line that asks for little."""
    return lra.Arguments(
        tasks=["listops", "retrieval"],
        tiny=True,
        device="cpu",
        workers=0,
        shrink=2,
        folder=str(tmp_path / "work"),
        output=str(tmp_path / "results"),
    )


def rows_of(arguments) -> list[dict[str, str]]:
    with open(f"{arguments.output}/lra-tiny.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_from_start_to_end_and_not_twice(arguments, tmp_path, capsys):
    assert lra.main(arguments) == 0
    rows = rows_of(arguments)
    assert [(row["task"], row["contestant"]) for row in rows] == [
        (task, contestant) for task in arguments.tasks for contestant in lra.CONTESTANTS
    ]
    assert all(float(row["steps_per_second"]) > 0 and 0 <= float(row["low"]) for row in rows)
    assert [float(row["density"]) < 1 for row in rows] == [False, False, True] * 2
    said = capsys.readouterr().out
    assert "geometric mean of 2 of 5 tasks" in said and "outermost operator" in said
    for name in ("lra-tiny.md", "lra-tiny.svg"):
        assert (tmp_path / "results" / name).stat().st_size > 500
    written = (tmp_path / "results" / "lra-tiny.csv").read_bytes()
    assert lra.main(replace(arguments, budget=-1)) == 0  # nothing is left to do
    assert (tmp_path / "results" / "lra-tiny.csv").read_bytes() == written


def test_a_run_in_pieces_ends_where_one_in_one_piece_does(arguments, monkeypatch, tmp_path):
    arguments.tasks, arguments.contestants = ["listops"], ["dense"]
    monkeypatch.setattr(lra, "WINDOW", 2)
    assert lra.main(arguments) == 0
    (path,) = (tmp_path / "work").glob("listops-dense-0*.pt")
    whole = torch.load(path)
    pieces = replace(arguments, folder=str(tmp_path / "p"), output=str(tmp_path / "q"))
    monkeypatch.setattr(lra.Clock, "check", lambda self: None)
    statuses = []
    monkeypatch.setattr(lra.Clock, "over", lambda self: True)  # after every window
    while not statuses or statuses[-1]:
        statuses.append(lra.main(pieces))
    assert statuses == [3, 3, 0]
    resumed = torch.load(tmp_path / "p" / path.name)
    assert resumed["step"] == whole["step"] == 6
    for name, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], value, atol=1e-6, rtol=1e-5)


def test_another_number_of_steps_is_another_run(arguments, tmp_path):
    """What was trained with fewer steps, its rate down to nothing, is not gone on with."""
    arguments.tasks, arguments.contestants = ["listops"], ["dense"]
    assert lra.main(arguments) == 0
    assert lra.main(replace(arguments, shrink=1)) == 0
    found = [torch.load(path) for path in (tmp_path / "work").glob("*.pt")]
    assert sorted(state["step"] for state in found) == [6, 12]
    assert all(state["optimizer"]["state"][0]["step"] == state["step"] for state in found)
    assert "no target speaks of it" in (tmp_path / "results" / "lra-tiny.md").read_text()


def test_contestants_start_alike_and_dense_is_eager():
    task = replace(datasets.TASKS["text"], length=96)
    tokens = torch.randint(1, 256, (3, 96), dtype=torch.uint8)
    tokens[0, 50:] = 0
    arguments = lra.Arguments(device="cpu")
    logits = {}
    for contestant in lra.CONTESTANTS:
        model = lra.build(task, contestant, arguments).eval()
        logits[contestant] = model(tokens)
    torch.testing.assert_close(logits["dense"], logits["eager"], atol=1e-5, rtol=1e-5)
    assert (logits["sparse"] - logits["eager"]).abs().max() > 1e-5
    assert "hfp" not in str(lra.build(task, "eager", arguments).encoder.config._attn_implementation)
    assert hfp.masks.butterfly(24).density(96) == lra.density(task, "sparse") < 1


def test_every_epoch_sees_every_example_once():
    split = datasets.Split(np.zeros((10, 4), np.uint8), np.zeros(10, np.uint8))
    recipe = lra.Recipe(10, 5, 1.0, 1)
    for epoch in range(2):
        seen = np.concatenate([lra.batch_of(split, recipe, 2 * epoch + i, 0) for i in range(2)])
        assert sorted(seen) == list(range(10))
    assert (lra.batch_of(split, recipe, 0, 0) != lra.batch_of(split, recipe, 2, 0)).any()


def test_the_conclusion_weighs_speed_and_accuracy():
    def row(task, contestant, speed, accuracy):
        same = {"steps": 1, "batch": 1, "length": 1, "seed": 0, "compiled": False}
        found = {"low": accuracy - 0.01, "high": accuracy + 0.01, "surrogate": False}
        given = {"task": task, "contestant": contestant, "steps_per_second": speed}
        return {**same, **found, **given, "accuracy": accuracy, "density": 1, "peak_gib": ""}

    rows = [
        row("listops", "eager", 1.0, 0.37),
        row("listops", "dense", 2.0, 0.375),
        row("text", "eager", 1.0, 0.64),
        row("text", "dense", 8.0, 0.62),
    ]
    found = lra_report.latest(rows)
    assert lra_report.mean(lra_report.speedup(found, "dense").values()) == pytest.approx(4.0)
    (dense, listops) = lra_report.conclusion(found)
    assert "4.00 times" in dense and "target 2.4, reached" in dense
    assert "better: no (worst: text, -2.0), on average -0.8" in dense
    assert "no more than the outermost operator" in listops
    rows[3]["low"] = 0.499
    assert "Not above chance" in lra_report.conclusion(found)[-1]
    assert lra_report.conclusion(found)[-1].endswith("confidence: text (ours, dense).")
    rows[1]["steps"] = 2  # not the same work: not compared
    assert list(lra_report.speedup(lra_report.latest(rows), "dense")) == ["text"]
