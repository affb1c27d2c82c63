"""extend_context(): what it refuses, what follows the extension, and the way back."""

import copy
import json
import pickle
import time

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertModel,
    BloomConfig,
    BloomModel,
    ByT5Tokenizer,
    CLIPVisionConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaModel,
    T5Config,
    T5Model,
)

import hf_flash_patch as hfp
from hf_flash_patch.integration.survey import configs_of
from tests.integration.tiny import tiny_config, tiny_model, token_ids


@pytest.fixture
def llama():
    return tiny_model(AutoModelForCausalLM, "llama")


@pytest.fixture
def bert():
    return tiny_model(AutoModelForMaskedLM, "bert")


def _state(model):
    """Everything an extension could change, comparable, tensors by identity and value."""
    configs = [(id(config), repr(copy.deepcopy(vars(config)))) for config in configs_of(model)]
    modules = []
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        tensors = {**module._parameters, **module._buffers}
        modules.append((name, repr(plain), {k: id(v) for k, v in tensors.items()}))
        modules.append({k: v.clone() for k, v in tensors.items() if v is not None}.__repr__())
    return configs, modules, repr(getattr(model, "generation_config", None))


def _logits(model, length):
    with torch.no_grad():
        return model(token_ids(1, length)).logits


BAD = {
    "zero": ("llama", {"max_length": 0}, "max_length=0; it has to be a positive integer"),
    "negative": ("bert", {"max_length": -8}, "max_length=-8"),
    "bool": ("llama", {"max_length": True}, "max_length=True"),
    "float": ("llama", {"max_length": 128.0}, "max_length=128.0"),
    "shrink": ("llama", {"max_length": 63}, "below the 64 tokens that .*rotary_emb takes already"),
    "shrink table": ("bert", {"max_length": 32}, "below the 64 tokens that .*position_embeddings"),
    "rope": ("llama", {"rope": "ntk"}, "rope='ntk'; allowed are 'auto', 'linear', 'dynamic', 'y"),
    "positions": ("bert", {"positions": "copy"}, "positions='copy'; allowed are 'auto', 'tile'"),
    "rope of a table": (
        "bert",
        {"rope": "yarn"},
        "BertForMaskedLM has learned positions, not RoPE",
    ),
    "table of rope": ("llama", {"positions": "tile"}, "LlamaForCausalLM has RoPE, not learned"),
    "type": ("llama", {"rope": {"rope_type": "x"}}, "'x'.*may be 'default', 'linear'"),
    "no type": ("llama", {"rope": {"factor": 2.0}}, '"rope_type" may be'),
    "key": (
        "llama",
        {"rope": {"rope_type": "linear", "beta_fast": 1}},
        "unknown keys beta_fast; allowed are factor,",
    ),
    "factor": ("llama", {"rope": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
    "factor text": ("llama", {"rope": {"rope_type": "yarn", "factor": "4"}}, "factor='4'"),
    "theta": ("llama", {"rope": {"rope_type": "default", "rope_theta": -1}}, "rope_theta=-1"),
    "type list": ("llama", {"rope": {"rope_type": ["yarn"]}}, r"\['yarn'\].*may be 'default'"),
    "part": (
        "llama",
        {"rope": {"rope_type": "yarn", "partial_rotary_factor": -1}},
        "cannot be made",
    ),
    "missing": ("llama", {"rope": {"rope_type": "longrope"}}, "short_factor=None.*list of 4"),
    "list": (
        "llama",
        {"rope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
        "long_factor=.*list of 4 positive",
    ),
    "llama3": (
        "llama",
        {"rope": {"rope_type": "llama3", "low_freq_factor": 4.0}},
        "high_freq_factor == low_freq_factor",
    ),
    "square": ("bert", {"max_length": 5000, "positions": "hierarchical"}, r"reaches 64² = 4096"),
    "no tokenizer": ("bert", {"tokenizer": object()}, "tokenizer=object; it has to be"),
}


@pytest.mark.parametrize("entry", ["extend_context", "patch"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_the_model_unchanged(name, entry, request):
    fixture, arguments, text = BAD[name]
    model = request.getfixturevalue(fixture)
    before = _state(model)
    with pytest.raises(hfp.ContextExtensionError, match=text):
        getattr(hfp, entry)(model, **{"max_length": 256, **arguments})
    assert _state(model) == before


def test_rope_of_a_model_that_came_scaled():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(AutoModelForCausalLM, "llama", rope_parameters=rope)
    with pytest.raises(hfp.ContextExtensionError, match="trained with linear scaling; allowed"):
        hfp.extend_context(model, 256, rope="yarn")
    report = hfp.extend_context(model, 256)
    assert model.config.rope_parameters["factor"] == 8.0
    assert "trained with linear scaling, which goes on" in report.parts[0].why


def test_longrope_by_layer_type_is_refused():
    model = tiny_model(AutoModelForCausalLM, "gemma3_text")
    with pytest.raises(hfp.ContextExtensionError, match="longrope fails on the second long input"):
        hfp.extend_context(model, 256, rope="longrope")


def test_a_rope_that_the_config_does_not_take_is_refused():
    model = tiny_model(AutoModelForCausalLM, "phi3")
    before = _state(model)
    with pytest.raises(hfp.ContextExtensionError, match="Phi3Config could not be loaded.*longrope"):
        hfp.extend_context(model, 256, rope="yarn")
    assert _state(model) == before
    report = hfp.extend_context(model, 256)
    assert report.parts[0].method == "longrope" and report.parts[0].exact_up_to == 64
    assert report.parts[0].why == "Phi3Config cannot be loaded with yarn scaling"


def test_a_dict_by_layer_type():
    model = tiny_model(AutoModelForCausalLM, "gemma3_text")
    sliding = model.config.rope_parameters["sliding_attention"]
    linear = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(hfp.ContextExtensionError, match="layer types global; .* has sliding_att"):
        hfp.extend_context(model, 256, rope={"full_attention": linear, "global": linear})
    with pytest.raises(hfp.ContextExtensionError, match=r"\['full_attention'\]='yarn'; it has to"):
        hfp.extend_context(model, 256, rope={"full_attention": "yarn"})
    hfp.extend_context(model, 256, rope={"sliding_attention": linear})
    assert model.config.rope_parameters["sliding_attention"] == {**sliding, **linear}
    assert model.config.rope_parameters["full_attention"]["rope_type"] == "default"


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1}
NOTHING = {
    "ALiBi": (BloomModel, BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)),
    "no positions": (MambaModel, MambaConfig(**SMALL)),
    "relative buckets": (T5Model, T5Config(vocab_size=99, d_model=32, num_layers=1)),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_to_extend_is_said(kind):
    cls, config = NOTHING[kind]
    with torch.device("meta"):
        model = cls(config)
    with pytest.raises(hfp.ContextExtensionError, match=f"{cls.__name__} has {kind}: .*nothing to"):
        hfp.extend_context(model, 4096)


def test_unknown_positions_are_named():
    model = tiny_model(AutoModel, "vit")
    with pytest.raises(
        hfp.ContextExtensionError, match=r"ViTModel \(model_type 'vit'\) has neither"
    ):
        hfp.extend_context(model, 4096)
    with pytest.raises(hfp.ContextExtensionError, match="Linear is not a transformers model"):
        hfp.extend_context(torch.nn.Linear(2, 2), 4096)


@pytest.mark.parametrize("fixture", ["llama", "bert"])
def test_under_an_optimizer(fixture, request):
    model = request.getfixturevalue(fixture)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(hfp.ContextExtensionError, match=r"an optimizer \(AdamW\). Extend the mod"):
        hfp.extend_context(model, 256)
    cycle = [optimizer]
    cycle.append(cycle)
    del optimizer, cycle  # in a cycle that nobody reaches
    hfp.extend_context(model, 256)


def test_compiled(llama):
    compiled = torch.compile(llama)
    for model in (compiled, llama):
        with pytest.raises(hfp.ContextExtensionError, match="compile.*Extend the model first"):
            hfp.extend_context(model, 256)
    del compiled, model
    llama.compile()
    with pytest.raises(hfp.ContextExtensionError, match="LlamaForCausalLM is compiled"):
        hfp.extend_context(llama, 256)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_sharded_and_in_ddp(bert, group):
    from torch.distributed.fsdp import fully_shard

    parallel = torch.nn.parallel.DistributedDataParallel(bert)
    for model in (parallel, bert):
        with pytest.raises(hfp.ContextExtensionError, match="DistributedDataParallel"):
            hfp.extend_context(model, 256)
    del parallel, model
    fully_shard(bert, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(hfp.ContextExtensionError, match="is sharded by FSDP"):
        hfp.extend_context(bert, 256)


@pytest.mark.parametrize("fixture", ["llama", "bert"])
def test_the_present_maximum_is_nothing_to_do(fixture, request):
    model = request.getfixturevalue(fixture)
    before = _state(model)
    report = hfp.extend_context(model, 64)
    assert _state(model) == before
    assert report.summary == "64 tokens (unchanged)" and report.parts[0].exact_up_to == 64


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_rope_twice_is_once(llama, method):
    other = copy.deepcopy(llama)
    hfp.extend_context(llama, 100, rope="linear")
    report = hfp.extend_context(llama, 256, rope=method)
    assert (report.before, report.after) == (100, 256)
    hfp.extend_context(other, 256, rope=method)
    assert llama.config.rope_parameters == other.config.rope_parameters
    assert llama.config.max_position_embeddings == other.config.max_position_embeddings
    assert llama.config.hfp == other.config.hfp
    assert torch.equal(_logits(llama, 250), _logits(other, 250))
    with pytest.raises(hfp.ContextExtensionError, match="below the 256 tokens"):
        hfp.extend_context(llama, 255)
    hfp.extend_context(llama, 256, rope="linear")  # another method at the same length
    assert llama.config.rope_parameters["rope_type"] == "linear"


def test_a_table_twice_starts_from_the_table_as_it_is(bert):
    other = copy.deepcopy(bert)
    hfp.extend_context(bert, 128, positions="tile")
    hfp.extend_context(bert, 256, positions="tile")
    hfp.extend_context(other, 256, positions="tile")
    assert torch.equal(_logits(bert, 256), _logits(other, 256))
    assert bert.config.hfp["context"]["original_max_length"] == 64
    hierarchical = hfp.extend_context(bert, 70000, positions="interpolate")
    assert hierarchical.before == 256 and hierarchical.parts[0].exact_up_to == 0


def test_the_tokenizer_follows_and_is_saved(bert, tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0, model_max_length=64)
    model = tiny_model(AutoModelForCausalLM, "llama", vocab_size=300)
    report = hfp.extend_context(model, 256, tokenizer=tokenizer)
    assert "tokenizer.model_max_length 64 -> 256" in str(report)
    tokenizer.save_pretrained(tmp_path)
    assert ByT5Tokenizer.from_pretrained(tmp_path).model_max_length == 256
    with pytest.raises(hfp.ContextExtensionError, match="259 tokens and BertForMaskedLM embeds 99"):
        hfp.extend_context(bert, 256, tokenizer=tokenizer)
    foreign = tiny_model(AutoModelForCausalLM, "gpt2", vocab_size=2000, eos_token_id=1999)
    with pytest.raises(hfp.ContextExtensionError, match="eos_token_id 1999, which the tokenizer"):
        hfp.extend_context(foreign, 256, tokenizer=tokenizer)
    assert tokenizer.model_max_length == 256 and bert.config.max_position_embeddings == 64


def test_the_generation_config_follows():
    model = tiny_model(AutoModelForCausalLM, "gpt2")
    model.generation_config.max_length = 64
    hfp.extend_context(model, 256)
    assert model.generation_config.max_length == 256
    model.generation_config.max_length = 30  # somebody's choice
    hfp.extend_context(model, 512)
    assert model.generation_config.max_length == 30


def test_generates_past_the_old_maximum(llama):
    for model in (llama, tiny_model(AutoModelForCausalLM, "gpt2")):
        hfp.extend_context(model, 128)
        out = model.generate(
            token_ids(1, 60), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert out.shape == (1, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_frequencies_are_fp32(llama, bert, dtype):
    llama.to(dtype)
    report = hfp.extend_context(llama, 256, rope="dynamic")
    assert llama.model.rotary_emb.inv_freq.dtype == torch.float32
    assert report.parts[0].exact_up_to == 0 and "cast with the model" in str(report)
    bert.to(dtype)
    weight = bert.bert.embeddings.position_embeddings.weight
    hfp.extend_context(bert, 256, positions="tile")
    grown = bert.bert.embeddings.position_embeddings.weight
    assert grown.dtype == dtype and torch.equal(grown[:64], weight)
    assert {p.dtype for p in bert.parameters()} == {dtype}


def test_an_8b_llama_on_the_meta_device_takes_less_than_a_second():
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: id(p) for name, p in model.named_parameters()}
    start = time.perf_counter()
    hfp.extend_context(model, 131072)
    assert time.perf_counter() - start < 1.0
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    assert model.model.rotary_emb.inv_freq.is_meta


def test_under_init_empty_weights_then_loaded(tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    full = tiny_model(AutoModelForCausalLM, "llama")
    hfp.extend_context(full, 256, rope="yarn")
    full.save_pretrained(tmp_path)
    with init_empty_weights():
        model = LlamaForCausalLM(tiny_config("llama")).eval()
        hfp.extend_context(model, 256, rope="yarn")
    model.tie_weights()
    model.set_attn_implementation("eager")
    model = load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
    assert torch.equal(_logits(model, 200), _logits(full, 200))


def test_dispatched_and_offloaded(llama, bert, tmp_path):
    from accelerate import cpu_offload, dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module

    expected = copy.deepcopy(llama)
    dispatch_model(llama, {"": "cpu"}, force_hooks=True)
    hook = ModelHook()
    add_hook_to_module(llama.model.rotary_emb, hook)
    hfp.extend_context(llama, 256)
    hfp.extend_context(expected, 256)
    assert llama.model.rotary_emb._hf_hook is hook
    assert torch.equal(_logits(llama, 200), _logits(expected, 200))
    cpu_offload(bert)
    with pytest.raises(hfp.ContextExtensionError, match="position_embeddings is offloaded by acc"):
        hfp.extend_context(bert, 256)


class Int8Linear(torch.nn.Module):
    """A quantised linear, as quantisers put them in: no floating weight."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().max() / 127
        self.weight = torch.nn.Parameter(
            (linear.weight / scale).round().to(torch.int8), requires_grad=False
        )
        self.scale, self.bias = torch.nn.Buffer(scale.detach()), linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("fixture", ["llama", "bert"])
def test_quantised_linears_are_left_alone(fixture, request):
    model = request.getfixturevalue(fixture)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and "decoder" not in name:
                setattr(module, name, Int8Linear(child))
    short = _logits(model, 64)
    method = {"rope": "dynamic"} if fixture == "llama" else {"positions": "tile"}
    hfp.extend_context(model, 256, **method)
    assert torch.equal(_logits(model, 64), short)
    assert _logits(model, 256).isfinite().all()


def test_a_quantised_table_is_refused(bert):
    table = bert.bert.embeddings.position_embeddings
    table.weight = torch.nn.Parameter(table.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(hfp.ContextExtensionError, match=r"is quantised \(torch.int8\)"):
        hfp.extend_context(bert, 256)


def test_shared_weights_stay_shared():
    encoder, decoder = (BertModel(tiny_config("bert")) for _ in range(2))
    decoder.embeddings.position_embeddings.weight = encoder.embeddings.position_embeddings.weight
    both = torch.nn.ModuleList([encoder, decoder])
    decoder.embeddings.position_embeddings.weight.note = "kept"
    hfp.extend_context(encoder, 256)
    assert len(decoder.embeddings.position_embeddings.weight) == 64  # not in what was passed
    del both
    bert = tiny_model(AutoModelForMaskedLM, "bert")
    before = bert.get_output_embeddings().weight
    assert before is bert.get_input_embeddings().weight
    hfp.extend_context(bert, 256)
    assert bert.get_output_embeddings().weight is bert.get_input_embeddings().weight is before


def test_encoder_and_decoder_grow_to_the_same_length():
    config = {"encoder": tiny_config("bert"), "decoder": tiny_config("bert")}
    config["decoder"].is_decoder = config["decoder"].add_cross_attention = True
    config["decoder"].max_position_embeddings = 128
    model = EncoderDecoderModel(
        encoder=BertModel(config["encoder"]),
        decoder=tiny_model(AutoModelForCausalLM, "bert", max_position_embeddings=128,
                           is_decoder=True, add_cross_attention=True),
    )  # fmt: skip
    report = hfp.extend_context(model, 128)
    assert [part.method for part in report.parts] == ["tile", "none"]
    report = hfp.extend_context(model, 256)
    assert [part.method for part in report.parts] == ["tile", "tile"]
    assert model.config.encoder.max_position_embeddings == 256
    assert model.config.decoder.max_position_embeddings == 256


def test_the_text_part_of_a_composite_model(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = LlavaConfig(
        text_config=tiny_config("llama"), vision_config=vision, image_token_index=5
    )
    model = LlavaForConditionalGeneration(config).eval()
    report = hfp.extend_context(model, 256, rope="yarn")
    assert [part.where for part in report.parts] == ["model.language_model.rotary_emb"]
    assert model.config.text_config.max_position_embeddings == 256
    model.save_pretrained(tmp_path)
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(reloaded, 200), _logits(model, 200))


def test_a_shared_config_does_not_extend_another_model():
    config = tiny_config("llama")
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with pytest.warns(UserWarning, match="keeps its context"):
        hfp.extend_context(first, 256)
    assert second.config is config and config.max_position_embeddings == 64
    assert first.config.max_position_embeddings == 256 and not hasattr(config, "hfp")


def test_a_stale_config_is_refused(llama):
    llama.config.rope_parameters["rope_theta"] = 5e5
    with pytest.raises(hfp.ContextExtensionError, match="edited after loading"):
        hfp.extend_context(llama, 256)


def test_the_report(llama):
    report = hfp.extend_context(llama, 256)
    assert str(report).splitlines()[:3] == [
        "model    LlamaForCausalLM",
        "context  64 -> 256 tokens (yarn)",
        "RoPE     model.rotary_emb: yarn (factor 4 is above 2: the least loss without "
        "training, and the fewest steps of fine-tuning)",
    ]
    assert report.to_dict()["parts"][0]["method"] == "yarn"
    json.dumps(report.to_dict())
    assert pickle.loads(pickle.dumps(report)) == report
    assert "<table>" in report._repr_html_() and "&gt;" in report._repr_html_()


def test_auto_goes_by_factor(llama):
    report = hfp.extend_context(copy.deepcopy(llama), 128)
    assert report.parts[0].method == "dynamic" and "at most 2" in report.parts[0].why
    assert report.parts[0].exact_up_to == 64
