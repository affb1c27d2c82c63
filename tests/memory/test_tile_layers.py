"""Layers in tiles: the same step, one tile's activations, dropout replayed."""

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.eomt.modeling_eomt import EomtLayerNorm2d
from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2LayerNorm

import hf_flash_patch as hfp
from hf_flash_patch.memory import chunked_loss, offload_checkpoints, tile_layers
from hf_flash_patch.memory.tiling import tiled
from tests.integration.tiny import VOCAB_SIZE, logits_and_gradients, token_ids

from .conftest import FAMILIES, SEQLEN, Largest, assert_same_step, batch, model_of, step

WIDTH = 37  # of the MLPs, and of nothing else
FOUND = {
    "llama": "2 MLPs and 5 norms",
    "gpt2": "2 MLPs and 5 norms",
    "bert": "2 MLPs and 2 norms",
    "gemma2": "2 MLPs and 9 norms",
    "qwen3": "2 MLPs and 5 norms",
    "olmo2": "2 MLPs and 5 norms",
    "gpt_neox": "2 MLPs and 5 norms",
    "phi": "2 MLPs and 3 norms",
    "nemotron": "2 MLPs and 5 norms",  # LayerNorm1P
}
# Whose layers have their MLP in a method, with what it takes to build and to call them.
CHUNKED: dict[str, tuple[dict, dict]] = {
    family: ({}, {})
    for family in (
        *("bert", "bert-generation", "big_bird", "camembert", "canine", "convbert"),
        *("data2vec-text", "electra", "ernie", "esm", "fnet", "git", "layoutlm", "luke"),
        *("markuplm", "megatron-bert", "mra", "nystromformer", "rembert", "roberta"),
        *(
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "splinter",
            "tapas",
            "visual_bert",
            "xlm-roberta",
            "xlm-roberta-xl",
            "yoso",
        ),
    )
}
BOXES = {"bbox": torch.zeros(2, SEQLEN, 4, dtype=torch.long)}
CHUNKED["bros"] = {"hidden_size": 64}, {"bbox": torch.rand(2, SEQLEN, 8)}
CHUNKED["layoutlmv3"] = {"coordinate_size": 5, "shape_size": 6, "visual_embed": False}, BOXES
CHUNKED["lilt"] = {"hidden_size": 48}, BOXES
CHUNKED["xmod"] = {"default_language": "en_XX"}, {}


def wide(family, **more):
    return model_of(
        family,
        FAMILIES.get(family, AutoModelForCausalLM),
        **({"n_inner": WIDTH} if family == "gpt2" else {"intermediate_size": WIDTH}),
        **more,
    )


@pytest.mark.parametrize("family", FOUND)
def test_same_step(family):
    model = wide(family)
    expected = step(model)
    with tile_layers(model, tile=7) as technique, Largest(WIDTH) as largest:
        assert FOUND[family] in str(technique)
        actual = step(model)
    assert_same_step(actual, expected)
    assert largest.rows <= 32  # weights
    with Largest(WIDTH) as largest:
        assert_same_step(step(model), expected)
    assert largest.rows == 48


@pytest.mark.parametrize("family", CHUNKED)
def test_mlps_in_a_method(family):
    """Its norm may be the layer's own, before the MLP or behind it."""
    overrides, inputs = CHUNKED[family]
    model = model_of(family, AutoModel, **overrides)

    def forward():
        return model(input_ids=token_ids(2, SEQLEN), **inputs)[0]

    expected = logits_and_gradients(forward, model, None)
    with tile_layers(model, tile=7):
        assert_same_step(logits_and_gradients(forward, model, None), expected)


def test_what_is_only_named_after_a_norm():
    """Parts of RobertaPreLayerNorm, which take more than a tensor; and norms of images."""
    model = model_of("roberta-prelayernorm", AutoModelForMaskedLM)
    with tile_layers(model) as technique:
        assert "2 MLPs and 3 norms" in str(technique)
        assert "forward" not in vars(model.roberta_prelayernorm.encoder)
    owner = torch.nn.Module()
    owner.norm = EomtLayerNorm2d(4)
    owner.other = GotOcr2LayerNorm(4, data_format="channels_first")
    model.owner = owner
    with tile_layers(model):
        assert "forward" not in vars(owner.norm) and "forward" not in vars(owner.other)


def test_parameters_that_a_function_leaves_out():
    """They may be all that is trained: a Q-Former has MLPs for queries beside those for text."""
    owner = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    owner[0].requires_grad_(False)
    x = torch.randn(1, 6, 4)
    (tiled(owner[0], owner, x, 2) + owner[1](x)).sum().backward()
    assert owner[0].weight.grad is None and owner[1].weight.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_all_techniques_at_once(family):
    """And patched, with LoRA: everything that an example may switch on."""
    model = wide(family)
    hfp.patch(model)
    targets = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "bert": "all-linear"}
    exclude = ["decoder"] if family == "bert" else None
    config = LoraConfig(r=4, target_modules=targets[family], exclude_modules=exclude)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = step(model)
    assert expected[1]
    techniques = [chunked_loss(model, chunk=5), offload_checkpoints(model, min_bytes=0)]
    techniques.append(tile_layers(model, tile=7))
    with Largest(VOCAB_SIZE) as largest:
        assert_same_step(step(model), expected)
    assert largest.rows <= 32
    for technique in reversed(techniques):
        technique.restore()
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same_step(step(model), expected)


class Noise(torch.nn.Module):
    """Dropout by a function, as in the MLPs of Starcoder 2."""

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("dropout", [torch.nn.Dropout(0.5), Noise()])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_is_replayed(dropout, reentrant):
    """The gradient is that of the loss that was computed: compared with finite differences."""
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.GELU(), dropout, torch.nn.Linear(9, 6)
    ).double()
    x = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)

    def loss(x):
        torch.manual_seed(5)
        if reentrant is None:
            return tiled(module, module, x, 3).square().sum()
        return (
            checkpoint(lambda x: tiled(module, module, x, 3), x, use_reentrant=reentrant)
            .square()
            .sum()
        )

    random = torch.get_rng_state()
    value = loss(x)
    state = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(random, state)
    for tensor in (x, *module.parameters()):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += 1e-6 * direction
            slope = (loss(x) - value) / 1e-6
            tensor -= 1e-6 * direction
        assert slope.item() == pytest.approx((tensor.grad * direction).sum().item(), rel=1e-3)


def test_a_checkpoint_does_not_recompute_the_last_module():
    module = torch.nn.Linear(6, 6)
    calls = []

    def counted(x):
        calls.append(x.shape[1])
        return module(x)

    x = torch.randn(1, 10, 6, requires_grad=True)
    out = x + checkpoint(lambda x: x + tiled(counted, module, x * 2, 5), x, use_reentrant=False)
    out.sum().backward()
    assert calls == [5, 5, 5, 5]  # forward, backward; a recomputation would make it six


def test_low_precision():
    """Under autocast, and in bf16 whose gradients are summed in fp32."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    x = torch.randn(1, 640, 16)

    def gradient(tile, dtype=torch.float32, autocast=False):
        owner = copy.deepcopy(module).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tiled(owner, owner, x.to(dtype), tile).float().square().mean().backward()
        assert owner[0].weight.grad.dtype == dtype
        return owner[0].weight.grad.double()

    exact = gradient(640, torch.float64)
    for setting in ({"dtype": torch.bfloat16}, {"autocast": True}):
        theirs, ours = (gradient(tile, **setting) for tile in (640, 10))
        assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def test_compiled():
    """All techniques in a compiled model; each breaks the graph and stays exact."""
    model = wide("llama", num_hidden_layers=1)
    hfp.patch(model)
    expected = step(model)
    chunked_loss(model, chunk=5)
    offload_checkpoints(model, min_bytes=0)
    tile_layers(model, tile=7)
    loss, found = step(torch.compile(model, backend="aot_eager"))
    gradients = {name.removeprefix("_orig_mod."): found[name] for name in found}
    assert_same_step((loss, gradients), expected)


def test_replicas_of_data_parallel_are_refused():
    model = model_of("llama")
    technique = tile_layers(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(hfp.UnsupportedModelError, match="has tile_layers and .*DataParallel"):
        replica(**batch())
    technique.restore()
    model._replicate_for_data_parallel()(**batch())


def test_evaluation_and_copies():
    model = wide("llama").eval()
    with torch.no_grad():
        expected = step_loss(model)
        with tile_layers(model, tile=7):
            copied = copy.deepcopy(model)
            pickled = pickle.loads(pickle.dumps(model))
            assert isinstance(pickled.model.layers[0].mlp.forward, partial)
            torch.testing.assert_close(step_loss(pickled), expected)
            torch.testing.assert_close(step_loss(model), expected)
            model.model.layers[0].mlp.up_proj.weight.zero_()
            torch.testing.assert_close(step_loss(copied), expected)
            assert (step_loss(model) - expected).abs() > 1e-6


@pytest.mark.parametrize("family, whole", [("llama", "mlp"), ("gpt2", "mlp"), ("bert", "layer.0")])
def test_zero_3_is_told_to_gather_them_whole(family, whole):
    """By deepspeed.utils.set_z3_leaf_module's mark, which goes with the technique."""
    model = wide(family)
    with tile_layers(model, tile=7):
        marked = [name for name, m in model.named_modules() if getattr(m, "_z3_leaf", False)]
        assert any(name.endswith(whole) for name in marked)
    assert not any("_z3_leaf" in vars(module) for module in model.modules())


def step_loss(model):
    return model(**batch()).loss


def test_the_backward_runs_once():
    module = torch.nn.Linear(4, 4)
    loss = tiled(module, module, torch.randn(1, 6, 4), 2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it can run once"):
        loss.backward()


def test_what_it_is_not_for():
    with pytest.raises(ValueError, match="tile=0"):
        tile_layers(model_of("llama"), tile=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_mixtures_of_experts(family):
    """Whose class may be named like any MLP."""
    model = model_of(family, AutoModelForCausalLM)
    for _ in range(2):  # as if nothing had been tried
        with pytest.raises(hfp.UnsupportedModelError, match="ForCausalLM has no layers"):
            tile_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("tokens", [4, 6])
def test_results_that_tiles_cannot_make(tokens):
    """Told at any length, not when the first long sequence comes."""
    owner, x = torch.nn.Linear(4, 4), torch.randn(1, tokens, 4)
    for function, what in (
        (lambda part: (owner(part), part), "a tuple"),
        (lambda part: owner(part)[0], r"\(\d, 4\) of \(1, \d, 4\)"),
        (lambda part: owner(part).mean(1, keepdim=True), r"\(1, 1, 4\) of \(1, \d, 4\)"),
    ):
        with pytest.raises(hfp.UnsupportedModelError, match=f"Linear .* {what}"):
            tiled(function, owner, x, 4)


class GatedMLP(torch.nn.Linear):
    """May be given a second tensor, whose tokens a tile would not have."""

    def forward(self, x, gate=None):
        """A product, gated."""
        return super().forward(x) if gate is None else super().forward(x) * gate


def test_what_may_be_given_more_is_left_alone():
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp = GatedMLP(model.config.hidden_size, model.config.hidden_size)
    before = step(model)
    with pytest.raises(hfp.UnsupportedModelError, match="has no layers"):
        tile_layers(model, tile=8)
    assert_same_step(step(model), before)
