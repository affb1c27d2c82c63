"""benchmarks/paper/fit.py: training in pieces."""

import itertools

import pytest
import torch

from benchmarks.paper import fit as fit_module
from benchmarks.paper.fit import UNTIMED, Recipe, Spent, fit
from benchmarks.paper.loop import Clock, OutOfTime, adamw

STEPS = 40


def model_after(folder, clock) -> tuple[torch.nn.Module, Spent, int]:
    """A model with dropout, fitted in as many pieces as it takes; also their number."""
    torch.manual_seed(1)
    for piece in itertools.count(1):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
        optimizer = adamw(model.train(), weight_decay=0.1, betas=(0.9, 0.95))

        def backward(step, model=model):
            loss = model(torch.full((4, 8), float(step % 3))).square().mean()
            loss.backward()
            return loss.detach()

        try:
            recipe = Recipe(STEPS, 1e-2, warmup=3)
            spent = fit(model, optimizer, recipe, backward, folder / "state", clock, "test")
            return model, spent, piece
        except OutOfTime:
            torch.manual_seed(piece)  # what comes next must not depend on it


def test_pieces_give_the_same_model(tmp_path, monkeypatch):
    whole, spent, _ = model_after(tmp_path, Clock(budget=100))
    assert (spent.steps, spent.gib) == (STEPS - UNTIMED, 0.0)
    assert spent.per_second(2) == pytest.approx(2 * spent.steps / spent.seconds)
    asked = itertools.count(1)
    monkeypatch.setattr(Clock, "over", lambda self: next(asked) % 12 == 0)
    other, spent, pieces = model_after(tmp_path, Clock(budget=100))
    assert pieces > 2 and spent.steps == STEPS - pieces * UNTIMED
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not (tmp_path / "state").exists()


def test_a_kill_costs_little(tmp_path, monkeypatch):
    """What was saved on the way is gone on with, though nobody said that the time was over."""
    whole, _, _ = model_after(tmp_path, Clock(budget=100))
    monkeypatch.setattr(fit_module, "EVERY", 0.0)
    first, kept = [], torch.nn.Module.__call__

    def killed(self, *inputs):
        first.append(self)
        if len(first) == 3 * 12 + 1:  # a Sequential of two: the 13th step
            raise KeyboardInterrupt
        return kept(self, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.Module, "__call__", killed)
        model_after(tmp_path, Clock(budget=100))
    assert torch.load(tmp_path / "state")["step"] == 12
    other, spent, _ = model_after(tmp_path, Clock(budget=100))
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert spent.steps == STEPS - 2 * UNTIMED and spent.seconds > 0


def test_nothing_timed():
    assert Spent().per_second(1) != Spent().per_second(1)  # nan
