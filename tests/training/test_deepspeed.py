"""A patched model under DeepSpeed's ZeRO-2 and ZeRO-3, where deepspeed is installed."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

import hf_flash_patch as hfp

from .corpus import documents, flattened, items_of, masked, model_of
from .processes import run

WORLD_SIZE = 2
STEPS = 3
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
SMALL = {"loss": {"chunk": 13}, "offload": {"min_bytes": 0}, "tile": {"tile": 7}}
CASES = (
    "llama",
    "llama checkpoints",
    "llama lora reentrant",
    "llama loss offload tile",
    "gpt2 loss tile",  # whose output layer shares its weight with the embedding
    "bert tile",
)


def made(case):
    """The model of a case, patched."""
    family, *kinds = case.split()
    model = model_of(family)
    hfp.patch(model, mask=hfp.masks.sliding_window(9))
    if "lora" in kinds:
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
        model.enable_input_require_grads()
    if {"checkpoints", "reentrant"} & set(kinds):
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in kinds})
    for name in SMALL.keys() & set(kinds):
        hfp.memory.TECHNIQUES[name](model, **SMALL[name])
    return model


def batches(rank, world_size):
    """Documents of a process, and those of all, a step at a time."""
    rows = documents(4 * STEPS)
    for step in range(STEPS):
        ours = rows[4 * step : 4 * step + 4]
        yield ours[rank::world_size], ours


def loss_of(model, case, mine, all_rows, world_size):
    """Of packed documents, or of BERT's task; gradients are averaged over the processes."""
    if case.startswith("bert"):  # takes the mean of its batch, whatever it is told
        batch, whole = masked(mine), masked(all_rows)
        share = items_of(batch, shifted=False) / items_of(whole, shifted=False)
        return model(**batch).loss * share * world_size
    items = items_of(flattened(all_rows)) / world_size
    return model(**flattened(mine), num_items_in_batch=items, use_cache=False).loss


def with_zero(stage):
    """Losses of every case's steps, over all processes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # it would compile some of its own
    deepspeed.init_distributed("gloo")
    settings = SETTINGS | {"zero_optimization": {"stage": stage}}
    found = {}
    for case in CASES:
        model = made(case)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
        found[case] = []
        for mine, all_rows in batches(dist.get_rank(), WORLD_SIZE):
            loss = loss_of(engine, case, mine, all_rows, WORLD_SIZE)
            engine.backward(loss)
            engine.step()
            loss = loss.detach()
            dist.all_reduce(loss)
            found[case].append(loss.item() / WORLD_SIZE)
    return found


def alone(case):
    """The same of one process."""
    model = made(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for mine, all_rows in batches(0, 1):
        loss = loss_of(model, case, mine, all_rows, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_equal_to_one_process(stage, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    found, _ = run(WORLD_SIZE, with_zero, stage)
    for case in CASES:
        expected = alone(case)
        assert expected[-1] < expected[0], case
        assert found[case] == pytest.approx(expected, rel=1e-5), case


def loaded_in_parts():
    """What a user of Trainer with ZeRO-3 has: a model whose weights are in parts from the start."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("gloo")
    settings = SETTINGS | {"zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_of("gpt2")
    said = ""
    try:
        hfp.patch(model, max_length=128)
    except hfp.ContextExtensionError as error:
        said = str(error)
    hfp.patch(model)
    technique = str(hfp.memory.chunked_loss(model, chunk=13))
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    losses = []
    for _ in range(STEPS):
        loss = engine(**flattened(documents(4)), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return said, technique, losses


def test_loaded_in_parts(monkeypatch):
    """Patched as any other; a longer context has to be given to the checkpoint before."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    for said, technique, losses in run(WORLD_SIZE, loaded_in_parts):
        assert "is a shard" in said and "Extend the model first" in said
        assert "99 words" in technique
        assert losses[-1] < losses[0] - 0.01
