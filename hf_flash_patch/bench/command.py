"""`hfp bench`: its arguments, and the run from the first check to the figure."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..env import environment
from ..errors import UnsupportedKernelError
from ..ops.backends import kernel_obstacle
from . import results
from .cells import GROUPS, Cell, cells
from .contestants import OURS, PEERS, YARDSTICKS, Contestant, find_peer, ours
from .figure import check_figure, save_figure
from .measure import Settings, measure
from .results import Result, read_csv, write_csv

DESCRIPTION = (
    "attention against PyTorch's kernels, FlexAttention and the flash-attn packages that are "
    "installed"
)
EPILOG = (
    "Everyone's results are checked before they are timed; a peer that does not serve a cell, or "
    "is wrong there, leaves its place empty. Rates are of visible work: TFLOP/s (a causal mask "
    "leaves half, backward has 2.5 times the forward), for decode GB/s of K and V. hfp_dense is "
    "ours on sequences of equal length, or without the block mask, at as many tiles; copy is a "
    "copy from memory to memory, bytes read and written."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hfp bench`."""
    groups = [*GROUPS, "all"]
    add = parser.add_argument
    add("--cells", nargs="+", choices=groups, help="groups; default core, or all that are saved")
    add("--match", metavar="REGEX", type=_regex, help="only cells whose name matches")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=list(PEERS),
        help="who to compare with; default all that are installed",
    )
    who.add_argument("--only-ours", action="store_true", help="time nobody else")
    add("--directions", nargs="+", choices=["fwd", "bwd"], default=["fwd", "bwd"])
    add("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    add("--rounds", type=_positive, default=3, help="turns of each contestant; default 3")
    add("--budget", type=float, metavar="SECONDS", help="start no cell after this time")
    add("--csv", type=Path, metavar="FILE", help="save results, after every cell")
    add("--figure", type=Path, metavar="FILE", help="draw results: .svg, .png or .pdf")
    add("--from-csv", type=Path, metavar="FILE", help="measure nothing, take saved results")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Runs the command.

    Args:
        arguments: as parsed.
        say: is given each line of the output when it is known.

    Raises:
        UnsupportedKernelError: no GPU that the compiled kernels serve.
        ImportError, ValueError, OSError: the figure or a file cannot be made or read.
        RuntimeError: our result is wrong, or there is none.
    """
    start = time.monotonic()
    if arguments.figure:
        check_figure(arguments.figure)
    for path in filter(None, (arguments.csv, arguments.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.from_csv:
        measured = [r for r in read_csv(arguments.from_csv) if _chosen(r.cell, arguments)]
        measured = [r for r in measured if r.direction in arguments.directions]
        names = [n for n in dict.fromkeys(r.contestant for r in measured) if n not in YARDSTICKS]
        say(results.header(names))
        for key, entries in results.by_cell(measured).items():
            say(results.line(key, entries, names))
    else:
        wanted = [c for c in cells(arguments.cells or ["core"]) if _chosen(c, arguments)]
        measured = _measure(wanted, arguments, say, start)
    for text in results.summary(measured):
        say(text)
    if arguments.figure:
        save_figure(measured, arguments.figure)


def _measure(
    wanted: list[Cell], arguments: argparse.Namespace, say: Callable[[str], None], start: float
) -> list[Result]:
    dtype = getattr(torch, arguments.dtype)
    machine = environment()
    if obstacle := _obstacle(dtype):
        raise UnsupportedKernelError(f"our compiled kernels are needed: {obstacle}.")
    contestants = [ours(machine.packages["hf_flash_patch"] or "")]
    say(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{arguments.dtype}, {arguments.rounds} rounds"
    )
    for name in () if arguments.only_ours else dict.fromkeys(arguments.peers):
        peer = find_peer(name)
        if isinstance(peer, Contestant):
            contestants.append(peer)
            say(f"{name}: {peer.version}")
        else:
            say(f"{name}: absent, {peer}")

    settings = Settings(dtype, tuple(arguments.directions), arguments.rounds)
    names = [contestant.name for contestant in contestants]
    say(results.header(names))
    measured: list[Result] = []
    noted: set[str] = set()
    for done, cell in enumerate(wanted):
        if arguments.budget and time.monotonic() - start > arguments.budget:
            say(f"The budget of {arguments.budget:g} s is spent: {len(wanted) - done} cells left.")
            break

        def note(text: str, cell: Cell = cell) -> None:
            if text not in noted:
                noted.add(text)
                say(f"{cell.name}: {text}")

        found = measure(cell, contestants, settings, note)
        measured += found
        if arguments.csv:
            write_csv(arguments.csv, measured)
        for key, entries in results.by_cell(found).items():
            say(results.line(key, entries, names))
    say(f"{OURS}: {len(results.by_cell(measured))} lines in {time.monotonic() - start:.0f} s")
    return measured


def _obstacle(dtype: torch.dtype) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return kernel_obstacle(device=torch.device("cuda"), dtype=dtype, head_dim=128)


def _chosen(cell: Cell, arguments: argparse.Namespace) -> bool:
    """Whether group and name are asked for."""
    named = arguments.match is None or arguments.match.search(cell.name) is not None
    groups = arguments.cells or ["all"]
    return named and ("all" in groups or cell.group in groups)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"it is {text}, no regular expression: {error}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}; it has to be a number from 1 on")
    return int(text)
