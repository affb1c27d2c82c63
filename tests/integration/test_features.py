"""What single families ask of attention: sinks, softcap, biases, other head sizes, dtypes, peft."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import hf_flash_patch as hfp
from hf_flash_patch.integration import attention as integration
from hf_flash_patch.integration.attention import hfp_attention
from hf_flash_patch.integration.attention_mask import AttentionMask
from hf_flash_patch.integration.masking import hfp_mask
from hf_flash_patch.integration.request import Request
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    logits_and_gradients,
    padding,
    tiny_model,
    token_ids,
)


class _Module(torch.nn.Module):
    """An attention module as far as the attention function looks at it."""

    def __init__(self, is_causal=True, dtype=torch.float32, **settings):
        super().__init__()
        self.projection = torch.nn.Linear(8, 8, dtype=dtype)
        self.is_causal = is_causal
        self.config = type("Config", (), {"hfp": settings})()


def _tensors(seqlen=9, heads=4, heads_k=2, head_dim=8, head_dim_v=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def make(heads, size):
        return torch.randn(2, heads, seqlen, size, generator=generator).to(dtype)

    return make(heads, head_dim), make(heads_k, head_dim), make(heads_k, head_dim_v)


def _reference(q, k, v, visible, scaling=None, softcap=None, bias=0.0, sinks=None):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + bias).masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sinks = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return (torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (logits.softmax(-1) @ v).transpose(1, 2)


CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["gpt_oss", "granite_swa", "mimo_v2_flash"])
def test_sinks_with_padding(family, dropout):
    """Logits and gradients, those of the sinks included; dropout leaves the seeded run finite."""
    model = tiny_model(AutoModelForCausalLM, family, attention_dropout=dropout)
    ids, mask = token_ids(), padding("mixed")
    if dropout == 0.0:
        assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)
    else:
        model.train()
        with hfp.patched(model):
            _, gradients = logits_and_gradients(
                lambda: model(ids, attention_mask=mask).logits, model, mask
            )
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_sinks_have_the_exact_gradient():
    q, k, v = _tensors()
    sinks = torch.tensor([-1.0, 0.0, 2.0, 40.0], requires_grad=True)
    out, _ = hfp_attention(_Module(), q, k, v, None, s_aux=sinks)
    expected = _reference(q, k, v, CAUSAL, sinks=sinks)
    assert_close(out.detach(), expected.detach(), "out")
    weights = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), sinks)[0] for x in (out, expected))
    assert_close(ours, theirs, "gradient")


def test_sinks_and_documents_in_varlen():
    q, k, v = (x[:1] for x in _tensors())
    sinks = torch.randn(4)
    cu = torch.tensor([0, 4, 9])
    out, _ = hfp_attention(
        _Module(), q, k, v, None, s_aux=sinks, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
        max_length_q=5, max_length_k=5,
    )  # fmt: skip
    document = torch.arange(9) >= 4
    visible = CAUSAL & (document[:, None] == document[None])
    assert_close(out, _reference(q, k, v, visible, sinks=sinks), "out")


def test_cu_seq_lens_with_a_tensor_as_maximum_do_not_read_it():
    q, k, v = (x[:1] for x in _tensors())
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    longest = torch.empty((), device="meta")  # reading it would raise
    out, _ = hfp_attention(
        _Module(is_causal=False), q, k, v, None, **arguments, max_length_q=longest,
        max_length_k=longest,
    )  # fmt: skip
    document = torch.arange(9) >= 4
    assert_close(out, _reference(q, k, v, document[:, None] == document[None]), "out")


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_softcap(family):
    model = tiny_model(AutoModelForCausalLM, family, attn_logit_softcapping=0.02)
    ids, mask = token_ids(), padding("left")
    assert_same_as_eager(model, lambda: model(ids, attention_mask=mask).logits, mask)


def test_softcap_and_scaling():
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module(), q, k, v, None, scaling=0.7, softcap=1.5)
    assert_close(out, _reference(q, k, v, CAUSAL, scaling=0.7, softcap=1.5), "out")


def test_is_causal_argument_wins_over_the_module():
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module(is_causal=True), q, k, v, None, is_causal=False)
    assert_close(out, _reference(q, k, v, torch.ones_like(CAUSAL)), "bidirectional")
    out, _ = hfp_attention(_Module(is_causal=False), q, k, v, None, is_causal=True)
    assert_close(out, _reference(q, k, v, CAUSAL), "causal")


def test_mask_object_wins_over_is_causal():
    q, k, v = _tensors()
    mask = hfp_mask(batch_size=2, q_length=9, kv_length=9)
    out, _ = hfp_attention(_Module(is_causal=False), q, k, v, mask)
    assert_close(out, _reference(q, k, v, CAUSAL), "causal")


@pytest.mark.parametrize("is_causal", [True, False])
def test_sliding_window_without_a_mask(is_causal):
    """As transformers' flash attention reads it: size tokens to the left, the token included."""
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module(is_causal), q, k, v, None, sliding_window=3)
    distance = torch.arange(9)[:, None] - torch.arange(9)[None]
    visible = distance.abs() < 3
    assert_close(out, _reference(q, k, v, visible & CAUSAL if is_causal else visible), "out")


def test_padding_mask_of_two_dimensions():
    q, k, v = _tensors()
    padding_mask = torch.ones(2, 9, dtype=torch.long)
    padding_mask[0, :3] = 0
    out, _ = hfp_attention(_Module(is_causal=False), q, k, v, padding_mask)
    visible = padding_mask.bool()[:, None, None]
    assert_close(out, _reference(q, k, v, visible), "out")


@pytest.mark.parametrize("head_dim_v", [4, 12])
def test_another_head_dim_of_v(head_dim_v):
    q, k, v = _tensors(head_dim_v=head_dim_v)
    out, _ = hfp_attention(_Module(), q, k, v, None)
    assert_close(out, _reference(q, k, v, CAUSAL), "out")


@pytest.mark.parametrize("family", ["t5", "umt5", "switch_transformers"])
def test_position_bias_is_trained(family):
    model = tiny_model(AutoModelForSeq2SeqLM, family)
    ids, mask = token_ids(), padding("mixed")

    def forward():
        return model(ids, attention_mask=mask, decoder_input_ids=token_ids(2, 7)).logits

    assert_same_as_eager(model, forward)
    _, gradients = logits_and_gradients(forward, model, None)
    assert any("relative_attention_bias" in name for name in gradients)


def test_frozen_position_bias_goes_through_ops():
    model = tiny_model(AutoModelForSeq2SeqLM, "t5").requires_grad_(False)
    ids, mask = token_ids(), padding("mixed")
    targets = token_ids(2, 7)
    expected = model(ids, attention_mask=mask, decoder_input_ids=targets).logits
    with hfp.patched(model):
        actual = model(ids, attention_mask=mask, decoder_input_ids=targets).logits
    assert_close(actual, expected, "logits")


def test_position_bias_with_a_dense_mask():
    q, k, v = _tensors()
    bias = torch.randn(1, 4, 9, 9)
    visible = torch.rand(2, 1, 9, 9) < 0.6
    visible |= torch.eye(9, dtype=torch.bool)
    out, _ = hfp_attention(_Module(), q, k, v, visible, position_bias=bias)
    assert_close(out, _reference(q, k, v, visible, bias=bias), "out")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_row_that_sees_nothing_beside_a_trained_bias(dtype):
    q, k, v = (x.requires_grad_() for x in _tensors())
    bias = torch.randn(1, 4, 9, 9, requires_grad=True)
    visible = CAUSAL[None, None].repeat(2, 1, 1, 1)
    visible[0, :, 4] = False
    mask = visible if dtype == torch.bool else torch.where(visible, 0.0, float("-inf"))
    out, _ = hfp_attention(_Module(), q, k, v, mask, position_bias=bias)
    assert out[0, 4].eq(0).all() and out[1, 4].ne(0).all()
    gradients = torch.autograd.grad(out[0, 4].sum(), (q, k, v, bias))
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_trained_bias_needs_a_backend_with_its_gradient():
    q, k, v = _tensors()
    bias = torch.randn(1, 4, 9, 9, requires_grad=True)
    with pytest.raises(hfp.UnsupportedKernelError, match='backend="cuda".*position bias'):
        hfp_attention(_Module(backend="cuda"), q, k, v, None, position_bias=bias)


@pytest.mark.parametrize("argument", sorted(integration.REFUSED_ARGUMENTS))
def test_arguments_that_cannot_be_served_are_refused_by_name(argument):
    q, k, v = _tensors()
    with pytest.raises(hfp.UnsupportedModelError, match=f"_Module passes {argument} "):
        hfp_attention(_Module(), q, k, v, None, **{argument: torch.ones(2)})


AUTO = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM}


@pytest.mark.parametrize("family", sorted(AUTO))
def test_output_attentions_is_refused_by_name(family):
    model = tiny_model(AUTO[family], family)
    with hfp.patched(model), pytest.raises(hfp.UnsupportedModelError, match="output_attentions"):
        model(token_ids(), output_attentions=True)
    assert len(model(token_ids(), output_attentions=True).attentions) == 2


def test_output_attentions_in_the_config_is_refused_before_anything_is_touched():
    model = tiny_model(AutoModelForCausalLM, "llama")
    model.config.output_attentions = True
    with pytest.raises(hfp.UnsupportedModelError, match="config.output_attentions=True"):
        hfp.patch(model)
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.config, "hfp")


def test_other_outputs_are_still_collected():
    model = tiny_model(AutoModelForCausalLM, "llama")
    with hfp.patched(model):
        assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("family", sorted(AUTO))
def test_autocast(family):
    """fp32 weights under bf16 autocast: attention computes in bf16, like SDPA's."""
    model = tiny_model(AUTO[family], family)
    ids, mask = token_ids(), padding("mixed")
    seen = []
    original = integration.attention

    def spy(q, k, v, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return original(q, k, v, **options)

    real = mask.bool()
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(ids, attention_mask=mask).logits[real].float()
            with hfp.patched(model), pytest.MonkeyPatch.context() as patch:
                patch.setattr(integration, "attention", spy)
                ours = model(ids, attention_mask=mask).logits[real].float()
    assert seen == [{torch.bfloat16}] * 2
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


def test_fp32_tensors_in_a_bf16_module_are_cast_to_its_dtype():
    """peft keeps norms, and with them q and k, in fp32."""
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module(dtype=torch.bfloat16), q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    assert (out.float() - _reference(q, k, v, CAUSAL)).abs().max() < 0.05


def test_fp32_tensors_beside_weights_stored_in_fp8_stay_fp32():
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module().to(torch.float8_e4m3fn), q, k, v, None)
    assert out.dtype == torch.float32


def test_fp32_model_stays_fp32():
    q, k, v = _tensors()
    out, _ = hfp_attention(_Module(), q, k, v, None)
    assert out.dtype == torch.float32


def test_quantized_module_computes_in_its_configs_dtype():
    module = _Module()
    module.config._is_quantized = True
    module.config.dtype = torch.bfloat16
    q, k, v = _tensors()
    assert hfp_attention(module, q, k, v, None)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted(AUTO))
def test_lora(family):
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
    base = tiny_model(AUTO[family], family)
    config = LoraConfig(
        target_modules=targets[family],
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(base, config).eval()
    ids, mask = token_ids(), padding("left")
    expected, expected_gradients = logits_and_gradients(
        lambda: model(input_ids=ids, attention_mask=mask).logits, model, mask
    )
    with hfp.patched(model) as patch:
        assert patch.reports[0].model == type(base).__name__
        actual, gradients = logits_and_gradients(
            lambda: model(input_ids=ids, attention_mask=mask).logits, model, mask
        )
    assert base.config._attn_implementation == "eager"
    assert_close(actual, expected, "logits")
    assert all("lora" in name for name in gradients) and gradients
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_lora_with_fp32_norms_on_a_bf16_model():
    base = tiny_model(AutoModelForCausalLM, "qwen3").bfloat16()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    ids = token_ids()
    with hfp.patched(model), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
    assert logits.isfinite().all()


def test_deterministic_algorithms_are_passed_on(monkeypatch):
    seen = []
    original = integration.attention

    def spy(*tensors, **options):
        seen.append(options["deterministic"])
        return original(*tensors, **options)

    monkeypatch.setattr(integration, "attention", spy)
    q, k, v = _tensors()
    hfp_attention(_Module(), q, k, v, None)
    torch.use_deterministic_algorithms(True)
    try:
        hfp_attention(_Module(), q, k, v, None)
    finally:
        torch.use_deterministic_algorithms(False)
    hfp_attention(_Module(), q, k, v, None, deterministic=True)
    assert seen == [False, True, True]


def test_no_copies_of_q_k_v(monkeypatch):
    """The layout change is a view: ops gets the tensors of transformers, transposed."""
    seen = []
    original = integration.attention

    def spy(*tensors, **options):
        seen.extend(tensors)
        return original(*tensors, **options)

    monkeypatch.setattr(integration, "attention", spy)
    tensors = _tensors()
    hfp_attention(_Module(), *tensors, None)
    for given, got in zip(tensors, seen, strict=True):
        assert got.data_ptr() == given.data_ptr() and got.shape == given.transpose(1, 2).shape


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("method", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_of_peft(family, method):
    """Prefix tuning starts from a filled cache, prompt tuning from a longer sequence."""
    base = tiny_model(AutoModelForCausalLM, family)
    model = get_peft_model(base, method(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids, mask = token_ids(), padding("left")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, -12:][mask.bool()]
        with hfp.patched(model):
            actual = model(input_ids=ids, attention_mask=mask).logits[:, -12:][mask.bool()]
    assert_close(actual, expected, "logits")


def test_prefix_tuning_of_an_encoder_without_a_mask():
    """The model makes its mask without the prefix; transformers drops one that hides nothing."""
    model = tiny_model(AutoModelForSequenceClassification, "bert")
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
        with hfp.patched(model):
            assert_close(model(input_ids=token_ids()).logits, expected, "logits")


def test_keys_out_of_a_convolution():
    """k and v come with another dimension contiguous, without gradients."""
    model = tiny_model(AutoModelForCausalLM, "inkling_text")
    with torch.no_grad():
        expected = model(token_ids()).logits
        with hfp.patched(model):
            assert_close(model(token_ids()).logits, expected, "logits")


@pytest.mark.parametrize("hides", ["nothing", "causal", "window", "padding"])
def test_a_mask_for_fewer_keys(hides):
    """It fits whatever comes only if it hides nothing."""
    rules = {"causal": hides == "causal", "window_size": (3, 3) if hides == "window" else (-1, -1)}
    if hides == "padding":
        rules["key_range"] = torch.tensor([[0, 5], [2, 12]], dtype=torch.int32)
    mask = AttentionMask(
        batch_size=2, seqlen_q=12, seqlen_k=12, device=torch.device("cpu"), **rules
    )
    request = Request(2, 12, 16, torch.device("cpu"))
    if hides == "nothing":
        assert request.resolve(mask, False, None)[0].sizes == (2, 12, 16)
    else:
        with pytest.raises(hfp.MaskError, match="made for"):
            request.resolve(mask, False, None)


def test_a_mask_of_one_key():
    """It says of all keys what it says of the one, as a tensor that is broadcast would."""
    one = partial(AttentionMask, 2, 1, 1, False, (-1, -1), torch.device("cpu"))
    request = Request(2, 1, 5, torch.device("cpu"))
    mask = request.resolve(one(), False, None)[0]
    assert mask.sizes == (2, 1, 5) and mask.hides_nothing
    hidden = torch.tensor([[1, 1], [0, 1]], dtype=torch.int32)  # the first row's key
    mask = request.resolve(one(key_range=hidden), False, None)[0]
    assert mask.materialise().flatten(1).tolist() == [[False] * 5, [True] * 5]
