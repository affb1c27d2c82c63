"""patch(remove_padding=True): layers that run without padding, results that do not notice."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import hf_flash_patch as hfp
from hf_flash_patch.families import FAMILIES
from hf_flash_patch.integration.survey import survey
from tests.integration.tiny import (
    assert_close,
    logits_and_gradients,
    padding,
    tiny_config,
    tiny_model,
    token_ids,
)

# Of the families' model types those that go through AttentionInterface.
ENCODERS = (
    "albert",
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "mobilebert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "splinter",
    "xlm-roberta",
    "xlm-roberta-xl",
)
SMALL = {"mobilebert": {"intra_bottleneck_size": 32, "embedding_size": 32, "hidden_size": 32}}


@pytest.fixture
def bert():
    return tiny_model(AutoModelForMaskedLM, "bert")


def _shapes(model):
    """(rows, tokens) of what the first linear layer of every attention is given, as they come."""
    seen = []
    for attention in survey(model):
        first = next(m for m in attention.module.modules() if isinstance(m, torch.nn.Linear))
        first.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def _hidden(model, mask, **inputs):
    ids = token_ids()
    return lambda: model(ids, attention_mask=mask, **inputs).last_hidden_state


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("kind", ["right", "left", "holes", "mixed"])
def test_same_as_padded(family, kind):
    model = tiny_model(AutoModel, family, **SMALL.get(family, {}))
    mask = padding(kind)
    expected, expected_gradients = logits_and_gradients(_hidden(model, mask), model, mask)
    with hfp.patched(model, remove_padding=True) as patch:
        seen = _shapes(model)
        actual, gradients = logits_and_gradients(_hidden(model, mask), model, mask)
    assert_close(actual, expected, "hidden states")
    assert set(seen) == {(1, int(mask.sum()))}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], f"gradient of {name}")
    assert "padding  removed for the layers of" in str(patch)
    assert "padding" in patch._repr_html_() and patch.to_dict()["padding"]


def test_the_table_knows_every_encoder_that_is_tested():
    known = {t for family in FAMILIES if family.encoder for t in family.model_types}
    assert set(ENCODERS) <= known
    assert not {"layoutlm", "xmod", "mpnet", "gpt2", "llama", "modernbert"} & known


@pytest.mark.parametrize("kind", ["none", "ones"])
def test_batches_without_padding_are_left_alone(bert, kind):
    mask = None if kind == "none" else torch.ones(2, 12, dtype=torch.long)
    expected = bert(token_ids(), attention_mask=mask).logits
    hfp.patch(bert, remove_padding=True)
    seen = _shapes(bert)
    assert_close(bert(token_ids(), attention_mask=mask).logits, expected, "logits")
    assert set(seen) == {(2, 12)}


def test_padding_is_zero(bert):
    hfp.patch(bert, remove_padding=True)
    mask = padding("mixed")
    hidden = bert.bert(token_ids(), attention_mask=mask).last_hidden_state
    assert not hidden[~mask.bool()].any() and hidden[mask.bool()].all()


def test_a_row_without_a_token(bert):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    expected = bert(token_ids(), attention_mask=mask).logits[1]
    hfp.patch(bert, remove_padding=True)
    assert_close(bert(token_ids(), attention_mask=mask).logits[1], expected, "logits")
    mask[1] = 0
    assert bert(token_ids(), attention_mask=mask).logits.isfinite().all()


def test_packed_documents_next_to_padding(bert):
    """Positions that start anew mean documents, with padding taken out as with it in place."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 0], [*range(9), 0, 0, 0]])
    mask = torch.tensor([[1] * 10 + [0] * 2, [1] * 9 + [0] * 3])
    call = {"attention_mask": mask, "position_ids": positions}
    results = []
    for remove_padding in (False, True):
        with hfp.patched(bert, remove_padding=remove_padding):
            results.append(
                logits_and_gradients(lambda: bert(token_ids(), **call).logits, bert, mask)
            )
    (expected, expected_gradients), (actual, gradients) = results
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def _runs_padded(model, **inputs):
    seen = _shapes(model)
    expected = model(token_ids(), **inputs)
    with hfp.patched(model, remove_padding=True):
        del seen[:]
        actual = model(token_ids(), **inputs)
    assert set(seen) == {(2, 12)}
    return actual, expected


def test_hidden_states_are_the_padded_ones(bert):
    mask = padding("mixed")
    actual, expected = _runs_padded(bert, attention_mask=mask, output_hidden_states=True)
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine[mask.bool()], theirs[mask.bool()], "hidden states")


def test_a_mask_of_your_own_runs_padded(bert):
    mask = torch.full((2, 1, 12, 12), torch.finfo(torch.float32).min).triu(1)
    actual, expected = _runs_padded(bert, attention_mask=mask)
    assert_close(actual.logits, expected.logits, "logits")


def test_attention_weights_stay_refused(bert):
    hfp.patch(bert, remove_padding=True)
    with pytest.raises(hfp.UnsupportedModelError, match="output_attentions=True"):
        bert(token_ids(), attention_mask=padding("left"), output_attentions=True)


@pytest.mark.parametrize("given", ["embeds", "tuple", "keywords"])
def test_forms_of_the_call(given):
    model = tiny_model(AutoModel, "bert")
    mask, ids = padding("right"), token_ids()
    expected = model(ids, attention_mask=mask)
    with hfp.patched(model, remove_padding=True):
        if given == "embeds":
            embeds = model.get_input_embeddings()(ids)
            actual = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        elif given == "tuple":
            actual = model(ids, mask, return_dict=False)[0]
        else:
            hidden = model.embeddings(ids)
            inner = hfp_mask_of(model, hidden, mask)
            actual = model.encoder(hidden_states=hidden, attention_mask=inner).last_hidden_state
    real = mask.bool()
    assert_close(actual[real], expected.last_hidden_state[real], "hidden states")


def hfp_mask_of(model, hidden, mask):
    return model._create_attention_masks(mask, None, hidden, None, None)[0]


def test_heads_that_pool(bert):
    model = tiny_model(AutoModelForSequenceClassification, "roberta")
    mask = padding("right")
    expected = model(token_ids(), attention_mask=mask).logits
    with hfp.patched(model, remove_padding=True):
        assert_close(model(token_ids(), attention_mask=mask).logits, expected, "logits")


def test_dropout_is_reproducible_and_counts(bert):
    model = tiny_model(
        AutoModelForMaskedLM, "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3
    ).train()
    hfp.patch(model, remove_padding=True)

    def run(seed):
        torch.manual_seed(seed)
        return model(token_ids(), attention_mask=padding("mixed")).logits

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_model(
        AutoModelForMaskedLM, "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3
    ).train()
    mask = padding("mixed")

    def run():
        torch.manual_seed(0)
        return model(token_ids(), attention_mask=mask).logits

    hfp.patch(model, remove_padding=True)
    expected, expected_gradients = logits_and_gradients(run, model, mask)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual, gradients = logits_and_gradients(run, model, mask)
    assert_close(actual, expected, "logits")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_autocast(bert):
    mask = padding("mixed")

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return bert(token_ids(), attention_mask=mask).logits.float()

    with hfp.patched(bert):
        expected, _ = logits_and_gradients(run, bert, mask)
    with hfp.patched(bert, remove_padding=True):
        actual, gradients = logits_and_gradients(run, bert, mask)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # Sums of other lengths round otherwise: a unit of bf16's last place, or two.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**-6 * expected.abs().max().item())


def test_peft(bert):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        bert, LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    )
    mask = padding("mixed")
    call = lambda: model(token_ids(), attention_mask=mask).logits  # noqa: E731
    expected, expected_gradients = logits_and_gradients(call, model, mask)
    with hfp.patched(model, remove_padding=True):
        seen = _shapes(model)
        actual, gradients = logits_and_gradients(call, model, mask)
    assert set(seen) == {(1, int(mask.sum()))}
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)


def test_ddp(bert, tmp_path):
    mask = padding("mixed")
    hfp.patch(bert, remove_padding=True)
    call = lambda model: model(token_ids(), attention_mask=mask).logits  # noqa: E731
    expected, expected_gradients = logits_and_gradients(lambda: call(bert), bert, mask)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(bert, find_unused_parameters=True)
        actual, gradients = logits_and_gradients(lambda: call(model), bert, mask)
    finally:
        torch.distributed.destroy_process_group()
    assert_close(actual, expected, "logits")
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient, name)


def test_memory_techniques(bert):
    mask, labels = padding("mixed"), token_ids()
    with hfp.patched(bert, remove_padding=True):
        expected = bert(token_ids(), attention_mask=mask, labels=labels).loss
        with hfp.memory.chunked_loss(bert, chunk=5):
            loss = bert(token_ids(), attention_mask=mask, labels=labels).loss
    assert_close(loss, expected, "loss")


def _state(model):
    return [
        (name, {key: (id(value), repr(value)) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def test_restore_gives_the_exact_prior_state_back(bert):
    before = _state(bert)
    patch = hfp.patch(bert, remove_padding=True)
    assert _state(bert) != before
    patch.restore()
    assert _state(bert) == before


def test_copies_and_pickles(bert):
    hfp.patch(bert, remove_padding=True)
    mask = padding("mixed")
    expected = bert(token_ids(), attention_mask=mask).logits
    for twin in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        seen = _shapes(twin)
        assert_close(twin(token_ids(), attention_mask=mask).logits, expected, "logits")
        assert set(seen) == {(1, int(mask.sum()))}


def test_a_copy_can_be_patched_again(bert):
    hfp.patch(bert, remove_padding=True)
    twin = copy.deepcopy(bert)
    seen = _shapes(twin)
    with hfp.patched(twin, remove_padding=True):
        twin(token_ids(), attention_mask=padding("mixed"))
        assert set(seen) == {(1, int(padding("mixed").sum()))}


def test_settings_survive_saving(bert, tmp_path):
    hfp.patch(bert, remove_padding=True)
    bert.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.config.hfp["remove_padding"] is True
    with hfp.patched(again) as patch:
        assert "removed" in str(patch)
    with hfp.patched(again, remove_padding=False) as patch:
        assert patch.to_dict()["padding"] is None


def _decoder():
    return AutoModelForCausalLM.from_config(tiny_config("bert", is_decoder=True))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: tiny_model(AutoModelForCausalLM, "llama"), "no BERT-like encoder"),
        (lambda: tiny_model(AutoModel, "modernbert"), "no BERT-like encoder"),
        (_decoder, "BertModel is a decoder"),
        (
            lambda: tiny_model(AutoModel, "bert", chunk_size_feed_forward=4),
            "chunk_size_feed_forward=4",
        ),
    ],
)
def test_refused_by_name(make, text):
    model = make()
    before = _state(model)
    with pytest.raises(hfp.UnsupportedModelError, match=f"remove_padding=True: .*{text}"):
        hfp.patch(model, remove_padding=True)
    assert _state(model) == before


def test_patterns_are_refused(bert):
    with pytest.raises(hfp.MaskError, match="remove_padding=True and a mask"):
        hfp.patch(bert, remove_padding=True, mask=hfp.masks.sliding_window(4))
    assert bert.config._attn_implementation == "eager"


def test_the_encoder_of_two():
    """Encoder-decoders: the encoder's padding goes, the decoder stays, and the report says so."""
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config("bert"), tiny_config("bert")
    )
    torch.manual_seed(0)
    model = EncoderDecoderModel(config).eval()
    model.set_attn_implementation("eager")
    mask, ids = padding("mixed"), token_ids()
    call = {"attention_mask": mask, "decoder_input_ids": ids}
    expected, expected_gradients = logits_and_gradients(
        lambda: model(ids, **call).logits, model, None
    )
    with hfp.patched(model, remove_padding=True) as patch:
        actual, gradients = logits_and_gradients(lambda: model(ids, **call).logits, model, None)
    assert_close(actual, expected, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], name)
    assert "removed for the layers of encoder.encoder" in str(patch)
    assert "BertModel is a decoder" in str(patch)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_with_one_break_and_lengths_that_change(fresh_compiler):
    model = tiny_model(AutoModelForMaskedLM, "bert", num_hidden_layers=1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    masks = [padding(kind) for kind in ("left", "mixed", "holes", "right")]
    expected = [
        logits_and_gradients(
            lambda m=mask: model(token_ids(), attention_mask=m).logits, model, mask
        )
        for mask in masks
    ]
    hfp.patch(model, remove_padding=True)
    compiled = torch.compile(model, backend=count)
    made = []
    for mask, (logits, gradients) in zip(masks, expected, strict=True):
        actual, found = logits_and_gradients(
            lambda m=mask: compiled(token_ids(), attention_mask=m).logits, model, mask
        )
        assert_close(actual, logits, "logits")
        for name, gradient in found.items():
            assert_close(gradient, gradients[name], name)
        made.append(len(graphs))
    assert made[-1] == made[1], "totals that change compile anew"


def test_compiled_as_one_graph_where_nothing_is_padded(fresh_compiler):
    model = tiny_model(AutoModelForMaskedLM, "bert", num_hidden_layers=1)
    expected = model(token_ids()).logits
    hfp.patch(model, remove_padding=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(token_ids()).logits, expected, "logits")
    with pytest.raises(Exception, match="counts the real tokens"):
        compiled(token_ids(), attention_mask=padding("left"))
