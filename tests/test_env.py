"""What `hfp env` says of a machine."""

from dataclasses import replace

import pytest
import torch

from hf_flash_patch.env import Environment, Gpu, compiled_sizes, environment
from hf_flash_patch.ops.library import ExtensionStatus

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
COMPLETE = Environment(
    system="Linux x86_64",
    python="3.12.0",
    packages={"torch": "2.11.0", "flash_attn": None},
    torch_cuda="13.0",
    gpus=(H100,),
    driver=True,
    extension=ExtensionStatus(True, "2 kernels", ("sm80 forward bf16 64", "sm80 forward bf16 32")),
)


def test_this_machine():
    found = environment()
    assert torch.__version__.startswith(found.packages["torch"])  # PyPI's leaves out "+cu128"
    assert len(found.gpus) == torch.cuda.device_count()
    text = str(found)
    assert "transformers" in text and f"python          {found.python}" in text


def test_nothing_is_missing():
    assert COMPLETE.advice == []
    assert "missing" not in str(COMPLETE)


def test_all_is_shown():
    lines = [line.split(maxsplit=1) for line in str(COMPLETE).splitlines()]
    assert ["torch", "2.11.0 (CUDA 13.0)"] in lines
    assert ["flash_attn", "not installed"] in lines
    assert ["gpu", "0           NVIDIA H100, compute capability 9.0, 80 GiB"] in lines
    assert ["kernels", "compiled"] in lines
    assert "                sm80 forward bf16: head_dim 32 64" in str(COMPLETE).splitlines()


@pytest.mark.parametrize(
    "change, advice",
    [
        ({"gpus": (), "driver": False}, "No NVIDIA GPU"),
        ({"gpus": (), "torch_cuda": None}, "torch is a CPU build: install one for CUDA"),
        ({"gpus": ()}, "torch sees no GPU: is CUDA_VISIBLE_DEVICES empty"),
        (
            {"gpus": (Gpu("Tesla T4", (7, 5), 2**34),)},
            "Tesla T4 has compute capability 7.5; the compiled kernels need 8.0",
        ),
        ({"extension": ExtensionStatus(False, "Install nvcc.")}, "Install nvcc."),
    ],
)
def test_what_is_missing(change, advice):
    machine = replace(COMPLETE, **change)
    (line,) = machine.advice
    assert line.startswith(advice)
    assert line in str(machine)


def test_sizes_are_grouped_and_sorted():
    instances = ("sm80 forward bf16 128", "sm80 forward bf16 64", "sm86 backward fp16 256")
    assert compiled_sizes(instances) == [
        "sm80 forward bf16: head_dim 64 128",
        "sm86 backward fp16: head_dim 256",
    ]
