"""The table of families against transformers' own models, and the models that are refused."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_flash_patch as hfp
from hf_flash_patch.families import FAMILIES, UNBOUNDED, family_of
from tests.integration.tiny import tiny_config, tiny_model

FIRST_MEMBERS = {family.name: family.model_types[0] for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_row_fits_its_first_member(family):
    model = tiny_model(AutoModel, family.model_types[0])
    assert family_of(model.config) is family
    owners = [m for _, m in model.named_modules() if _has(m, family.table)]
    assert owners
    limit = getattr(model.config, family.length)
    for owner in owners if family.positions == "learned" else ():
        table = owner.get_submodule(family.table)
        assert len(table.weight) == limit + (table.offset if family.reserved == "offset" else 0)
        assert (table.padding_idx is not None) == (family.reserved == "padding_idx")
        for path in family.buffers:
            parent, _, name = path.rpartition(".")
            assert getattr(owner.get_submodule(parent), name).shape[-1] == limit
    if family.fp32_scores:
        assert hasattr(model.config, family.fp32_scores)


def _has(module, path):
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def test_every_known_model_type_exists_and_stands_in_one_row():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    types += [model_type for members in UNBOUNDED.values() for model_type in members]
    assert len(types) == len(set(types))
    assert [t for t in types if t not in CONFIG_MAPPING] == []


def test_unknown_families_are_none():
    assert family_of(tiny_config("vit")) is None
    assert family_of(object()) is None


REFUSED = {
    "bloom": ("AutoModelForCausalLM", "BloomAttention", {}),
    "falcon": ("AutoModelForCausalLM", "FalconAttention", {}),
    "mpt": ("AutoModelForCausalLM", "MptAttention", {}),
    "gptj": ("AutoModelForCausalLM", "GPTJAttention", {"rotary_dim": 4}),
    "codegen": ("AutoModelForCausalLM", "CodeGenAttention", {"rotary_dim": 4}),
    "gpt_neo": ("AutoModelForCausalLM", "GPTNeo", {"attention_types": [[["global"], 2]]}),
    "xglm": ("AutoModelForCausalLM", "XGLMAttention", {}),
    "openai-gpt": ("AutoModelForCausalLM", "Attention", {}),
    "xlnet": ("AutoModelForCausalLM", "XLNetRelativeAttention", {}),
    "mamba": ("AutoModelForCausalLM", "has no attention", {}),
    "deberta": ("AutoModelForMaskedLM", "DisentangledSelfAttention", {}),
    "deberta-v2": ("AutoModelForMaskedLM", "DisentangledSelfAttention", {}),
    "mpnet": ("AutoModelForMaskedLM", "MPNetSelfAttention", {}),
    "longformer": (
        "AutoModelForMaskedLM",
        "LongformerSelfAttention",
        {"attention_window": [4, 4]},
    ),
    "big_bird": ("AutoModelForMaskedLM", "BigBird", {"attention_type": "original_full"}),
    "roformer": ("AutoModelForMaskedLM", "RoFormerSelfAttention", {}),
    "ibert": ("AutoModelForMaskedLM", "IBertSelfAttention", {}),
    "convbert": ("AutoModelForMaskedLM", "ConvBertSelfAttention", {}),
    "fnet": ("AutoModelForMaskedLM", "has no attention", {}),
    "hy_v4": ("AutoModelForCausalLM", "another path for names", {}),
    "glm_moe_dsa": ("AutoModelForCausalLM", "another path for names", {}),
}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_by_name_and_left_unchanged(model_type):
    auto_name, reason, overrides = REFUSED[model_type]
    auto = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoModelForMaskedLM": AutoModelForMaskedLM,
    }[auto_name]
    with torch.device("meta"):
        model = auto.from_config(tiny_config(model_type, **overrides))
    before = model.config._attn_implementation
    with pytest.raises(hfp.UnsupportedModelError, match=reason) as caught:
        hfp.patch(model)
    assert type(model).__name__ in str(caught.value)
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "hfp")
