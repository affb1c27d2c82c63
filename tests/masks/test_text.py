"""Patterns as text and JSON, pickled, hashed, and drawn."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch

from hf_flash_patch import MaskError, masks
from hf_flash_patch.masks.plot import fractions
from tests.masks.catalogue import BY_NAME, WRITABLE


@pytest.mark.parametrize("case", WRITABLE, ids=lambda case: case.name)
def test_written_and_read_again(case):
    pattern = case.pattern
    assert masks.parse(json.loads(json.dumps(str(pattern)))) == pattern
    for other in (~pattern, pattern & masks.sinks(2), (pattern | masks.sinks(2)) & ~pattern):
        assert masks.parse(str(other)) == other
        assert masks.parse(str(masks.causal() & other)) == masks.causal() & other


def test_text():
    pattern = masks.sliding_window(4096) | masks.global_tokens(64)
    assert str(pattern) == "sliding_window(4096) | global_tokens(64)"
    assert str(masks.causal() & pattern & ~masks.sinks(4)) == (
        "causal() & (sliding_window(4096) | global_tokens(64)) & ~sinks(4)"
    )
    assert masks.parse(" bigbird(3, random=2, global_=1, seed=7) ") == masks.bigbird(3, 2, 1, 7)
    assert masks.parse("per_head([causal(), full()])") == masks.per_head(
        [masks.causal(), masks.full()]
    )
    assert masks.parse("documents([0, 0, 1])") == masks.documents([0, 0, 1])


@pytest.mark.parametrize("case", WRITABLE, ids=lambda case: case.name)
def test_pickled_and_hashed(case):
    again = pickle.loads(pickle.dumps(case.pattern))
    assert again == case.pattern and hash(again) == hash(case.pattern)
    assert len({again, case.pattern, ~case.pattern}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "sliding_window(",
        "sliding_window",
        "open('x')",
        "__import__('os').system('true')",
        "3",
        "causal() + full()",
        "causal() if 1 else full()",
        "sliding_window(1, 2, 3)",
        "sliding_window(**{})",
        "causal() & 3",
        "3 | causal()",
        "~'full()'",
        "[causal()]",
    ],
)
def test_text_that_is_no_pattern(text):
    with pytest.raises(MaskError):
        masks.parse(text)


def test_code_is_not_text():
    with pytest.raises(MaskError, match="made of code"):
        str(BY_NAME["mask_mod"].pattern | masks.causal())
    assert "MaskMod" in repr(BY_NAME["mask_mod"].pattern)


@pytest.mark.parametrize("seqlen", [100, 5000])
def test_fractions_are_of_pairs(seqlen):
    for pattern in (
        masks.causal(),
        masks.shifted_groups(640),
        masks.per_head([masks.full(), masks.strided(300)]),
    ):
        shown = fractions(pattern, seqlen, 20)
        assert shown.shape[1] == shown.shape[2] <= 20 and shown.shape[0] == pattern.static_heads
        assert 0.0 <= shown.min() and shown.max() <= 1.0
        size = -(-seqlen // shown.shape[1]) if seqlen == 100 else 256
        dense = pattern.dense(seqlen)[0, :, :size, size : 2 * size].double().mean(dim=(1, 2))
        torch.testing.assert_close(shown[:, 0, 1], dense)


def test_plots(tmp_path, monkeypatch):
    assert masks.causal().plot(3) == "█··\n██·\n███"
    text = masks.shifted_groups(4).plot(8, tmp_path / "groups.svg")
    assert text.count("\n\n") == 1
    assert (tmp_path / "groups.svg").read_text().count("<rect") == 2 + 8 + 8
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        masks.causal().plot(64, tmp_path / "x.png")


def test_plot_by_matplotlib(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    masks.per_head([masks.causal(), masks.full()]).plot(64, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_name_that_is_nearly_right():
    with pytest.raises(MaskError, match="no sliding_windw; did you mean sliding_window"):
        masks.parse("sliding_windw(4) | causal()")
