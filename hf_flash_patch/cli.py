"""The command `hfp`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .env import environment


def _env(arguments: argparse.Namespace) -> int:
    print(environment())
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
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen)
