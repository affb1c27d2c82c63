"""Shared sequences on as many GPUs as there are."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.gpu
def test_as_one_gpu():
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={gpus}", "-m", "tests.parallel.on_gpus"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{gpus} GPUs:\n{done.stdout}\n{done.stderr[-4000:]}"
