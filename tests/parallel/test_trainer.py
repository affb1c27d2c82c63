"""A Trainer whose processes share sequences learns as one process does."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState

import hf_flash_patch as hfp
from hf_flash_patch.errors import ParallelError
from tests.training import corpus
from tests.training.processes import run

STEPS = 3
LENGTH = 48


def of_length(collator):
    """Batches of one length, that processes can share."""

    def collate(rows):
        batch = collator(rows)
        fill = {"labels": corpus.IGNORED}
        return {
            name: F.pad(x, (0, LENGTH - x.shape[1]), value=fill.get(name, 0))
            for name, x in batch.items()
        }

    return collate


def counted(predicted):
    """Tokens that were asked for, and those predicted right."""
    labels = torch.from_numpy(predicted.label_ids)[:, 1:]
    right = torch.from_numpy(predicted.predictions)[:, :-1].argmax(-1) == labels
    return {"asked": int((labels != corpus.IGNORED).sum()), "right": int(right.sum())}


# Model, collator, memory techniques.
RUNS = {
    "llama": ("llama", of_length(corpus.padded), False),
    "gpt2": ("gpt2", of_length(corpus.padded), False),
    "techniques": ("llama", of_length(corpus.padded), True),
}


def learn(name, folder, processes=1, method="auto"):
    """Losses of some steps, and the evaluation after them, whose last batch is not full."""
    torch.set_num_threads(1)
    family, collator, techniques = RUNS[name]
    model = corpus.model_of(family)
    hfp.patch(model)
    if techniques:
        hfp.memory.chunked_loss(model, chunk=13)
        hfp.memory.offload_checkpoints(model, min_bytes=0)
        hfp.memory.tile_layers(model, tile=7)
    more = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    if processes > 1:
        more["parallelism_config"] = ParallelismConfig(cp_size=processes)
    more["per_device_eval_batch_size"] = 4
    trainer = corpus.trainer_of(model, folder, collator, **more)
    trainer.compute_metrics = None if techniques else counted
    if processes > 1:
        hfp.parallel.share_in_trainer(trainer, method=method)
    trainer.train()
    found = trainer.evaluate(corpus.documents(7))
    counts = [found["eval_" + name] for name in (() if techniques else ("asked", "right"))]
    return corpus.curve(trainer).tolist(), [found["eval_loss"], *counts]


def by_hand(processes=2):
    """The first loss of a loop of one's own, with accelerate."""
    model = corpus.model_of("llama")
    hfp.patch(model)
    batch = of_length(corpus.padded)(corpus.documents(4))
    if processes > 1:
        accelerator = Accelerator(parallelism_config=ParallelismConfig(cp_size=processes))
        hfp.parallel.share_in_accelerator(accelerator, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, _ = accelerator.prepare(model, optimizer)
        assert accelerator.gather_for_metrics({"row": torch.ones(3)})["row"].tolist() == [1, 1, 1]
        assert accelerator.gather_for_metrics([{"row": "a"}, {"row": "b"}])[-1] == {"row": "b"}
        assert accelerator.gather_for_metrics(["a", "b"], use_gather_object=True) == ["a", "b"]
    return model(**batch).loss.item()


def check(folder):
    assert by_hand() == pytest.approx(by_hand(processes=1), rel=1e-5)
    AcceleratorState._reset_state()
    found = []
    for name, method in (("llama", "ring"), ("llama", "ulysses"), ("gpt2", "auto")):
        found.append(learn(name, folder, processes=2, method=method))
    return [*found, learn("techniques", folder, processes=2)]


def test_learns_as_one_process_does(tmp_path):
    expected = {name: learn(name, tmp_path) for name in ("llama", "gpt2")}
    for found in run(2, check, tmp_path, fsdp=True):
        for name, (curve, evaluated) in zip(
            ("llama", "llama", "gpt2", "llama"), found, strict=True
        ):
            assert curve == pytest.approx(expected[name][0], rel=1e-4)
            assert evaluated == pytest.approx(expected[name][1][: len(evaluated)], rel=1e-4)


def not_shared():
    """accelerate's own context parallelism, of a patched model."""
    model = corpus.model_of("llama")
    hfp.patch(model, mask=hfp.masks.sliding_window(7))
    accelerator = Accelerator(parallelism_config=ParallelismConfig(cp_size=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, _ = accelerator.prepare(model, optimizer)
    ids = of_length(corpus.padded)(corpus.documents(2))["input_ids"]
    buffers = {"buffers": [ids], "buffer_seq_dims": [1], "no_restore_buffers": {ids}}
    with accelerator.maybe_context_parallel(**buffers):
        try:
            return model(ids).logits.shape
        except ParallelError as error:
            return str(error)


def test_accelerates_own_way_is_refused():
    for said in run(2, not_shared, fsdp=True):
        assert "every process would see its own tokens only" in said


@pytest.mark.parametrize("setting", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_of_whole_rows(tmp_path, setting):
    model = corpus.model_of("llama")
    with hfp.patched(model):
        more = {setting: 0.1} if setting == "label_smoothing_factor" else {}
        trainer = corpus.trainer_of(model, tmp_path, **more)
        trainer.compute_loss_func = None if more else counted
        with pytest.raises(ParallelError, match=f"{setting} computes the loss of whole rows"):
            hfp.parallel.share_in_trainer(trainer)


def test_one_process_shares_nothing(tmp_path):
    model = corpus.model_of("llama")
    with hfp.patched(model):
        trainer = corpus.trainer_of(model, tmp_path)
        with pytest.raises(ParallelError, match="set cp_size"):
            hfp.parallel.share_in_trainer(trainer)
