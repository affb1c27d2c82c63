"""patch(remove_padding=True): encoders on real tokens alone, equal to the padded run at these."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import hf_flash_patch as hfp
from hf_flash_patch.families import ENCODERS
from hf_flash_patch.ops import functional
from tests.integration.tiny import (
    assert_close,
    assert_same_as_eager,
    logits_and_gradients,
    padding,
    tiny_config,
    tiny_model,
    token_ids,
)

TYPES = [model_type for types in ENCODERS.values() for model_type in types]
MORE = {
    "mobilebert": {"intra_bottleneck_size": 32},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
}


@pytest.fixture
def layouts(monkeypatch):
    """Shapes of q in every call of ops."""
    seen = []
    attention = functional.attention

    def spy(q, *args, **kwargs):
        seen.append(tuple(q.shape))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr("hf_flash_patch.integration.attention.attention", spy)
    return seen


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("kind", ["left", "right", "holes", "mixed"])
def test_equal_to_the_padded_run(model_type, kind, layouts):
    """Hidden states and gradients, at real tokens; RoBERTa's positions come from the token 0."""
    model = tiny_model(AutoModel, model_type, **MORE.get(model_type, {}))
    real = padding(kind)
    ids = token_ids().masked_fill(real == 0, 0)
    patch = assert_same_as_eager(
        model,
        lambda: model(ids, attention_mask=real).last_hidden_state,
        real,
        remove_padding=True,
    )
    assert "padding: removed" in str(patch)
    assert {shape[0] for shape in layouts} == {int(real.sum())} and len(layouts[0]) == 3


@pytest.mark.parametrize(
    "mask",
    [
        hfp.masks.sliding_window(3),
        hfp.masks.sliding_window(2) | hfp.masks.global_tokens(1),
        hfp.masks.per_head([hfp.masks.sliding_window(i) for i in (1, 2, 3, 4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind, packed", [("right", True), ("left", False), ("holes", False)])
def test_patterns_count_real_tokens_from_the_start(mask, kind, packed, layouts):
    """A pattern is of positions in the padded row; only right padding leaves them as they are."""
    model = tiny_model(AutoModel, "bert")
    real = padding(kind)
    ids = token_ids()
    with hfp.patched(model, mask=mask):
        expected = model(ids, attention_mask=real).last_hidden_state[real.bool()]
    layouts.clear()
    with hfp.patched(model, mask=mask, remove_padding=True):
        found = model(ids, attention_mask=real).last_hidden_state[real.bool()]
    assert_close(found, expected, kind)
    assert all(len(shape) == (3 if packed else 4) for shape in layouts)


def test_layers_change_shapes_as_views():
    """What selects a row has a gradient that fills another with zeros, and copies."""
    model = tiny_model(AutoModel, "bert")
    with hfp.patched(model, remove_padding=True):
        hidden = model(token_ids(), attention_mask=padding("right")).last_hidden_state
    steps, met = [hidden.grad_fn], set()
    while steps:
        step = steps.pop()
        if step is not None and step not in met:
            met.add(step)
            steps += [before for before, _ in step.next_functions]
    names = {step.name() for step in met}
    assert not names & {"SelectBackward0", "CloneBackward0"} and "IndexCopyBackward0" in names


def test_chosen_blocks_stay_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    mask, real = hfp.masks.top_k_blocks(2, block_size=32), padding("right")
    with hfp.patched(model, mask=mask, remove_padding=True):
        model(token_ids(), attention_mask=real)
    assert all(len(shape) == 4 for shape in layouts)


@pytest.mark.parametrize("real", [None, torch.ones(2, 12, dtype=torch.long)])
def test_without_padding_nothing_happens(real, layouts):
    model = tiny_model(AutoModel, "bert")
    with hfp.patched(model, remove_padding=True):
        model(token_ids(), attention_mask=real)
    assert layouts == [(2, 12, 4, 8)] * 2


def test_padding_is_zero_and_tuples_too():
    model = tiny_model(AutoModel, "bert")
    real = padding("mixed")
    with hfp.patched(model, remove_padding=True):
        whole = model(token_ids(), attention_mask=real)
        hidden, pooled = model(token_ids(), attention_mask=real, return_dict=False)
    assert not whole.last_hidden_state[real == 0].any()
    assert torch.equal(hidden, whole.last_hidden_state)
    assert torch.equal(pooled, whole.pooler_output)


def test_hidden_states_of_each_layer_are_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    real = padding("right")
    expected = model(token_ids(), attention_mask=real, output_hidden_states=True).hidden_states
    with hfp.patched(model, remove_padding=True):
        found = model(token_ids(), attention_mask=real, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours[real == 1], theirs[real == 1], "hidden states")


def test_settings_survive(tmp_path, layouts):
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
    )
    model = BertForSequenceClassification(config).eval()
    patch = hfp.patch(model, remove_padding=True)
    real = padding("right")
    expected = model(token_ids(), attention_mask=real).logits
    model.save_pretrained(tmp_path)
    assert_close(copy.deepcopy(model)(token_ids(), attention_mask=real).logits, expected, "copy")
    patch.restore()
    assert not model.bert.encoder._forward_pre_hooks and not model.bert.encoder._forward_hooks
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    layouts.clear()
    with hfp.patched(again):
        assert_close(again(token_ids(), attention_mask=real).logits, expected, "reloaded")
    assert {len(shape) for shape in layouts} == {3}
    layouts.clear()
    with hfp.patched(again, remove_padding=False):
        again(token_ids(), attention_mask=real)
    assert {len(shape) for shape in layouts} == {4}


@pytest.mark.parametrize("reentrant", [True, False])
def test_training(reentrant):
    """Checkpointed, with a loss, under autocast-free fp32: the padded run's loss and gradients."""
    real = padding("mixed")
    ids = token_ids()
    labels = ids.masked_fill(real == 0, -100)
    results = []
    for settings in ({}, {"remove_padding": True}):
        model = tiny_model(AutoModelForMaskedLM, "bert").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hfp.patch(model, **settings)
        loss = model(ids, attention_mask=real, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (expected, theirs), (loss, ours) = results
    assert_close(loss, expected, "loss")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)


DOCUMENTS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 0], [*range(9), 0, 0, 0]])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert"])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "mixed"])
def test_documents_stay_apart(model_type, kind, layouts):
    """Positions that start anew mean documents, whether padding is there or not."""
    model = tiny_model(AutoModel, model_type)
    real = padding(kind)
    call = {"attention_mask": real, "position_ids": DOCUMENTS + 2 * (model_type == "roberta")}
    forward = lambda: model(token_ids(), **call).last_hidden_state  # noqa: E731
    with hfp.patched(model):
        expected, theirs = logits_and_gradients(forward, model, real)
    layouts.clear()
    with hfp.patched(model, remove_padding=True):
        found, ours = logits_and_gradients(forward, model, real)
    assert_close(found, expected, "hidden states")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)
    assert {shape[0] for shape in layouts} == {int(real.sum())}


def test_documents_told_by_lengths_stay_padded(layouts):
    """Of a padded row: nothing but the attention of the padded run knows what they count."""
    model = tiny_model(AutoModel, "bert")
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    call = {"attention_mask": padding("right")[1:], "position_ids": torch.arange(12)[None]}
    call |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    ids = token_ids()[1:]
    results = []
    for settings in ({}, {"remove_padding": True}):
        with hfp.patched(model, **settings):
            results.append(model(ids, **call).last_hidden_state[:, :9])
    assert_close(results[1], results[0], "hidden states")
    assert not torch.allclose(results[0], model(ids, call["attention_mask"])[0][:, :9], atol=1e-3)
    assert {len(shape) for shape in layouts} == {4}


def test_patterns_over_documents_stay_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    real = torch.tensor([[1] * 10 + [0] * 2, [1] * 9 + [0] * 3])
    call = {"attention_mask": real, "position_ids": DOCUMENTS}
    mask = hfp.masks.strided(3)
    with hfp.patched(model, mask=mask):
        expected = model(token_ids(), **call).last_hidden_state[real == 1]
    with hfp.patched(model, mask=mask, remove_padding=True):
        found = model(token_ids(), **call).last_hidden_state[real == 1]
    assert_close(found, expected, "hidden states")
    assert {len(shape) for shape in layouts} == {4}


def test_rows_without_a_token(layouts):
    model = tiny_model(AutoModel, "bert")
    real = torch.zeros(2, 12, dtype=torch.long)
    with hfp.patched(model, remove_padding=True):
        assert model(token_ids(), attention_mask=real).last_hidden_state.isfinite().all()
        assert {len(shape) for shape in layouts} == {4}
    real[1] = 1
    forward = lambda: model(token_ids(), attention_mask=real).last_hidden_state  # noqa: E731
    assert_same_as_eager(model, forward, real, remove_padding=True)


def test_a_mask_of_one_s_own_stays_padded(layouts):
    model = tiny_model(AutoModel, "bert")
    mask = torch.full((2, 1, 12, 12), torch.finfo(torch.float32).min).triu(1)
    assert_same_as_eager(
        model,
        lambda: model(token_ids(), attention_mask=mask).last_hidden_state,
        remove_padding=True,
    )
    assert {len(shape) for shape in layouts} == {4}


def test_two_in_one():
    """The encoder of an encoder-decoder; the decoder's padding stays."""
    torch.manual_seed(0)
    configs = tiny_config("bert"), tiny_config("bert")
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs)).eval()
    model.set_attn_implementation("eager")
    real, ids = padding("mixed"), token_ids()
    assert_same_as_eager(
        model,
        lambda: model(ids, attention_mask=real, decoder_input_ids=ids).logits,
        remove_padding=True,
    )


def test_autocast():
    model = tiny_model(AutoModel, "bert")
    real = padding("mixed")
    with torch.autocast("cpu", torch.bfloat16):
        with hfp.patched(model):
            expected = model(token_ids(), attention_mask=real).last_hidden_state[real == 1]
        with hfp.patched(model, remove_padding=True):
            found = model(token_ids(), attention_mask=real).last_hidden_state[real == 1]
    # Matrices of other sizes add in another order: two units of bf16's last place.
    bound = 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_peft_and_chunked_loss(layouts):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(AutoModelForMaskedLM, "bert")
    lora = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(model, lora)
    real = padding("mixed")
    labels = token_ids().masked_fill(real == 0, -100)
    call = {"input_ids": token_ids(), "attention_mask": real, "labels": labels}
    expected, theirs = logits_and_gradients(lambda: model(**call).loss, model, None)
    layouts.clear()
    with hfp.patched(model, remove_padding=True), hfp.memory.chunked_loss(model, chunk=5):
        found, ours = logits_and_gradients(lambda: model(**call).loss, model, None)
    assert_close(found, expected, "loss")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)
    assert {len(shape) for shape in layouts} == {3}


def test_ddp(tmp_path):
    model = tiny_model(AutoModelForMaskedLM, "bert")
    real = padding("mixed")
    forward = lambda m: m(token_ids(), attention_mask=real).logits  # noqa: E731
    expected, theirs = logits_and_gradients(lambda: forward(model), model, real)
    hfp.patch(model, remove_padding=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        found, ours = logits_and_gradients(lambda: forward(parallel), model, real)
    finally:
        torch.distributed.destroy_process_group()
    assert_close(found, expected, "logits")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)


def _state(model):
    return [
        (name, {key: (id(value), repr(value)) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def test_restored_and_copied(layouts):
    model = tiny_model(AutoModel, "bert")
    real = padding("mixed")
    before = _state(model)
    patch = hfp.patch(model, remove_padding=True)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    patch.restore()
    assert _state(model) == before
    for twin in twins:
        for settings, rank in (
            ({}, 3),
            ({"remove_padding": True}, 3),
            ({"remove_padding": False}, 4),
        ):
            layouts.clear()
            with hfp.patched(twin, **settings):
                twin(token_ids(), attention_mask=real)
            assert {len(shape) for shape in layouts} == {rank}, settings


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled(compiler):
    """With a break before and behind the encoder; once for each number of tokens, then for any."""
    model = tiny_model(AutoModel, "bert", num_hidden_layers=1)
    graphs, shapes = [], set()

    def count(graph, inputs):
        graphs.append(graph)
        shapes.update(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph.forward

    compiled = torch.compile(model, backend=count)

    def run(lengths):
        real = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        results = []
        for called, settings in ((model, {}), (compiled, {"remove_padding": True})):
            forward = lambda m=called: m(token_ids(), attention_mask=real).last_hidden_state  # noqa: E731
            with hfp.patched(model, **settings):
                results.append(logits_and_gradients(forward, model, real))
        (expected, theirs), (found, ours) = results
        assert_close(found, expected, "compiled")
        for name, gradient in ours.items():
            assert_close(gradient, theirs[name], name)
        return len(graphs)

    made = [run(lengths) for lengths in ((12, 8), (11, 3), (9, 5), (7, 6), (10, 4))]
    assert made[-1] == made[2], made
    assert (1, 20, model.config.hidden_size) in shapes  # the first batch's real tokens


def test_compiled_whole_where_nothing_is_padded(compiler):
    model = tiny_model(AutoModel, "bert", num_hidden_layers=1)
    expected = model(token_ids()).last_hidden_state
    with hfp.patched(model, remove_padding=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(compiled(token_ids()).last_hidden_state, expected, "compiled")
        real = padding("left")
        refusal = "reads on the host how many tokens"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=refusal):
            compiled(token_ids(), attention_mask=real)


def test_exported_padded():
    model = tiny_model(AutoModel, "bert", num_hidden_layers=1)
    real = padding("mixed")
    expected = model(token_ids(), attention_mask=real).last_hidden_state[real == 1]
    with hfp.patched(model, remove_padding=True):
        program = torch.export.export(model, (token_ids(), real))
    found = program.module()(token_ids(), real).last_hidden_state
    assert_close(found[real == 1], expected, "exported")


def test_refused():
    with pytest.raises(hfp.UnsupportedModelError, match="encoders like BERT"):
        hfp.patch(tiny_model(AutoModelForCausalLM, "llama"), remove_padding=True)
    with pytest.raises(hfp.UnsupportedModelError, match="encoders like BERT"):
        hfp.patch(tiny_model(AutoModelForCausalLM, "bert", is_decoder=True), remove_padding=True)
    model = tiny_model(AutoModel, "bert", chunk_size_feed_forward=4)
    with pytest.raises(hfp.UnsupportedModelError, match="chunk_size_feed_forward"):
        hfp.patch(model, remove_padding=True)
    assert not hasattr(model.config, "hfp")
