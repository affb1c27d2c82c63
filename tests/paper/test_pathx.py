"""pathx.py from start to end in small, in pieces, and what its parts promise."""

import csv
import itertools
from dataclasses import replace

import pytest
import torch

import hf_flash_patch as hfp
from benchmarks.paper import pathfinder, pathx, pathx_report, routes
from benchmarks.paper.tracer import Shape, Tracer

SMALL = Shape(hidden=16, layers=2, heads=2, registers=3)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A command line that asks for little."""
    monkeypatch.setitem(pathx.POOL_PIXELS, "cpu", 2**12)
    for name, stages in list(routes.ROUTES.items()):
        monkeypatch.setitem(routes.ROUTES, name, [stages[0], *stages[-2:]][-3:])
    return pathx.Arguments(
        route="pretrain",
        tiny=True,
        scale=0.1,
        tested=40,
        hidden=16,
        layers=2,
        heads=2,
        device="cpu",
        folder=str(tmp_path / "work"),
        output=str(tmp_path / "results"),
    )


def rows_of(arguments) -> list[dict[str, str]]:
    with open(f"{arguments.output}/pathx-tiny.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_from_start_to_end_in_pieces(arguments, tmp_path, capsys):
    """No time at all: every piece is a stage, which ends once it has begun."""
    route, statuses = routes.ROUTES["pretrain"], []
    while not statuses or statuses[-1]:
        statuses.append(pathx.main(replace(arguments, budget=-1)))
        assert len(statuses) < 40
    assert len(statuses) > len(route) and statuses[-1] == 0
    rows = rows_of(arguments)
    assert [row["stage"] for row in rows] == [stage.name for stage in route]
    assert [row["accuracy"] == "" for row in rows] == [stage.goal == "pixels" for stage in route]
    assert all(int(row["steps"]) > 0 and int(row["images"]) > 0 for row in rows)
    said = capsys.readouterr().out
    assert "Path-X: " in said and "Path-256: " in said and "paper's 63.1%" in said
    for name in ("pathx-tiny.md", "pathx-tiny.svg"):
        assert (tmp_path / "results" / name).stat().st_size > 500
    written = (tmp_path / "results" / "pathx-tiny.csv").read_bytes()
    assert pathx.main(arguments) == 0  # nothing is left to do
    assert (tmp_path / "results" / "pathx-tiny.csv").read_bytes() == written


def test_traces_are_learnt_too(arguments):
    arguments.route = "traced"
    assert pathx.main(arguments) == 0
    rows = rows_of(arguments)
    assert {row["goal"] for row in rows} == {"traces"} and len(rows) == 3
    said = pathx_report.conclusion(rows)
    assert all("map of contours" in sentence for sentence in said) and len(said) == 2


def test_a_stage_goes_on_where_it_stopped(arguments, tmp_path):
    stopped = replace(arguments, scale=1000.0, budget=-1)
    assert pathx.main(stopped) == 3
    state = torch.load(tmp_path / "work" / "pretrain-tiny-0.pt")
    assert state["stage"] == 0 and state["steps"] == 1 and state["seen"][0] == 1
    assert pathx.main(stopped) == 3
    later = torch.load(tmp_path / "work" / "pretrain-tiny-0.pt")
    assert later["steps"] == 2 and later["seen"][0] == 2 and later["seconds"] > state["seconds"]
    assert later["optimizer"]["state"][0]["step"] == 2
    moved = [not torch.equal(later["model"][n], value) for n, value in state["model"].items()]
    assert sum(moved) > len(moved) / 2


def test_a_checkpoint_of_other_conditions(arguments):
    arguments.scale = 1000.0
    assert pathx.main(replace(arguments, budget=-1)) == 3
    with pytest.raises(SystemExit, match=r"of scale, .* \[1000.0, 16, .* give another --folder"):
        pathx.main(replace(arguments, scale=1.0))


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_around_the_row_loses_and_doubles_nothing(arguments, monkeypatch, after):
    add = pathx.Records.add

    def killed(self, row):
        if after:
            add(self, row)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathx.Records, "add", killed)
        pathx.main(arguments)
    assert pathx.main(arguments) == 0
    rows = rows_of(arguments)
    assert [row["stage"] for row in rows] == [s.name for s in routes.ROUTES["pretrain"]]
    assert all(float(row["last_loss"]) > 0 for row in rows)


def test_a_kill_costs_little(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(pathx, "EVERY", 0.0)
    steps, loss_of = iter(range(5)), pathx.loss_of

    def killed(*inputs):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return loss_of(*inputs)

    monkeypatch.setattr(pathx, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        pathx.main(replace(arguments, scale=1000.0))
    state = torch.load(tmp_path / "work" / "pretrain-tiny-0.pt")
    assert state["steps"] == 4 and state["optimizer"]["state"][0]["step"] == 4


def test_the_patched_model_is_the_eager_one_under_its_masks():
    torch.manual_seed(0)
    stage = replace(routes.tiny(routes.ROUTES["labels"])[-1], rows=(2, None))
    model = Tracer(SMALL).eval()
    model.fit(16)
    images = pathfinder.generate(stage.geometry, 3, torch.Generator().manual_seed(0))
    model.encoder.set_attn_implementation("eager")
    plain = model(images.pixels)
    with hfp.patch(model):
        for one, other in zip(plain, model(images.pixels), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    masks = stage.masks(SMALL)
    assert masks[1] is None and 0 < stage.density(SMALL) < 1
    with hfp.patch(model, mask=lambda layer: masks[layer]):
        assert (model(images.pixels)[2] - plain[2]).abs().max() > 1e-6


def test_brightness_and_neighbours_matter_from_the_start():
    """Tokens of lines and dots are unlike after the first norm, and every layer adds to them."""
    torch.manual_seed(0)
    encoder = Tracer(Shape()).eval().encoder
    embeddings = encoder.embeddings.patch_embeddings
    pixels = embeddings(torch.tensor([0.9, 1.0])[:, None, None, None]).flatten(1)
    line, dot = encoder.model.layer[0].norm1(pixels)
    assert (line - dot).norm() > 0.02 * dot.norm()
    image = torch.rand(1, 1, 8, 8)
    states = encoder(pixel_values=image, output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states):
        assert 0.1 < (after - before).norm() / before.norm() < 2


def test_positions_go_by_pixels_or_by_the_image():
    """What two neighbours see of each other does not depend on the canvas, unless stretched."""

    def turns(size: int, stretch: float) -> torch.Tensor:
        model = Tracer(SMALL).eval()
        model.fit(size, stretch)
        cos, sin = model.encoder.rope_embeddings(torch.zeros(1, 1, size, size))
        angle = torch.atan2(sin, cos)
        apart = angle[1] - angle[0]
        return torch.atan2(apart.sin(), apart.cos())

    torch.testing.assert_close(turns(16, 1.0), turns(64, 1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(turns(32, 2.0) * 2, turns(16, 1.0), atol=1e-4, rtol=0)


def test_contours_grow_and_images_are_turned_alike():
    geometry = pathfinder.smaller(pathfinder.GEOMETRIES[128], 64, 5, 1)
    stage = routes.Stage("s", geometry, 2, "traces", 1.0, 4, 1e-3)
    fresh = pathx.Fresh(stage, 0, torch.device("cpu"))
    ink = {}
    for progress in (0.0, 1.0):
        fresh._left = []
        pixels, labels, traces = fresh.batch(progress)
        assert pixels.shape == traces.shape == (4, 64, 64) and labels.shape == (4,)
        assert ((traces > 0) <= (pixels > 0)).all()
        parts = fresh._parts[2]
        ink[progress] = float((parts >= 2).float().mean())
    assert ink[1.0] > 1.3 * ink[0.0] and fresh.pools == 2
    same = pathx.Fresh(stage, 0, torch.device("cpu"))
    assert torch.equal(same.batch(0.0)[0], pathx.Fresh(stage, 0, torch.device("cpu")).batch(0.0)[0])


def test_hidden_pixels_come_in_squares():
    hidden = pathx.hide(50, 15, torch.Generator().manual_seed(0)).view(50, 15, 15)
    assert abs(hidden.float().mean() - 0.5) < 0.05
    assert torch.equal(hidden[:, 0:14:2], hidden[:, 1:14:2])


def test_checkpoints_are_small_enough_to_carry():
    weights = sum(p.numel() for p in Tracer(Shape()).parameters())
    assert weights * 12 < 14e6  # bytes, with AdamW's two moments


@pytest.mark.parametrize("name", list(routes.ROUTES))
def test_routes_end_at_the_arenas_own_images(name):
    stages = routes.ROUTES[name]
    last = {stage.name: stage.geometry for stage in stages}
    assert last["Path-X"] == pathfinder.GEOMETRIES[128]
    assert last.get("Path-256", pathfinder.GEOMETRIES[256]) == pathfinder.GEOMETRIES[256]
    for stage in stages:
        made = pathfinder.generate(stage.geometry, 1, torch.Generator().manual_seed(0))
        assert made.pixels.shape[-1] == stage.geometry.size
        assert stage.density(Shape()) <= 1 and len(stage.masks(Shape())) == 8
