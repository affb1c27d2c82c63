"""transformers' mask request -> one small object, computed once per forward, given to every layer.

transformers asks for a mask with a function of indices, a padding mask and the cache's sizes. What
the kernels can express (causal, windows, padding, documents, a cache longer than what is used)
becomes a few numbers and tensors linear in the sequence, on the device and without a host sync.
Every other request is materialised, by transformers' own code, as bits of blocks: exact, also
without a sync, at an eighth of the memory of a boolean mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from ..errors import ParallelError
from ..families import EAGER_MASK
from ..masks.block_mask import BlockMask
from ..ops.padding import pack_key_padding
from . import packing
from .attention_mask import AttentionMask, may_read
from .patterns import Pattern, read_mask_function
from .sharing import WholeSequence, whole_sequence

_AND_MASK_CODE = and_masks(causal_mask_function).__code__


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
) -> AttentionMask | torch.Tensor | None:
    """The mask function registered with transformers; what it returns is never None, so that a mask
    cannot be lost, but eager attention's own for models in `families.EAGER_MASK`.

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
    request: dict[str, Any] = {
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
    if getattr(config, "model_type", "") in EAGER_MASK:
        return eager_mask(**request, **kwargs)
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
    return None if may_read(columns) and columns.all() else columns


def _kept(offset: int | torch.Tensor) -> int | torch.Tensor:
    """The offset as it is now: a static cache counts on in the tensor it hands out."""
    return offset.clone() if isinstance(offset, torch.Tensor) else offset
