"""Models whose sequences processes share against one process, on gloo: loss and gradients."""

import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

import hf_flash_patch as hfp
from hf_flash_patch.errors import MaskError, ParallelError
from tests.integration.tiny import assert_close, tiny_model
from tests.training.processes import run

IGNORED = -100
WORDS = 99
SEQLEN = 96  # of cases that need no blocks
WHOLE_BLOCKS = 1024  # of four processes, two chunks each


def batch(seqlen=SEQLEN, rows=2, seed=0):
    """Tokens, a third of which have no label; more in one half than in the other."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, seqlen), generator=draw)
    chance = torch.linspace(0.1, 0.6, seqlen).expand(rows, -1)
    labels = ids.masked_fill(torch.bernoulli(chance, generator=draw).bool(), IGNORED)
    return {"input_ids": ids, "labels": labels}


def padded(seqlen=SEQLEN):
    """One row padded on the left, one on the right."""
    found = batch(seqlen)
    mask = torch.ones_like(found["input_ids"])
    mask[0, : seqlen // 3] = 0
    mask[1, -seqlen // 5 :] = 0
    found["labels"] = found["labels"].masked_fill(mask == 0, IGNORED)
    return {**found, "attention_mask": mask}


def right_padded():
    """As BERT's tokenizers pad, with the token that RoBERTa finds its positions by."""
    found = padded()
    found["attention_mask"][0] = 1
    real = found["attention_mask"].bool()
    return {**found, "input_ids": found["input_ids"].masked_fill(~real, 0)}


def packed(seqlen=SEQLEN):
    """Documents of 5, 40 and the rest, kept apart by their positions."""
    found = batch(seqlen, rows=1)
    lengths = [5, 40, seqlen - 45]
    positions = torch.cat([torch.arange(n) for n in lengths])
    found["labels"][0, positions == 0] = IGNORED
    return {**found, "position_ids": positions[None]}


def with_gaps():
    """Positions that leave some out, in one document as the mask has it: all are real."""
    found = batch()
    position = torch.arange(SEQLEN)
    found["position_ids"] = (position + 7 * (position >= 50))[None]
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


def long(function):
    return lambda: function(WHOLE_BLOCKS)


UNEVEN = hfp.masks.sliding_window(40) | hfp.masks.global_tokens(range(300, 500))
WINDOW = hfp.masks.sliding_window(150)
SPARSE = hfp.masks.sliding_window(40) | hfp.masks.global_tokens(3)
PER_HEAD = hfp.masks.per_head([hfp.masks.sliding_window(9 * i) for i in range(1, 5)])
# Family, its config, the patch, the batch, and the methods that can.
ALL = ("ring", "ulysses", "both")
CASES = {
    "causal": ("llama", {}, {}, batch, ALL),
    "gpt2": ("gpt2", {}, {}, batch, ALL),
    "opt padded": ("opt", {}, {}, padded, ALL),
    "bert": ("bert", {}, {}, right_padded, ALL),
    "roberta": ("roberta", {}, {}, right_padded, ALL),
    "modernbert": ("modernbert", {"layer_types": ["full_attention"] * 2}, {}, batch, ALL),
    "padded": ("llama", {}, {}, padded, ALL),
    "packed": ("llama", {}, {}, packed, ("ulysses",)),
    "positions with gaps": ("llama", {}, {}, with_gaps, ("ulysses",)),
    "sinks": ("gpt_oss", {"layer_types": ["full_attention"] * 2}, {}, batch, ALL),
    "model's window": ("mistral", {"sliding_window": 20}, {}, padded, ("ulysses",)),
    "top k": ("llama", {}, {"mask": hfp.masks.top_k_blocks(2, block_size=32)}, batch, ("ulysses",)),
    "softcap": ("gemma2", {"layer_types": ["full_attention"] * 2}, {}, batch, ALL),
    "long packed": ("llama", {}, {}, long(packed), ("ring", "both")),
    "long window": ("mistral", {"sliding_window": 200}, {}, long(batch), ("ring", "both")),
    "window and padding": ("gpt2", {}, {"mask": WINDOW}, long(padded), ALL),
    "sparse": ("bert", {}, {"mask": SPARSE}, long(batch), ALL),
    "uneven": ("bert", {}, {"mask": UNEVEN}, long(batch), ("ring", "both")),
    "per head": ("llama", {}, {"mask": PER_HEAD}, long(batch), ALL),
}


def model_of(case):
    family, overrides, settings, make, _ = CASES[case]
    bidirectional = family in ("bert", "roberta", "modernbert")
    inputs = make()
    overrides = {"max_position_embeddings": WHOLE_BLOCKS + 2, **overrides}
    if family == "gpt2":
        overrides["n_positions"] = overrides["max_position_embeddings"]
    auto = AutoModelForMaskedLM if bidirectional else AutoModelForCausalLM
    model = tiny_model(auto, family, **overrides)
    hfp.patch(model, **settings)
    return model, inputs


def loss_and_gradients(model, inputs, **more):
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def start():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def averaged(gradients):
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients


def check_cases():
    _, size = start()
    failed = []
    for case in CASES:
        for method in CASES[case][-1]:
            if (method == "both") != (size == 4) and (size == 2 or case != "padded"):
                continue  # four are slow on two cores, and two make no ring of those
            try:
                model, inputs = model_of(case)
                expected, gradients = loss_and_gradients(model, inputs)
                with hfp.parallel.sequence_parallel(model, method=method):
                    loss, ours = loss_and_gradients(model, inputs)
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
                for name, gradient in averaged(ours).items():
                    assert_close(gradient, gradients[name], name)
            except Exception as error:
                failed.append(f"{case} by {method}: {type(error).__name__}: {error}")
    return failed


@pytest.mark.parametrize("size", [2, 4])
def test_like_one_process(size):
    for failed in run(size, check_cases):
        assert not failed, "\n".join(failed)


def check_a_mesh():
    """Two pairs of processes with batches of their own; a checkpoint in every layer; DDP."""
    rank, _ = start()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, _ = model_of("causal")
    both = [batch(seed=1), batch(seed=2)]
    items = [(x["labels"][:, 1:] != IGNORED).sum() for x in both]
    expected = [loss_and_gradients(copy.deepcopy(model), x) for x in both]
    model.gradient_checkpointing_enable()
    model.train()
    sp = hfp.parallel.sequence_parallel(model, mesh["sp"])
    assert str(sp) == "sequences of LlamaForCausalLM: 2 processes that exchange heads"
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    mine = both[rank // 2]
    loss, gradients = loss_and_gradients(ddp, mine)
    torch.testing.assert_close(loss, expected[rank // 2][0])
    for name, gradient in gradients.items():
        name = name.removeprefix("module.")
        assert_close(gradient, sum(g[name] for _, g in expected) / 2, name)
    # As Trainer calls it: a share of the sum over all batches.
    share, gradients = loss_and_gradients(ddp, mine, num_items_in_batch=sum(items))
    dist.all_reduce(share)
    weighed = sum(i * x for i, (x, _) in zip(items, expected, strict=True)) / sum(items)
    torch.testing.assert_close(share, weighed)
    for name, gradient in gradients.items():
        name = name.removeprefix("module.")
        total = sum(i * g[name] for i, (_, g) in zip(items, expected, strict=True)) / sum(items)
        assert_close(gradient * 4, total, name)
    return True


def test_a_mesh():
    assert all(run(4, check_a_mesh))


def check_the_handle():
    rank, size = start()
    model, inputs = model_of("causal")
    whole = model(**inputs)
    for method, text in (("ring", "a ring of 4 processes"), ("both", "a ring of 2 times 2")):
        sp = hfp.parallel.sequence_parallel(model, method=method)
        assert text in str(sp)
        # Positional arguments, a tuple, no labels, no gradient.
        with torch.no_grad():
            (logits,) = model(inputs["input_ids"], return_dict=False)
            loss = model(**inputs, return_dict=False)[0]
            embedded = model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
        assert logits.shape[1] == SEQLEN // size
        torch.testing.assert_close(sp.unshard(logits), whole.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sp.unshard(embedded.logits), whole.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(loss, whole.loss)
        shared_copy = copy.deepcopy(model)
        torch.testing.assert_close(shared_copy(**inputs).loss, whole.loss)
        sp.restore()
        sp.restore()
        torch.testing.assert_close(model(**inputs).logits, whole.logits, atol=0.0, rtol=0.0)
        assert "_loss_function" not in vars(model) and not model._forward_pre_hooks
    sp, model = hfp.parallel.sequence_parallel(model), weakref.ref(model)
    del whole, embedded, shared_copy
    gc.collect()
    return model() is None  # a handle keeps no model alive


def check_uneven_masks():
    """The second chunk, which is dear, goes with the first, the cheapest, not with the third."""
    start()
    model, inputs = model_of("uneven")
    with hfp.parallel.sequence_parallel(model, method="ring") as shared:
        ids = torch.arange(WHOLE_BLOCKS)[None]
        mine = shared.shard(ids)
        return mine[0, :: WHOLE_BLOCKS // 4].tolist(), torch.equal(shared.unshard(mine), ids)


def test_uneven_masks():
    assert run(2, check_uneven_masks) == [([0, 256], True), ([512, 768], True)]


def test_the_handle():
    assert all(run(4, check_the_handle))


def scoring(model):
    """A model whose forward scores tokens itself, as trl's do; its loss, by trl's rules."""
    inner = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
        out = inner(*args, **kwargs)
        logits = out.logits
        if shift_labels is None:
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        out.mask = shift_labels != IGNORED
        out.scores = -F.cross_entropy(logits.mT, shift_labels, reduction="none")
        out.loss = -out.scores.sum() / out.mask.sum().clamp(min=1)
        return out

    model.forward = forward


def check_scores():
    start()
    model, inputs = model_of("causal")
    scoring(model)
    whole = model(**inputs, fused_lm_head=True)
    for method in ("ring", "ulysses"):
        with hfp.parallel.sequence_parallel(model, method=method) as shared:
            found = model(**inputs, fused_lm_head=True)
            torch.testing.assert_close(found.loss, whole.loss)
            torch.testing.assert_close(shared.unshard(found.scores)[:, :-1], whole.scores)
            assert torch.equal(shared.unshard(found.mask)[:, :-1], whole.mask)
    return True


def test_models_that_score_tokens_themselves():
    assert all(run(2, check_scores))


def expecting(*errors):
    """What calls raise, as a list of texts, and a function that makes a call."""
    said = []

    def expect(function, *arguments, **options):
        try:
            function(*arguments, **options)
            said.append("nothing")
        except errors as error:
            said.append(str(error))

    return said, expect


def differ():
    """What the second process does otherwise, each time."""
    rank, _ = start()
    model, inputs = model_of("causal")
    share = hfp.parallel.sequence_parallel
    said, expect = expecting(ParallelError, TypeError)

    expect(share, model, method="ulysses" if rank else "ring")
    if rank:
        hfp.unpatch(model)
    expect(share, model)
    if rank:
        hfp.patch(model, mask=WINDOW)
    expect(share, model)
    if rank:
        hfp.unpatch(model)
        hfp.patch(model)
    sp = share(model, method="ring")
    expect(model.train(rank == 0), **inputs)
    model.eval()
    expect(model.to(torch.bfloat16 if rank else torch.float32), **inputs)
    model.to(torch.float32)
    expect(model, **inputs, **({"output_router_logits": True} if rank else {}))
    expect(model, **inputs, output_attentions=rank == 1)
    expect(model, **inputs, num_items_in_batch=torch.tensor(40 + rank))
    expect(model, **inputs, cu_seq_lens_q=torch.tensor([0, 30 + rank, SEQLEN]))
    if rank:
        expect(model, inputs["input_ids"], None, None, None, None, None, None, None, None, None)
    else:
        expect(model, **inputs)
    if rank:
        hfp.unpatch(model)
        hfp.patch(model, mask=WINDOW)
    expect(model, **inputs)
    if rank:
        hfp.unpatch(model)
    expect(model, **inputs)
    sp.restore()
    return said


def test_processes_that_differ():
    """All of them say so, or that another one does; none waits."""
    other = "another of the processes that share a sequence cannot go on"
    expected = [
        ("settings (method)",) * 2,
        (other, "patch(model) first"),
        ("settings (masks)",) * 2,
        ("settings (training mode)",) * 2,
        ("settings (dtype)",) * 2,
        (other, "called with output_router_logits"),
        ("batches (flags)",) * 2,
        ("batches (num_items_in_batch)",) * 2,
        ("batches (cu_seq_lens_q)",) * 2,
        (other, "too many positional arguments"),
        ("settings (masks)",) * 2,
        (other, "no longer calls us"),
    ]
    for rank, said in enumerate(run(2, differ)):
        for texts, error in zip(expected, said, strict=True):
            assert texts[rank] in error


def interrupt():
    start()
    model, inputs = model_of("causal")

    def press(*_):
        raise KeyboardInterrupt

    pressed = model.lm_head.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt), hfp.parallel.sequence_parallel(model, method="ring"):
        model(**inputs)
    pressed.remove()
    model(input_ids=inputs["input_ids"][:, :-1])
    return True


def test_a_keyboard_interrupt_leaves_no_sequence_behind():
    assert all(run(2, interrupt))


def errors():
    rank, size = start()
    model, inputs = model_of("causal")
    share = hfp.parallel.sequence_parallel
    said, expect = expecting(MaskError, ParallelError)

    expect(share, model, method="rings")
    expect(share, tiny_model(AutoModelForCausalLM, "llama"))
    t5 = tiny_model(AutoModelForCausalLM, "bloom")
    expect(share, t5)
    encoder = tiny_model(AutoModelForMaskedLM, "bert")
    hfp.patch(encoder, remove_padding=True)
    expect(share, encoder)
    odd = tiny_model(AutoModelForCausalLM, "gpt2", n_head=2, num_attention_heads=2)
    hfp.patch(odd)
    expect(share, odd, method="ulysses")
    sp = share(model, method="ring")
    expect(share, model)
    mine = {**inputs, "input_ids": inputs["input_ids"] + (rank == 1)}
    expect(model, **mine)
    expect(model, inputs["input_ids"][:, : 90 + (rank == 2)])
    expect(model, inputs["input_ids"][:, :90])
    expect(model, inputs["input_ids"], attention_mask=torch.ones(1, 1, SEQLEN, SEQLEN))
    expect(model, inputs["input_ids"], past_key_values=DynamicCache())  # empty, therefore false
    expect(model, inputs["input_ids"], logits_to_keep=1)
    expect(model, inputs["input_ids"], weights=torch.ones(3))
    expect(model.model, inputs["input_ids"])
    model.train()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    expect(model, **inputs)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    hfp.unpatch(model)
    expect(model, **inputs)
    sp.restore()
    hfp.patch(model, mask=WINDOW)
    with share(model, method="ring"):
        expect(model, **inputs)
    return said


def test_errors_on_every_rank():
    expected = [
        "it has to be one of auto, ring",
        "does not call us; patch(model) first",
        "not known to mix tokens in self-attention alone",
        "was patched with remove_padding",
        "2 heads do not divide among 4",
        "shared already",
        "different batches (input_ids)",
        "different batches (length, input_ids)",
        "90 tokens do not divide among a ring of 4 processes; pad the batch to a multiple of 8",
        "attention_mask has shape (1, 1, 96, 96)",
        "called with past_key_values; a cache holds whole sequences",
        "logits_to_keep",
        "called with weights",
        "call the model that sequence_parallel was given",
        "a ring has no attention dropout",
        "no longer calls us",
        "do not lie on blocks of 128",
    ]
    for said in run(4, errors):
        for text, error in zip(expected, said, strict=True):
            assert text in error
