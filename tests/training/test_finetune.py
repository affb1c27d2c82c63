"""examples/finetune.py: from start to end, killed and gone on, on several processes."""

import csv
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash_patch as hfp

from .processes import reset, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
from finetuning import data, options, records  # noqa: E402

CONFIGS = [p for p in sorted((EXAMPLES / "configs").glob("*.yaml")) if "accelerate" not in p.name]
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of texts and of a .jsonl file."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        words = torch.randint(0, 10, (900 - 50 * index,), generator=generator).tolist()
        (folder / f"{index}.txt").write_text(" ".join(WORDS[(w * w) % 10] for w in words))
    lines = ['{"text": "one two three"}', '{"text": "ten nine eight seven"}']
    (folder / "more.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def command(corpus, tmp_path):
    """The command line of a tiny run."""
    reset()

    def made(*more: str, model_type: str = "llama", output: str = "out") -> list[str]:
        scratch = (
            f'{{"model_type": "{model_type}", "hidden_size": 32, "intermediate_size": 64, '
            '"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}'
        )
        settings = {"scratch": scratch, "data": corpus, "output_dir": tmp_path / output}
        settings |= {"max_length": 128, "max_steps": 6, "save_steps": 1, "vocab_size": 300}
        settings |= {"eval_windows": 4, "learning_rate": 1e-3, "tune": "full"}
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        arguments += ["--eval_lengths", "64", "128", "--use_cpu", "--disable_tqdm", "true"]
        return [*arguments, *more]

    return made


def curve(folder: Path, metric: str = "loss") -> dict[int, float]:
    """Step -> value of metrics.csv, which has every step once."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == metric]
    found = {int(row["step"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    return found


def test_from_start_to_end(command, tmp_path):
    finetune.main(command("--mask", "sliding_window(32) | global_tokens(4)"))
    folder = tmp_path / "out"
    assert list(curve(folder)) == [1, 2, 3, 4, 5, 6]
    for length in (64, 128):
        before, after = curve(folder, f"eval_{length}_loss").values()
        assert after < before
    assert (folder / "losses.png").stat().st_size > 10_000
    assert len(list(folder.glob("checkpoint-*"))) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "sliding_window(32) | global_tokens(4)" in str(hfp.patch(model))
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    reset()
    weights = load_file(folder / "model.safetensors")
    trainer = finetune.main(command())  # there is nothing left to do
    assert trainer.state.global_step == 6 and list(curve(folder)) == [1, 2, 3, 4, 5, 6]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("model_type, more", [("gpt2", []), ("bert", []), ("bert", ["padded"])])
def test_other_families(command, tmp_path, model_type, more):
    """A learned table grows, BERT learns masked tokens; packed and padded."""
    more = ["--no_packing"] if more else ["--positions", "interpolate"]
    finetune.main(command(*more, "--max_steps", "2", model_type=model_type))
    assert list(curve(tmp_path / "out")) == [1, 2]


def test_longlora_and_merging(command, corpus, tmp_path):
    """The adapter has embeddings and norms; merged, it is a model like any other."""
    finetune.main(command(output="base"))
    base = ["--model", str(tmp_path / "base"), "--data", str(corpus), "--max_steps", "3"]
    base += ["--output_dir", str(tmp_path / "out"), "--eval_lengths", "64", "--use_cpu"]
    base += ["--disable_tqdm", "true", "--learning_rate", "1e-2", "--length", "128"]
    trainer = finetune.main([*base, "--tune", "longlora", "--merge"])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in saved) == 8  # q, k, v and the output, of two layers
    assert sum("norm" in name for name in saved) == 5
    assert sum("embed_tokens" in name for name in saved) == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), hfp.patched(merged):
        trained = trainer.model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)


def _to_the_fourth_step(arguments: list[str]) -> None:
    """The run, which waits in the middle of its fourth optimizer step."""
    step, calls = torch.optim.AdamW.step, []

    def waits(self, *args):
        calls.append(step(self, *args))
        if len(calls) == 4:
            time.sleep(600)

    torch.optim.AdamW.step = waits
    finetune.main(arguments)


def test_killed_in_the_middle_of_a_step(command, tmp_path):
    """What is lost is the step, and what was half saved; the rest goes on as if nothing was."""
    folder = tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    running = fork.Process(target=_to_the_fourth_step, args=(command(),))
    running.start()
    deadline = time.monotonic() + 120
    while (done := records.last_complete(folder)) is None or records.step_of(done) < 3:
        assert running.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    running.kill()  # SIGKILL
    running.join()
    assert records.last_complete(folder) == done
    half = folder / "checkpoint-4"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"glob')
    finetune.main(command(output="whole"))
    reset()
    trainer = finetune.main(command())
    assert trainer.state.global_step == 6
    assert curve(folder) == curve(tmp_path / "whole")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "whole" / "model.safetensors")[name]), name


def _finetune(arguments: list[str]) -> dict[int, float]:
    trainer = finetune.main(arguments)
    return records.losses(trainer.state.log_history, "loss")


@pytest.mark.parametrize("kind, tune", [("ddp", "full"), ("fsdp2", "full"), ("fsdp2", "longlora")])
def test_two_processes(command, tmp_path, kind, tune):
    """Equal to one process with twice the batch, and gone on from its middle."""
    more = ["--tune", tune, "--lora_r", "4", "--learning_rate", "3e-3"]
    expected = _finetune(command("--gradient_accumulation_steps", "2", *more, output="one"))
    more += ["--save_steps", "3", "--memory", "loss", "offload", "tile"]
    arguments = command(*more)
    run(2, _finetune, arguments, fsdp=kind == "fsdp2")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    first, second = run(2, _finetune, arguments, fsdp=kind == "fsdp2")
    assert first == second == pytest.approx(expected, rel=1e-5)
    name = "model.safetensors" if tune == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / run / name) for run in ("out", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "more",
    [
        ["--share", "ring"],
        ["--no_packing", "--mask", "sinks(9)", "--tune", "lora", "--lora_r", "4"],
    ],
    ids=["packed", "sparse lora"],
)
def test_two_processes_share_sequences(command, monkeypatch, more):
    """Equal to one process with the same batches."""
    more = [*more, "--max_length", "512", "--eval_lengths", "512"]
    expected = _finetune(command(*more, output="one"))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    more += ["--memory", "loss", "offload", "tile", "--keep_attention"]
    first, second = run(2, _finetune, command(*more), fsdp=True)
    assert first == second == pytest.approx(expected, rel=1e-5)


class TestOptions:
    """What may be given, and what is refused."""

    def test_a_file_and_what_overrides_it(self, tmp_path):
        file = tmp_path / "options.yaml"
        file.write_text("scratch: {model_type: gpt2}\neval_lengths: [8, 16]\npacking: false\n")
        model, text, training = options.read([str(file), "--eval_lengths", "32", "--use_cpu"])
        assert model.scratch == '{"model_type": "gpt2"}'
        assert (text.eval_lengths, text.packing, training.use_cpu) == ([32], False, True)

    def test_a_model_instead_of_the_files(self, tmp_path):
        file = tmp_path / "options.yaml"
        file.write_text("scratch: {model_type: gpt2}\n")
        model, _, _ = options.read([str(file), "--model", "a", "--use_cpu"])
        assert (model.model, model.scratch) == ("a", None)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "Give --model, or --scratch"),
            (["nowhere.yaml"], "nowhere.yaml: there is no such file"),
            (["--model", "a", "--bogus", "3"], "Unknown options: --bogus 3"),
            (["--model", "a", "--eval_lengths", "0"], "2 at least"),
            (["--model", "a", "--scratch", "{}"], "one of the two"),
            (
                ["--model", "a", "--memory", "offload", "--gradient_checkpointing", "true"],
                "give one",
            ),
            (["--model", "a", "--memory", "tile", "--keep_attention"], "is for checkpoints of"),
            (
                ["--model", "a", "--gradient_checkpointing", "--keep_attention", "--no_patch"],
                "and not --no_patch",
            ),
        ],
    )
    def test_one_model(self, arguments, message):
        with pytest.raises(SystemExit, match=message):
            options.read(arguments)

    @pytest.mark.parametrize("name", ["accelerate_ddp", "accelerate_fsdp2", "accelerate_shared"])
    def test_accelerates_configs(self, name):
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(EXAMPLES / "configs" / f"{name}.yaml"))
        assert config.num_processes == 2 and config.mixed_precision is None
        assert config.distributed_type == ("MULTI_GPU" if "ddp" in name else "FSDP")
        sharing = config.parallelism_config.get("parallelism_config_cp_size", 1)
        assert sharing == (2 if "shared" in name else 1)

    def test_one_checkpoint_is_not_enough(self):
        with pytest.raises(ValueError, match="save_total_limit=1: it takes 2"):
            options.read(["--model", "a", "--save_total_limit", "1"])

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
    def test_the_configs_are_read(self, config):
        new = "scratch" in config.read_text()
        assert options.read([str(config), "--use_cpu", *([] if new else ["--model", "a"])])


class TestData:
    """Rows, windows and sources."""

    def test_packed_rows_lose_nothing(self):
        documents = [torch.arange(n, dtype=torch.int32) for n in (7, 5, 11)]
        rows = list(data.Rows(documents, 6, packing=True))
        assert [sum(map(len, row)) for row in rows] == [6, 6, 6, 5]
        assert torch.equal(torch.cat([p for row in rows for p in row]), torch.cat(documents))
        padded = list(data.Rows(documents, 6, packing=False))
        assert [len(row[0]) for row in padded] == [6, 5, 6, 5]

    def test_every_length_predicts_the_same_tokens(self):
        documents = [torch.arange(100, dtype=torch.int32), torch.arange(9, dtype=torch.int32)]
        found = [
            [item["labels"][item["labels"] != data.IGNORED].tolist() for item in windows]
            for windows in (data.Windows(documents, n, [16, 64], 3) for n in (16, 64))
        ]
        assert found[0] == found[1] and len(found[0]) == 3 and len(found[0][0]) == 8

    def test_windows_that_processes_share(self):
        tokenizer = data.new_tokenizer({"a": "a text"}, 300)
        collate = data.Collator(tokenizer, packing=True, masked=False, multiple=8)
        windows = data.Windows([torch.arange(9, dtype=torch.int32)], 6, [6], 1)
        batch = collate([windows[0]])
        assert batch["labels"].shape == (1, 8) and batch["labels"][0, 6:].tolist() == [-100, -100]
        assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2]
        assert batch["input_ids"][0, :6].tolist() == windows[0]["input_ids"].tolist()

    def test_no_document_is_long_enough(self):
        with pytest.raises(SystemExit, match="longest document held out has 9 tokens"):
            data.Windows([torch.arange(9)], 16, [16], 1)

    def test_sources(self, corpus, tmp_path):
        settings = options.DataOptions()
        assert len(data.texts(str(corpus), settings)) == 14
        assert len(data.texts(str(corpus / "more.jsonl"), settings)) == 2
        train, test = data.held_out(data.texts(str(corpus / "0.txt"), settings))
        assert len(*test.values()) / len(*train.values()) == pytest.approx(0.15 / 0.85, rel=0.01)
        settings.text_field = "body"
        with pytest.raises(SystemExit, match="line 1 has text and no 'body'"):
            data.texts(str(corpus / "more.jsonl"), settings)
        (tmp_path / "empty.txt").touch()
        with pytest.raises(SystemExit, match="there is no text in it"):
            data.texts(str(tmp_path / "empty.txt"), settings)

    def test_datasets_where_it_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install datasets"):
            data.texts("no/such-place", options.DataOptions())
