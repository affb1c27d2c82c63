"""hfp extend."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM, ByT5Tokenizer

from hf_flash_patch.cli import main
from tests.integration.tiny import tiny_model, token_ids


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "llama"
    model = tiny_model(AutoModelForCausalLM, "llama", vocab_size=300, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(path)
    ByT5Tokenizer(extra_ids=0, model_max_length=64).save_pretrained(path)
    return path


def test_writes_a_checkpoint_that_takes_longer_inputs(llama, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["extend", str(llama), "--max-length", "256", "--rope", "yarn", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "64 -> 256 tokens (yarn)" in said and f"written  {out}" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.max_position_embeddings == 256 and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).model_max_length == 256
    assert model(token_ids(1, 200)).logits.isfinite().all()


def test_keeps_the_head_and_takes_a_dict(llama, tmp_path, capsys):
    bert = tmp_path / "bert"
    tiny_model(
        type("_", (), {"from_config": BertForMaskedLM._from_config}), "bert"
    ).save_pretrained(bert)
    out = tmp_path / "out"
    command = ["extend", str(bert), "--max-length", "128", "--positions", "tile", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "(tile)" in said and "tokenizer" not in said  # it has none
    assert not list(out.glob("tokenizer*"))
    assert BertForMaskedLM.from_pretrained(out)(token_ids(1, 128)).logits.shape == (1, 128, 99)
    rope = '{"rope_type": "linear", "factor": 8}'
    command = ["extend", str(llama), "--max-length", "256", "--rope", rope, "--out", f"{out}2"]
    assert main(command) == 0 and "'factor': 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--max-length", "32"], "max_length=32 is below the 64 tokens"),
        (["--max-length", "128", "--rope", "{x"], "--rope {x is not JSON"),
        (["--max-length", "128", "--positions", "tile"], "has RoPE, not learned positions"),
    ],
)
def test_errors_are_said_and_nothing_is_written(llama, tmp_path, capsys, arguments, text):
    out = tmp_path / "out"
    assert main(["extend", str(llama), *arguments, "--out", str(out)]) == 1
    assert text in capsys.readouterr().err and not out.exists()


def test_neither_overwrites_nor_invents(llama, tmp_path, capsys):
    command = ["extend", str(llama), "--max-length", "128", "--out"]
    assert main([*command, str(llama)]) == 1
    assert "is not empty" in capsys.readouterr().err
    command[1] = nothing = str(tmp_path / "nothing")
    assert main([*command, str(tmp_path / "out")]) == 1
    assert f"hfp extend: there is no {nothing}." in capsys.readouterr().err
