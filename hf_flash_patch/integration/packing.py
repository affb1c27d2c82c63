"""Documents packed in one row, as the range of keys that each token's own document covers.

Everything is computed on the device, without a sync. All ranges are int32 (batch, seqlen, 2): start
and stop of the document a token belongs to.
"""

import torch
import torch.nn.functional as F


def ranges_from_boundaries(boundary: torch.Tensor) -> torch.Tensor:
    """Document ranges, given where documents start.

    Args:
        boundary: bool (batch, seqlen); True at the first token of every document but a row's first,
            where it is free.

    Returns:
        int32 (batch, seqlen, 2).
    """
    seqlen = boundary.shape[1]
    index = torch.arange(seqlen, device=boundary.device).expand_as(boundary)
    start = torch.where(boundary, index, 0).cummax(dim=1).values
    last = F.pad(boundary[:, 1:], (0, 1), value=True)
    stop = torch.where(last, index + 1, seqlen).flip(1).cummin(dim=1).values.flip(1)
    return torch.stack((start, stop), dim=-1).int()


def boundaries_from_ids(ids: torch.Tensor) -> torch.Tensor:
    """bool (batch, seqlen): where the document number in `ids`, int (batch, seqlen), changes."""
    return F.pad(ids[:, 1:] != ids[:, :-1], (1, 0))


def boundaries_from_position_ids(
    position_ids: torch.Tensor,
    key_padding: torch.Tensor | None = None,
    *,
    all_real: bool = False,
) -> torch.Tensor:
    """Where documents start, judging by the tokens' positions.

    Without a padding mask a document ends where the next position is not the next integer, as in
    transformers' own packing detection. With one, positions are compared from real token to real
    token, and only a position that does not rise starts a document: what stands at padding means
    nothing (left padding reads 1, 1, 0, 1, ... in generate), and holes may be counted or not.

    Args:
        position_ids: int (batch or 1, seqlen).
        key_padding: bool (batch, seqlen), True where a token is real; None if there is no mask, or
            none that says anything.
        all_real: whether there is a mask that calls every token real.

    Returns:
        bool (batch or 1, seqlen).
    """
    if key_padding is None:
        before, here = position_ids[:, :-1], position_ids[:, 1:]
        return F.pad(here <= before if all_real else here != before + 1, (1, 0))
    position_ids = position_ids.expand(key_padding.shape[0], -1)
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    last_real = torch.where(key_padding, index, -1).cummax(dim=1).values
    # The nearest real token to the left; -1 for none.
    previous = F.pad(last_real[:, :-1], (1, 0), value=-1)
    restarts = position_ids <= position_ids.gather(1, previous.clamp(min=0))
    return key_padding & (previous >= 0) & restarts


def in_range(key: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """bool (..., keys): which of the positions `key`, (keys,), lie in ranges (..., 2)."""
    return (key >= ranges[..., :1]) & (key < ranges[..., 1:])


def ranges_from_cu_seqlens(cu_seqlens: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Document ranges (1, seqlen, 2) of one row, from its documents' cumulative lengths.

    Args:
        cu_seqlens: int (num_documents + 1,), from 0.
        seqlen: tokens in the row.
    """
    index = torch.arange(seqlen, device=cu_seqlens.device)
    # Tokens past the last document, if any, form one of their own.
    edges = F.pad(cu_seqlens.long(), (0, 1), value=seqlen)
    document = torch.searchsorted(edges[1:].contiguous(), index, right=True)
    return torch.stack((edges[document], edges[document + 1]), dim=-1).int()[None]


def chunk_ranges(
    chunk_size: int, origin: torch.Tensor, first: int | torch.Tensor, seqlen: int
) -> torch.Tensor:
    """Ranges (batch, seqlen, 2) of the chunks that a run of tokens belongs to.

    Args:
        chunk_size: tokens in a chunk.
        origin: int (batch,); where each row's first chunk starts (its left padding).
        first: key position of the first token; an int, or a tensor of one element on the device.
        seqlen: number of tokens.
    """
    position = torch.arange(seqlen, device=origin.device) + first
    chunk = (position - origin[:, None]).div(chunk_size, rounding_mode="floor")
    start = chunk * chunk_size + origin[:, None]
    return torch.stack((start, start + chunk_size), dim=-1).int()


def intersect(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Intersection of two ranges (..., 2); None stands for everything."""
    if a is None or b is None:
        return b if a is None else a
    start = torch.maximum(a[..., 0], b[..., 0])
    return torch.stack((start, torch.maximum(start, torch.minimum(a[..., 1], b[..., 1]))), dim=-1)
