"""A patched model on several processes, DDP and FSDP2 through accelerate, against one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_flash_patch as hfp
from tests.integration.tiny import assert_close

from .corpus import documents, flattened, items_of, masked, model_of, padded
from .processes import run

ROWS = 8
ADAPTER = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
WRAPPERS = ("module.", "_checkpoint_wrapped_module.")  # in the names of parameters


def rows():
    return [row for row in documents(40) if len(row["input_ids"]) >= 12][:ROWS]


def full(rows_):
    """The rows, all as short as the shortest, without padding."""
    shortest = min(len(row["input_ids"]) for row in rows())
    return padded([{name: ids[:shortest] for name, ids in row.items()} for row in rows_]) | {
        "attention_mask": None
    }


def sparse():
    return hfp.masks.butterfly(4) | hfp.masks.global_tokens(2)


def with_memory(model):
    hfp.memory.chunked_loss(model, chunk=13)
    hfp.memory.offload_checkpoints(model, min_bytes=0)
    hfp.memory.tile_layers(model, tile=7)
    return model


def with_adapter(model):
    """LongLoRA's: norms and embeddings are trained whole."""
    modules = ["embed_tokens", "norm", "input_layernorm"]
    return get_peft_model(model, LoraConfig(**ADAPTER, modules_to_save=modules))


def checkpointed(use_reentrant):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    return prepare


def keeping(model):
    """Attention's results kept; checkpoints that are switched on later, as by the Trainer."""
    hfp.memory.keep_attention(model)
    return checkpointed(True)(model)


def wrapped(model):
    """torch's own way, which FSDP's plugin of accelerate takes."""
    model.config.use_cache = False  # the cache would be filled twice
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer)
    )
    return model


@dataclass
class Case:
    """What is trained on what.

    Attributes:
        collate: makes a batch of rows.
        mask: of the patch.
        prepare: what is done to the patched model.
        family: of the model.
        accumulated: gradients are summed over batches of one row.
    """

    collate: Callable[[list], dict]
    mask: Any = None
    prepare: Callable[[Any], Any] = lambda model: model
    family: str = "llama"
    accumulated: bool = False


CASES = {
    "causal": Case(full),
    "window": Case(full, hfp.masks.sliding_window(5)),
    "blocks": Case(padded, sparse()),
    "packed": Case(flattened),
    "packed window": Case(flattened, hfp.masks.sliding_window(5), family="gpt2"),
    "padded": Case(padded),
    "bert": Case(masked, family="bert"),
    "bert blocks": Case(masked, sparse(), family="bert"),
    "accumulated": Case(padded, accumulated=True),
    "checkpoints": Case(flattened, prepare=checkpointed(False)),
    "reentrant": Case(flattened, prepare=checkpointed(True)),
    "wrapped": Case(padded, prepare=wrapped),
    "lora": Case(flattened, prepare=with_adapter),
    "memory": Case(flattened, prepare=with_memory),
    "kept": Case(padded, hfp.masks.sliding_window(5), prepare=keeping),
}


OF_FOUR = ("causal", "window", "blocks", "packed", "padded", "bert blocks", "lora")


def patched(case, **overrides):
    torch.manual_seed(0)
    model = model_of(case.family, **overrides)
    hfp.patch(model, mask=case.mask)
    return case.prepare(model)


def loss_and_gradients(case, model, mine, items, accelerator=None):
    """The loss of some rows, over `items` tokens, and the gradients, whole on every process."""
    plain = contextlib.nullcontext()
    batches = [[row] for row in mine] if case.accumulated else [mine]
    total = torch.zeros(())
    for index, batch in enumerate(map(case.collate, batches)):
        last = index == len(batches) - 1
        with plain if last or accelerator is None else accelerator.no_sync(model):
            if case.family == "bert":  # takes the mean of the batch, whatever it is told
                loss = model(**batch).loss * items_of(batch, shifted=False) / items
            else:
                loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
        total += loss.detach()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        if gradient is not None:
            gradients[name] = gradient
    return total, gradients


def items_of_all(case):
    return items_of(case.collate(rows()), shifted=case.family != "bert")


def prepared(accelerator, model, family):
    """The model in DDP or in shards."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and family == "bert":
        # accelerate 1.15 fails on what BERT's output layer shares, whatever its attention is.
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        return fully_shard(model)
    if plugin is not None:
        plugin.transformer_cls_names_to_wrap = None  # of the model before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator.prepare(model, optimizer)[0]


def on_a_process(names):
    """Loss and gradients of some cases, of this rank's rows."""
    accelerator = Accelerator(cpu=True)
    world_size = accelerator.num_processes
    found = {}
    for name in names:
        case = CASES[name]
        model = patched(case)
        model = prepared(accelerator, model, case.family)
        mine = rows()[accelerator.process_index :: world_size]
        # Gradients are averaged over the processes, so each counts its loss as often.
        items = items_of_all(case) / world_size
        loss, gradients = loss_and_gradients(case, model, mine, items, accelerator)
        dist.all_reduce(loss)
        if accelerator.is_main_process:  # files: small, and a queue's own threads are not forked
            found[name] = (loss.item() / world_size, {k: v.tolist() for k, v in gradients.items()})
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_equal_to_one_process(world_size, fsdp):
    names = list(CASES) if world_size == 2 else OF_FOUR
    found = run(world_size, on_a_process, names, fsdp=fsdp)[0]
    for name in names:
        case = CASES[name]
        loss, expected = loss_and_gradients(case, patched(case), rows(), items_of_all(case))
        assert found[name][0] == pytest.approx(loss.item(), rel=1e-6), name
        assert found[name][1].keys() == expected.keys()
        for parameter, gradient in found[name][1].items():
            assert_close(torch.tensor(gradient), expected[parameter], f"{name}: {parameter}")


def with_dropout():
    """Losses and gradients with and without checkpoints, from the same seed, another a rank."""
    accelerator = Accelerator(cpu=True)
    found = []
    for name in ("packed", "checkpoints", "reentrant", "memory"):
        case = CASES[name]
        model = patched(case, attention_dropout=0.3)
        model.config.use_cache = False  # as with checkpoints; without, other numbers are drawn
        model = prepared(accelerator, model, case.family)
        torch.manual_seed(accelerator.process_index + 1)
        mine = rows()[accelerator.process_index :: 2]
        found.append(loss_and_gradients(case, model, mine, items_of_all(case), accelerator))
    (loss, gradients), *others = found
    for other, other_gradients in others:
        torch.testing.assert_close(other, loss)
        for name, gradient in gradients.items():
            assert_close(other_gradients[name], gradient, name)
    return loss.item()


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_dropout_is_replayed(fsdp):
    """By each process for itself."""
    dropped = run(2, with_dropout, fsdp=fsdp)
    case = CASES["packed"]
    for rank, loss in enumerate(dropped):
        plain, _ = loss_and_gradients(case, patched(case), rows()[rank::2], items_of_all(case))
        assert abs(plain.item() - loss) > 1e-4


def with_a_head_of_its_own():
    dist.init_process_group("gloo")
    model = patched(CASES["memory"])
    fully_shard(model.lm_head)
    fully_shard(model)
    try:
        model(**flattened(rows()))
    except hfp.UnsupportedModelError as error:
        return str(error)


def test_an_output_layer_that_is_sharded_by_itself_is_refused():
    """Its weight is gone when the loss is computed; every rank says so."""
    for said in run(2, with_a_head_of_its_own):
        assert "Shard it with the whole model" in said


def patch_what_is_sharded():
    dist.init_process_group("gloo")
    model = model_of("llama")
    fully_shard(model)
    said = []
    for function in (hfp.patch, *hfp.memory.TECHNIQUES.values()):
        try:
            function(model)
        except hfp.UnsupportedModelError as error:
            said.append(str(error))
    return said


def test_sharding_comes_last():
    for said in run(2, patch_what_is_sharded):
        assert len(said) == 4 and all("sharded by FSDP" in text for text in said)
