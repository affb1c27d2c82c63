"""The mask that every layer of a forward is given: one small object, linear in the sequence.

To `hfp_attention` it says who may see whom. To everything else, which may cut, edit, move or add
it, it is the dense mask that it stands for: bool, or eager attention's where it is added to scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils.import_utils import is_tracing

from ..errors import UnsupportedModelError
from ..masks.block_mask import BlockMask
from ..ops.arguments import MaskArguments
from . import packing

_TENSORS = ("cu_seqlens", "seqused_k", "key_padding", "key_range", "key_bits", "doc_range")
_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Who may see whom, for every layer of one forward; positions are rows of the key tensor.

    Attributes:
        batch_size, seqlen_q, seqlen_k: sizes of the attention it was made for.
        causal, window_size: as in `ops`, bottom-right aligned to seqused_k if given, else to
            seqlen_k.
        seqused_k: int32 (batch,) or None; keys from there on are unused slots of a cache.
        key_padding: bool (batch, seqlen_k) or None; True where the key is real.
        all_real: whether a padding mask was given that calls every key real.
        key_range, key_bits: the same for the kernels (ops.padding).
        doc_range: int32 (batch, seqlen, 2) or None; packed documents and chunks.
        dense: bool (batch or 1, num_heads or 1, seqlen_q, seqlen_k) or None; what none of the
            above can say.
        device: where its tensors are.
        q_start, k_start: positions of the first query (a tensor of one element where only the
            device knows it; None for seqlen_k - seqlen_q after the first key) and the first key.
        block_mask: lists of blocks, or None.
        cu_seqlens: int32 (batch + 1,) or None; if given, the tensors have in one row the real
            tokens of sequences (or documents) that were padded to seqlen_q: `tokens`, and at most
            `longest` of one.
        place: int64 (tokens,) or None; where in the padded batch those tokens were.
        combined: this mask under patterns, by pattern, and as lists, see `sparse.under`; and on
            other devices.
    """

    batch_size: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    window_size: tuple[int, int]
    device: torch.device
    seqused_k: torch.Tensor | None = None
    key_padding: torch.Tensor | None = None
    all_real: bool = False
    key_range: torch.Tensor | None = None
    key_bits: torch.Tensor | None = None
    doc_range: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    q_start: int | torch.Tensor | None = None
    k_start: int = 0
    block_mask: BlockMask | None = None
    cu_seqlens: torch.Tensor | None = None
    tokens: int = 0
    longest: int = 0
    place: torch.Tensor | None = None
    combined: dict[Any, Any] = field(default_factory=dict, repr=False)
    _packed: dict[str, Any] = field(default_factory=dict, repr=False)

    # What transformers and accelerate ask of a mask they did not make.
    ndim = 4
    dtype = torch.bool

    @property
    def shape(self) -> torch.Size:
        """(batch, 1, seqlen_q, seqlen_k), as of the dense mask it stands for."""
        return torch.Size((self.batch_size, 1, self.seqlen_q, self.seqlen_k))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, queries and keys of the tensors it is for."""
        if self.cu_seqlens is not None:
            return 1, self.tokens, self.tokens
        return self.batch_size, self.seqlen_q, self.seqlen_k

    @property
    def is_plain(self) -> bool:
        """Whether causality and the window are all there is."""
        hides = (self.seqused_k, self.key_range, self.doc_range, self.dense, self.block_mask)
        return all(rule is None for rule in (*hides, self.cu_seqlens))

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key."""
        return self.is_plain and not self.causal and tuple(self.window_size) == (-1, -1)

    def to(
        self,
        where: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        *,
        device: torch.device | str | None = None,
    ) -> AttentionMask | torch.Tensor:
        """The same mask on another device, where accelerate moves what a layer is given; for a
        dtype, what eager attention adds to its scores.

        Raises:
            UnsupportedModelError: the dtype is not floating.
        """
        if isinstance(where, torch.dtype):
            where, dtype = None, where
        where = device if where is None else where
        if dtype is not None:
            added = self.additive(dtype)
            return added if where is None else added.to(where, non_blocking=non_blocking)
        if where is None or torch.device(where) == self.device:
            return self
        # accelerate moves what each layer is given: a copy is made once a forward and device, so
        # that what the layers share stays shared.
        place = "on", torch.device(where)
        if place not in self.combined:
            self.combined[place] = self._moved(torch.device(where), non_blocking)
        return self.combined[place]

    def _moved(self, where: torch.device, non_blocking: bool) -> AttentionMask:
        """A copy on another device."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(where, non_blocking=non_blocking)
            for name in (*_TENSORS, "dense")
            if getattr(self, name) is not None
        }
        if isinstance(self.q_start, torch.Tensor):
            moved["q_start"] = self.q_start.to(where, non_blocking=non_blocking)
        if self.block_mask is not None:
            moved["block_mask"] = self.block_mask.to(where)
        return replace(self, device=where, combined={}, _packed={}, **moved)

    def document_ranges(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Ranges of the documents that `position_ids` tell apart; None if there is but one.

        Computed once a forward: the layers of a model share the mask and the tensor. On a CUDA
        device the answer is never None, since finding one document only would take a sync.

        Args:
            position_ids: int (batch or 1, seqlen).

        Returns:
            int32 (batch, seqlen, 2), or None.
        """
        if not torch.compiler.is_compiling() and self._packed.get("of") is position_ids:
            return self._packed["ranges"]
        boundary = packing.boundaries_from_position_ids(
            position_ids, self.key_padding, all_real=self.all_real
        )
        if may_read(boundary) and not boundary.any():
            ranges = None
        else:
            ranges = packing.ranges_from_boundaries(boundary).expand(self.batch_size, -1, -1)
        if not torch.compiler.is_compiling():
            self._packed.update(of=position_ids, ranges=ranges)
        return ranges

    def arguments(self, doc_range: torch.Tensor | None = None) -> MaskArguments:
        """What `ops` takes, `doc_range` included."""
        longest = None if self.cu_seqlens is None else self.longest
        return MaskArguments(
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            seqused_k=self.seqused_k,
            key_range=self.key_range,
            key_bits=self.key_bits,
            doc_range=packing.intersect(self.doc_range, doc_range),
            attn_bias=self.dense,
            block_mask=self.block_mask,
        )

    def materialise(self, doc_range: torch.Tensor | None = None) -> torch.Tensor:
        """The dense mask, bool (batch, heads that differ, seqlen_q, seqlen_k); quadratic memory.

        Args:
            doc_range: further ranges, int32 (batch, seqlen, 2), to intersect with.
        """
        key = torch.arange(self.seqlen_k, device=self.device)
        used = self.seqlen_k if self.seqused_k is None else self.seqused_k.view(-1, 1, 1, 1)
        # The key position on a query's own diagonal.
        diagonal = torch.arange(self.seqlen_q, device=self.device)[:, None] + (used - self.seqlen_q)
        visible = (key < used).expand(self.shape)
        if self.causal:
            visible = visible & (key <= diagonal)
        left, right = self.window_size
        if left >= 0:
            visible = visible & (key >= diagonal - left)
        if right >= 0:
            visible = visible & (key <= diagonal + right)
        if self.key_padding is not None:
            visible = visible & self.key_padding[:, None, None, :]
        if self.key_range is not None:
            visible = visible & packing.in_range(key, self.key_range[:, None, None, :])
        ranges = packing.intersect(self.doc_range, doc_range)
        if ranges is not None:
            visible = visible & packing.in_range(key, ranges[:, None])
        if self.block_mask is not None:
            visible = visible & self.block_mask.dense()
        return visible if self.dense is None else visible & self.dense

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """What eager attention adds to its scores: 0 where a key is seen, else the dtype's minimum.

        Raises:
            UnsupportedModelError: the dtype is not floating: a model that asks for another one
                expects eager's mask, of which it would be the opposite of this one's.
        """
        if not dtype.is_floating_point:
            raise UnsupportedModelError(
                f"the model computes attention itself and converts its mask to {dtype}; that is "
                'for eager attention. Load it with attn_implementation="eager".'
            )
        visible = self.materialise()
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """An index into the dense mask, for models that cut the mask themselves."""
        return self.materialise()[index]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of the dense mask, for models that reshape the mask themselves (SigLIP 2)."""
        if name.startswith("_") or not callable(getattr(torch.Tensor, name, None)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return lambda *args, **kwargs: getattr(self.materialise(), name)(*args, **kwargs)

    def __invert__(self) -> torch.Tensor:
        return ~self.materialise()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Torch functions see the dense mask, for models that edit the mask themselves; one that
        adds it to scores, the mask that eager attention adds."""
        scores = None
        if getattr(func, "__name__", "") in _ADDITIONS:
            scores = next((x for x in args if isinstance(x, torch.Tensor)), None)

        def dense(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(dense(item) for item in value)
            if not isinstance(value, AttentionMask):
                return value
            if scores is not None and scores.is_floating_point():
                return value.additive(scores.dtype)
            return value.materialise()

        return func(*dense(args), **{name: dense(value) for name, value in (kwargs or {}).items()})


def may_read(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs no device sync and breaks no trace."""
    return tensor.device.type == "cpu" and not is_tracing(tensor)
