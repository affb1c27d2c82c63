"""Patched models on a GPU: exact to bf16, no host syncs, packing, generate()."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import hf_flash_patch as hfp
from tests.integration.tiny import padding, tiny_model, token_ids

pytestmark = pytest.mark.gpu

CLASSES = {
    "bert": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


@pytest.fixture(params=sorted(CLASSES))
def model(request):
    return tiny_model(CLASSES[request.param], request.param).cuda()


def gradients(model, inputs, mask):
    """Logits at real tokens, and every parameter's gradient, in fp64."""
    model.zero_grad()
    logits = model(**inputs).logits
    real = logits[mask.bool()] if mask is not None else logits.flatten(0, 1)
    real.float().square().mean().backward()
    named = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return real.detach().double(), named


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_as_exact_as_eager_in_bf16(model, kind):
    """Against fp32 eager, bf16 patched is off by no more than twice what bf16 eager is."""
    mask = padding(kind)
    inputs = {"input_ids": token_ids().cuda()}
    if mask is not None:
        mask = mask.cuda()
        inputs["attention_mask"] = mask
    model.set_attn_implementation("eager")
    exact, exact_gradients = gradients(model, inputs, mask)
    model.bfloat16()
    eager, eager_gradients = gradients(model, inputs, mask)

    def no_worse(actual, peer, reference, scale, what):
        error, allowed = (actual - reference).abs().max(), (peer - reference).abs().max()
        assert error <= 2 * allowed + 2**-8 * scale, f"{what}: {error:.1e} against {allowed:.1e}"

    # The gradient of a key's bias is 0 but for rounding, so a gradient's scale is the model's.
    largest = max(gradient.abs().max() for gradient in exact_gradients.values())
    is_encoder = model.config.model_type == "bert"
    for remove_padding in (False, True) if is_encoder else (False,):
        with hfp.patched(model, backend="cuda", remove_padding=remove_padding):
            ours, our_gradients = gradients(model, inputs, mask)
        no_worse(ours, eager, exact, exact.abs().max(), "logits")
        for name, gradient in our_gradients.items():
            no_worse(gradient, eager_gradients[name], exact_gradients[name], 1e-2 * largest, name)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_forward_and_backward_never_wait_for_the_gpu(model, kind):
    model.bfloat16().train()
    mask = padding(kind)
    inputs = {"input_ids": token_ids().cuda()}
    if mask is not None:
        inputs["attention_mask"] = mask.cuda()
    # Without a mask, transformers itself looks on the host for packed documents (in position_ids,
    # unless there is a cache) and for forgotten padding (unless there is no padding token).
    model.config.pad_token_id = None
    use_cache = kind == "none"
    with hfp.patched(model, backend="cuda"):
        for mode in ("default", "error"):  # the first time, libraries initialise
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                model(**inputs, use_cache=use_cache).logits.float().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind, waits", [("none", 0), ("mixed", 1)])
def test_removing_padding_waits_for_the_gpu_once(kind, waits):
    model = tiny_model(AutoModelForMaskedLM, "bert").cuda().bfloat16().train()
    model.config.pad_token_id = None  # with one, transformers looks for forgotten padding
    mask = padding(kind)
    inputs = {"input_ids": token_ids().cuda()}
    if mask is not None:
        inputs["attention_mask"] = mask.cuda()
    with hfp.patched(model, backend="cuda", remove_padding=True):
        for mode in ("default", "warn"):  # the first time, libraries initialise
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    model(**inputs).logits.float().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == waits


def test_captured_with_its_padding():
    """The capture of a CUDA graph cannot wait: the batch keeps its padding."""
    model = tiny_model(AutoModelForMaskedLM, "bert").cuda().bfloat16().eval()
    model.config.pad_token_id = None
    inputs = {"input_ids": token_ids().cuda(), "attention_mask": padding("mixed").cuda()}
    with torch.no_grad(), hfp.patched(model, backend="cuda", remove_padding=True):
        expected = model(**inputs).logits
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs).logits
        graph.replay()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(captured[real], expected[real], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_is_eager_s(model_type, cache):
    model = tiny_model(AutoModelForCausalLM, model_type).cuda().eval()
    mask = padding("left").cuda()
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": mask,
        "cache_implementation": cache,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    ids = token_ids().cuda()
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    with hfp.patched(model):  # fp32: the torch engine on the GPU
        assert torch.equal(model.generate(ids, **options), expected)
    model.bfloat16()
    with hfp.patched(model, backend="cuda"):
        generated = model.generate(ids, **options)
    assert generated.shape[1] <= expected.shape[1] and generated.shape[0] == expected.shape[0]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_continuous_batching_is_eager_s(model_type):
    model = tiny_model(AutoModelForCausalLM, model_type).cuda().eval()
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {
        "generation_config": config,
        "continuous_batching_config": ContinuousBatchingConfig(
            num_blocks=8, block_size=16, max_batch_tokens=16
        ),
        "warmup": False,
    }
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (23, 5, 11, 2)]
    model.set_attn_implementation("eager")
    expected = [
        model.generate(torch.tensor([prompt]).cuda(), generation_config=config)[0, len(prompt) :]
        for prompt in prompts
    ]
    with hfp.patched(model):  # fp32: the torch engine on the GPU
        outputs = model.generate_batch(prompts, **options)
    for index, text in enumerate(expected):
        assert outputs[f"req_{index}"].generated_tokens == text.tolist()
    model.bfloat16()
    with hfp.patched(model, backend="cuda"):
        outputs = model.generate_batch(prompts, **options)
    assert all(len(output.generated_tokens) == 8 for output in outputs.values())


def test_packed_documents_equal_documents_alone():
    model = tiny_model(AutoModelForCausalLM, "llama").cuda().bfloat16().eval()
    ids = token_ids(batch_size=2, seqlen=12).cuda()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], device="cuda").expand(2, -1)
    with torch.no_grad(), hfp.patched(model, backend="cuda"):
        packed = model(input_ids=ids, position_ids=positions).logits
        alone = torch.cat(
            [model(input_ids=part).logits for part in (ids[:, :5], ids[:, 5:])], dim=1
        )
    torch.testing.assert_close(packed.float(), alone.float(), rtol=2e-2, atol=2e-2)
