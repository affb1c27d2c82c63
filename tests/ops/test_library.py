"""Operators without a GPU: extension missing or broken, fake tensors, the flash-attn package."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flash_patch.errors import UnsupportedKernelError
from hf_flash_patch.ops import backends, library
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.functional import attention, flash_attn_func, flash_attn_varlen_func
from hf_flash_patch.ops.library import ExtensionStatus


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Fake tensors on a GPU that is not there, with the extension in place."""
    monkeypatch.setattr(backends, "extension_status", lambda: ExtensionStatus(True, "there"))
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    with FakeTensorMode():
        yield lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="cuda:0")


def test_extension_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "EXTENSION", tmp_path / "_C.abi3.so")
    status = library._load_extension()
    assert not status.loaded and not status.instances
    assert "Install nvcc" in status.reason and "make build-cuda" in status.reason


def test_extension_broken(tmp_path, monkeypatch):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "EXTENSION", broken)
    status = library._load_extension()
    assert not status.loaded
    assert "_C.abi3.so does not load under torch" in status.reason


def test_extension_status_is_one_answer():
    assert library.extension_status() is library.extension_status()


def test_engines_have_no_gradient_of_their_own():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    arguments = (*[None] * 2, 4, 4, *[None] * 15, 1.0, False, -1, -1, 0.0, 0.0)
    out, _ = torch.ops.hf_flash_patch.torch_forward(q, q, q, *arguments)
    with pytest.raises(RuntimeError, match="First-order gradients come from flash_attn_func"):
        out.sum().backward()


def test_shapes_without_a_gpu(pretend_gpu):
    q, k = pretend_gpu(2, 10, 4, 64), pretend_gpu(2, 20, 2, 64)
    out, lse = flash_attn_func(q, k, k, causal=True, dropout_p=0.1, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert (lse.shape, lse.dtype) == ((2, 4, 10), torch.float32)

    q, k = pretend_gpu(30, 4, 64), pretend_gpu(50, 2, 64)
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="cuda:0")
    out, lse = flash_attn_varlen_func(q, k, k, cu_seqlens, cu_seqlens, 15, 25, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, 30)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for flash-attn that records its calls."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    calls = []

    def record(name):
        def function(q, *args, **kwargs):
            calls.append((name, args, kwargs))
            return torch.empty_like(q)

        return function

    module.flash_attn_func = record("dense")
    module.flash_attn_varlen_func = record("varlen")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


def test_flash_attn_package(pretend_gpu, package):
    q = pretend_gpu(1, 10, 2, 64)
    assert flash_attn_func(q, q, q, causal=True, backend="flash_attn").shape == q.shape
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device="cuda:0")
    lengths = (cu_seqlens, cu_seqlens, 10, 10)
    flash_attn_varlen_func(
        *[pretend_gpu(10, 2, 64)] * 3, *lengths, backend="flash_attn", softmax_scale=0.3
    )
    (dense, _, dense_options), (varlen, varlen_args, varlen_options) = package
    assert (dense, varlen) == ("dense", "varlen")
    assert dense_options == {
        "softmax_scale": 0.125,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
    }
    assert varlen_args[2:] == lengths and varlen_options["softmax_scale"] == 0.3


def test_what_flash_attn_is_not_asked(pretend_gpu, package):
    q = pretend_gpu(1, 10, 2, 64)
    key_range = torch.zeros(1, 2, dtype=torch.int32, device="cuda:0")
    for options, text in (
        ({"dropout_p": 0.1}, "dropout_p > 0"),
        ({"return_lse": True}, "return_lse"),
        ({"mask": MaskArguments(key_range=key_range)}, "key_range"),
    ):
        with pytest.raises(UnsupportedKernelError, match=f"does not serve {text}.*backend="):
            attention(q, q, q, backend="flash_attn", **options)
    with pytest.raises(UnsupportedKernelError, match="does not serve dtype torch.float32"):
        attention(*[q.float()] * 3, backend="flash_attn")
    assert not package
