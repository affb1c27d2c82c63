"""The command `hfp`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from .bench import command as bench
from .context import command as extend
from .env import environment


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
    except (OSError, ValueError) as error:
        print(f"hfp extend: {error}", file=sys.stderr)
        return 1
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
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen)
