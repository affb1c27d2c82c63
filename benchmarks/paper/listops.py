"""ListOps: the value of a nested expression, 500 to 2000 tokens long.

Our own generator, from the published description (Nangia & Bowman 2018; Tay et al. 2021, Long
Range Arena): operators MIN, MAX, MED (the median, rounded down) and SM (the sum, modulo 10) of two
to ten arguments, each a digit or, one time in four, another expression, ten levels deep at most.

Whoever knows the outermost operator alone is right 37 times in 100; every Transformer of the
papers is. Only clearly more shows that anything else was read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

OPERATORS = ("MIN", "MAX", "MED", "SM")
END = "]"
TOKENS = ("<pad>", *"0123456789", *(f"[{name}" for name in OPERATORS), END)
SHORTEST, LONGEST = 500, 2000  # tokens, both excluded
MAX_DEPTH, MAX_ARGUMENTS = 10, 10
NESTED = 0.25  # of arguments

_DIGIT = 1  # the id of 0
_OPERATOR = TOKENS.index("[MIN")
_END = TOKENS.index(END)


class _TooLong(Exception):
    pass


def apply(operator: int, values: list[int]) -> int:
    """The value of an operator, by its place in OPERATORS, on its arguments."""
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def _grow(draw: random.Random, depth: int, tokens: list[int], longest: int) -> int:
    """Writes an expression behind `tokens`; returns its value."""
    operator = int(4 * draw.random())
    tokens.append(_OPERATOR + operator)
    values = []
    for _ in range(2 + int((MAX_ARGUMENTS - 1) * draw.random())):
        if depth + 1 < MAX_DEPTH and draw.random() < NESTED:
            values.append(_grow(draw, depth + 1, tokens, longest))
        else:
            values.append(int(10 * draw.random()))
            tokens.append(_DIGIT + values[-1])
        if len(tokens) >= longest:
            raise _TooLong
    tokens.append(_END)
    return apply(operator, values)


def expressions(
    seed: int | str, shortest: int = SHORTEST, longest: int = LONGEST
) -> Iterator[tuple[bytes, int]]:
    """Different expressions without end: ids of TOKENS, one byte each, and the value, 0 to 9.

    Args:
        seed: decides them all.
        shortest: tokens; every expression has more.
        longest: tokens; every expression has fewer.
    """
    draw, seen = random.Random(seed), set()
    while True:
        tokens: list[int] = []
        try:
            value = _grow(draw, 1, tokens, longest)
        except _TooLong:
            continue
        if shortest < len(tokens) < longest:
            text = bytes(tokens)
            if text not in seen:
                seen.add(text)
                yield text, value


def text(ids: bytes) -> str:
    """Ids as the arena writes them, "[MAX 2 [MIN 1 7 ] ]"."""
    return " ".join(TOKENS[i] for i in ids)
