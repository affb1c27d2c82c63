"""A patched model on two processes: DDP and FSDP2 through accelerate, DeepSpeed where it is."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import DataCollatorWithFlattening

import hf_flash_patch as hfp
from tests.integration.tiny import assert_close

from .corpus import IGNORED, documents, model_of, padded
from .processes import run

WORLD_SIZE = 2
ROWS = 4


def full(rows):
    """The first tokens of the rows as one batch without padding."""
    shortest = min(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name][:shortest] for row in rows])
        for name in ("input_ids", "labels")
    }


def flattened(rows):
    """The rows in one, kept apart by their positions."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows, return_tensors="pt")


def sparse():
    return hfp.masks.butterfly(4) | hfp.masks.global_tokens(2)


# Collator, settings of the patch, and whether the memory techniques are on.
CASES = {
    "causal": (full, dict, False),
    "window": (full, lambda: {"mask": hfp.masks.sliding_window(5)}, False),
    "blocks": (padded, lambda: {"mask": sparse()}, False),
    "packed": (flattened, dict, False),
    "padded": (padded, dict, False),
    "memory": (flattened, dict, True),
}


def rows():
    return [row for row in documents(24) if len(row["input_ids"]) >= 12][:ROWS]


def patched(case, family="llama"):
    collate, settings, memory = CASES[case]
    model = model_of(family)
    hfp.patch(model, **settings())
    if memory:
        hfp.memory.chunked_loss(model, chunk=13)
        hfp.memory.offload_checkpoints(model, min_bytes=0)
        hfp.memory.tile_layers(model, tile=7)
    return model, collate


def loss_and_gradients(model, batch, items):
    loss = model(**batch, num_items_in_batch=items).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        gradients[name.removeprefix("module.")] = gradient
    return loss.detach(), gradients


def items_of(batch):
    return (batch["labels"][:, 1:] != IGNORED).sum()


def on_a_process():
    """Loss and gradients of every case, of this rank's rows."""
    accelerator = Accelerator(cpu=True)
    found = {}
    for case in CASES:
        model, collate = patched(case)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, _ = accelerator.prepare(model, optimizer)
        mine = rows()[accelerator.process_index :: WORLD_SIZE]
        shortest = min(len(row["input_ids"]) for row in rows())
        if collate is full:
            mine = [{name: ids[:shortest] for name, ids in row.items()} for row in mine]
        batch = collate(mine)
        items = items_of(batch)
        dist.all_reduce(items)
        # Gradients are averaged over the processes, so each counts its loss twice.
        loss, gradients = loss_and_gradients(model, batch, items / WORLD_SIZE)
        dist.all_reduce(loss)
        if accelerator.is_main_process:  # files: small, and a queue's own threads are not forked
            found[case] = (loss.item() / WORLD_SIZE, {k: v.tolist() for k, v in gradients.items()})
    return found


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_equal_to_one_process(fsdp):
    found, _ = run(WORLD_SIZE, on_a_process, fsdp=fsdp)
    for case in CASES:
        model, collate = patched(case)
        batch = collate(rows())
        loss, expected = loss_and_gradients(model, batch, items_of(batch))
        assert found[case][0] == pytest.approx(loss.item(), rel=1e-6), case
        assert found[case][1].keys() == expected.keys()
        for name, gradient in found[case][1].items():
            assert_close(torch.tensor(gradient), expected[name], f"{case}: {name}")


def with_a_head_of_its_own():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, collate = patched("memory")
    fully_shard(model.lm_head)
    fully_shard(model)
    try:
        model(**collate(rows()))
    except hfp.UnsupportedModelError as error:
        return str(error)


def test_an_output_layer_that_is_sharded_by_itself_is_refused():
    """Its weight is gone when the loss is computed; every rank says so."""
    for said in run(WORLD_SIZE, with_a_head_of_its_own):
        assert "Shard it with the whole model" in said


def patch_what_is_sharded():
    from torch.distributed.fsdp import fully_shard

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
    for said in run(WORLD_SIZE, patch_what_is_sharded):
        assert len(said) == 4 and all("sharded by FSDP" in text for text in said)
