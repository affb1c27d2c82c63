"""Does a patched model say what the unpatched one says?"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize, pad
from transformers import PreTrainedModel

import hf_flash_patch as hfp

from .checkpoints import Checkpoint

LONGEST = 512  # tokens compared
PROMPTS = (33, 97, 65, 52, 85)  # characters of each function to continue


@dataclass(frozen=True)
class Result:
    """What came of one model.

    Attributes:
        name: of the checkpoint.
        report: what `hfp.patch` reported.
        compared: "logits" or "hidden states".
        patched_error: largest |patched - eager|.
        sdpa_error: largest |sdpa - eager|: how far apart PyTorch's own two are.
        allowed_error: bound on `patched_error`.
        use: what the model is for: "texts" or "embeddings".
        verdict: how those compare, in a few words.
        same: whether they are as good as equal.
        prompt: what the patched model was given; empty for encoders.
        continuation: what it made of it.
    """

    name: str
    report: str
    compared: str
    patched_error: float
    sdpa_error: float
    allowed_error: float
    use: str
    verdict: str
    same: bool
    prompt: str = ""
    continuation: str = ""

    @property
    def claims(self) -> dict[str, bool]:
        """What was verified, and whether it held."""
        close = (
            f"{self.compared} {self.patched_error:.1e} from eager, allowed {self.allowed_error:.1e}"
        )
        return {
            close: self.patched_error <= self.allowed_error,
            f"{self.use}: {self.verdict}": self.same,
        }


def compare(checkpoint: Checkpoint, device: str, dtype: str, new_tokens: int) -> Result:
    """Compares a checkpoint, patched, with itself under eager and sdpa, on padded batches.

    Args:
        checkpoint: the model.
        device: where.
        dtype: name of a torch dtype.
        new_tokens: tokens to generate greedily, for a decoder.
    """
    with torch.no_grad():
        compare_one = compare_decoder if checkpoint.generates else compare_encoder
        return compare_one(checkpoint, device, dtype, new_tokens)


def compare_decoder(checkpoint: Checkpoint, device: str, dtype: str, new_tokens: int) -> Result:
    """`compare` by logits and greedy texts."""
    tokenizer = checkpoint.tokenizer()
    texts = encode(checkpoint, functions(), device, side="left")
    starts = [text[:size] for text, size in zip(functions(), PROMPTS, strict=True)]
    prompts = encode(checkpoint, starts, device, side="left")

    def answers(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        tokens = model.generate(**prompts, do_sample=False, max_new_tokens=new_tokens)
        return real_tokens(model(**texts).logits, texts), tokens

    sdpa = real_tokens(checkpoint.load("sdpa", device, dtype)(**texts).logits, texts)
    model = checkpoint.load("eager", device, dtype)
    eager, eager_tokens = answers(model)
    with hfp.patch(model) as patch:
        ours, our_tokens = answers(model)

    allowed = allowed_error(eager, sdpa)
    same, verdict = same_texts(model, prompts, eager_tokens, our_tokens, allowed)
    first = prompts["input_ids"].shape[1]
    return Result(
        name=checkpoint.name,
        report=str(patch),
        compared="logits",
        patched_error=distance(ours, eager),
        sdpa_error=distance(sdpa, eager),
        allowed_error=allowed,
        use="texts",
        verdict=verdict,
        same=same,
        prompt=tokenizer.decode(our_tokens[0, :first], skip_special_tokens=True),
        continuation=tokenizer.decode(our_tokens[0, first:], skip_special_tokens=True),
    )


def compare_encoder(checkpoint: Checkpoint, device: str, dtype: str, new_tokens: int) -> Result:
    """`compare` by hidden states and sentence embeddings; generates nothing."""
    batch = encode(checkpoint, functions() + SENTENCES, device, side="right")

    def answers(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model(**batch).last_hidden_state
        return real_tokens(hidden, batch), embeddings(hidden, batch)

    sdpa, sdpa_embeddings = answers(checkpoint.load("sdpa", device, dtype))
    model = checkpoint.load("eager", device, dtype)
    eager, eager_embeddings = answers(model)
    with hfp.patch(model) as patch:
        ours, our_embeddings = answers(model)

    difference = distance(our_embeddings, eager_embeddings)
    allowed = allowed_error(eager_embeddings, sdpa_embeddings)
    return Result(
        name=checkpoint.name,
        report=str(patch),
        compared="hidden states",
        patched_error=distance(ours, eager),
        sdpa_error=distance(sdpa, eager),
        allowed_error=allowed_error(eager, sdpa),
        use="embeddings",
        verdict=f"{difference:.1e} from eager, allowed {allowed:.1e}",
        same=difference <= allowed,
    )


SENTENCES = [
    "Attention compares every token with every other one.",
    "Short.",
    "The kernel keeps a tile of the keys in shared memory.",
    "Der Speicher wächst linear mit der Länge der Folge.",
]


def functions() -> list[str]:
    """Five functions of the standard library, of different lengths."""
    functions = (textwrap.wrap, textwrap.fill, textwrap.indent, textwrap.shorten, textwrap.dedent)
    return [inspect.getsource(function) for function in functions]


def encode(checkpoint: Checkpoint, texts: list[str], device: str, side: str):
    """Tokens of texts, cut at `LONGEST` and padded on one side."""
    batch = checkpoint.tokenizer()(
        texts,
        padding=True,
        padding_side=side,
        truncation=True,
        max_length=min(LONGEST, checkpoint.max_context or LONGEST),
        return_tensors="pt",
    )
    if checkpoint.generates:
        batch.pop("token_type_ids", None)
    return batch.to(device)


def real_tokens(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, seqlen, size) without padding: (tokens, size), fp32."""
    return hidden[batch["attention_mask"].bool()].float()


def embeddings(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the real tokens, of length 1: (batch, seqlen, size) to (batch, size), fp32."""
    weights = batch["attention_mask"].unsqueeze(-1).float()
    return normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (one - other).abs().max().item()


def allowed_error(eager: torch.Tensor, sdpa: torch.Tensor) -> float:
    """Twice what PyTorch's own two differ by, and some roundings of fp32 where that is tiny."""
    return 2 * distance(eager, sdpa) + 1e-6 * eager.abs().max().item()


def same_texts(
    model: PreTrainedModel,
    prompts: dict[str, torch.Tensor],
    eager: torch.Tensor,
    ours: torch.Tensor,
    allowed: float,
) -> tuple[bool, str]:
    """Whether greedy texts are equal, or part where the eager model itself is undecided.

    In bf16 the two best tokens often have the same logit, and then either is right.

    Args:
        model: the eager model.
        prompts: what both were given.
        eager: its tokens (batch, seqlen).
        ours: the patched model's.
        allowed: logits nearer than this are a tie.

    Returns:
        the verdict, and a few words.
    """
    width = max(eager.shape[1], ours.shape[1])
    eager, ours = (pad(tokens, (0, width - tokens.shape[1]), value=-1) for tokens in (eager, ours))
    ties = 0
    for row, (one, other) in enumerate(zip(eager, ours, strict=True)):
        if torch.equal(one, other):
            continue
        at = int((one != other).nonzero()[0])
        mask = pad(
            prompts["attention_mask"][row], (0, at - prompts["attention_mask"].shape[1]), value=1
        )
        logits = model(input_ids=one[None, :at], attention_mask=mask[None]).logits[0, -1].float()
        if (logits[one[at]] - logits[other[at]]).abs() > allowed:
            return False, f"number {row + 1} of {len(eager)} differs from token {at} on"
        ties += 1
    if ties:
        return True, f"{len(eager) - ties} of {len(eager)} equal, the others up to a tie"
    return True, f"{len(eager)} of {len(eager)} equal"
