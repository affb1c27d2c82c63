"""The command `hfp bench`; here the torch engine stands for ours, and a clock for the GPU."""

import itertools
import sys
import types
from collections import namedtuple
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_flash_patch.bench import command, contestants, measure, results
from hf_flash_patch.bench.cells import GROUPS, KV_LIMIT, TILE, Cell, cells
from hf_flash_patch.bench.check import Reference, check_dropout
from hf_flash_patch.bench.contestants import COPY, DENSE, OURS, Contestant, Refusal
from hf_flash_patch.bench.problem import Problem
from hf_flash_patch.bench.results import BEST, SDPA, Result
from hf_flash_patch.bench.timing import MAX_REPEATS, MIN_REPEATS, Timing, plan, time_interleaved
from hf_flash_patch.cli import main
from hf_flash_patch.ops.functional import attention, flash_attn_func, flash_attn_varlen_func
from hf_flash_patch.testing.reference import visible

ALL = cells(["all"])


def small(group, layout, *, causal=True, seqlen=96, batch=2, **options):
    """A cell that a CPU computes in milliseconds, of 4 heads of 16."""
    options = {"num_heads_k": 4} | options
    return Cell(group, layout, 16, causal, seqlen, batch, 4, **options)


SMALL = {
    "full": small("core", "dense", causal=False),
    "causal": small("core", "dense"),
    "gqa": small("gqa", "dense", num_heads_k=2),
    "window": small("window", "dense", window=24),
    "packed": small("varlen", "packed", seqlen=256),
    "packed full": small("varlen", "packed", seqlen=256, causal=False),
    "documents": small("documents", "documents", seqlen=256),
    "padded": small("varlen", "padded", seqlen=256),
    "decode": small("decode", "decode", causal=False, num_heads_k=2),
    "blocks": small("blocks", "dense", causal=False, seqlen=384, density=0.4),
    "padded blocks": small(
        "blocks", "padded", causal=False, seqlen=384, density=0.4, dropout=0.25, batch=8
    ),
    "dropout": small("dropout", "dense", causal=False, batch=8, dropout=0.25),
}


def bind_engine(problem):
    """Ours, on a CPU."""
    cell = problem.cell
    options = {"mask": problem.mask, "causal": cell.causal, "window_size": cell.window_size}
    return partial(attention, dropout_p=cell.dropout, backend="torch", **options)


def make(cell):
    torch.manual_seed(0)
    return Problem(cell, dtype=torch.bfloat16, device="cpu")


@pytest.fixture
def engine():
    return Contestant(OURS, "0", bind_engine)


@pytest.fixture
def clock(monkeypatch):
    """Runs everything once; the first of the contestants takes 1 ms, the second 2 ms, ..."""

    def pretend(calls, *, rounds):
        for call in calls.values():
            call()
        return {name: Timing(1.0 + i, 0.01 * i) for i, name in enumerate(calls)}

    monkeypatch.setattr(measure, "time_interleaved", pretend)
    monkeypatch.setattr(measure, "COPY_BYTES", 2**20)


@pytest.fixture
def settings():
    return measure.Settings(torch.bfloat16, ("fwd", "bwd"), 1, device="cpu")


def result(cell, direction, contestant, rate):
    return Result(cell, direction, contestant, "1.0", 1 / 3, 0.02, rate, "bfloat16", "a GPU")


# What is measured.


def test_groups():
    assert {name: len(cells([name])) for name in GROUPS} == {
        "core": 24,
        "head_dims": 12,
        "gqa": 4,
        "window": 1,
        "dropout": 12,
        "varlen": 6,
        "documents": 3,
        "decode": 20,
        "blocks": 12,
        "density": 24,
        "long_sparse": 4,
    }
    assert len(ALL) == 122 == len({(cell.group, cell.name) for cell in ALL})
    assert all(cell.group == name for name in GROUPS for cell in cells([name]))
    assert cells(["gqa", "window", "gqa"]) == cells(["gqa"]) + cells(["window"])


def test_hidden_size_and_tokens():
    for cell in cells(["core", "head_dims", "gqa", "window", "dropout"]):
        assert cell.num_heads == 2048 // cell.head_dim
        assert cell.batch * cell.seqlen == 16384
    for cell in cells(["varlen"]):
        assert cell.batch * cell.seqlen == 32768
        assert all(128 <= length <= 8192 for length in cell.lengths[:-1])
        assert sum(cell.lengths) == 32768 or cell.layout == "padded"
    for lengths in (cell.lengths for cell in cells(["documents"])):
        assert sum(lengths) == 32768 and max(lengths) == 4096 and sorted(lengths)[37] < 400
    for cell in cells(["decode"]):
        assert cell.kv_bytes <= KV_LIMIT
        assert cell.name.endswith(f"{cell.batch}x{cell.seqlen // 1024}k")


@pytest.mark.parametrize("seqlen", [1, 100, 512])
def test_pairs_against_the_exact_count(seqlen):
    def exact(**options):
        options = {"causal": True, "window_size": (-1, -1)} | options
        return visible(seqlen, seqlen, seqlen, **options).sum().item()

    cell = small("core", "dense", seqlen=seqlen, batch=1)
    assert replace(cell, causal=False).pairs == exact(causal=False)
    assert cell.pairs == exact() - seqlen / 2
    windowed = replace(cell, window=64)
    assert windowed.pairs == exact(window_size=windowed.window_size) - min(64, seqlen) / 2


def test_work():
    cell = cells(["core"])[0]
    assert cell.name == "d64 full 512"
    assert cell.flop == 4 * 32 * 32 * 512 * 512 * 64
    assert cell.work("fwd") == cell.flop and cell.work("bwd") == 2.5 * cell.flop
    assert replace(cell, causal=True).flop == cell.flop / 2
    decode = cells(["decode"])[0]
    assert decode.work("fwd") == decode.kv_bytes == 2 * 4096 * 8 * 128 * 2
    assert (cell.unit, decode.unit) == ("TFLOP/s", "GB/s")


@pytest.mark.parametrize("cell", cells(["varlen", "documents"]), ids=lambda cell: cell.name)
def test_the_uniform_cell_is_nearly_the_ragged_one(cell):
    uniform = cell.uniform
    assert uniform.seqlen % TILE == 0
    assert abs(sum(uniform.lengths) / sum(cell.lengths) - 1) < 0.05
    assert abs(uniform.tiles / cell.tiles - 1) < 0.1


def test_tiles():
    cell = small("core", "dense", seqlen=300, batch=2)
    assert cell.tiles == 2 * 4 * (1 + 2 + 3)
    assert replace(cell, causal=False).tiles == 2 * 4 * 9


# The check.


@pytest.mark.parametrize("cell", SMALL.values(), ids=list(SMALL))
def test_every_cell_is_checked_and_timed(cell, engine, settings, clock):
    notes = []
    found = measure.measure(cell, [engine], settings, notes.append)
    assert notes == []
    ours = [r for r in found if r.contestant == OURS]
    assert [r.direction for r in ours] == (["fwd"] if cell.decode else ["fwd", "bwd"])
    assert all(r.milliseconds == 1.0 and r.cell == cell for r in ours)
    unit = 1e6 if cell.decode else 1e9
    assert [r.rate for r in ours] == [cell.work(r.direction) / unit for r in ours]
    others = [DENSE] if cell.ragged or cell.density else [COPY] if cell.decode else []
    assert [r.contestant for r in found if r.direction == "fwd"] == [OURS, *others]


def test_yardsticks(engine, settings, clock):
    cell = SMALL["packed"]
    dense = measure.measure(cell, [engine], settings, print)[1]
    assert dense.contestant == DENSE
    assert dense.milliseconds == 2.0 * cell.tiles / cell.uniform.tiles
    copy = measure.measure(SMALL["decode"], [engine], settings, print)[1]
    assert copy.contestant == COPY
    assert copy.rate == 2 * measure.COPY_BYTES / 2.0 / 1e6


@pytest.mark.parametrize(
    "wrong",
    [
        {"causal": False},
        {"causal": False, "window_size": (-1, 1)},
        {"causal": True, "softmax_scale": 1.05 * 16**-0.5},
    ],
    ids=["mask", "one key", "scale"],
)
def test_a_wrong_peer_is_left_out_and_ours_raises(wrong, engine, settings, clock):
    cell = SMALL["causal"]

    def bind(problem):
        return partial(flash_attn_func, backend="torch", **wrong)

    notes = []
    found = measure.measure(cell, [engine, Contestant("peer", "", bind)], settings, notes.append)
    assert {r.contestant for r in found} == {OURS}
    assert len(notes) == 1 and notes[0].startswith("peer is wrong: Wrong: ")
    with pytest.raises(RuntimeError, match="hfp fails at d16 causal 96: .* is off by"):
        measure.measure(cell, [Contestant(OURS, "", bind)], settings, notes.append)


def test_a_wrong_gradient_is_found(engine):
    problem = make(SMALL["gqa"])
    reference = Reference(problem)
    out = bind_engine(problem)(problem.q, problem.k, problem.v)
    dq, dk, dv = problem.gradients(out)
    reference.check((out, dq, dk, dv))
    with pytest.raises(AssertionError, match="dk is off by"):
        reference.check((out, dq, 1.1 * dk, dv))
    with pytest.raises(AssertionError, match="dv is off by"):
        reference.check((out, dq, dk, dv.roll(1, dims=1)))


def test_the_reference_in_pieces_is_the_reference(monkeypatch):
    problem = make(small("window", "dense", seqlen=200, window=50, num_heads_k=2))
    whole = Reference(problem).exact
    monkeypatch.setattr("hf_flash_patch.bench.check.ROWS", 64)
    pieces = Reference(problem).exact
    assert [x.shape for x in whole] == [x.shape for x in pieces]
    for x, y in zip(whole, pieces, strict=True):
        torch.testing.assert_close(x, y)


def test_dropout_is_checked_by_its_statistics():
    problem = make(SMALL["dropout"])
    plain = bind_engine(problem.without_dropout())(problem.q, problem.k, problem.v)
    dropped = bind_engine(problem)(problem.q, problem.k, problem.v)
    check_dropout((dropped,), (plain,), 0.25)
    for wrong, said in (
        (0.75 * dropped, "times that without"),
        (plain, "varies by 0.000"),
        (dropped / 0.0, "not finite"),
    ):
        with pytest.raises(AssertionError, match=said):
            check_dropout((wrong,), (plain,), 0.25)


def test_a_refusal_leaves_a_place_empty(engine, settings, clock):
    def refuse(problem):
        raise Refusal("no such mask")

    notes = []
    cell = SMALL["causal"]
    found = measure.measure(cell, [engine, Contestant("peer", "", refuse)], settings, notes.append)
    assert notes == ["peer is left out: Refusal: no such mask"]
    assert {r.contestant for r in found} == {OURS}


# The contestants, as far as a CPU goes.


@pytest.mark.parametrize("name", ["full", "causal", "dropout"])
def test_sdpa_takes_part(name, engine, settings, clock):
    notes = []
    peer = contestants.find_peer("sdpa_flash")
    found = measure.measure(SMALL[name], [engine, peer], settings, notes.append)
    if name == "dropout":  # The CPU's kernel has none.
        assert len(notes) == 1 and notes[0].startswith("sdpa_flash is left out: RuntimeError")
    else:
        assert notes == []
        assert {r.contestant for r in found} == {OURS, "sdpa_flash"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "name", ["causal", "gqa", "window", "packed", "padded", "decode", "blocks"]
)
def test_flex_computes_the_cell(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = make(SMALL[name])
    q, k, v = (x.detach() for x in (problem.q, problem.k, problem.v))
    with torch._functorch.config.patch(donated_buffer=True):  # Undoes what bind sets.
        attend = contestants.find_peer("flex").bind(problem)
    Reference(problem).check((attend(q, k, v),))


def as_package(**functions):
    """flash-attn's interface on the torch engine, returning lse as some generations do."""
    dense = partial(flash_attn_func, backend="torch", return_lse=True)
    varlen = partial(flash_attn_varlen_func, backend="torch", return_lse=True)
    both = {"flash_attn_func": dense, "flash_attn_varlen_func": varlen}
    return types.SimpleNamespace(**both | functions)


@pytest.mark.parametrize("name", [name for name in SMALL if "blocks" not in name])
def test_flash_attn_computes_the_cell(name, monkeypatch, engine, settings, clock):
    monkeypatch.setattr(contestants.importlib, "import_module", lambda _: as_package())
    notes = []
    peer = contestants.find_peer("fa2")
    assert peer.version == "of unknown version"
    found = measure.measure(SMALL[name], [engine, peer], settings, notes.append)
    assert notes == [] and {r.contestant for r in found} >= {OURS, "fa2"}


def test_flash_attn_decodes_by_its_own_function(monkeypatch):
    called = []

    def with_kvcache(q, k_cache, v_cache, **options):
        called.append(options)
        return flash_attn_func(q, k_cache, v_cache, backend="torch", **options)

    package = as_package(flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setattr(contestants.importlib, "import_module", lambda _: package)
    problem = make(SMALL["decode"])
    attend = contestants.find_peer("fa3").bind(problem)
    Reference(problem).check((attend(problem.q, problem.k, problem.v),))
    assert called == [{"causal": False}]


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setattr(contestants.importlib, "import_module", lambda _: types.SimpleNamespace())
    assert contestants.find_peer("fa4") == "ImportError: flash_attn.cute has no flash_attn_func"
    monkeypatch.undo()
    assert contestants.find_peer("fa3").startswith("ModuleNotFoundError: No module named")


# Results.


def test_ratios():
    cell, other = ALL[0], ALL[1]
    entries = {"hfp": 300.0, "sdpa_flash": 200.0, "sdpa_cudnn": 240.0, "fa4": 600.0, "copy": 900.0}
    table = results.by_cell(result(cell, "fwd", name, rate) for name, rate in entries.items())
    assert list(table) == [(cell, "fwd")]
    [found] = table.values()
    assert results.ratio(found, BEST) == 0.5
    assert results.ratio(found, SDPA) == 1.25
    assert results.ratio(found, "copy") == 300 / 900
    assert results.ratio(found, "flex") is None
    text = results.line((cell, "fwd"), found, ["hfp", "flex", "fa4"])
    assert text.split() == "d64 full 512 fwd 300.0 - 600.0 0.50 fa4, 0.33 of copy (900)".split()

    faster = [result(other, "fwd", "hfp", 400.0), result(other, "fwd", "fa4", 100.0)]
    lines = results.summary([*itertools.chain(*(x.values() for x in table.values())), *faster])
    assert lines[0].split() == (
        "core fwd against best peer 2 cells mean 1.414 worst 0.500 at d64 full 512".split()
    )
    assert lines[-1] == "rounds differ by 2.0% (median), 2.0% at most"
    assert results.summary([]) == []


def test_csv_round_trip(tmp_path):
    some = [result(cell, "fwd", "fa4", 100 / 7) for cell in ALL]
    results.write_csv(tmp_path / "a.csv", some)
    assert results.read_csv(tmp_path / "a.csv") == some
    (tmp_path / "b.csv").write_text("head_dim,causal\n64,True\n")
    with pytest.raises(ValueError, match=r"b.csv has the columns \['head_dim', 'causal'\]"):
        results.read_csv(tmp_path / "b.csv")


# Timing.


def test_a_turn_fits_its_time_and_the_queue():
    assert plan(print, gpu_ms=2.0, host_ms=0.1, turn_ms=20.0).repeats == 10
    assert plan(print, gpu_ms=0.004, host_ms=0.1).repeats == MAX_REPEATS
    assert plan(print, gpu_ms=500.0, host_ms=0.1).repeats == MIN_REPEATS
    assert plan(print, gpu_ms=500.0, host_ms=2.0).spin == 5 * 2 * 3_000_000


def test_timing_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="time_interleaved needs a CUDA device"):
        time_interleaved({"nothing": lambda: None})


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, capsys):
    saved = tmp_path / "a.csv"
    some = "d64 causal 512|d64 causal left-padded|d128 decode 32/8 heads 1x4k"
    choice = ["--cells", "all", "--match", some, "--peers", "sdpa_flash", "--rounds", "1"]
    assert main(["bench", *choice, "--csv", str(saved)]) == 0
    table = results.by_cell(results.read_csv(saved))
    assert len(table) == 2 + 2 + 1
    for (cell, _), entries in table.items():
        # No GPU reads memory at 10 TB/s or multiplies at 3 PFLOP/s: more would be L2, or a bug.
        assert all(0 < entry.rate < (1e4 if cell.decode else 3e3) for entry in entries.values())
    assert COPY in table[next(key for key in table if key[0].decode)]


# The command.


@pytest.fixture
def on_cpu(monkeypatch, engine, clock):
    """`hfp bench` over small cells, with the torch engine and SDPA on the CPU."""
    monkeypatch.setattr(command, "_obstacle", lambda dtype: None)
    monkeypatch.setattr(command, "ours", lambda version: engine)
    monkeypatch.setattr(command, "Settings", partial(measure.Settings, device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(command, "cells", lambda groups: list(SMALL.values()))


def test_from_start_to_end(on_cpu, tmp_path, capsys):
    saved, figure = tmp_path / "new" / "a.csv", tmp_path / "a.svg"
    command_line = ["bench", "--cells", "all", "--peers", "sdpa_flash", "fa3", "--csv", str(saved)]
    assert main(command_line) == 0
    said = capsys.readouterr().out
    assert said.startswith("a GPU, torch ") and "fa3: absent, ModuleNotFoundError" in said
    assert said.count("sdpa_flash is left out: Refusal: no mask but causal") == 1
    assert "d16 causal 96                     bwd         0.0        0.0" in said
    assert len(results.by_cell(results.read_csv(saved))) == 2 * len(SMALL) - 1

    assert main(["bench", "--from-csv", str(saved), "--figure", str(figure)]) == 0
    table = capsys.readouterr().out
    assert all(x in said for x in table.splitlines()[1:])
    drawn = figure.read_text()
    for text in ("core: d16 causal, bwd", "decode: d16 decode 4/2 heads, fwd", "hfp_dense", "GB/s"):
        assert f"<!-- {text}" in drawn


def test_cells_and_directions_are_chosen_from_a_file(tmp_path, capsys):
    saved = tmp_path / "a.csv"
    results.write_csv(
        saved, [result(c, d, "hfp", 1.0) for c in cells(["core", "gqa"]) for d in ("fwd", "bwd")]
    )
    choice = ["--cells", "gqa", "--directions", "bwd", "--match", "causal"]
    assert main(["bench", "--from-csv", str(saved), *choice]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split("  ")[0] for x in lines[1:3]] == [
        "d128 causal 16/4 heads 2k",
        "d128 causal 16/4 heads 8k",
    ]
    assert len(lines) == 4


def test_a_spent_budget_starts_no_cell(on_cpu, tmp_path, capsys, monkeypatch):
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr(command.time, "monotonic", lambda: next(now))
    saved = tmp_path / "a.csv"
    assert main(["bench", "--only-ours", "--budget", "25", "--csv", str(saved)]) == 0
    assert "The budget of 25 s is spent: " in capsys.readouterr().out
    assert 0 < len(results.read_csv(saved)) < len(SMALL)


def test_match_and_only_ours(on_cpu, capsys):
    assert main(["bench", "--only-ours", "--match", "packed", "--directions", "fwd"]) == 0
    said = capsys.readouterr().out
    assert "sdpa" not in said.replace("best of SDPA", "") and "bwd" not in said
    assert "d16 full packed 512" in said and "d16 causal 96" not in said


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench"]) == 1
    said = capsys.readouterr()
    assert said.err == "hfp bench: our compiled kernels are needed: there is no CUDA device.\n"
    assert said.out == ""


def test_a_figure_that_cannot_be_made_fails_before_the_measuring(capsys, tmp_path, monkeypatch):
    assert main(["bench", "--figure", str(tmp_path / "a.txt")]) == 1
    assert "has to end in one of .svg, .png, .pdf" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", "--figure", str(tmp_path / "a.svg")]) == 1
    assert "--figure needs matplotlib, which is not installed" in capsys.readouterr().err


def test_what_does_not_parse(capsys):
    for wrong, said in (
        (["--cells", "everything"], "invalid choice: 'everything'"),
        (["--peers", "fa1"], "invalid choice: 'fa1'"),
        (["--match", "["], "it is [, no regular expression: unterminated"),
        (["--rounds", "0"], "it is 0; it has to be a number from 1 on"),
        (["--peers", "fa2", "--only-ours"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", *wrong])
        assert said in capsys.readouterr().err


def test_flash_attn_4_gets_the_blocks(monkeypatch):
    fields = ["mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size"]
    module = types.ModuleType("flash_attn.cute.block_sparsity")
    module.BlockSparseTensorsTorch = namedtuple("BlockSparseTensorsTorch", fields)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("flash_attn.cute", "flash_attn"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    cell = small("blocks", "dense", seqlen=512, batch=2, density=0.3)
    options = contestants._block_options(Problem(cell, dtype=torch.bfloat16, device="cpu"))
    for lists, blocks in zip(options.values(), (cell.blocks, cell.blocks.mT), strict=True):
        assert lists.block_size == (128, 128)
        assert not lists.mask_block_cnt.any()
        for head, row in itertools.product(range(cell.num_heads), range(4)):
            count = lists.full_block_cnt[0, head, row]
            seen = lists.full_block_idx[0, head, row, :count].long()
            assert torch.equal(seen, blocks[head, row].nonzero()[:, 0])
