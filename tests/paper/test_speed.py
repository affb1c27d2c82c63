"""benchmarks/paper/attention_tables.py and training_speed.py, in small."""

import csv

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from benchmarks.paper import attention_tables, training_speed
from benchmarks.paper import attention_tables_report as tables_report
from benchmarks.paper import training_speed_report as speed_report
from benchmarks.paper.records import Records


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def on_gpu(records):
    return [row | {"device": "a GPU"} for row in records.rows]


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
    assert "| butterfly |" in text and "no target speaks of it" in text


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
    said = tables_report.conclude(on_gpu(records), tmp_path / "a").splitlines()
    assert said[0].endswith("1k 6.00, 4k 6.00; target >= 5 everywhere: reached.")
    assert said[1].endswith("1k 1.04, 4k 1.04; target >= 1.05 everywhere: missed.")
    assert "21.0 times less memory than eager" in said[2] and said[2].endswith("reached.")
    assert "166.7 times as fast" in said[3] and "65% of the ideal" in said[3]
    assert said[3].endswith(">= 58%: reached.")
    text = (tmp_path / "a.md").read_text()
    assert "| paper's FlashAttention, A100 | 2.29 | 30.09 | 7492.85 |" in text
    assert "| paper's PyTorch, A100 | 1184 | 17024 |  |" in text


# Training.


@pytest.fixture(scope="module")
def speeds(tmp_path_factory):
    """Folder of a run in two pieces, of which the first one stops after two rows."""
    folder = tmp_path_factory.mktemp("speeds")
    settings = {
        "workloads": ["bert-large-512-padded", "gpt2-1024"],
        "extras": ["none", "loss"],
        "output": str(folder),
        "tiny": True,
    }
    arguments = training_speed.Arguments(**settings)
    with pytest.MonkeyPatch.context() as patch:
        clock = iter(range(100))
        patch.setattr(training_speed.time, "monotonic", lambda: next(clock))
        patch.setattr(speed_report, "conclude", lambda *_: "")
        stopped = training_speed.Arguments(**settings, budget=2.5)
        assert training_speed.main(stopped) == training_speed.BUDGET_SPENT
    assert len(rows(folder / "training-speed-tiny.csv")) == 2
    assert training_speed.main(arguments) == 0
    return folder, arguments


def test_speeds_have_every_row_once(speeds):
    folder, _ = speeds
    found = rows(folder / "training-speed-tiny.csv")
    everyone = {
        "bert-large-512-padded": ["eager", "sdpa", "hfp", "hfp_unpadded"],
        "gpt2-1024": ["eager", "sdpa", "hfp"],
    }
    assert [(r["workload"], r["extras"], r["contestant"]) for r in found] == [
        (workload, extras, name)
        for workload, names in everyone.items()
        for extras in ("none", "loss")
        for name in names
    ]
    assert all(float(row["tokens_per_second"]) > 0 and row["outcome"] == "ok" for row in found)
    for workload in everyone:
        losses = [float(row["loss"]) for row in found if row["workload"] == workload]
        assert max(losses) / min(losses) < 1.0001
    assert (folder / "training-speed-tiny.svg").stat().st_size > 0
    assert "| gpt2-1024 | loss | hfp |" in (folder / "training-speed-tiny.md").read_text()


def test_speeds_measure_nothing_twice(speeds, monkeypatch):
    folder, arguments = speeds
    monkeypatch.setattr(speed_report, "conclude", lambda *_: "")
    monkeypatch.setattr(training_speed.Speeds, "measure", None)
    assert training_speed.main(arguments) == 0


def train_one(tmp_path, monkeypatch, extras="none", **settings):
    """Exit status and rows of GPT-2 with sdpa."""
    monkeypatch.setattr(speed_report, "conclude", lambda *_: "")
    settings = {"contestants": ["sdpa"], "workloads": ["gpt2-1024"], "extras": [extras]} | settings
    arguments = training_speed.Arguments(output=str(tmp_path), tiny=True, **settings)
    status = training_speed.main(arguments)
    path = tmp_path / "training-speed-tiny.csv"
    return status, rows(path) if path.exists() else []


def test_extras_are_applied(tmp_path, monkeypatch):
    applied = []

    def compiled(model, backend):
        # The loss comes before, as docs/training.md wants it.
        assert "loss" in applied
        applied.append(backend)
        return model

    plain = training_speed.hfp.memory.chunked_loss
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(
        training_speed.hfp.memory, "chunked_loss", lambda m: applied.append("loss") or plain(m)
    )
    assert train_one(tmp_path, monkeypatch)[0] == 0 and applied == []
    assert train_one(tmp_path, monkeypatch, "compile+loss")[0] == 0 and applied == ["loss", "eager"]


def test_training_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("backend='inductor' raised: CUDA out of memory.")

    monkeypatch.setattr(training_speed.Speeds, "_steps", full)
    status, found = train_one(tmp_path, monkeypatch)
    assert status == 0 and [row["outcome"] for row in found] == ["out of memory"]


def test_training_that_fails_has_no_row(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(training_speed.Speeds, "_steps", broken)
        assert train_one(tmp_path, patch) == (training_speed.FAILED, [])
    assert "gpt2-1024 none sdpa fails: RuntimeError: no such kernel" in capsys.readouterr().out
    status, found = train_one(tmp_path, monkeypatch)
    assert status == 0 and len(found) == 1


def test_another_loss_fails(tmp_path, monkeypatch, capsys):
    assert train_one(tmp_path, monkeypatch)[0] == 0
    monkeypatch.setattr(training_speed, "SAME_LOSS", -1.0)
    status, found = train_one(tmp_path, monkeypatch, contestants=["sdpa", "eager"])
    assert status == training_speed.FAILED and len(found) == 1
    assert "the loss is" in capsys.readouterr().out


def test_workloads_and_who_is_in_them(tmp_path, monkeypatch):
    assert list(training_speed.WORKLOADS) == [
        "bert-large-512",
        "bert-large-512-padded",
        "gpt2-1024",
        "gpt2-2048",
        "gpt2-4096",
        "gpt2-medium-1024",
        "gpt2-medium-2048",
        "gpt2-medium-4096",
    ]
    batches = {name: w.batch for name, w in training_speed.WORKLOADS.items()}
    assert batches["bert-large-512-padded"] == batches["bert-large-512"] == 56
    assert batches["gpt2-medium-1024"] == batches["gpt2-1024"] == 4 * batches["gpt2-4096"] == 16
    speeds = training_speed.Speeds(training_speed.Arguments(output=str(tmp_path)))
    left = list(speeds.left())
    assert len(left) == 8 * 4 * 3 + 4
    assert {workload for workload, _, name in left if name == "hfp_unpadded"} == {
        "bert-large-512-padded"
    }


def test_models_are_the_known_ones():
    counts = {}
    for name, (kind, sizes) in training_speed.MODELS.items():
        auto = AutoModelForMaskedLM if name == "bert-large" else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(kind(**sizes))
        counts[name] = round(sum(p.numel() for p in model.parameters()) / 1e6)
        config = model.config
        dropped = [value for key, value in config.to_dict().items() if key.endswith("_pdrop")]
        dropped += [config.hidden_dropout_prob] if name == "bert-large" else []
        assert dropped and set(dropped) == {0.1}
    assert counts == {"bert-large": 335, "gpt2": 124, "gpt2-medium": 355}


def test_batches_are_padded():
    workload = training_speed.WORKLOADS["bert-large-512-padded"]
    batches = training_speed.make_batches(workload, 100, torch.device("cpu"))
    for batch in batches:
        lengths = batch.inputs["attention_mask"].sum(1)
        assert batch.tokens == lengths.sum() and 128 <= lengths.min() and lengths.max() <= 512
        predicted = batch.inputs["labels"] != training_speed.IGNORED
        assert not (predicted & (batch.inputs["attention_mask"] == 0)).any()
        assert 0.13 < predicted.sum().item() / batch.tokens < 0.17
    assert len({batch.tokens for batch in batches}) == len(batches)
    full = training_speed.WORKLOADS["gpt2-1024"]
    batch = training_speed.make_batches(full, 100, torch.device("cpu"))[0]
    assert batch.tokens == 16384 and "attention_mask" not in batch.inputs


def test_speeds_conclusion(tmp_path):
    """Against numbers by hand."""
    records = Records(tmp_path / "a.csv")

    def add(workload, contestant, extras, rate):
        row = {"workload": workload, "contestant": contestant, "extras": extras, "outcome": "ok"}
        numbers = dict.fromkeys(speed_report.NUMBERS, 1.0) | {"tokens_per_second": rate}
        if rate is None:
            row["outcome"], numbers = "out of memory", dict.fromkeys(speed_report.NUMBERS)
        records.add(row | numbers)

    for extras, ours in (("none", 106.0), ("loss", 210.0)):
        add("gpt2-1024", "eager", extras, 100.0)
        add("gpt2-1024", "sdpa", extras, 100.0)
        add("gpt2-1024", "hfp", extras, ours)
    add("gpt2-4096", "eager", "none", None)
    add("gpt2-4096", "sdpa", "none", 100.0)
    add("gpt2-4096", "hfp", "none", 111.0)
    add("bert-large-512-padded", "sdpa", "none", 100.0)
    add("bert-large-512-padded", "hfp", "none", 90.0)
    add("bert-large-512-padded", "hfp_unpadded", "none", 150.0)
    said = speed_report.conclude(on_gpu(records), tmp_path / "a").splitlines()
    assert "(hfp, extras: loss) is 2.10 times as fast as eager; target >= 2: reached." in said[0]
    assert said[1].endswith("none 1.06, loss 2.10; target >= 1.05 everywhere: reached.")
    assert said[2].endswith("none 1.11; target >= 1.12 everywhere: missed.")
    assert said[3].endswith("none 1.50; target >= 1.4 everywhere: reached.")
    assert "| gpt2-4096 | none | eager | out of memory |" in (tmp_path / "a.md").read_text()


@pytest.mark.parametrize("report", [tables_report, speed_report])
def test_no_rows_yet(report, tmp_path):
    assert report.conclude([], tmp_path / "a") == "Nothing is measured that a target speaks of."
