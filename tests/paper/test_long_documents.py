"""benchmarks/paper/long_documents.py, in small."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_flash_patch as hfp
from benchmarks.paper import long_documents, masked_sources
from benchmarks.paper.loop import Clock
from hf_flash_patch.testing import sources

from .packages import few_objects, install

SIZES = {"gamma": 60, "deltalib": 50, "eps_kit": 40}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folder of a study done at once, and of the same done in pieces; with how many pieces."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch, few_objects():
        install(root / "packages", monkeypatch, SIZES)
        assert run(root / "whole", seeds=[0, 1]) == 0
        asked = itertools.count(1)
        monkeypatch.setattr(Clock, "over", lambda self: next(asked) % 20 == 0)
        pieces = 1
        while run(root / "pieces", seeds=[1]) != 0:
            pieces += 1
    return root / "whole", root / "pieces", pieces


def run(folder, **settings):
    arguments = long_documents.Arguments(
        preset="tiny", device="cpu", folder=str(folder), output=str(folder), **settings
    )
    return long_documents.main(arguments)


def rows(folder):
    with open(folder / "long-documents-tiny.csv") as file:
        return list(csv.DictReader(file))


def test_stopping_changes_nothing(outputs):
    whole, pieces, count = outputs
    assert count > 2
    measured = [
        [{**row, "steps_per_second": ""} for row in rows(folder) if row["seed"] == "1"]
        for folder in (whole, pieces)
    ]
    assert measured[0] == measured[1]
    assert not list((pieces / "tiny").glob("*.state"))


def test_every_length_and_seed_is_there(outputs):
    folder, _, _ = outputs
    found = [(int(row["length"]), int(row["seed"])) for row in rows(folder)]
    assert found == [(length, seed) for seed in (0, 1) for length in (32, 128)]
    for row in rows(folder):
        assert 0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1
    text = (folder / "long-documents-tiny.md").read_text()
    assert "seeds 0, 1). Target +4 points: " in text and "no target speaks of it" in text
    assert (folder / "long-documents-tiny.png").stat().st_size > 10_000


def test_the_packages_are_told_apart(outputs):
    """Their words differ: what remains after masking is enough."""
    folder, _, _ = outputs
    assert max(float(row["accuracy"]) for row in rows(folder)) > 0.8


@torch.no_grad()
def test_padding_changes_nothing(outputs):
    folder, _, _ = outputs
    study = long_documents.Study(
        long_documents.Arguments(preset="tiny", device="cpu", folder=str(folder), output="")
    )
    model = AutoModelForSequenceClassification.from_pretrained(study.base(0)).eval()
    hfp.patch(model)
    rows = [torch.arange(3, 3 + n, dtype=torch.int32) for n in (30, 9)]
    together = study._logits(model, rows)
    apart = torch.cat([study._logits(model, [row]) for row in rows])
    assert torch.allclose(together, apart, atol=1e-5)


def test_other_windows_are_another_model(outputs):
    settings = {"preset": "tiny", "device": "cpu", "folder": str(outputs[0]), "output": ""}
    for epochs, there in ((None, True), (3, False)):
        arguments = long_documents.Arguments(**settings, window_epochs=epochs)
        assert long_documents.Study(arguments).base(0).exists() == there


def test_unknown_length(outputs):
    with pytest.raises(SystemExit, match="--lengths 256; there are 32, 128"):
        run(outputs[0], lengths=[256])


def test_no_name_is_left(tmp_path, monkeypatch, outputs):
    study = outputs[0] / "tiny"
    saved = torch.load(study / "documents.pt")
    assert saved["names"] == ["deltalib", "eps_kit", "gamma"]
    install(tmp_path, monkeypatch, SIZES)
    found = masked_sources.documents(3, 500, 10_000, 20, 0.2)
    assert len(found) == 60 and {document.package for document in found} == set(SIZES)
    for document in found:
        text = document.text.lower()
        assert not [name for name in [*SIZES, "part", "module", "copyright"] if name in text]
        assert not [name for name in SIZES if f"{name}short" in text]


MASKED = {
    "import torch": "",
    "from torch.nn import (\n    Linear,\n    ReLU,\n)\nx = 1": "\nx = 1",
    "from torch import a, \\\n    b\nx = 1": "\nx = 1",
    ">>> import torch as thing\n>>> thing.zeros(3)": "\n>>> _.zeros(3)",
    "class TorchDispatch(PyTorchBase):": "class _Dispatch(Py_Base):",
    "torch.linalg.solve(LINALG, linalg_x)": "_._.solve(_, linalg_x)",
    "See https://pytorch.org/docs, file `nn/linalg.py`.": "See _ file `_`.",
    "# a comment\nx = 1  # another": "x = 1  # another",
    "x = 1\n    Copyright the authors": "x = 1",
    "scikit-learn and Scikit Learn": "_ and _",
}


@pytest.mark.parametrize("text", MASKED)
def test_what_is_taken_out(text, monkeypatch):
    files = {"torch": [Path("/site/torch/linalg.py"), Path("/site/torch/nn/__init__.py")]}
    files["sklearn"] = [Path("/site/sklearn/svm.py")]
    monkeypatch.setattr(masked_sources, "own_files", lambda: files)
    distributions = {"sklearn": ["scikit-learn"], "torch": ["torch"]}
    monkeypatch.setattr(
        masked_sources.importlib.metadata, "packages_distributions", lambda: distributions
    )
    mask = masked_sources.masking(list(files), {"torch": {Path("a.py"): text}})
    assert mask(text) == MASKED[text]


def test_whole_folders_are_held_out():
    files = [Path(f"/p/{folder}/{i}.py") for folder in "abcdefgh" for i in range(5)]
    test = masked_sources.held_out(files, 0.25)
    folders = {file.parent for file in test}
    assert len(test) == 10 and len(folders) == 2
    assert masked_sources.held_out(files[:5], 0.2) == set()


def test_too_few_folders(tmp_path, monkeypatch):
    (tmp_path / "flat").mkdir()
    for i in range(9):
        (tmp_path / "flat" / f"m{i}.py").write_text("".join(f"x{i * j} = {j}\n" for j in range(99)))
    paths = {"stdlib": str(tmp_path / "none"), "purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(SystemExit, match="flat has too few files for both splits"):
        masked_sources.documents(1, 100, 10_000, 20, 0.2)


def test_micro_batches_take_every_row_once():
    rows = [torch.zeros(n) for n in (7, 100, 3, 40, 39, 8)]
    found = long_documents.micro_batches(rows, 80)
    assert found == [[1], [3, 4], [5, 0, 2]]


def test_tokens_are_those_of_the_text(outputs):
    study = outputs[0] / "tiny"
    saved = torch.load(study / "documents.pt")
    assert all(ids[0] == 1 and 64 < len(ids) <= 128 for ids in saved["train"] + saved["test"])
    assert len(saved["train"]) + len(saved["test"]) == 60
    assert sorted(set(saved["test_labels"].tolist())) == [0, 1, 2]
