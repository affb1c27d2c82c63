"""Several processes in bf16, on GPUs by the compiled kernels: torchrun -m tests.parallel.on_gpus

Loss and gradients of the cases of test_model.py, by shared sequences, DDP and FSDP2. The error,
against fp32 on one process, is at most twice that of bf16 on one process, plus a rounding of bf16.
"""

import contextlib
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_flash_patch as hfp

from .test_model import CASES, IGNORED, averaged, loss_and_gradients, model_of

ROUNDING = 2**-8
# By data parallelism: models that count tokens over processes, as their losses ask for.
APART = ("causal", "gpt2", "padded", "packed", "model's window", "per head")


def together(model, batches, **settings):
    """Loss and gradients of all batches on one process, each token counting the same."""
    items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    total = {}
    with hfp.patched(model, **settings):
        for batch in batches:
            more = {"num_items_in_batch": items} if len(batches) > 1 else {}
            loss, gradients = loss_and_gradients(model, batch, **more)
            for name, value in {"loss": loss, **gradients}.items():
                total[name] = total.get(name, 0.0) + value
    return total


def apart(model, batches, method, **settings):
    """The same by DDP or FSDP2, a batch a process."""
    items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    size = dist.get_world_size()
    model = copy.deepcopy(model)
    hfp.patch(model, **settings)
    if method == "fsdp2":
        for layer in (getattr(model.base_model, "layers", None) or model.base_model.h)[:]:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    # Gradients are averaged over the processes, so each counts its loss as often as there are.
    more = {"num_items_in_batch": items / size}
    loss, gradients = loss_and_gradients(wrapped, batches[dist.get_rank()], **more)
    dist.all_reduce(loss)
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return {"loss": loss / size} | {n.removeprefix("module."): g for n, g in whole.items()}


def shared(model, batch, method, **settings):
    """The same by processes that share the batch's sequences."""
    with hfp.patched(model, **settings), hfp.parallel.sequence_parallel(model, method=method):
        loss, gradients = loss_and_gradients(model, batch)
    return {"loss": loss, **averaged(gradients)}


def check(case, method, device):
    """What is wrong, or nothing."""
    model, inputs = model_of(case)
    settings = CASES[case][2]
    hfp.unpatch(model)
    model, inputs = model.to(device), {name: x.to(device) for name, x in inputs.items()}
    batches, by_data = [inputs], method in ("ddp", "fsdp2")
    if by_data:
        every = range(dist.get_world_size())
        batches = [{**inputs, "input_ids": (inputs["input_ids"] + i) % 90} for i in every]
    exact = together(model, batches, backend="torch", **settings)
    model = copy.deepcopy(model).to(torch.bfloat16)
    alone = together(model, batches, **settings)
    if by_data:
        found = apart(model, batches, method, **settings)
    else:
        found = shared(model, inputs, method, **settings)
    for name, true in exact.items():
        scale = true.abs().max()
        error, usual = ((x[name].float() - true).abs().max() for x in (found, alone))
        if not error <= 2 * usual + ROUNDING * scale:
            return f"{name}: {error:.2e}, on one process {usual:.2e}, of {scale:.2e}"
    return ""


def main():
    """Prints a line a case on the first process; 1 if any is wrong on any."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    with torch.cuda.device(device) if cuda else contextlib.nullcontext():
        failed = torch.zeros((), device=device)
        for case, (*_, methods) in CASES.items():
            for method in (*methods, *(("ddp", "fsdp2") if case in APART else ())):
                if method == "both" and dist.get_world_size() < 4:
                    continue
                wrong = check(case, method, device)
                failed += bool(wrong)
                if wrong or dist.get_rank() == 0:
                    result = wrong or "as one process"
                    print(f"rank {dist.get_rank()}: {case} by {method}: {result}", flush=True)
        dist.all_reduce(failed)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes: {int(failed)} wrong", flush=True)
    dist.destroy_process_group()
    return int(failed.item() > 0)


if __name__ == "__main__":
    sys.exit(main())
