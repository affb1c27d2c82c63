"""Every pattern, in small, with the plain Python rule it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_flash_patch import masks

Rule = Callable[[int, int, int], bool]  # of head (of two), query and key position

_generator = torch.Generator().manual_seed(0)
TOKENS = 240  # positions that brute force knows
LAYOUT = torch.rand(2, 9, 9, generator=_generator) < 0.4
_CELLS = LAYOUT.tolist()
DOCUMENTS = [0] * 37 + [1] * 64 + [2] * 60 + [0] * 31 + [7] * 100
CU_SEQLENS = [0, 37, 101, 161, 300]


@dataclass(frozen=True)
class Case:
    """A pattern and its rule."""

    name: str
    pattern: masks.Pattern
    rule: Rule


def _document(position: int) -> int:
    return sum(position >= end for end in CU_SEQLENS[1:])


def _power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


def _drawn(late: int, number: int) -> int:
    x = late * 2654435761 + (5 * 40503 + number) * 97531 + 1
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) & 0xFFFFFFFF) * factor
    return ((x ^ (x >> 16)) & 0x7FFFFFFF) % late


def _bigbird(q: int, k: int) -> bool:
    i, j = q // 16, k // 16
    late, early = max(i, j), min(i, j)
    random = late > early and early in (_drawn(late, 0), _drawn(late, 1))
    return abs(i - j) <= 1 or min(q, k) < 16 or random


CASES = [
    Case("full", masks.full(), lambda h, q, k: True),
    Case("causal", masks.causal(), lambda h, q, k: k <= q),
    Case("window", masks.sliding_window(50), lambda h, q, k: abs(q - k) < 50),
    Case(
        "dilated",
        masks.dilated_window(70, 3),
        lambda h, q, k: abs(q - k) < 70 and (q - k) % 3 == 0,
    ),
    Case("global", masks.global_tokens(5), lambda h, q, k: q < 5 or k < 5),
    Case(
        "global_at",
        masks.global_tokens([3, 4, 90]),
        lambda h, q, k: q in (3, 4, 90) or k in (3, 4, 90),
    ),
    Case("sinks", masks.sinks(33), lambda h, q, k: k < 33),
    Case(
        "strided",
        masks.strided(40),
        lambda h, q, k: abs(q - k) < 40 or (q - k) % 40 == 0,
    ),
    Case(
        "strided_little",
        masks.strided(7),
        lambda h, q, k: abs(q - k) < 7 or (q - k) % 7 == 0,
    ),
    Case("fixed", masks.fixed(48, 10), lambda h, q, k: q // 48 == k // 48 or k % 48 >= 38),
    Case("bigbird", masks.bigbird(3, 2, 1, 5, block=16), lambda h, q, k: _bigbird(q, k)),
    Case("longformer", masks.longformer(64, 3), lambda h, q, k: abs(q - k) <= 32 or min(q, k) < 3),
    Case(
        "butterfly",
        masks.butterfly(20),
        lambda h, q, k: q // 20 == k // 20 or _power_of_two(q // 20 ^ k // 20),
    ),
    Case(
        "butterfly_two",
        masks.butterfly(32, 2),
        lambda h, q, k: q // 32 ^ k // 32 in (0, 1, 2),
    ),
    Case(
        "shifted_groups",
        masks.shifted_groups(48),
        lambda h, q, k: (q + 24 * h) // 48 == (k + 24 * h) // 48,
    ),
    Case(
        "documents",
        masks.documents(DOCUMENTS),
        lambda h, q, k: DOCUMENTS[q] == DOCUMENTS[k],
    ),
    Case(
        "cu_seqlens",
        masks.documents(cu_seqlens=CU_SEQLENS),
        lambda h, q, k: _document(q) == _document(k),
    ),
    Case(
        "per_head",
        masks.per_head([masks.sliding_window(9), masks.causal()]),
        lambda h, q, k: k <= q if h else abs(q - k) < 9,
    ),
    Case(
        "layout",
        masks.from_block_layout(LAYOUT, 30),
        lambda h, q, k: _CELLS[h][q // 30][k // 30],
    ),
    Case(
        "mask_mod",
        masks.from_mask_mod(lambda b, h, q, k: (q * 7 + k * 3 + h) % 5 < 2, per_head=True),
        lambda h, q, k: (q * 7 + k * 3 + h) % 5 < 2,
    ),
]
BY_NAME = {case.name: case for case in CASES}
WRITABLE = [case for case in CASES if case.name != "mask_mod"]


@functools.cache
def _table(name: str) -> torch.Tensor:
    rule = BY_NAME[name].rule
    positions = range(TOKENS)
    return torch.tensor(
        [[[rule(head, q, k) for k in positions] for q in positions] for head in range(2)]
    )


def brute_force(case: Case, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """The rule, pair by pair, bool (1, 2, seqlen_q, seqlen_k); queries are the last positions."""
    return _table(case.name)[None, :, seqlen_k - seqlen_q : seqlen_k, :seqlen_k]
