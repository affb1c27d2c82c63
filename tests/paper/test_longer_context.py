"""benchmarks/paper/longer_context.py, in small."""

import csv
import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_flash_patch as hfp
from benchmarks.paper import longer_context
from benchmarks.paper.corpus import Blocks, corpus, held_out
from benchmarks.paper.loop import Clock, OutOfTime
from benchmarks.paper.text import Distinct

from .packages import few_objects, install

SIZES = {f"alpha{i}": 60 for i in range(8)} | {f"beta{i}": 10 for i in range(6)}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folder of a study done at once, and of the same done in pieces; with how many pieces."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch, few_objects():
        install(root / "packages", monkeypatch, SIZES)
        assert run(root / "whole") == 0
        asked = itertools.count(1)
        monkeypatch.setattr(Clock, "over", lambda self: next(asked) % 5 == 0)
        pieces = 1
        while run(root / "pieces", runs=["32-to-64"]) != 0:
            pieces += 1
    return root / "whole", root / "pieces", pieces


def run(folder, **settings):
    arguments = longer_context.Arguments(
        preset="tiny", device="cpu", folder=str(folder), output=str(folder), **settings
    )
    return longer_context.main(arguments)


def models(folder):
    (found,) = (path for path in (folder / "tiny").iterdir() if path.is_dir())
    return found


def rows(folder):
    with open(folder / "longer-context-tiny.csv") as file:
        return list(csv.DictReader(file))


def test_stopping_changes_nothing(outputs):
    whole, pieces, count = outputs
    assert count > 2
    measured = [
        {tuple(row.values()) for row in rows(folder) if row["metric"] not in ("tokens/s", "GiB")}
        for folder in (whole, pieces)
    ]
    assert {row[6] for row in measured[1]} == {"32", "32-to-64, not tuned", "32-to-64"}
    assert measured[1] <= measured[0]
    assert not list(models(pieces).glob("*.state"))


def test_every_run_is_there(outputs, capsys):
    folder, _, _ = outputs
    found = {row["run"] for row in rows(folder) if row["metric"] == "perplexity"}
    assert found == {"32", "64", "128-sparse", "32-to-32", "32-to-64, not tuned", "32-to-64"}
    speed = [row for row in rows(folder) if (row["run"], row["metric"]) == ("speed", "tokens/s")]
    assert [row["attention"] for row in speed] == ["eager", "sdpa", "hfp", "sdpa", "hfp", "hfp"]
    text = (folder / "longer-context-tiny.md").read_text()
    assert "sines and cosines" in text and "no target speaks of it" in text
    assert "times as fast per token" in text and text.count("paired over documents") == 2
    assert "32-to-64" in text.split("further training of one model")[1].split(".")[0]
    assert (folder / "longer-context-tiny.png").stat().st_size > 10_000


def test_a_finished_study_does_nothing(outputs, monkeypatch, capsys):
    folder, _, _ = outputs
    monkeypatch.setattr(longer_context, "fit", None)
    before = rows(folder)
    assert run(folder) == 0
    assert rows(folder) == before


def test_what_another_machine_measured_is_not_done_again(outputs, monkeypatch, tmp_path):
    for name in ("longer-context-tiny.csv", "tiny/corpus.pt", "tiny/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((outputs[0] / name).read_bytes())
    monkeypatch.setattr(longer_context, "fit", None)
    assert run(tmp_path) == 0
    assert rows(tmp_path) == rows(outputs[0])
    assert "paired over documents" in (tmp_path / "longer-context-tiny.md").read_text()


def test_other_conditions_are_other_models(outputs, monkeypatch, tmp_path):
    asked = []

    def fit(model, optimizer, recipe, *others):
        asked.append(recipe.steps)
        raise OutOfTime

    monkeypatch.setattr(longer_context, "fit", fit)
    assert run(outputs[0], runs=["32"], batch=512) == 3
    assert asked == [12]
    with pytest.raises(SystemExit, match="no multiple of 128"):
        run(outputs[0], batch=1000)


@torch.no_grad()
@pytest.mark.parametrize("name, length", [("32", 32), ("128-sparse", 128), ("32-to-64", 64)])
def test_perplexity_is_what_transformers_says(outputs, name, length):
    folder, _, _ = outputs
    text = torch.load(folder / "tiny" / "corpus.pt")["test"].long()
    model = AutoModelForCausalLM.from_pretrained(models(folder) / name).eval()
    if name == "128-sparse":
        assert model.config.hfp["mask"]
        hfp.patch(model)
    inputs, labels = text[:, :-1].reshape(-1, length), text[:, 1:].reshape(-1, length)
    loss = model(input_ids=inputs, labels=labels, shift_labels=labels.contiguous()).loss.item()
    found = [r for r in rows(folder) if (r["run"], r["metric"]) == (name, "perplexity")]
    assert math.log(float(found[0]["value"])) == pytest.approx(loss, rel=1e-5)


def test_buckets_hold_every_token_once(outputs):
    folder, _, _ = outputs
    for metric, length in (("perplexity in document", 128), ("perplexity in window", 64)):
        found = [r for r in rows(folder) if (r["run"], r["metric"]) == ("64", metric)]
        counts = [int(r["last"]) + 1 - int(r["first"]) for r in found]
        mean = sum(n * math.log(float(r["value"])) for n, r in zip(counts, found, strict=True))
        (whole,) = [r for r in rows(folder) if (r["run"], r["metric"]) == ("64", "perplexity")]
        assert sum(counts) == length
        assert mean / length == pytest.approx(math.log(float(whole["value"])), rel=1e-5)


def test_another_text_is_not_compared(outputs):
    """Packages of another version are other text: its perplexity is no contest."""
    settings = {"preset": "tiny", "device": "cpu", "folder": str(outputs[0])}
    study = longer_context.Study(longer_context.Arguments(**settings, output=str(outputs[0])))
    assert study.log.has(run="32", metric="perplexity")
    study.text.test[0, 0] += 1
    assert not longer_context.report.open_log(study).has(run="32", metric="perplexity")


def test_positions_start_alike_and_as_large_as_gpt2s():
    found = longer_context.waves(300, 64)
    assert found.std() == pytest.approx(0.02, rel=0.2)
    alike = found @ found.T  # what two positions have in common goes by how far apart they are
    for apart in (1, 7, 100):
        assert alike.diagonal(apart).std() < 1e-6


@pytest.mark.parametrize("name", longer_context.PRESETS)
def test_dense_runs_see_the_same_tokens(outputs, monkeypatch, name):
    """Blocks of the longest dense context: a step has as many of them as it can."""
    asked = []
    settings = {"preset": "tiny", "device": "cpu", "folder": str(outputs[0])}
    study = longer_context.Study(longer_context.Arguments(**settings, output=""))
    study.preset = longer_context.PRESETS[name]
    monkeypatch.setattr(longer_context, "Blocks", lambda texts, length, seed: asked.append(length))
    monkeypatch.setattr(hfp.memory, "chunked_loss", lambda model, chunk: None)
    for length in (*study.preset.lengths, study.preset.sparse):
        model = torch.nn.Linear(1, 1)
        study._backward(model, length, study.preset.micro, compiled=False)
    longest = max(study.preset.lengths)
    assert asked == [longest] * len(study.preset.lengths) + [study.preset.sparse]


def test_unknown_run(outputs):
    with pytest.raises(
        SystemExit, match="--runs 4096; there are 32, 64, 128-sparse, 32-to-32, 32-to-64"
    ):
        run(outputs[0], runs=["4096"])


def test_out_of_memory_takes_smaller_pieces(outputs, monkeypatch):
    study = longer_context.Study(
        longer_context.Arguments(preset="tiny", device="cpu", folder=str(outputs[0]), output="")
    )
    tried = []

    def backward(model, length, micro, compiled):
        def step(number):
            tried.append(micro)
            if micro > 128:
                raise torch.OutOfMemoryError
            return torch.zeros(())

        return step

    monkeypatch.setattr(study, "_backward", backward)
    speed, _ = study._time("eager", study.runs["64"], compiled=False)
    assert sorted(set(tried), reverse=True) == [512, 256, 128] and speed > 0
    study.preset = replace(study.preset, micro=64)
    monkeypatch.setattr(longer_context, "adamw", None)  # not reached: nothing fits
    assert math.isnan(study._time("eager", study.runs["128-sparse"], compiled=False)[0])


def test_no_text_is_in_both_splits(tmp_path, monkeypatch):
    install(tmp_path / "packages", monkeypatch, SIZES)
    found = corpus(tmp_path / "text", 100_000, 400, documents=4, length=64)
    assert len(set(found.sources)) == 2 and all(name.startswith("beta") for name in found.sources)
    assert len(found.train) == len(SIZES) - 2
    assert found.test.shape == (4, 65) and "4 documents of 64 tokens" in str(found)
    text = (tmp_path / "packages" / "alpha0" / "part0" / "module0.py").read_text()
    for name in SIZES:
        (tmp_path / "packages" / name / "zcopy.py").write_text(text.replace("\n", "\n\n"))
    again = corpus(tmp_path / "more", 100_000, 400, documents=4, length=64)
    assert torch.equal(again.test, found.test)
    with pytest.raises(SystemExit, match="held out: no source has 65 tokens; read more"):
        corpus(tmp_path / "less", 20, 400, documents=4, length=64)


def test_packages_of_middle_size_are_held_out():
    sizes = {"a": 900, "b": 30, "c": 20, "d": 10, "e": 9, "f": 1}
    assert held_out(sizes, least=2) == ["b", "e"]


def test_blocks_take_every_token_once_an_epoch():
    texts = [torch.arange(100, 165, dtype=torch.int32), torch.arange(33, dtype=torch.int32)]
    blocks = Blocks(texts, 16, seed=3)
    assert len(blocks) == 6
    epochs = [blocks(start, 6)[:, :-1].flatten().tolist() for start in (0, 6)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(32), *range(100, 164)]] * 2
    assert epochs[0] != epochs[1]
    assert torch.equal(blocks(4, 3), torch.cat([blocks(4, 2), blocks(6, 1)]))
    with pytest.raises(SystemExit, match="no package has 64 tokens"):
        Blocks(texts[1:], 64, seed=0)


def test_near_copies_are_found():
    text = "".join(f"line {i} of the text\n" for i in range(80))
    distinct = Distinct()
    assert distinct(text)
    assert not distinct(text)
    assert not distinct(text.replace("line 7 ", "    line seven ").replace("\n", "\n\n"))
    assert distinct("".join(f"other line {i}\n" for i in range(80)))
    assert distinct("short\n") and not distinct("short\n")
