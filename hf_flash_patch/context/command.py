"""`hfp extend`: a checkpoint in, the extended checkpoint out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from ..errors import ContextExtensionError
from . import scaling, tables
from .extend import extend_context

DESCRIPTION = "extend the maximum context of a checkpoint; stock transformers loads the result"

# A tokenizer of any class has one of these; what transformers saves has the first.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command."""
    parser.add_argument("path", help="folder or hub name of the checkpoint")
    parser.add_argument("--max-length", type=int, required=True, metavar="N", help="tokens")
    parser.add_argument(
        "--rope",
        default="auto",
        metavar="METHOD",
        help=f"for RoPE: auto, {', '.join(scaling.METHODS)}, or rope_parameters as JSON",
    )
    parser.add_argument(
        "--positions",
        default="auto",
        metavar="METHOD",
        help=f"for learned positions: auto, {', '.join(tables.METHODS)}",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder to write")


def run(arguments: argparse.Namespace, say: Callable[[str], Any]) -> None:
    """Loads, extends, saves; with the tokenizer, if the checkpoint has one.

    Args:
        arguments: as `add_arguments` declares them.
        say: takes the report.

    Raises:
        ContextExtensionError: as `extend_context`, or the folder to write has something in it.
        OSError: the checkpoint cannot be read, or the folder cannot be written.
        ImportError: its tokenizer needs a package that is not installed.
    """
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ContextExtensionError(
            f"--out {out} is not empty; name a folder that is, or a new one."
        )
    if arguments.path.startswith(("/", ".")) and not Path(arguments.path).exists():
        raise ContextExtensionError(f"there is no {arguments.path}.")  # a hub's name has neither
    model = _model_class(arguments.path).from_pretrained(arguments.path, dtype="auto")
    tokenizer = _tokenizer(arguments.path)
    report = extend_context(
        model,
        arguments.max_length,
        rope=_rope(arguments.rope),
        positions=arguments.positions,
        tokenizer=tokenizer,
    )
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    say(report.text(("written", str(out))))


def _model_class(path: str) -> Any:
    """The class that the checkpoint was saved from: with its head, that is."""
    names = AutoConfig.from_pretrained(path).architectures or ()
    found = (getattr(transformers, name, None) for name in names)
    return next((cls for cls in found if cls is not None), AutoModel)


def _tokenizer(path: str) -> Any:
    """The checkpoint's; None where it has no file of one: transformers would make up an empty
    one."""
    has_one = any(_has(path, name) for name in _TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(path) if has_one else None


def _has(path: str, name: str) -> bool:
    try:
        return cached_file(path, name) is not None
    except OSError:
        return False


def _rope(given: str) -> str | dict[str, Any]:
    if not given.startswith("{"):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ContextExtensionError(f"--rope {given} is not JSON: {error}.") from error
