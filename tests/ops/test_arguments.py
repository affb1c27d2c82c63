"""Bad input: each error names what was given, what is allowed and what to do."""

from __future__ import annotations

import pytest
import torch

from hf_flash_patch.errors import MaskError, UnsupportedKernelError
from hf_flash_patch.ops import backends
from hf_flash_patch.ops.arguments import MaskArguments
from hf_flash_patch.ops.functional import attention, flash_attn_func, flash_attn_varlen_func
from hf_flash_patch.ops.library import ExtensionStatus
from tests.ops.cases import cumulative


def randn(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, **options)


Q = randn(2, 8, 4, 16)
K = randn(2, 8, 2, 16)

TENSORS = {
    "rank": ((Q[0], K, K), r"q has rank 3 and shape \(8, 4, 16\).*flash_attn_varlen_func"),
    "list": (([1.0], K, K), "q is of type list; it has to be a tensor"),
    "array": ((Q, K.numpy(), K), "k is of type ndarray; it has to be a tensor"),
    "dtype": ((Q.long(), K, K), r"q has dtype torch.int64; it has to be one of torch.bfloat16"),
    "dtypes": (
        (Q, K.bfloat16(), K),
        r"q has dtype torch.float32, k has torch.bfloat16.*cast them",
    ),
    "device": ((Q, K.to("meta"), K), "q is on cpu, k on meta; all three have to be on one device"),
    "stride": (
        (Q, K, K.repeat_interleave(2, -1)[..., ::2]),
        r"v has stride 2 along head_dim.*Call v.contiguous\(\)",
    ),
    "no head_dim": ((randn(1, 2, 1, 0),) * 3, "q has head_dim 0; it has to be 1 or more"),
    "head_dims": ((Q, K[..., :8], K), "q has head_dim 16, k has 8; they have to be equal"),
    "k and v": ((Q, K, K[:, :7]), r"k has shape \(2, 8, 2, 16\), v has \(2, 7, 2, 16\)"),
    "batch": ((Q, K[:1], K[:1]), "q has batch size 2, k has 1"),
    "heads": (
        (Q, K.repeat(1, 1, 2, 1)[:, :, :3], K.repeat(1, 1, 2, 1)[:, :, :3]),
        "q has 4 heads, k and v have 3; the first has to be a multiple",
    ),
    "no heads": ((Q, K[:, :, :0], K[:, :, :0]), "q has 4 heads, k and v have 0"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name):
    tensors, text = TENSORS[name]
    with pytest.raises(UnsupportedKernelError, match=text):
        flash_attn_func(*tensors)


NAN, INF = float("nan"), float("inf")
OPTIONS = {
    "dropout nan": ({"dropout_p": NAN}, "dropout_p is nan; it has to be a probability, 0 to 1"),
    "dropout above": ({"dropout_p": 1.5}, "dropout_p is 1.5"),
    "dropout below": ({"dropout_p": -0.1}, "dropout_p is -0.1"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0; it has to be a finite number >= 0"),
    "softcap nan": ({"softcap": NAN}, "softcap is nan"),
    "scale": ({"softmax_scale": INF}, "softmax_scale is inf; it has to be a finite number"),
    "scale text": ({"softmax_scale": "a"}, "softmax_scale is 'a'; it has to be a finite number"),
    "dropout none": ({"dropout_p": None}, "dropout_p is None; it has to be a probability"),
    "window": ({"window_size": (-2, 0)}, r"window_size is \(-2, 0\); it has to be two ints"),
    "window none": ({"window_size": (None, 0)}, r"window_size is \(None, 0\)"),
    "window float": ({"window_size": (1.0, 0)}, r"window_size is \(1.0, 0\)"),
    "window one": ({"window_size": 3}, "window_size is 3; it has to be two ints"),
    "window length": ({"window_size": (1, 2, 3)}, r"window_size is \(1, 2, 3\)"),
    "alibi shape": (
        {"alibi_slopes": torch.ones(3)},
        r"alibi_slopes has dtype torch.float32 and shape \(3,\); .* \(4,\) or .* \(2, 4\)",
    ),
    "alibi dtype": ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes has dtype torch.float16"),
    "alibi device": (
        {"alibi_slopes": torch.ones(4, device="meta")},
        "alibi_slopes is on meta, q on cpu",
    ),
    "alibi list": ({"alibi_slopes": [1.0] * 4}, "alibi_slopes is of type list; .* a tensor"),
    "alibi gradient": (
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        "alibi_slopes requires a gradient.*Detach it",
    ),
    "padding shape": (
        {"key_padding_mask": torch.ones(2, 7, dtype=torch.bool)},
        r"key_padding_mask has shape \(2, 7\); .* \(batch, seqlen_k\) = \(2, 8\)",
    ),
    "padding list": ({"key_padding_mask": [[True]]}, "key_padding_mask is of type list; .*tensor"),
    "padding device": (
        {"key_padding_mask": torch.ones(2, 8, dtype=torch.bool, device="meta")},
        "key_padding_mask is on meta, k on cpu",
    ),
    "padding dtype": (
        {"key_padding_mask": torch.ones(2, 8)},
        r"key_padding_mask has dtype torch.float32.*Use mask.bool\(\)",
    ),
    "backend": ({"backend": "triton"}, "backend is 'triton'; it has to be one of 'auto', 'cuda'"),
    "package": ({"backend": "flash_attn"}, "needs the package flash-attn, which is not installed"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options, text = OPTIONS[name]
    with pytest.raises((UnsupportedKernelError, MaskError), match=text):
        flash_attn_func(Q, K, K, **options)


def test_block_mask_of_another_type():
    with pytest.raises(MaskError, match="block_mask is of type object; it has to be a pattern"):
        flash_attn_func(Q, K, K, block_mask=object())
    with pytest.raises(MaskError, match="block_mask is of type object; it has to be a pattern"):
        flash_attn_varlen_func(Q[0], K[0], K[0], *[cumulative([8])] * 2, 8, 8, block_mask=object())


CU = cumulative([3, 5])
VARLEN = {
    "dtype": ((CU.long(), CU, 5, 5), r"cu_seqlens_q has dtype torch.int64.*int32 \(batch \+ 1,\)"),
    "rank": ((CU, CU[None], 5, 5), r"cu_seqlens_k has dtype torch.int32 and shape \(1, 3\)"),
    "empty": ((CU[:1], CU[:1], 5, 5), r"cu_seqlens_q has dtype torch.int32 and shape \(1,\)"),
    "device": ((CU.to("meta"), CU, 5, 5), "cu_seqlens_q is on meta, q on cpu"),
    "batch": ((CU, cumulative([1, 2, 5]), 5, 5), "cu_seqlens_q describes 2 sequences.* 3;"),
    "list": (([0, 3, 8], CU, 5, 5), "cu_seqlens_q is of type list; it has to be a tensor"),
    "missing": ((CU, None, 5, 5), "cu_seqlens_k is missing"),
    "first": ((CU + 1, CU, 5, 5), r"cu_seqlens_q is \[1, 4, 9\]; it has to start at 0"),
    "decreasing": ((CU, cumulative([9, -1]), 9, 9), r"cu_seqlens_k is \[0, 9, 8\].*never decrease"),
    "last": ((CU, cumulative([3, 4]), 5, 5), r"\[0, 3, 7\].*end at 8, the number of tokens in k"),
    "longest": ((CU, CU, 5, 4), "max_seqlen_k is 4, but cu_seqlens_k holds a sequence of 5"),
    "no longest": ((CU, CU, None, 5), "max_seqlen_q is None; it has to be an int"),
    "longest of text": ((CU, CU, "5", 5), "max_seqlen_q is '5'; it has to be an int"),
    "longest not whole": ((CU, CU, 5.0, 5), "max_seqlen_q is 5.0; it has to be an int"),
    "tensor": ((CU, CU, 5, CU[2]), "max_seqlen_k is .*would synchronise"),
}


@pytest.mark.parametrize("name", VARLEN)
def test_variable_length(name):
    arguments, text = VARLEN[name]
    with pytest.raises(MaskError, match=text):
        flash_attn_varlen_func(Q[0], K[0], K[0], *arguments)


def test_variable_length_takes_rank_3_and_no_padding_mask():
    with pytest.raises(UnsupportedKernelError, match=r"q has rank 4.*\(total, num_heads, head_dim"):
        flash_attn_varlen_func(Q, K, K, CU, CU, 5, 5)
    with pytest.raises(MaskError, match="leave padded keys out of k, v and cu_seqlens_k"):
        padding = torch.ones(1, 8, dtype=torch.bool)
        flash_attn_varlen_func(Q[0], K[0], K[0], CU, CU, 5, 5, key_padding_mask=padding)


INT = torch.int32
MASKS = {
    "seqused_k": (torch.ones(3, dtype=INT), r"seqused_k .* int32 \(batch,\) = \(2,\)"),
    "key_range": (torch.ones(2, 2), r"key_range has dtype torch.float32 .* = \(2, 2\)"),
    "key_bits": (torch.ones(2, 2, dtype=INT), r"key_bits .* = \(2, 1\)"),
    "doc_range": (torch.ones(1, 8, 2, dtype=INT), r"doc_range .* = \(2, 8, 2\)"),
    "attn_bias": (torch.ones(2, 8, 8), r"attn_bias .* seqlen_k\) = \(2, 4, 8, 8\), with rank 4"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    tensor, text = MASKS[name]
    with pytest.raises(MaskError, match=text):
        attention(Q, K, K, mask=MaskArguments(**{name: tensor}))
    with pytest.raises(MaskError, match=f"{name} is on meta, q on cpu"):
        attention(Q, K, K, mask=MaskArguments(**{name: tensor.to("meta")}))
    with pytest.raises(MaskError, match=f"{name} is given together with cu_seqlens"):
        mask = MaskArguments(CU, CU, 5, 5, **{name: tensor})
        attention(Q[0], K[0], K[0], mask=mask)


def test_masks_that_do_not_fit():
    doc_range = torch.zeros(2, 8, 2, dtype=INT)
    with pytest.raises(MaskError, match="doc_range is given with seqlen_q 8 and seqlen_k 4"):
        attention(Q, K[:, :4], K[:, :4], mask=MaskArguments(doc_range=doc_range))
    with pytest.raises(MaskError, match="attn_bias has dtype torch.int64.*Use .bool()"):
        attention(Q, K, K, mask=MaskArguments(attn_bias=torch.ones(2, 1, 8, 8).long()))
    bias = torch.ones(2, 1, 8, 8, requires_grad=True)
    with pytest.raises(MaskError, match="attn_bias requires a gradient"):
        attention(Q, K, K, mask=MaskArguments(attn_bias=bias))
    with torch.no_grad():
        attention(Q, K, K, mask=MaskArguments(attn_bias=bias))


OBSTACLES = [
    ({"device": "cpu"}, "the tensors are on cpu; move them to a CUDA device"),
    ({"dtype": torch.float32}, "dtype is torch.float32; the kernels take bfloat16 and float16"),
    ({"head_dim_v": 32}, "head_dim is 64, that of v 32; pad v with zeros to 64"),
    ({"head_dim": 300}, "head_dim is 300; 1 to 256 is supported"),
    ({"attn_bias": True}, "attn_bias is given"),
    ({"capability": (7, 5)}, "the GPU has compute capability 7.5; 8.0 or later is needed"),
]


def resolve(monkeypatch, backend, **changes):
    """Resolve as if the extension and a GPU were there."""
    monkeypatch.setattr(backends, "extension_status", lambda: ExtensionStatus(True, "there"))
    capability = changes.pop("capability", (9, 0))
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    call = {"device": "cuda:0", "dtype": torch.bfloat16, "head_dim": 64, **changes}
    call["device"] = torch.device(call["device"])
    return backends.resolve_backend(backend, **call)


@pytest.mark.parametrize(("changes", "text"), OBSTACLES, ids=lambda x: str(x)[:30])
def test_what_keeps_the_kernels_away(monkeypatch, changes, text):
    engine, reason = resolve(monkeypatch, "auto", **changes)
    assert engine == "torch" and text in reason
    with pytest.raises(UnsupportedKernelError, match=text + '.*backend="torch" serves it'):
        resolve(monkeypatch, "cuda", **changes)


def test_the_kernels_where_they_serve(monkeypatch):
    assert resolve(monkeypatch, "auto")[0] == "cuda"
    assert resolve(monkeypatch, "cuda")[0] == "cuda"
    assert resolve(monkeypatch, "torch") == ("torch", "asked for")


def test_cuda_without_the_extension(monkeypatch):
    status = ExtensionStatus(False, "_C.abi3.so is not there. Install nvcc")
    monkeypatch.setattr(backends, "extension_status", lambda: status)
    with pytest.raises(UnsupportedKernelError, match=r'backend="cuda" cannot serve.*Install nvcc'):
        flash_attn_func(Q, K, K, backend="cuda")
    assert flash_attn_func(Q, K, K, backend="auto").shape == Q.shape
