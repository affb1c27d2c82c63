"""Installed packages as text, and texts as tokens."""

import pytest
import torch

from hf_flash_patch.testing import sources, text


def test_no_text_is_in_both_splits(monkeypatch, tmp_path):
    for name, content in {"a": "x" * 900, "b": "y" * 800, "c": "x" * 900, "d": "z" * 100}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(content)
    paths = {"stdlib": str(tmp_path / "none"), "purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    texts = dict(sources.packages(10_000))
    assert list(texts) == ["a", "b", "d"]  # c is a copy of a
    assert sources.split(texts) == (["a", "d"], ["b"])
    cut = dict(sources.packages(1500))
    assert sum(map(len, cut.values())) < 1900


def test_documents_are_cut_in_turns():
    streams = {"a": torch.arange(7), "b": torch.arange(10, 12), "c": torch.arange(20, 26)}
    found, names = text.cut(streams, 4, 2)
    assert names == ["a", "b", "c", "a"] and found.tolist() == [[0, 1], [10, 11], [20, 21], [2, 3]]
    with pytest.raises(ValueError, match="no source has 8 tokens"):
        text.cut(streams, 4, 8)


def test_byte_pairs():
    tokenizer = text.byte_pairs(["def f(x): return 42"] * 9, 300, ["<pad>"])
    ids = tokenizer.encode("return 42").ids
    assert tokenizer.decode(ids) == "return 42" and 0 not in ids and len(ids) < 9
