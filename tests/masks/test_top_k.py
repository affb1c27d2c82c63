"""Blocks chosen by content: which ones, and attention and models under them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_flash_patch as hfp
from hf_flash_patch import MaskError, masks
from hf_flash_patch.masks import BlockMask
from hf_flash_patch.masks.top_k import TopKBlocks, _pool
from tests.integration.tiny import assert_close, padding, tiny_model, token_ids

SIZE = 32


def expected_blocks(q, k, count, causal, real=None, start=None) -> torch.Tensor:
    """bool (batch, heads, nq, nk) of what is to be chosen, block by block."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    start = seqlen_k - seqlen_q if start is None else start
    real = torch.ones(batch, seqlen_k).bool() if real is None else real
    nq, nk = -(-seqlen_q // SIZE), -(-seqlen_k // SIZE)
    wanted = torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    count += start % SIZE != 0
    for b in range(batch):
        for h in range(heads):
            group = h * k.shape[2] // heads
            for i in range(nq):
                rows = slice(i * SIZE, min((i + 1) * SIZE, seqlen_q))
                mean_q = q[b, rows, h].float().mean(dim=0)
                first, last = start + rows.start, start + rows.stop - 1
                scores = []
                for j in range(nk):
                    keys = slice(j * SIZE, (j + 1) * SIZE)
                    part = k[b, keys, group].float()[real[b, keys]]
                    if not len(part) or (causal and keys.start > last):
                        continue
                    score = float(mean_q @ part.mean(dim=0))
                    if j == 0 or (keys.start <= last and keys.stop > first):
                        score = float("inf")
                    scores.append((score, j))
                for _, j in sorted(scores, reverse=True)[:count]:
                    wanted[b, h, i, j] = True
    return wanted


def blocks_of(mask: BlockMask) -> torch.Tensor:
    seen = mask.dense()
    nq, nk = mask.row_offsets.shape[2] - 1, mask.column_offsets.shape[2] - 1
    rows, columns = torch.arange(nq) * SIZE, torch.arange(nk) * SIZE
    return seen[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("shape", [(0, 40, 40), (1, 0, 40), (1, 40, 0)])
def test_nothing_to_choose_from(shape):
    batch, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, seqlen_q, 4, 16), torch.randn(batch, seqlen_k, 2, 16)
    out = hfp.flash_attn_func(q, k, k, block_mask=masks.top_k_blocks(2, block_size=SIZE))
    assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(256, 256), (200, 200), (64, 256), (70, 200)])
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_chosen(causal, seqlen_q, seqlen_k, padded):
    q, k = torch.randn(2, seqlen_q, 4, 16), torch.randn(2, seqlen_k, 2, 16)
    real = None
    if padded:
        real = torch.ones(2, seqlen_k, dtype=torch.bool)
        real[0, 90:] = False
        real[1, 40:50] = False
    mask = masks.top_k_blocks(3, block_size=SIZE).select(q, k, causal=causal, key_padding=real)
    assert torch.equal(blocks_of(mask), expected_blocks(q, k, 3, causal, real))


def test_one_choice_a_group():
    q, k = torch.randn(2, 160, 4, 16), torch.randn(2, 160, 2, 16)
    mask = masks.top_k_blocks(2, block_size=SIZE, per_group=True).select(q, k, causal=True)
    means = q.unflatten(2, (2, 2)).mean(dim=3)
    assert mask.num_heads == 2
    assert torch.equal(blocks_of(mask), expected_blocks(means, k, 2, True))


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    q, k, v = (torch.randn(2, 200, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    pattern = masks.top_k_blocks(3, block_size=SIZE)
    out = hfp.flash_attn_func(q, k, v, causal=causal, block_mask=pattern)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    dense = pattern.select(q, k, causal=causal).dense()
    if causal:
        dense = dense & torch.ones(200, 200, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        *(x.transpose(1, 2).repeat_interleave(2, dim=1) for x in (k, v)),
        attn_mask=dense,
    ).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    for actual, expected in zip(
        gradients, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("family", "auto"), [("bert", AutoModelForMaskedLM), ("llama", AutoModelForCausalLM)]
)
def test_models(family, auto, monkeypatch):
    """Enough blocks are all; fewer are what each layer chose, under padding, and trained."""
    model = tiny_model(auto, family, max_position_embeddings=256)
    ids, real = token_ids(2, 150), padding("mixed", 150)
    keep = real.bool()
    inputs = {"input_ids": ids, "attention_mask": real}
    with hfp.patched(model):
        plain = model(**inputs).logits
    with hfp.patched(model, mask=masks.top_k_blocks(5, block_size=SIZE)):
        assert_close(model(**inputs).logits[keep], plain[keep], "logits")
    chosen = []
    select = TopKBlocks.select

    def recorded(self, *arguments, **options):
        chosen.append(select(self, *arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(TopKBlocks, "select", recorded)
    with hfp.patched(model, mask=masks.top_k_blocks(2, block_size=SIZE)) as patch:
        assert "top_k_blocks(2, block_size=32, per_group=False)" in str(patch)
        logits = model(**inputs).logits
        logits[keep].sum().backward()
    assert len(chosen) == 2 and (logits - plain)[keep].abs().max() > 1e-4
    assert all(len(mask.row_entries) == 2 * 4 * 5 * 2 for mask in chosen)


def test_generate():
    """Prefill is sparse, a decode step sees all."""
    model = tiny_model(
        AutoModelForCausalLM, "llama", max_position_embeddings=256, num_hidden_layers=1
    )
    ids = token_ids(2, 120)
    pattern = masks.top_k_blocks(2, block_size=SIZE)
    with hfp.patched(model, mask=pattern), torch.no_grad():
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
            assert_close(out.logits[0], model(ids).logits[:, -1], "logits of the prefill")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(ids).logits, model(ids).logits, "logits")


def test_what_it_is_not():
    pattern = masks.top_k_blocks(4)
    assert masks.parse(str(pattern)) == pattern
    for make in (
        lambda: pattern & masks.causal(),
        lambda: masks.causal() | pattern,
        lambda: ~pattern,
        lambda: masks.per_head([pattern]),
        lambda: pattern.block_mask(128),
        lambda: pattern.density(128),
        lambda: pattern.plot(128),
        lambda: masks.top_k_blocks(1),
        lambda: masks.top_k_blocks(4, block_size=100),
    ):
        with pytest.raises(MaskError):
            make()
    q, edges = torch.randn(20, 2, 8), torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(MaskError, match="is for the dense layout"):
        hfp.flash_attn_varlen_func(q, q, q, edges, edges, 20, 20, block_mask=pattern)


def test_the_default_dtype_does_not_matter():
    x, real = torch.randn(1, 64, 2, 8), torch.ones(1, 64, dtype=torch.bool)
    torch.set_default_dtype(torch.float64)
    try:
        for padding_mask in (None, real):
            assert _pool(x, padding_mask, SIZE)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
