"""The command `hfp`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

from . import masks
from .bench import command as bench
from .context import command as extend
from .env import environment
from .masks.block_mask import FULL_TILE


def _env(arguments: argparse.Namespace) -> int:
    print(environment())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    try:
        bench.run(arguments, partial(print, flush=True))
    except (ImportError, OSError, ValueError) as error:
        print(f"hfp bench: {error}", file=sys.stderr)
        return 1
    return 0


def _extend(arguments: argparse.Namespace) -> int:
    try:
        extend.run(arguments, print)
    except (ImportError, OSError, ValueError) as error:
        print(f"hfp extend: {error}", file=sys.stderr)
        return 1
    return 0


def _mask(arguments: argparse.Namespace) -> int:
    try:
        pattern = masks.parse(arguments.pattern)
        start = time.perf_counter()
        mask = pattern.block_mask(arguments.seqlen, block_size=arguments.block_size)
        seconds = time.perf_counter() - start
        picture = pattern.plot(arguments.seqlen, arguments.plot)
    except (ImportError, OSError, ValueError) as error:
        print(f"hfp mask: {error}", file=sys.stderr)
        return 1
    full = int((mask.row_entries[:, 1] == FULL_TILE).sum())
    blocks = len(mask.row_entries)
    print(pattern)
    print(f"{mask.density():.3%} of {arguments.seqlen} x {arguments.seqlen} pairs", end="")
    print(f" in {mask.num_heads} lists" if mask.num_heads > 1 else "")
    print(f"{blocks} blocks of {mask.block_size}: {full} full, {blocks - full} with a tile")
    print(f"{len(mask.tiles)} tiles that differ; lowered in {seconds:.3f} s")
    # A character is about twice as high as wide.
    print("\n" + "".join(cell * 2 if cell != "\n" else cell for cell in picture))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: as on the command line, without the program's name; None takes them from there.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(prog="hfp", description="hf_flash_patch on the command line.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "versions, GPUs, compiled head dims, what is missing and how to get it"
    commands.add_parser("env", help=text, description=text).set_defaults(run=_env)
    parser_of_bench = commands.add_parser(
        "bench", help=bench.DESCRIPTION, description=bench.DESCRIPTION, epilog=bench.EPILOG
    )
    bench.add_arguments(parser_of_bench)
    parser_of_bench.set_defaults(run=_bench)
    parser_of_extend = commands.add_parser(
        "extend", help=extend.DESCRIPTION, description=extend.DESCRIPTION
    )
    extend.add_arguments(parser_of_extend)
    parser_of_extend.set_defaults(run=_extend)
    text = "a pattern's density, blocks and picture"
    of_mask = commands.add_parser("mask", help=text, description=text)
    of_mask.add_argument(
        "pattern", help="such as 'causal() & (sliding_window(4096) | global_tokens(64))'"
    )
    of_mask.add_argument("--seqlen", type=int, default=4096, help="tokens; default 4096")
    of_mask.add_argument("--block-size", type=int, default=128, help="tokens; default 128")
    of_mask.add_argument("--plot", metavar="FILE", help="picture: .svg, or matplotlib's formats")
    of_mask.set_defaults(run=_mask)
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen)
