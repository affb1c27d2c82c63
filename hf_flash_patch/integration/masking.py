"""transformers' mask request -> one small object, computed once per forward, given to every layer.

transformers asks for a mask with a function of indices, a padding mask and the cache's sizes. What
the kernels can express (causal, windows, padding, documents, a cache longer than what is used)
becomes a few numbers and tensors linear in the sequence, on the device and without a host sync.
Every other request is materialised, by transformers' own code, as bits of blocks: exact, also
without a sync, at an eighth of the memory of a boolean mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from ..errors import ParallelError, UnsupportedModelError
from ..masks.block_mask import BlockMask
from ..ops.arguments import MaskArguments
from ..ops.padding import pack_key_padding
from . import packing
from .patterns import Pattern, read_mask_function
from .sharing import WholeSequence, whole_sequence

_TENSORS = ("cu_seqlens", "seqused_k", "key_padding", "key_range", "key_bits", "doc_range")
_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_AND_MASK_CODE = and_masks(causal_mask_function).__code__


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
        combined: this mask under patterns, by pattern, and as lists; see `sparse.under`.
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
        if where is None:
            return self
        moved: dict[str, Any] = {
            name: getattr(self, name).to(where, non_blocking=non_blocking)
            for name in (*_TENSORS, "dense")
            if getattr(self, name) is not None
        }
        if isinstance(self.q_start, torch.Tensor):
            moved["q_start"] = self.q_start.to(where, non_blocking=non_blocking)
        if self.block_mask is not None:
            moved["block_mask"] = self.block_mask.to(where)
        return replace(self, device=torch.device(where), combined={}, _packed={}, **moved)

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
        if _may_read(boundary) and not boundary.any():
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


def hfp_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | AttentionMask | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> AttentionMask:
    """The mask function registered with transformers; never returns None, so that a mask cannot be
    lost.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset: position of the first query; a tensor of one element where the cache is static.
        kv_offset: position of the first key (sliding caches drop old keys).
        mask_function: (batch, head, query, key) -> bool on positions.
        attention_mask: bool (batch, seen tokens) or None; or what this function returned, which is
            returned again.
        local_size: window or chunk of local attention.
        use_vmap: True where a caller put a function of their own on top.
        config: the model's.
        device: where to make tensors.
        **kwargs: hints for other implementations (skips of masks, dtype).
    """
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    request = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    pattern = _read(request, local_size, bidirectional, config)
    sequence = whole_sequence()
    if sequence is not None:
        return _shared(pattern, request, sequence)
    mask = None if pattern is None else _compact(pattern, request)
    if mask is not None:
        return mask
    return _materialised(request)


def _shared(
    pattern: Pattern | None, request: dict[str, Any], sequence: WholeSequence
) -> AttentionMask:
    """The mask of a whole sequence, from a process's request for its own tokens."""
    own = request["q_length"]
    square = (request["kv_length"], request["q_offset"], request["kv_offset"]) == (own, 0, 0)
    if not square or own * sequence.processes != sequence.seqlen:
        raise ParallelError(
            f"attention of {own} queries to {request['kv_length']} keys, where "
            f"{sequence.processes} processes share {sequence.seqlen} tokens: only self-attention "
            "without a cache can be shared."
        )
    if pattern is None or pattern.documents is not None or pattern.chunk_size:
        raise ParallelError(
            "the model's mask is a function of its own tokens' contents or chunks, which says "
            "nothing about the whole sequence."
        )
    size = {"q_length": sequence.seqlen, "kv_length": sequence.seqlen}
    mask = _compact(pattern, {**request, **size, "attention_mask": sequence.key_padding})
    assert mask is not None  # a square request always has a compact form
    return replace(mask, doc_range=sequence.doc_range)


def _materialised(request: dict[str, Any]) -> AttentionMask:
    """The request by transformers' own code: bits of blocks, or of keys for a single query."""
    batch_size, seqlen_q, seqlen_k = (request[n] for n in ("batch_size", "q_length", "kv_length"))
    first = request["q_offset"]

    def rows_of(rows: slice) -> torch.Tensor:
        part = {**request, "q_length": rows.stop - rows.start, "q_offset": first + rows.start}
        seen = sdpa_mask(**part, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return seen.expand(batch_size, 1, part["q_length"], seqlen_k)

    mask = AttentionMask(
        batch_size=batch_size,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=False,
        window_size=(-1, -1),
        device=torch.device(request["device"]),
        q_start=_kept(first),
        k_start=request["kv_offset"],
    )
    if seqlen_q != 1:
        shape = (batch_size, 1, seqlen_q, seqlen_k)
        return replace(mask, block_mask=BlockMask.from_rows(rows_of, shape, mask.device))
    visible = rows_of(slice(0, 1))[:, 0, 0]
    key_range, key_bits = pack_key_padding(visible)
    return replace(mask, key_padding=visible, key_range=key_range, key_bits=key_bits)


def _read(
    request: dict[str, Any], local_size: int | None, bidirectional: bool, config: Any
) -> Pattern | None:
    """The request's mask function as a `Pattern`, or None where it must be materialised."""
    function = request["mask_function"]
    if function is causal_mask_function:
        return Pattern(causal=True)
    if function is bidirectional_mask_function:
        return Pattern()
    if request["use_vmap"]:
        return None  # a caller's own overlay
    if not torch.compiler.is_compiling():
        return read_mask_function(function)
    # While torch.compile traces, a function that looks up a tensor (packed documents, chunks)
    # cannot be called on symbols. transformers packs only where there is neither padding nor a
    # cache, and never bidirectionally.
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    starts_empty = isinstance(request["q_offset"], int) and request["q_offset"] == 0
    square = (
        starts_empty and request["kv_offset"] == 0 and request["q_length"] == request["kv_length"]
    )
    packed = square and request["attention_mask"] is None and not bidirectional
    if not packed and not chunked:
        return read_mask_function(function)
    if not square or function.__code__ is not _AND_MASK_CODE:
        return None
    # What remains is transformers' own "causal, same chunk, same document": a token sees its
    # predecessor unless a document or a chunk starts, so one diagonal of the mask (linear memory)
    # says where they do.
    window = -1 if chunked or local_size is None else local_size - 1
    return Pattern(causal=True, window_left=window, documents=_documents_on_diagonal(request))


def _documents_on_diagonal(request: dict[str, Any]) -> torch.Tensor:
    """Document numbers, int (batch, seqlen), from the mask function's values at (q, q - 1)."""
    query = torch.arange(request["q_length"], device=request["device"])[None]
    batch = torch.arange(request["batch_size"], device=request["device"])[:, None]
    sees_previous = request["mask_function"](
        batch, torch.zeros_like(batch), query, (query - 1).clamp(min=0)
    )
    return (~sees_previous.expand(request["batch_size"], -1)).cumsum(dim=1)


def _compact(pattern: Pattern, request: dict[str, Any]) -> AttentionMask | None:
    """The `AttentionMask` of linear size for `pattern`, or None if the kernels' rules cannot
    express it."""
    batch_size, seqlen_q, seqlen_k = (
        request["batch_size"],
        request["q_length"],
        request["kv_length"],
    )
    padding = request["attention_mask"]
    if padding is not None and padding.ndim != 2:
        return None
    device = torch.device(request["device"])
    first = request["q_offset"] - request["kv_offset"]  # key position of the first query
    aligned = pattern.causal or pattern.window_left >= 0 or pattern.window_right >= 0

    # The rules are aligned to the last used key, which must be the last query's own.
    seqused_k = None
    if isinstance(first, torch.Tensor):
        seqused_k = (first + seqlen_q).reshape(1).to(device, torch.int32).expand(batch_size)
    elif aligned and first + seqlen_q > seqlen_k:
        return None
    elif aligned and first + seqlen_q < seqlen_k:
        seqused_k = torch.full((batch_size,), first + seqlen_q, dtype=torch.int32, device=device)

    doc_range = key_range = key_bits = None
    square = not isinstance(first, torch.Tensor) and first == 0 and seqlen_q == seqlen_k
    if pattern.documents is not None:
        if not square:
            return None
        doc_range = packing.ranges_from_boundaries(packing.boundaries_from_ids(pattern.documents))
    if pattern.chunk_size:
        if not square and seqlen_q != 1:
            return None
        origin = pattern.chunk_origin - request["kv_offset"]
        chunks = packing.chunk_ranges(pattern.chunk_size, origin, first, seqlen_q)
        chunks = chunks.expand(batch_size, -1, -1).clamp(0, seqlen_k)
        if seqlen_q == 1:
            key_range = chunks[:, 0]
        else:
            doc_range = packing.intersect(doc_range, chunks)

    key_padding = _key_padding(padding, request["kv_offset"], seqlen_k, batch_size)
    if key_padding is not None:
        padded_range, key_bits = pack_key_padding(key_padding)
        key_range = packing.intersect(key_range, padded_range)
    return AttentionMask(
        batch_size=batch_size,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=pattern.causal,
        window_size=(pattern.window_left, pattern.window_right),
        device=device,
        seqused_k=seqused_k,
        key_padding=key_padding,
        all_real=padding is not None and key_padding is None,
        key_range=None if key_range is None else key_range.contiguous(),
        key_bits=key_bits,
        doc_range=None if doc_range is None else doc_range.expand(batch_size, -1, -1),
        q_start=_kept(request["q_offset"]),
        k_start=request["kv_offset"],
    )


def _key_padding(
    padding: torch.Tensor | None, kv_offset: int, seqlen_k: int, batch_size: int
) -> torch.Tensor | None:
    """The columns of the padding mask that the keys stand for, bool (batch, seqlen_k); None if all
    are known real."""
    if padding is None:
        return None
    columns = padding[:, kv_offset : kv_offset + seqlen_k].bool()
    # A static cache is longer than the tokens seen so far.
    columns = F.pad(columns, (0, seqlen_k - columns.shape[1]), value=False).expand(batch_size, -1)
    return None if _may_read(columns) and columns.all() else columns


def _kept(offset: int | torch.Tensor) -> int | torch.Tensor:
    """The offset as it is now: a static cache counts on in the tensor it hands out."""
    return offset.clone() if isinstance(offset, torch.Tensor) else offset


def _may_read(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs no device sync and breaks no trace."""
    return tensor.device.type == "cpu" and not is_tracing(tensor)
