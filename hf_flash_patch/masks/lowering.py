"""Pattern -> `BlockMask`, in time and memory that follow the blocks that are not empty.

A pattern's runs say which blocks are empty, full and partial. Partial ones whose signatures agree
have equal elements, so one of each kind is looked at, element by element.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..errors import MaskError
from .bits import pack_bits, transpose_tiles
from .block_mask import FULL_TILE, BlockMask, check_block_size
from .grid import PARTIAL, Grid
from .pattern import Pattern

KEPT = 32  # masks in the cache

_CHUNK = 2**22  # elements looked at at once
_MAX_ENTRIES = 2**31 - 1

_Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_cache: OrderedDict[tuple, BlockMask] = OrderedDict()


def lower(pattern: Pattern, grid: Grid, num_heads: int, device: torch.device) -> BlockMask:
    """`Pattern.block_mask`, by its grid."""
    check_block_size(grid.block)
    heads = pattern.heads(num_heads)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (pattern, grid, heads, device)
    mask = _cache.get(key)
    if mask is None:
        pattern.check(grid)
        # What makes tensors below makes them there: a GPU lowers by itself.
        with torch.device(device):
            mask = _cache[key] = _lower(pattern, grid, heads, num_heads)
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    return mask


def _lower(pattern: Pattern, grid: Grid, heads: int, num_heads: int) -> BlockMask:
    known: dict[Pattern, int] = {}
    parts: list[_Blocks] = []
    uses = []
    first_tile = 0
    for sequence in range(pattern.batches):
        for head in range(heads):
            one = pattern.at(sequence, head * (num_heads // heads), num_heads)
            if one not in known:
                known[one] = len(parts)
                row, column, tile, tiles = blocks_of(one, grid)
                tile = torch.where(tile == FULL_TILE, tile, tile + first_tile)
                first_tile += len(tiles)
                parts.append((row, column, tile, tiles))
            uses.append(known[one])
    number = torch.cat([torch.full_like(parts[use][0], i) for i, use in enumerate(uses)])
    row, column, tile = (torch.cat([parts[use][part] for use in uses]) for part in range(3))
    if len(row) > _MAX_ENTRIES:
        raise MaskError(
            f"the mask has {len(row)} blocks of {grid.block} tokens that are not empty, more than "
            f"{_MAX_ENTRIES}; use a sparser pattern, a shorter sequence or larger blocks."
        )
    tiles, inverse = _distinct(torch.cat([part[3] for part in parts]))
    if len(tiles):
        tile = torch.where(tile == FULL_TILE, tile, inverse[tile.clamp(min=0)])

    def lists(
        major: torch.Tensor, minor: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = number * length + major
        order = key.argsort(stable=True)
        edges = torch.arange(len(uses))[:, None] * length + torch.arange(length + 1)
        offsets = torch.searchsorted(key[order], edges).view(pattern.batches, heads, length + 1)
        return offsets.int(), torch.stack((minor, tile), dim=1)[order].int()

    rows, columns = lists(row, column, grid.rows), lists(column, row, grid.columns)
    host = None
    if row.device.type != "cpu":
        host = (rows[0].cpu(), rows[1].cpu())
    return BlockMask(
        grid.seqlen_q,
        grid.seqlen_k,
        grid.block,
        pattern.batches,
        heads,
        *rows,
        *columns,
        tiles,
        transpose_tiles(tiles),
        host,
    )


def blocks_of(pattern: Pattern, grid: Grid) -> _Blocks:
    """Row, column and tile (`FULL_TILE` or a number) of each block with anything in it, by rising
    row and column, and the tiles' bits, for what `Pattern.at` returned."""
    if 0 in (grid.rows, grid.columns):
        none = torch.zeros(0, dtype=torch.int64)
        return none, none, none, torch.zeros(0, grid.block, grid.block // 32, dtype=torch.int32)
    row, column, state = pattern.runs(grid).blocks()
    partial = (state == PARTIAL).nonzero()[:, 0]
    q, k = row[partial] * grid.block, column[partial] * grid.block
    cut = [
        (length - first).clamp(max=grid.block)
        for length, first in ((grid.seqlen_q, q), (grid.seqlen_k, k))
    ]
    signature = pattern.signature(grid, q + grid.q_start, k + grid.k_start)
    kind, example = _kinds(len(partial), [*signature, *cut])
    tiles, count = _tiles(pattern, grid, q[example], k[example])
    pairs = cut[0][example] * cut[1][example]
    # Kinds turn out to be empty, full, or to have a tile.
    tiled = (count > 0) & (count < pairs)
    tile = torch.where(count == pairs, FULL_TILE, tiled.cumsum(0) - 1)[kind]
    number = torch.full_like(row, FULL_TILE)
    number[partial] = tile
    live = torch.ones_like(row, dtype=torch.bool)
    live[partial] = (count > 0)[kind]
    return row[live], column[live], number[live], tiles[tiled]


def _kinds(length: int, columns: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each row's kind, and one row of each kind; rows of a kind agree in all columns."""
    kind = torch.zeros(length, dtype=torch.int64)
    for column in columns:
        values, number = column.unique(return_inverse=True)
        kind = (kind * len(values) + number).unique(return_inverse=True)[1]
    example = torch.zeros(int(kind.max()) + 1 if length else 0, dtype=torch.int64)
    example[kind] = torch.arange(length)
    return kind, example


def _tiles(
    pattern: Pattern, grid: Grid, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits (n, block, block / 32) and pairs seen (n,) of the blocks that start at (q, k)."""
    within = torch.arange(grid.block)
    step = max(1, _CHUNK // grid.block**2)
    words, counts = [], []
    for begin in range(0, max(len(q), 1), step):
        i = q[begin : begin + step, None, None] + within[:, None]
        j = k[begin : begin + step, None, None] + within
        # Positions past the end do not exist; no pattern has to know them.
        seen = pattern.visible(
            i.clamp(max=grid.seqlen_q - 1) + grid.q_start,
            j.clamp(max=grid.seqlen_k - 1) + grid.k_start,
        )
        seen = seen & (i < grid.seqlen_q) & (j < grid.seqlen_k)
        counts.append(seen.sum(dim=(1, 2)))
        words.append(pack_bits(seen))
    return torch.cat(words), torch.cat(counts)


def _distinct(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles that differ, and the number of each among them."""
    flat = tiles.flatten(1)
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator, device="cpu")
    factor = factor.to(flat.device)
    # Equal tiles have equal hashes; should unequal ones, too, then all are kept.
    hashes = torch.cat([(part * factor).sum(dim=1) for part in flat.split(4096)])
    values, inverse = hashes.unique(return_inverse=True)
    example = torch.zeros_like(values)
    example[inverse] = torch.arange(len(flat))
    if not torch.equal(flat[example[inverse]], flat):
        return tiles, torch.arange(len(tiles))
    return tiles[example], inverse
