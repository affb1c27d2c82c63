"""A pattern as an expression, `sliding_window(4096) | global_tokens(64)`, and back.

The expression is what a model's config keeps and what the command line takes. It is read, not run:
calls of the names below on literals, joined by `&`, `|`, `~` and brackets.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from typing import Any

from ..errors import MaskError
from . import structured, tokens, top_k
from .pattern import And, Not, Or, Pattern

# What a user writes.
_FUNCTIONS: dict[str, Callable[..., Pattern]] = {
    function.__name__: function
    for function in (
        tokens.full,
        tokens.causal,
        tokens.sliding_window,
        tokens.dilated_window,
        tokens.global_tokens,
        tokens.sinks,
        tokens.strided,
        tokens.fixed,
        tokens.longformer,
        tokens.shifted_groups,
        structured.bigbird,
        structured.butterfly,
        structured.documents,
        structured.per_head,
        structured.from_block_layout,
        top_k.top_k_blocks,
    )
}


def _ranges(ranges: list) -> Pattern:
    return tokens.Global(tuple((int(start), int(stop)) for start, stop in ranges))


def _document_runs(lists: list) -> Pattern:
    return structured.Documents(tuple(tuple((int(a), int(b)) for a, b in runs) for runs in lists))


# What only `text_of` writes: the parts of what a user wrote.
_PARTS: dict[str, Callable[..., Pattern]] = {
    "global_ranges": _ranges,
    "groups": tokens.Groups,
    "band": structured.Band,
    "random_blocks": structured.RandomCells,
    "block_table": lambda block, shape, digits: structured.Layout(block, tuple(shape), digits),
    "document_runs": _document_runs,
}


def text_of(pattern: Pattern) -> str:
    """The expression that `parse` reads as `pattern`.

    Raises:
        MaskError: a part of it is code (from_mask_mod, from_flex), which no text can keep.
    """
    match pattern:
        case And(left, right):
            return f"{_operand(left, And)} & {_operand(right)}"
        case Or(left, right):
            return f"{_operand(left, Or)} | {_operand(right)}"
        case Not(of):
            return f"~{_operand(of)}"
        case structured.PerHead(patterns):
            return f"per_head([{', '.join(map(text_of, patterns))}])"
        case top_k.TopKBlocks(count, block, per_group):
            return f"top_k_blocks({count}, block_size={block}, per_group={per_group})"
    name, arguments = _call(pattern)
    return f"{name}({', '.join(map(repr, arguments))})"


def _operand(pattern: Pattern, inside: type | None = None) -> str:
    text = text_of(pattern)
    # & and | are read from the left, so a left operand of the same kind needs no brackets.
    bare = not isinstance(pattern, (And, Or)) or type(pattern) is inside
    return text if bare else f"({text})"


def _call(pattern: Pattern) -> tuple[str, list]:
    match pattern:
        case tokens.Full() | tokens.Causal():
            return type(pattern).__name__.lower(), []
        case tokens.Window(size, 1):
            return "sliding_window", [size]
        case tokens.Window(size, dilation):
            return "dilated_window", [size, dilation]
        case tokens.Sinks(count):
            return "sinks", [count]
        case tokens.Global(((0, count),)):
            return "global_tokens", [count]
        case tokens.Global(ranges):
            return "global_ranges", [[list(pair) for pair in ranges]]
        case tokens.Strided(stride):
            return "strided", [stride]
        case tokens.Fixed(block, globals_):
            return "fixed", [block, globals_]
        case tokens.Groups(group, shift):
            return "groups", [group, shift]
        case tokens.ShiftedGroups(group):
            return "shifted_groups", [group]
        case structured.Band(block, reach):
            return "band", [block, reach]
        case structured.RandomCells(block, count, seed):
            return "random_blocks", [block, count, seed]
        case structured.Butterfly(block, factors):
            return "butterfly", [block, factors]
        case structured.Layout(block, shape, digits):
            return "block_table", [block, list(shape), digits]
        case structured.Documents(lists):
            return "document_runs", [[[list(pair) for pair in runs] for runs in lists]]
    raise MaskError(
        f"{type(pattern).__name__} is made of code, which an expression cannot keep; give it again "
        "where it is needed, or describe it with patterns or from_block_layout."
    )


def parse(text: str) -> Pattern:
    """The pattern of an expression such as "sliding_window(4096) | global_tokens(64)".

    Args:
        text: calls of the functions of `hfp.masks` that take numbers and lists, `&`, `|`, `~`,
            brackets; what `str(pattern)` gives.

    Raises:
        MaskError: it is no such expression, or a function refuses its arguments.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise MaskError(f"{text!r} is no mask expression: {error}. {_HINT}") from None
    try:
        pattern = _read(tree, text)
    except TypeError as error:  # an operator, of what is no pattern
        raise MaskError(f"{text!r} is no mask expression: {error}. {_HINT}") from None
    if not isinstance(pattern, Pattern):
        raise MaskError(f"{text!r} is of type {type(pattern).__name__}, no mask. {_HINT}")
    return pattern


_HINT = f"Write calls of {', '.join(_FUNCTIONS)}, joined by & | ~ and brackets."


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _read(left, text) & _read(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _read(left, text) | _read(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_read(operand, text)
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
            return -value
        case ast.Constant(value):
            return value
        case ast.List(elements) | ast.Tuple(elements):
            return [_read(element, text) for element in elements]
        case ast.Call(ast.Name(name), arguments, keywords):
            function = _FUNCTIONS.get(name) or _PARTS.get(name)
            if function is not None and all(keyword.arg for keyword in keywords):
                values = [_read(argument, text) for argument in arguments]
                named = {str(word.arg): _read(word.value, text) for word in keywords}
                try:
                    return function(*values, **named)
                except (TypeError, RuntimeError) as error:
                    raise MaskError(f"{ast.unparse(node)}: {error}.") from None
            near = difflib.get_close_matches(name, _FUNCTIONS, 1)
            if function is None and near:
                raise MaskError(f"{text!r}: there is no {name}; did you mean {near[0]}? {_HINT}")
    raise MaskError(f"{ast.unparse(node)!r} in {text!r} is no mask expression. {_HINT}")
