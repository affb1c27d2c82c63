"""Installed packages as text."""

from hf_flash_patch.testing import sources


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
