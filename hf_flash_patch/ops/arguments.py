"""What a call may be given, and its checks. No tensor's values are read: nothing synchronises."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MaskError, UnsupportedKernelError
from ..masks.block_mask import BlockMask
from .padding import WORD_BITS

MAX_HEAD_DIM = 256
KERNEL_BLOCK_SIZE = 128  # of the block lists that the compiled kernels read
TENSOR_FIELDS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
    "key_range",
    "key_bits",
    "doc_range",
    "attn_bias",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class MaskArguments:
    """Which pairs (query i, key j) see each other, beyond causal and window. All is optional.

    With off = seqlen_k - seqlen_q, where seqused_k replaces seqlen_k if given, causal means
    j <= i + off, and a window (left, right) means i + off - left <= j <= i + off + right. All rules
    hold at once. A query that sees no key gives out 0, lse -inf and no gradient. Tensors live on
    q's device; none is read on the host there.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), cumulative lengths from 0 to total; both or
            neither. They mean the layout (total, num_heads, head_dim), and no other tensor goes
            with them.
        max_seqlen_q, max_seqlen_k: longest sequence, or any larger number; needed with cu_seqlens.
        seqused_k: int32 (batch,), keys in use from the start of each row (a static cache); moves
            the alignment.
        key_range: int32 (batch, 2), first visible key and one past the last (padding); leaves the
            alignment alone.
        key_bits: int32 (batch, ceil(seqlen_k / 32)), bit j % 32 of word j // 32 is 1 where key j is
            visible.
        doc_range: int32 (batch, seqlen, 2), start and stop of the document of each token (packing);
            needs seqlen_q == seqlen_k, and starts and stops that do not decrease along the row.
        attn_bias: broadcastable to (batch, num_heads, seqlen_q, seqlen_k); bool is True where a
            pair sees each other, float is added to the logits, after softcap. Served by the torch
            backend alone; has no gradient.
        block_mask: lists of blocks, of the call's lengths, or with cu_seqlens of at least
            max_seqlen_q and max_seqlen_k; for one sequence or each, one head or each num_heads /
            num_heads_of_mask of them.
    """

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_k: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    key_bits: torch.Tensor | None = None
    doc_range: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    block_mask: BlockMask | None = None

    @property
    def varlen(self) -> bool:
        """Whether the layout is (total, num_heads, head_dim)."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    def batch_size(self, q: torch.Tensor) -> int:
        """Number of sequences."""
        return q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def empty(self) -> bool:
        """Whether nothing is said, so that causal and window are the whole mask."""
        return self.block_mask is None and not self._given()

    def _given(self) -> dict[str, torch.Tensor]:
        fields = self.__dict__
        return {name: fields[name] for name in TENSOR_FIELDS if fields[name] is not None}

    def validate(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Check every given field against q and k, whose own shapes have been checked.

        Raises:
            MaskError: a field has the wrong shape, dtype or device, or does not go with another.
        """
        given = self._given()
        for name, tensor in given.items():
            check_is_tensor(name, tensor)
            if tensor.device != q.device:
                raise MaskError(
                    f"{name} is on {tensor.device}, q on {q.device}; move it once, before "
                    "the forward pass."
                )
        if self.varlen:
            self._validate_varlen(q, k)
        elif given:
            self._validate_dense(q, k)
        if self.block_mask is not None:
            self._validate_block_mask(self.block_mask, q, k)

    def _validate_block_mask(self, mask: BlockMask, q: torch.Tensor, k: torch.Tensor) -> None:
        if mask.device != q.device:
            raise MaskError(
                f"block_mask is on {mask.device}, q on {q.device}; lower the pattern there, or "
                "move the BlockMask once."
            )
        batch, num_heads = self.batch_size(q), q.shape[-2]
        lengths = (mask.seqlen_q, mask.seqlen_k)
        if self.varlen:
            needed = (self.max_seqlen_q or 0, self.max_seqlen_k or 0)
            fits = mask.seqlen_q >= needed[0] and mask.seqlen_k >= needed[1]
        else:
            needed = (q.shape[1], k.shape[1])
            fits = lengths == needed
        if not fits:
            raise MaskError(
                f"block_mask is for (seqlen_q, seqlen_k) = {lengths}, the call has {needed}; lower "
                "the pattern for these lengths, or give the pattern itself."
            )
        if mask.batch_size not in (1, batch) or num_heads % mask.num_heads:
            raise MaskError(
                f"block_mask has lists for (batch, heads) = {(mask.batch_size, mask.num_heads)}, "
                f"the call has {(batch, num_heads)}; the first has to be 1 or the batch, the "
                "second has to divide num_heads."
            )

    def _validate_varlen(self, q: torch.Tensor, k: torch.Tensor) -> None:
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            missing = "cu_seqlens_q" if self.cu_seqlens_q is None else "cu_seqlens_k"
            raise MaskError(
                f"{missing} is missing; variable length needs cu_seqlens_q and cu_seqlens_k."
            )
        for name, cu_seqlens in (
            ("cu_seqlens_q", self.cu_seqlens_q),
            ("cu_seqlens_k", self.cu_seqlens_k),
        ):
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
                raise MaskError(
                    f"{name} has dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; it "
                    "has to be int32 (batch + 1,): 0, then the running sum of the sequence lengths."
                )
        if self.cu_seqlens_q.shape[0] != self.cu_seqlens_k.shape[0]:
            raise MaskError(
                f"cu_seqlens_q describes {self.cu_seqlens_q.shape[0] - 1} sequences, cu_seqlens_k "
                f"{self.cu_seqlens_k.shape[0] - 1}; both have to describe the same batch."
            )
        for name, length in (
            ("max_seqlen_q", self.max_seqlen_q),
            ("max_seqlen_k", self.max_seqlen_k),
        ):
            if not _is_whole(length, 0):
                raise MaskError(
                    f"{name} is {length!r}; it has to be an int >= 0, the longest sequence. Read "
                    "it once where cu_seqlens is made: reading it from a tensor here would "
                    "synchronise."
                )
        for name in ("seqused_k", "key_range", "key_bits", "doc_range", "attn_bias"):
            if getattr(self, name) is not None:
                raise MaskError(
                    f"{name} is given together with cu_seqlens; it belongs to the dense layout. "
                    "Express it by leaving hidden tokens out of q, k, v and cu_seqlens."
                )

    def _validate_dense(self, q: torch.Tensor, k: torch.Tensor) -> None:
        batch, seqlen_q, num_heads = q.shape[:3]
        seqlen_k = k.shape[1]
        words = (seqlen_k + WORD_BITS - 1) // WORD_BITS
        for name, tensor, shape, axes in (
            ("seqused_k", self.seqused_k, (batch,), "(batch,)"),
            ("key_range", self.key_range, (batch, 2), "(batch, 2)"),
            ("key_bits", self.key_bits, (batch, words), "(batch, ceil(seqlen_k / 32))"),
            ("doc_range", self.doc_range, (batch, seqlen_q, 2), "(batch, seqlen, 2)"),
        ):
            if tensor is not None and (tensor.dtype != torch.int32 or tuple(tensor.shape) != shape):
                raise MaskError(
                    f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; it has to "
                    f"be int32 {axes} = {shape}."
                )
        if self.doc_range is not None and seqlen_q != seqlen_k:
            raise MaskError(
                f"doc_range is given with seqlen_q {seqlen_q} and seqlen_k {seqlen_k}; it needs "
                "equal lengths. Use attn_bias, or cu_seqlens, for documents seen from a part of "
                "their tokens."
            )
        if self.attn_bias is not None:
            _check_attn_bias(self.attn_bias, (batch, num_heads, seqlen_q, seqlen_k))


def check_is_tensor(name: str, given: Any) -> None:
    """Check an argument that describes a mask.

    Raises:
        MaskError: it is no tensor.
    """
    if not isinstance(given, torch.Tensor):
        raise MaskError(f"{name} is of type {type(given).__name__}; it has to be a tensor.")


def _check_attn_bias(bias: torch.Tensor, shape: tuple[int, ...]) -> None:
    if bias.dim() != 4 or any(
        given not in (1, wanted) for given, wanted in zip(bias.shape, shape, strict=True)
    ):
        raise MaskError(
            f"attn_bias has shape {tuple(bias.shape)}; it has to be broadcastable to (batch, "
            f"num_heads, seqlen_q, seqlen_k) = {shape}, with rank 4."
        )
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise MaskError(
            f"attn_bias has dtype {bias.dtype}; it has to be bool (True: may see) or floating "
            "point (added to the logits). Use .bool() for a 0/1 mask."
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise MaskError(
            "attn_bias requires a gradient, which this attention does not compute. Detach it if it "
            "is not trained, or keep eager attention for a learned bias."
        )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, varlen: bool) -> None:
    """Check rank, dtype, device, heads and head_dim of q, k and v.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) if `varlen`.
        k: (batch, seqlen_k, num_heads_k, head_dim), or (total_k, num_heads_k, head_dim).
        v: as k, with a head_dim of its own.
        varlen: which of the two layouts is meant.

    Raises:
        UnsupportedKernelError: naming the tensor and what it should be.
    """
    for name, given in (("q", q), ("k", k), ("v", v)):
        if type(given) is not torch.Tensor and not isinstance(given, torch.Tensor):
            raise UnsupportedKernelError(
                f"{name} is of type {type(given).__name__}; it has to be a tensor."
            )
    layout = "(total, num_heads, head_dim)" if varlen else "(batch, seqlen, num_heads, head_dim)"
    rank, dtype, device = 3 if varlen else 4, q.dtype, q.device
    if dtype not in DTYPES:
        raise UnsupportedKernelError(
            f"q has dtype {dtype}; it has to be one of {', '.join(map(str, DTYPES))}."
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        shape = tensor.shape
        if len(shape) != rank:
            raise UnsupportedKernelError(
                f"{name} has rank {len(shape)} and shape {tuple(shape)}; it has to be {layout}"
                + (
                    " with cu_seqlens."
                    if varlen
                    else ". Variable length goes to flash_attn_varlen_func."
                )
            )
        if tensor.dtype != dtype:
            raise UnsupportedKernelError(
                f"q has dtype {dtype}, {name} has {tensor.dtype}; all three have to be equal. "
                "Nothing is cast here: cast them, or run under autocast and cast to its dtype."
            )
        if tensor.device != device:
            raise UnsupportedKernelError(
                f"q is on {device}, {name} on {tensor.device}; all three have to be on one device."
            )
        if shape[-1] < 1:
            raise UnsupportedKernelError(
                f"{name} has head_dim {shape[-1]}; it has to be 1 or more."
            )
        if shape[-1] > 1 and tensor.stride()[-1] != 1:
            raise UnsupportedKernelError(
                f"{name} has stride {tensor.stride(-1)} along head_dim, its last dimension; that "
                "dimension has to be contiguous (any other stride is fine). Call "
                f"{name}.contiguous()."
            )
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    if shape_k[-1] != shape_q[-1]:
        raise UnsupportedKernelError(
            f"q has head_dim {shape_q[-1]}, k has {shape_k[-1]}; they have to be equal."
        )
    if shape_k != shape_v and shape_k[:-1] != shape_v[:-1]:
        raise UnsupportedKernelError(
            f"k has shape {tuple(shape_k)}, v has {tuple(shape_v)}; they may differ in head_dim "
            "only."
        )
    if not varlen and shape_q[0] != shape_k[0]:
        raise UnsupportedKernelError(
            f"q has batch size {shape_q[0]}, k has {shape_k[0]}; they have to be equal."
        )
    num_heads, num_heads_k = shape_q[-2], shape_k[-2]
    if num_heads_k == 0 or num_heads % num_heads_k != 0:
        raise UnsupportedKernelError(
            f"q has {num_heads} heads, k and v have {num_heads_k}; the first has to be a multiple "
            "of the second (query head h uses key head h // (num_heads // num_heads_k))."
        )


def _is_whole(number: Any, least: int) -> bool:
    """Whether it is an integer of at least so much; NumPy's and symbolic ones are."""
    if type(number) is int:  # isinstance(..., torch.Tensor) is a call of Python: the usual first
        return number >= least
    no_integer = isinstance(number, (bool, float, torch.Tensor))
    return not no_integer and _within(number, least, sys.maxsize)


def _within(number: Any, least: float, most: float) -> bool:
    """False for NaN as well, and for what is no number."""
    try:
        return least <= number <= most
    except TypeError:
        return False


def check_options(
    q: torch.Tensor,
    mask: MaskArguments,
    *,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    dropout_p: float,
) -> None:
    """Check the numbers of a call, and `alibi_slopes` against q.

    Raises:
        UnsupportedKernelError: a number is out of its range.
        MaskError: window_size or alibi_slopes is malformed.
    """
    if not _within(dropout_p, 0.0, 1.0):
        raise UnsupportedKernelError(
            f"dropout_p is {dropout_p!r}; it has to be a probability, 0 to 1. Pass 0.0 in "
            "evaluation."
        )
    if not _within(softcap, 0.0, sys.float_info.max):
        raise UnsupportedKernelError(
            f"softcap is {softcap!r}; it has to be a finite number >= 0, where 0 means none."
        )
    if not _within(softmax_scale, -sys.float_info.max, sys.float_info.max):
        raise UnsupportedKernelError(
            f"softmax_scale is {softmax_scale!r}; it has to be a finite number. None means "
            "head_dim ** -0.5."
        )
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(sides) != 2 or not all(_is_whole(side, -1) for side in sides):
        raise MaskError(
            f"window_size is {window_size!r}; it has to be two ints (left, right), tokens on "
            "either side of the diagonal, with -1 for no limit."
        )
    if alibi_slopes is None:
        return
    check_is_tensor("alibi_slopes", alibi_slopes)
    num_heads = q.shape[-2]
    shapes = ((num_heads,), (mask.batch_size(q), num_heads))
    if alibi_slopes.dtype != torch.float32 or tuple(alibi_slopes.shape) not in shapes:
        raise MaskError(
            f"alibi_slopes has dtype {alibi_slopes.dtype} and shape {tuple(alibi_slopes.shape)}; "
            f"it has to be float32, (num_heads,) = {shapes[0]} or (batch, num_heads) = {shapes[1]}."
        )
    if alibi_slopes.device != q.device:
        raise MaskError(f"alibi_slopes is on {alibi_slopes.device}, q on {q.device}; move it once.")
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise MaskError(
            "alibi_slopes requires a gradient, which this attention does not compute. Detach it."
        )
