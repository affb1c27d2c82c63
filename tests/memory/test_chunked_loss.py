"""A loss in chunks: the model's own, and logits that are never whole."""

import copy
import inspect
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_flash_patch as hfp
from hf_flash_patch.memory import chunked_loss, linear_cross_entropy
from hf_flash_patch.memory import linear_loss as module
from hf_flash_patch.memory.chunked_loss import LazyLogits
from tests.integration.tiny import VOCAB_SIZE, tiny_model, token_ids

from .conftest import FAMILIES, Largest, assert_same_step, batch, model_of, step

# Those that scale or cap their logits, that tie the output layer, that have another loss.
DECODERS = ["gemma2", "cohere", "granite", "qwen3", "opt", "gpt_neox", "phi"]
ENCODERS = ["roberta", "distilbert", "modernbert", "electra"]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*in spite of chunked_loss.*")
        yield


@pytest.mark.parametrize("family", [*FAMILIES, *DECODERS, *ENCODERS])
def test_loss_and_gradients_are_the_models(family):
    auto = FAMILIES["bert"] if family in ENCODERS else AutoModelForCausalLM
    model = model_of(family, auto)
    expected = step(model)
    with chunked_loss(model, chunk=7), Largest(VOCAB_SIZE) as largest:
        actual = step(model)
    assert_same_step(actual, expected)
    assert largest.rows <= 32  # the embedding and its gradient are as wide; 48 tokens are not there
    with Largest(VOCAB_SIZE) as largest:
        assert_same_step(step(model), expected)
    assert largest.rows >= 48


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_makes_no_gradients(mode, monkeypatch):
    """The weight's, in fp32, would be of gigabytes."""
    model = model_of("llama")
    expected = model(**batch()).loss
    monkeypatch.setattr(torch.autograd, "grad", None)
    with mode(), chunked_loss(model, chunk=7):
        torch.testing.assert_close(model(**batch()).loss, expected)


def test_labels_by_position():
    model, ids = model_of("llama"), batch()["input_ids"]
    expected = model(ids, labels=ids).loss
    assert list(inspect.signature(model.forward).parameters)[5] == "labels"
    with chunked_loss(model, chunk=7), Largest(VOCAB_SIZE) as largest:
        torch.testing.assert_close(model(ids, None, None, None, None, ids).loss, expected)
    assert largest.rows <= 32


def test_number_of_items_and_given_shift():
    """Trainer's gradient accumulation, and sequence parallelism, give these."""
    model = model_of("llama")
    labels = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for more in ({"num_items_in_batch": 17}, {"shift_labels": labels}):
        expected = step(model, **more)
        with chunked_loss(model, chunk=5):
            assert_same_step(step(model, **more), expected)


def test_other_uses_of_logits():
    model = model_of("llama")
    data = batch()
    with torch.no_grad():
        expected = model(**data).logits
        with chunked_loss(model):
            logits = model(**data).logits
            assert type(logits).__name__ == "LazyLogits" and logits.shape == expected.shape
            assert logits.to("meta").device.type == "meta" and logits.to("meta").half().is_meta
            torch.testing.assert_close(logits.argmax(-1), expected.argmax(-1))
            torch.testing.assert_close(logits[:, -1] * 2 + 1, expected[:, -1] * 2 + 1)
            torch.testing.assert_close(torch.stack([logits, logits])[1], expected)
            data.pop("labels")
            assert type(model(**data).logits) is torch.Tensor
    with chunked_loss(model):
        logits = model(**batch()).logits
        with pytest.warns(UserWarning, match=r"softmax needs all logits: \(2, 24, 99\)"):
            logits.softmax(-1)
        for use in (
            lambda: torch.cat([logits, logits]),
            lambda: torch.stack(tensors=(logits,)),
            lambda: torch.where(torch.tensor(True), logits, 0.0),
        ):
            with pytest.warns(UserWarning, match=r"needs all logits: \(2, 24, 99\) are computed"):
                assert use().shape[-2:] == (24, 99)
        with pytest.raises(hfp.UnsupportedModelError, match="add_ would change logits in place"):
            logits.add_(1)


class _Passed(torch.autograd.Function):
    """What ZeRO-3 puts behind every module."""

    @staticmethod
    def forward(ctx, output):
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_output_layer_as_zero_3_leaves_it(family):
    """It frees the weight behind the layer, and gathers it for whoever takes it from there; the
    tests of DeepSpeed itself are in tests/training."""
    model = model_of(family)
    expected = step(model)
    with chunked_loss(model, chunk=7), Largest(VOCAB_SIZE) as largest:
        head = model.get_output_embeddings()
        weight = head.weight
        weight.ds_id = 0

        def freed(module, args, output):
            vars(module)["_parameters"] = _Gathers(module._parameters)
            return _Passed.apply(output)

        with head.register_forward_hook(freed):
            assert_same_step(step(model), expected)
        assert largest.rows <= 32 and head._parameters.taken
        del weight.ds_id


class _Gathers(dict):
    """Parameters that say when they have been taken."""

    taken = False

    def __getitem__(self, name):
        self.taken = True
        return super().__getitem__(name)


def test_old_way_of_shifting():
    """Logits cut by one, as in many a custom loss."""
    model = model_of("llama")
    data = batch()

    def loss():
        logits = model(**data).logits[..., :-1, :].contiguous()
        return F.cross_entropy(logits.view(-1, VOCAB_SIZE), data["labels"][..., 1:].reshape(-1))

    expected = loss()
    with chunked_loss(model, chunk=5), Largest(VOCAB_SIZE) as largest:
        torch.testing.assert_close(loss(), expected)
    assert largest.rows <= 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    """bf16 weights, and bf16 autocast over fp32 weights: no worse than the whole."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 32, generator=generator)
    weight = torch.randn(500, 32, generator=generator) * 0.3
    target = torch.randint(0, 500, (200,), generator=generator)

    def gradients(dtype, whole, autocast=False):
        h, w = (x.clone().to(dtype).requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if whole:
                loss = F.cross_entropy(F.linear(h, w).float(), target)
            else:
                loss = linear_cross_entropy(h, w, target, chunk=32)
        (loss * 0.3).backward()
        assert (h.grad.dtype, w.grad.dtype) == (dtype, dtype)
        return loss.detach().double(), h.grad.double(), w.grad.double()

    exact = gradients(torch.float64, whole=True)
    autocast = dtype is torch.float32
    theirs, ours = gradients(dtype, True, autocast), gradients(dtype, False, autocast)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).abs().mean() <= 1.2 * (b - c).abs().mean() + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_options_of_cross_entropy(reduction, frozen):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).requires_grad_(name != frozen)
        for name, shape in {"hidden": (13, 8), "weight": (11, 8), "bias": (11,)}.items()
    }
    hidden, weight, bias = tensors.values()
    target = torch.randint(0, 11, (13,), generator=generator)
    target[4] = 7
    classes = torch.rand(11, generator=generator)
    options = {"ignore_index": 7, "reduction": reduction, "label_smoothing": 0.1}
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, weight=classes, **options)
    actual = linear_cross_entropy(
        hidden, weight, target, bias, class_weight=classes, chunk=4, **options
    )
    torch.testing.assert_close(actual, expected)
    wanted = [x for x in tensors.values() if x.requires_grad]
    theirs = torch.autograd.grad(expected * 3, wanted)
    for a, b in zip(torch.autograd.grad(actual * 3, wanted), theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_backward_runs_once():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 8), torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_layer_of_peft():
    config = {"target_modules": ["q_proj"], "r": 4}
    model = get_peft_model(model_of("llama"), LoraConfig(**config, modules_to_save=["lm_head"]))
    expected = step(model)
    assert any("modules_to_save.default" in name for name in expected[1])
    with chunked_loss(model, chunk=9):
        assert_same_step(step(model), expected)
    model = model_of("llama")
    chunked_loss(model, chunk=9)  # peft copies the layer with what it has
    model = get_peft_model(model, LoraConfig(**config, modules_to_save=["lm_head"]))
    assert isinstance(model(**batch()).logits, LazyLogits)
    model = get_peft_model(model_of("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(hfp.UnsupportedModelError, match="output layer has adapters"):
        chunked_loss(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_it_too(copied):
    """Its logits are promises as well, whether the original still has the technique or not."""
    model = model_of("llama")
    technique = chunked_loss(model, chunk=5)
    again = copied(model)
    assert isinstance(again(**batch()).logits, LazyLogits)
    technique.restore()
    assert isinstance(again(**batch()).logits, LazyLogits)
    assert_same_step(step(again), step(model))


def test_replicas_of_data_parallel_are_refused():
    model = model_of("llama")
    technique = chunked_loss(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(hfp.UnsupportedModelError, match="has chunked_loss and .*DataParallel"):
        replica(**batch())
    technique.restore()
    model._replicate_for_data_parallel()(**batch())


def test_another_output_layer_is_told():
    model = model_of("llama")
    technique = chunked_loss(model)
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.warns(UserWarning, match="chunked_loss has no effect on LlamaForCausalLM"):
        step(model)
    technique.restore()
    with warnings.catch_warnings(), chunked_loss(model):
        warnings.simplefilter("error")
        step(model)


def test_a_forward_that_runs_no_hooks_is_told_once():
    """As adapters of peft before 0.21 call it."""
    model = model_of("llama")
    with chunked_loss(model):
        with pytest.warns(UserWarning, match="has no effect where model.forward"):
            model.forward(**batch())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.forward(**batch())
            step(model)
            with torch.no_grad():
                model.forward(**batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_for_batches_of_several_lengths(family):
    """The second length compiles the model for any."""
    one = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    model = model_of(family, **one)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # what is asked is how it is traced
    for length in (24, 31, 17):
        ids = token_ids(2, length)
        expected = model(input_ids=ids, labels=ids).loss
        with chunked_loss(model, chunk=7):
            actual = compiled(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(actual, expected)


def test_liger_where_it_is_installed(monkeypatch):
    calls = []
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = lambda *a, **k: calls.append((a, k)) or a[0].sum()
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(module, "uses_liger", lambda backend, device, plain: plain)
    hidden, weight, target = torch.randn(4, 8), torch.randn(5, 8), torch.arange(4)
    linear_cross_entropy(hidden, weight, target, reduction="sum")
    ((_, options),) = calls
    assert options["accum_dtype"] is torch.float32 and options["reduction"] == "sum"
    linear_cross_entropy(hidden, weight, target, steps=(torch.tanh,))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "backend, message",
    [("fused", "allowed are \"auto\"|allowed are 'auto'"), ("liger", "needs the package liger")],
)
def test_unknown_or_missing_backends(backend, message, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hfp.UnsupportedKernelError, match=message):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(5, 8), torch.arange(4), backend=backend)


def test_a_missing_backend_is_told_at_once(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    model = model_of("llama")
    with pytest.raises(hfp.UnsupportedKernelError, match="liger-kernel, which is not installed"):
        chunked_loss(model, backend="liger")
    assert "forward" not in vars(model.lm_head)


def test_arguments_out_of_range():
    tensors = torch.randn(4, 8), torch.randn(5, 8), torch.arange(4)
    with pytest.raises(ValueError, match="reduction='none'"):
        linear_cross_entropy(*tensors, reduction="none")
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(*tensors, chunk=0)


def test_what_it_is_not_for():
    with pytest.raises(hfp.UnsupportedModelError, match="BertModel has no linear output layer"):
        chunked_loss(tiny_model(AutoModel, "bert"))
    model = model_of("llama")
    with chunked_loss(model) as technique:
        assert str(technique) == "chunked_loss: cross-entropy of 99 words, 512 tokens at a time"
        with pytest.raises(hfp.UnsupportedModelError, match="has chunked_loss already"):
            chunked_loss(model)
        model.lm_head.forward = lambda hidden: hidden
        with pytest.raises(hfp.UnsupportedModelError, match="Linear.forward has been replaced"):
            technique.restore()
        model.lm_head.forward = technique._changes._replaced[0][2]
    assert "forward" not in vars(model.lm_head) and not model._forward_pre_hooks
    with pytest.raises(hfp.UnsupportedModelError, match="holds 0"):
        chunked_loss(torch.nn.Linear(2, 2))


def test_encoder_decoder():
    model = tiny_model(AutoModelForSeq2SeqLM, "t5", decoder_start_token_id=0).train()
    ids = token_ids(2, 24)
    expected = model(input_ids=ids, labels=ids).loss
    with chunked_loss(model, chunk=5), Largest(VOCAB_SIZE) as largest:
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    assert largest.rows <= 32
