"""Sequences that processes share against one process, on gloo."""

import os
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import hf_flash_patch as hfp
from hf_flash_patch.errors import MaskError, ParallelError
from hf_flash_patch.integration import packing
from hf_flash_patch.integration.attention_mask import AttentionMask
from hf_flash_patch.masks.part import part_of
from hf_flash_patch.parallel.attend import _lists
from hf_flash_patch.parallel.groups import Groups
from hf_flash_patch.parallel.layout import balanced, owned
from tests.training.processes import run

SEQLEN, HEADS = 1024, 8
PATTERNS = {
    "window": hfp.masks.causal() & hfp.masks.sliding_window(150),
    "global": hfp.masks.sliding_window(40) | hfp.masks.global_tokens(3),
    "documents": hfp.masks.causal() & hfp.masks.documents([0] * 100 + [1] * 500 + [2] * 424),
    "strided": hfp.masks.strided(64),
}
# (options, heads of k and v)
CASES = {
    "full": ({}, 8),
    "causal": ({"causal": True}, 8),
    "causal gqa": ({"causal": True}, 2),
    "mqa": ({"causal": True}, 1),
    "softcap": ({"causal": True, "softcap": 5.0, "softmax_scale": 0.3}, 4),
    **{name: ({"block_mask": pattern}, 4) for name, pattern in PATTERNS.items()},
    "causal and a pattern": ({"causal": True, "block_mask": PATTERNS["global"]}, 8),
}


def inputs(options, heads_k, dtype):
    draw = torch.Generator().manual_seed(0)
    batch = 2 if "key_padding_mask" in options else 1
    shapes = [(batch, SEQLEN, heads, 8) for heads in (HEADS, heads_k, heads_k, HEADS)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def padding():
    """The second row is padded on the left, the last token of the first on the right."""
    real = torch.ones(2, SEQLEN, dtype=torch.bool)
    real[1, :200] = False
    real[0, -1] = False
    return real


def alone(options, heads_k, dtype=torch.float32):
    *leaves, dout = inputs(options, heads_k, dtype)
    leaves = [x.requires_grad_() for x in leaves]
    out = hfp.flash_attn_func(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def shared(method, options, heads_k, dtype=torch.float32, group=None):
    layout = "zigzag" if method == "ring" else "contiguous"
    *leaves, dout = (
        hfp.parallel.shard(x, group, layout=layout) for x in inputs(options, heads_k, dtype)
    )
    leaves = [x.requires_grad_() for x in leaves]
    function = getattr(hfp.parallel, f"{method}_attention")
    if method == "ring" and "key_padding_mask" in options:
        real = hfp.parallel.shard(options["key_padding_mask"], group)
        options = {**options, "key_padding_mask": real}
    out = function(*leaves, group, **options)
    parts = [out, *torch.autograd.grad(out, leaves, dout)]
    return [hfp.parallel.unshard(x, group, layout=layout) for x in parts]


def compare(actual, expected, atol=2e-5, rtol=1e-4):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )


def start():
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return rank, size


def check_all():
    _, size = start()
    failed = []
    for method in ("ring", "ulysses"):
        for name, (options, heads_k) in CASES.items():
            pads = (False, True) if name in ("full", "causal gqa", "window") else (False,)
            for padded in pads:
                extra = {"key_padding_mask": padding()} if padded else {}
                given = {**options, **extra}
                try:
                    compare(shared(method, given, heads_k), alone(given, heads_k))
                except Exception as error:
                    failed.append(f"{method} {name} padded={padded}: {error}")
    # bf16: within two roundings, of which the parts cost one.
    given = {"causal": True}
    for method in ("ring", "ulysses"):
        exact = alone(given, 4)
        ours, theirs = shared(method, given, 4, torch.bfloat16), alone(given, 4, torch.bfloat16)
        for mine, one, true in zip(ours, theirs, exact, strict=True):
            error, reference = (mine - true).abs().max(), (one - true).abs().max()
            if not error <= 2 * reference + 1e-2:
                failed.append(f"{method} bf16: {error} against {reference}")
    return failed


@pytest.mark.parametrize("size", [2, 4])
def test_like_one_process(size):
    for failed in run(size, check_all):
        assert not failed, "\n".join(failed)


def check_layouts():
    """Three chunks of a process and another's, in an order of no rule."""
    start()
    layout = ((0, 4, 3), (5, 1, 2))
    failed = []
    for name in ("full", "causal", "softcap", "window"):
        options, heads_k = CASES[name]
        *leaves, dout = inputs(options, heads_k, torch.float32)
        sizes = 768  # six chunks on blocks
        *leaves, dout = (x[:, :sizes] for x in (*leaves, dout))
        whole = [x.clone().requires_grad_() for x in leaves]
        out = hfp.flash_attn_func(*whole, **options)
        expected = [out, *torch.autograd.grad(out, whole, dout)]
        parts = [hfp.parallel.shard(x, layout=layout).requires_grad_() for x in leaves]
        out = hfp.parallel.ring_attention(*parts, **options, layout=layout)
        part = hfp.parallel.shard(dout, layout=layout)
        found = [out, *torch.autograd.grad(out, parts, part)]
        try:
            compare([hfp.parallel.unshard(x, layout=layout) for x in found], expected)
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    return failed


def test_other_layouts():
    for failed in run(2, check_layouts):
        assert not failed, "\n".join(failed)


def test_balanced():
    assert balanced([1.0, 1.0, 1.0, 1.0], 2) == ((0, 2), (1, 3))
    assert balanced([8.0, 1.0, 1.0, 1.0, 1.0, 4.0], 2) == ((0, 3, 4), (1, 2, 5))
    causal = [i + 0.5 for i in range(8)]
    shares = [sum(causal[i] for i in chunks) for chunks in balanced(causal, 4)]
    assert len(set(shares)) == 1


def check_dropout():
    """What each head keeps where all processes have one seed; and whether they draw on alike."""
    start()
    torch.manual_seed(3)
    zeros, ones = torch.zeros(1, 8, 4, 8), torch.ones(1, 8, 4, 8)
    out = hfp.parallel.ulysses_attention(zeros, zeros, ones, dropout_p=0.5)
    whole = hfp.parallel.unshard(out, layout="contiguous")
    return [tuple(head) for head in whole[0, :, :, 0].T.tolist()], torch.rand(()).item()


def test_heads_drop_places_of_their_own():
    (kept, after), other = run(2, check_dropout)
    assert len(set(kept)) == 4 and other == (kept, after)


def check_messages():
    """Exchanges of a causal ring's forward and backward."""
    start()
    sent = []
    exchange = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda operations: sent.append(1) or exchange(operations)
    shared("ring", {"causal": True}, 4)
    return len(sent)


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_sent_in_vain(size):
    """Keys go round twice; gradients of keys only where others have added to them."""
    assert run(size, check_messages) == [3 * (size - 1)] * size


def check_groups():
    """Two pairs of processes, each with a sequence of its own."""
    rank, _ = start()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    for method in ("ring", "ulysses"):
        compare(shared(method, {"causal": True}, 2, group=group), alone({"causal": True}, 2))
    return True


def test_groups():
    assert all(run(4, check_groups))


def errors():
    rank, _ = start()
    q = torch.randn(1, 128, 6, 16)
    caught = []
    for function, arguments, options in (
        (hfp.parallel.ring_attention, (q[:, :5], q[:, :5], q[:, :5]), {}),
        (hfp.parallel.ring_attention, (q, q[:, :64], q[:, :64]), {}),
        (hfp.parallel.ring_attention, (q, q, q), {"block_mask": mask_of(256)}),
        (hfp.parallel.ring_attention, (q, q, q), {"key_padding_mask": torch.ones(1, 4)}),
        (hfp.parallel.ring_attention, (q[:, :50],) * 3, {"block_mask": mask_of(200)}),
        (hfp.parallel.ulysses_attention, (q, q, q), {}),
        (hfp.parallel.ulysses_attention, (q[:, :, :4], q[:, :, :3], q[:, :, :3]), {}),
        (hfp.parallel.ulysses_attention, (q[:, :, :4],) * 3, {"return_lse": True}),
        (hfp.parallel.ulysses_attention, (q[:, :, :4],) * 3, {"alibi_slopes": torch.ones(4)}),
        (hfp.parallel.shard, (q[:, :126],), {}),
        (hfp.parallel.shard, (q,), {"layout": "stripes"}),
        (hfp.parallel.shard, (q,), {"layout": ((0,), (1,), (2,), (2,))}),
    ):
        try:
            function(*arguments, **options)
            caught.append("nothing")
        except (MaskError, ParallelError) as error:
            caught.append(str(error))
    return caught


def mask_of(seqlen):
    return hfp.masks.causal().block_mask(seqlen, seqlen)


def test_errors_on_every_rank():
    expected = [
        "5 queries",
        "128 queries and 64 keys",
        "256 tokens, 4 processes share 512",
        "key_padding_mask has shape",
        "do not lie on blocks",
        "6 heads do not divide among 4",
        "3 heads of k and v",
        "no return_lse",
        "no alibi_slopes",
        "do not divide into 8 equal chunks",
        "has to be one of contiguous, zigzag",
        "does not give 4 processes equally many chunks",
    ]
    for caught in run(4, errors):
        for text, error in zip(expected, caught, strict=True):
            assert text in error


def test_one_process_alone():
    assert run(1, check_all) == [[]]


def round_trip():
    start()
    tensor = torch.arange(3 * 32).view(3, 32)
    results = []
    for layout in ("zigzag", "contiguous"):
        part = hfp.parallel.shard(tensor, layout=layout)
        results.append(torch.equal(hfp.parallel.unshard(part, layout=layout), tensor))
    return results


def test_shards_go_back():
    assert run(4, round_trip) == [[True, True]] * 4


def test_zigzag_balances_causal_work():
    pairs = [sum(2 * i + 1 for i in owned(rank, 4, "zigzag")) for rank in range(4)]
    assert len(set(pairs)) == 1


def test_lists_of_a_batch_go_with_it():
    """A million tokens of two documents have lists of half a gigabyte."""
    ids = torch.tensor([[0] * 100 + [1] * 412])
    ranges = packing.ranges_from_boundaries(packing.boundaries_from_ids(ids))
    cpu = torch.device("cpu")
    mask = AttentionMask(1, 512, 512, causal=True, window_size=(-1, -1), device=cpu)
    lists = _lists(Groups(None, None), replace(mask, doc_range=ranges), None, HEADS)
    assert torch.equal(lists.dense()[0, 0], ids.T == ids)
    of_batch = weakref.ref(lists)
    del lists
    assert of_batch() is None


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "documents"])
def test_parts_of_a_mask(name):
    mask = PATTERNS[name].block_mask(300, 300, 2, block_size=64)
    whole = mask.dense()
    for rows in (slice(0, 128), slice(64, 300)):
        for keys in (slice(0, 192), slice(256, 300), slice(None)):
            with torch.inference_mode():
                part = part_of(mask, rows=rows, keys=keys)
            assert not any(x.is_inference() for x in part.tensors())  # kept, for training too
            part.verify()
            assert torch.equal(part.dense(), whole[:, :, rows, keys])
            assert part_of(mask, rows=rows, keys=keys) is part
