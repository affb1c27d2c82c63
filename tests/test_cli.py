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
