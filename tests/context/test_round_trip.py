"""Extended, saved, and loaded by stock transformers in a process that never imports us."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

import hf_flash_patch as hfp
from hf_flash_patch.context import plan_extension
from hf_flash_patch.context.scaling import METHODS as ROPE
from hf_flash_patch.context.tables import METHODS as POSITIONS
from hf_flash_patch.families import FAMILIES
from tests.integration.tiny import VOCAB_SIZE, tiny_model

OLD, NEW = 64, 200
LENGTHS = (20, OLD, NEW)  # ascending: dynamic frequencies follow the longest input so far

# With their heads; the other members of the families without.
HEADS = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "bart": "AutoModelForSeq2SeqLM",
    "modernbert": "AutoModelForMaskedLM",
}
LAYERS = ["sliding_attention", "full_attention"]
THETA = {"rope_theta": 10000.0}
OVERRIDES = {
    "gemma3_text": {"layer_types": LAYERS},
    # Half of each head; of the tiny head_dim, a quarter is one frequency, which dynamic divides by.
    "gpt_neox": {
        "rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}
    },
    # Scaled as they came: how far each goes on is the test.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "rope_parameters": {
            **THETA,
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "mistral": {
        "rope_parameters": {
            **THETA,
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            **THETA,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.25, 1.5, 1.75],
            "long_factor": [1.0, 1.5, 2.0, 2.5],
        },
    },
    "qwen2": {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 1.5}},
    "olmo": {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 2.0}},
}
NATIVE = ("deepseek_v3", "mistral", "phi3", "qwen2", "olmo")
NESTED = ("gemma3_text", "modernbert")
DICTS = {
    "llama-dict": ("llama", {"rope_type": "yarn", "beta_fast": 16.0}),
    "llama-theta": ("llama", {"rope_type": "default", "rope_theta": 5e5}),
    "gemma3-dict": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
}


def _cases():
    """name -> (auto class, model type, arguments of extend_context)."""
    cases = {}
    for family in FAMILIES:
        if family.positions != "learned":
            continue
        # The other members: test_members.
        model_type = family.model_types[0]
        for method in POSITIONS:
            auto = HEADS.get(model_type, "AutoModel")
            cases[f"{model_type}-{method}"] = (auto, model_type, {"positions": method})
    for model_type in ("llama", "gpt_neox", *NESTED):
        auto = HEADS.get(model_type, "AutoModelForCausalLM")
        for method in ROPE:
            if not (method == "longrope" and model_type in NESTED):
                cases[f"{model_type}-{method}"] = (auto, model_type, {"rope": method})
    for model_type in NATIVE:
        cases[f"{model_type}-native"] = ("AutoModelForCausalLM", model_type, {"rope": "auto"})
    for name, (model_type, rope) in DICTS.items():
        cases[name] = ("AutoModelForCausalLM", model_type, {"rope": rope})
    return cases


CASES = _cases()

SCRIPT = """
import json, sys, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for name, (auto, lengths) in json.load(open("cases.json")).items():
    model = getattr(transformers, auto).from_pretrained(name, attn_implementation="eager").eval()
    saved = torch.load(f"{name}/logits.pt")
    for length in lengths:
        with torch.no_grad():
            logits = model(**torch.load(f"inputs{length}.pt")[auto])[0]
        if not torch.equal(logits, saved[length]):
            print(name, length, (logits - saved[length]).abs().max().item())
assert "hf_flash_patch" not in sys.modules
print("done", end="")
"""


def _inputs():
    found = {}
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB_SIZE - 9, (1, length))
        found[length] = dict.fromkeys(("AutoModel", *HEADS.values(), "AutoModelForCausalLM"))
        for auto in found[length]:
            found[length][auto] = {"input_ids": ids}
        found[length]["AutoModelForSeq2SeqLM"]["decoder_input_ids"] = ids.flip(1)
    return found


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Every case extended and saved: the folder, and name -> (report, which lengths stayed)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("extended")
    inputs, found, todo = _inputs(), {}, {}
    for length, by_auto in inputs.items():
        torch.save(by_auto, folder / f"inputs{length}.pt")
    for name, (auto, model_type, arguments) in CASES.items():
        overrides = copy.deepcopy(OVERRIDES.get(model_type, {}))
        model = tiny_model(getattr(transformers, auto), model_type, **overrides)
        limit = plan_extension(model, NEW).report.before
        before = {n: _logits(model, inputs[n][auto]) for n in LENGTHS if n <= limit}
        report = hfp.extend_context(model, NEW, **arguments)
        after = {n: _logits(model, inputs[n][auto]) for n in LENGTHS}
        model.save_pretrained(folder / name)
        torch.save(after, folder / name / "logits.pt")
        found[name] = report, {n: torch.equal(before[n], after[n]) for n in before}
        todo[name] = auto, LENGTHS
    (folder / "cases.json").write_text(json.dumps(todo))
    return folder, found


def test_stock_transformers_computes_the_same_bits(extended):
    folder, found = extended
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done", done.stdout
    assert len(found) == len(CASES) > 50


@pytest.mark.parametrize("name", CASES)
def test_old_lengths_stay_where_the_report_says_so(extended, name):
    report, stayed = extended[1][name]
    assert stayed and report.after == NEW
    promised = min(part.exact_up_to for part in report.parts)
    for length, same in stayed.items():
        assert same or length > promised
    method = report.parts[0].method
    if method in ("tile", "hierarchical", "dynamic", "longrope") and "native" not in name:
        assert promised == report.before
    if method in ("interpolate", "linear", "yarn", "llama3", "default"):
        assert promised == 0 and not any(stayed.values())
