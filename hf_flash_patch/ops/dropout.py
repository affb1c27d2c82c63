"""Counter-based dropout: a pair is kept or not as a function of (seed, offset, head, i, j) alone.

So forward, backward, recomputation, every tile shape and both engines drop the same pairs. One call
of Philox4x32 serves 16 pairs, a byte each: rows {2a, 2a + 1} + {0, 8} and columns {2b, 2b + 1} +
{0, 8} of a tile of 16 x 16, which is what two threads of the compiled kernels hold.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC'11); 7 rounds are the fewest
that pass BigCrush.
"""

from __future__ import annotations

import math

import torch

TILE = 16

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def new_rng_state(device: torch.device) -> torch.Tensor:
    """Fresh int64 (2,), seed and offset, on `device`, from torch's generator there.

    torch.manual_seed, activation checkpointing and CUDA graphs therefore replay it. One kernel, no
    sync.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """K of 0..256: a pair is kept if its byte is below K; what is kept is multiplied by 256 / K."""
    return math.floor((1.0 - dropout_p) * 256.0 + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What kept probabilities are multiplied by; 0 if none is kept."""
    threshold = keep_threshold(dropout_p)
    return 256.0 / threshold if threshold else 0.0


def dropout_keep_mask(
    rng_state: torch.Tensor,
    dropout_p: float,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
) -> torch.Tensor:
    """The whole mask of one call, for tests and inspection; quadratic memory.

    Args:
        rng_state: int64 (2,), seed and offset.
        dropout_p: probability of dropping.
        batch, num_heads, seqlen_q, seqlen_k: sizes; positions count inside each sequence.

    Returns:
        bool (batch, num_heads, seqlen_q, seqlen_k), True where the pair is kept.
    """
    heads = torch.arange(batch * num_heads, device=rng_state.device)
    keep = keep_tile(rng_state, dropout_p, heads, 0, seqlen_q, 0, seqlen_k)
    return keep.view(batch, num_heads, seqlen_q, seqlen_k)


def keep_tile(
    rng_state: torch.Tensor,
    dropout_p: float,
    heads: torch.Tensor,
    row_begin: int,
    row_end: int,
    column_begin: int,
    column_end: int,
) -> torch.Tensor:
    """Rows [row_begin, row_end) and columns [column_begin, column_end) of the mask.

    Args:
        rng_state: int64 (2,).
        dropout_p: probability of dropping.
        heads: int64 (n,), batch index * num_heads + head.

    Returns:
        bool (n, rows, columns), True where the pair is kept.
    """
    device = rng_state.device
    first_row, first_column = row_begin // TILE, column_begin // TILE
    row_tiles = -(-row_end // TILE) - first_row
    column_tiles = -(-column_end // TILE) - first_column

    y = torch.arange(first_row * 4, (first_row + row_tiles) * 4, device=device)
    x = torch.arange(first_column * 4, (first_column + column_tiles) * 4, device=device)
    counter = (x, y[:, None], heads[:, None, None], rng_state[1] & _LOW)
    words = _philox(counter, (rng_state[0] & _LOW, (rng_state[0] >> 32) & _LOW))

    # Word = 2 * parity of the row + half of the 16 rows, byte = 2 * parity of the column + half.
    stacked = torch.stack([word.expand(len(heads), len(y), len(x)) for word in words], dim=-1)
    keep = stacked.view(torch.uint8).unflatten(-1, (4, 8))[..., :4] < keep_threshold(dropout_p)
    keep = keep.view(len(heads), row_tiles, 4, column_tiles, 4, 2, 2, 2, 2)
    #       n, row tile, half, pair of rows, parity, column tile, half, pair of columns, parity
    keep = keep.permute(0, 1, 6, 2, 5, 3, 8, 4, 7)
    keep = keep.reshape(len(heads), row_tiles * TILE, column_tiles * TILE)
    row, column = row_begin - first_row * TILE, column_begin - first_column * TILE
    return keep[:, row : row + row_end - row_begin, column : column + column_end - column_begin]


def _philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Philox4x32 on int64 tensors that hold unsigned 32-bit words.

    A product of two such words wraps around in int64, but its 64 bits are the right ones, so an
    arithmetic shift and a mask give its halves.
    """
    x, y, z, w = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        a = x * _MULTIPLIERS[0]
        b = z * _MULTIPLIERS[1]
        x = ((b >> 32) & _LOW) ^ y ^ key_0
        y = b & _LOW
        z = ((a >> 32) & _LOW) ^ w ^ key_1
        w = a & _LOW
        key_0 = (key_0 + _KEY_STEPS[0]) & _LOW
        key_1 = (key_1 + _KEY_STEPS[1]) & _LOW
    return x, y, z, w
