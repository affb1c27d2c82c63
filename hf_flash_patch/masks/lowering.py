"""Pattern -> `BlockMask`, in time and memory that follow the blocks that are not empty.

A pattern's runs say which blocks are empty, full and partial. Partial ones whose signatures agree
have equal elements, so one of each kind is looked at, element by element.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch.nn.functional import pad

from ..errors import MaskError
from .bits import pack_bits, transpose_tiles
from .block_mask import FULL_TILE, BlockMask, check_block_size
from .grid import EMPTY, PARTIAL, Grid, states_of
from .pattern import Pattern

KEPT = 32  # masks in the cache

_CHUNK = 2**22  # elements looked at at once
_MAX_ENTRIES = 2**31 - 1

_Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_cache: OrderedDict[tuple, BlockMask] = OrderedDict()


def lower(
    pattern: Pattern, grid: Grid, num_heads: int, device: torch.device, *, keep: bool = True
) -> BlockMask:
    """`Pattern.block_mask`, by its grid; without `keep`, for a pattern that no other call has."""
    check_block_size(grid.block)
    heads = pattern.heads(num_heads)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (pattern, grid, heads, device)
    mask = _cache.pop(key, None)  # its place is at the end; another thread may evict it
    if mask is None:
        pattern.check(grid)
        # What makes tensors below makes them there: a GPU lowers by itself. Kept ones have to do
        # for training, too, where a caller's inference mode made them first.
        with torch.device(device), torch.inference_mode(False):
            mask = _lower(pattern, grid, heads, num_heads)
    if keep:
        _cache[key] = mask
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
    return mask


def _lower(pattern: Pattern, grid: Grid, heads: int, num_heads: int) -> BlockMask:
    known: dict[Pattern, int] = {}
    parts: list[_Blocks] = []
    uses = []
    for sequence in range(pattern.batches):
        for head in range(heads):
            one = pattern.at(sequence, head * (num_heads // heads), num_heads)
            if one not in known:
                known[one] = len(parts)
                parts.append(blocks_of(one, grid))
            uses.append(known[one])
    entries = sum(len(parts[use][0]) for use in uses)
    if entries > _MAX_ENTRIES:
        raise MaskError(
            f"the mask has {entries} blocks of {grid.block} tokens that are not empty, more than "
            f"{_MAX_ENTRIES}; use a sparser pattern, a shorter sequence or larger blocks."
        )
    tiles = torch.cat([part[3] for part in parts])
    example, inverse = _distinct(tiles.flatten(1))
    tiles = tiles[example]
    # A part's tile FULL_TILE, -1, becomes the last of its numbers: FULL_TILE.
    numbers = [
        pad(of, (0, 1), value=FULL_TILE)[part[2]]
        for of, part in zip(inverse.int().split([len(p[3]) for p in parts]), parts, strict=True)
    ]
    row, column = (torch.cat([parts[use][axis] for use in uses]) for axis in range(2))
    tile = torch.cat([numbers[use] for use in uses])
    # The lines of each list, counted on from one list to the next.
    by_row, by_column = (
        torch.cat([parts[use][axis] + i * length for i, use in enumerate(uses)])
        for axis, length in enumerate((grid.rows, grid.columns))
    )

    def offsets(line: torch.Tensor, length: int) -> torch.Tensor:
        edges = torch.arange(len(uses) * length + 1, dtype=torch.int32)
        found = torch.searchsorted(line, edges, out_int32=True)
        # One list's end is the next one's start.
        shape, strides = (pattern.batches, heads, length + 1), (heads * length, length, 1)
        return found.as_strided(shape, strides).contiguous()

    # Blocks come by row; sorted by column, stably, they stay so in each column.
    by_column, order = by_column.sort(stable=True)
    rows = offsets(by_row, grid.rows), torch.stack((column, tile), dim=1)
    columns = offsets(by_column, grid.columns), torch.stack((row, tile), dim=1)[order]
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
    """Row, column and tile (`FULL_TILE` or a number) of each block with anything in it, int32 (n,)
    by rising row and column, and the tiles' bits, for what `Pattern.at` returned."""
    if 0 in (grid.rows, grid.columns):
        none = torch.zeros(0, dtype=torch.int32)
        return none, none, none, none.view(0, grid.block, grid.block // 32)
    row, column, state = pattern.runs(grid).blocks()
    partial = (state == PARTIAL).nonzero()[:, 0]
    q, k = first = torch.stack((row[partial], column[partial])).long() * grid.block
    signature = pattern.signature(grid, q + grid.q_start, k + grid.k_start)
    # Blocks that a sequence's end cuts short are of other kinds than those before.
    cut = [q.clamp(min=grid.seqlen_q - grid.block), k.clamp(min=grid.seqlen_k - grid.block)]
    example, kind = _distinct(torch.stack([*signature, *cut], dim=1).view(torch.int32))
    tiles, states = _tiles(pattern, grid, *first[:, example])
    # Kinds turn out to be empty, full, or to have a tile.
    tiled = states == PARTIAL
    number = tiled.cumsum(0, dtype=torch.int32) * tiled + FULL_TILE  # which is before tile 0
    tile = torch.full_like(row, FULL_TILE)
    tile[partial] = number[kind]
    if (states == EMPTY).any():  # rare; asking is cheaper than sorting out every time
        live = torch.ones_like(row, dtype=torch.bool)
        live[partial] = (states != EMPTY)[kind]
        row, column, tile = (x[live] for x in (row, column, tile))
    return row, column, tile, tiles[tiled]


def _tiles(
    pattern: Pattern, grid: Grid, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits (n, block, block / 32) and states (n,) of the blocks that start at (q, k)."""
    within = torch.arange(grid.block)
    step = max(1, _CHUNK // grid.block**2)
    words, states = [], []
    for begin in range(0, max(len(q), 1), step):
        i = q[begin : begin + step, None, None] + within[:, None]
        j = k[begin : begin + step, None, None] + within
        # Positions past the end do not exist; no pattern has to know them.
        seen = pattern.visible(
            i.clamp(max=grid.seqlen_q - 1) + grid.q_start,
            j.clamp(max=grid.seqlen_k - 1) + grid.k_start,
        )
        rows, columns = i < grid.seqlen_q, j < grid.seqlen_k
        seen = seen & rows & columns
        pairs = rows.sum(dim=(1, 2)) * columns.sum(dim=(1, 2))
        # In int32, over one dimension: 0.6 ms on a CPU for 2**22 elements, else 18.
        count = seen.flatten(1).sum(dim=1, dtype=torch.int32)
        states.append(states_of(count, pairs))
        words.append(pack_bits(seen))
    return torch.cat(words), torch.cat(states)


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of one row of each kind, and of each row's kind, int64, where equal rows are of a
    kind; rows are int32 (n, m)."""
    generator = torch.Generator(rows.device).manual_seed(0)
    factor = torch.randint(-(2**62), 2**62, rows.shape[1:], generator=generator)
    step = max(1, _CHUNK // len(factor))
    hashes = torch.cat([(part * factor).sum(dim=1) for part in rows.split(step)])

    def examples(kinds: torch.Tensor, kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        example = torch.empty(len(kinds), dtype=torch.int64)
        example[kind] = torch.arange(len(kind))
        return example, kind

    example, kind = examples(*hashes.unique(return_inverse=True))
    if torch.equal(rows[example[kind]], rows):
        return example, kind
    # Unequal rows of one hash. To sort 33000 rows of 10 takes 33 ms on a CPU, the above 3.
    return examples(*rows.unique(dim=0, return_inverse=True))
