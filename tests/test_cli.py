"""The command `hfp`."""

import subprocess
import sys

import pytest

from hf_flash_patch.cli import main
from hf_flash_patch.env import environment


def test_env(capsys):
    assert main(["env"]) == 0
    assert capsys.readouterr().out == f"{environment()}\n"


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_unknown_command_lists_what_there_is(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["environment"])
    assert "invalid choice: 'environment' (choose from" in capsys.readouterr().err


def test_python_dash_m():
    command = [sys.executable, "-m", "hf_flash_patch", "env"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "transformers" in done.stdout, done.stderr


def test_mask(capsys, tmp_path):
    picture = tmp_path / "mask.svg"
    expression = "causal() & (sliding_window(64) | sinks(4))"
    assert main(["mask", expression, "--seqlen", "1024", "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == expression
    assert lines[1] == "6.423% of 1024 x 1024 pairs"
    assert lines[2] == "21 blocks of 128: 0 full, 21 with a tile"
    assert len(lines) == 5 + 32 and {len(line) for line in lines[5:]} == {64}
    assert picture.read_text().startswith("<svg")


def test_mask_of_nonsense(capsys):
    assert main(["mask", "exit()"]) == 1
    assert capsys.readouterr().err.startswith("hfp mask: 'exit()' in 'exit()' is no mask")
    assert main(["mask", "causal()", "--seqlen", "0"]) == 1
    assert "seqlen" in capsys.readouterr().err
