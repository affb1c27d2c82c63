"""Which modules of a model attend, and which of them go through transformers' AttentionInterface.

Judged by the code the modules run, not by flags: a model outside the interface accepts any
attention name and ignores it without a word.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import NOT_TOKEN_ATTENTION
from .attention import hfp_attention
from .registry import ATTENTION_NAME

_INTERFACE_NAMES = {"get_interface", "ALL_ATTENTION_FUNCTIONS"}
_OWN_ATTENTION_NAMES = {
    "softmax",
    "Softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
}
# An attention that treats other names differently from "eager" would treat ours by accident.
_NAME_BRANCH = re.compile(r"_attn_implementation\s*(?:not\s+)?(?:in\b|[!=]=(?!\s*[\"']eager[\"']))")


@dataclass(frozen=True)
class AttentionModule:
    """One attention module of a model.

    Attributes:
        name: path below the model.
        module: the module.
        status: "served" (goes through the interface), "unsupported" (own attention; why in
            `reason`) or "kept" (not attention from token to token; stays as it is).
        reason: empty where served.
    """

    name: str
    module: nn.Module
    status: str
    reason: str = ""

    @property
    def class_name(self) -> str:
        """Class of the module."""
        return type(self.module).__name__

    @property
    def config(self) -> Any:
        """The config the module reads, or None."""
        return getattr(self.module, "config", None)

    @property
    def implementation(self) -> str:
        """Name of the attention implementation its config asks for; "own" if it asks for none."""
        return getattr(self.config, "_attn_implementation", None) or "own"


def survey(model: nn.Module) -> list[AttentionModule]:
    """Every attention module below `model`, in order."""
    found = []
    for name, module in model.named_modules():
        status, reason = _status(module)
        if status == "unsupported" and _holds_served(module):
            continue  # a wrapper around attention modules
        if status:
            found.append(AttentionModule(name, module, status, reason))
    # A config names one attention for all who read it.
    foreign = {
        id(entry.config): f"shares its config with a {entry.class_name}, which is not served"
        for entry in found
        if entry.status == "unsupported" and entry.config is not None
    }
    return [
        replace(entry, status="unsupported", reason=foreign[id(entry.config)])
        if entry.status == "served" and id(entry.config) in foreign
        else entry
        for entry in found
    ]


def _status(module: nn.Module) -> tuple[str, str]:
    cls: Any = type(module)
    status, reason = _classify(cls, cls.forward)
    replaced = vars(module).get("forward")  # of this module alone
    if status == "served" and replaced is not None:
        names = _names_of([_plain(replaced)])
        if names & _OWN_ATTENTION_NAMES and not names & _INTERFACE_NAMES:
            return "unsupported", "has a forward of its own, which computes attention itself"
    if status == "served" and getattr(module, "config", None) is None:
        return "unsupported", "has no `config`, which would say what attention it calls"
    return status, reason


def _holds_served(module: nn.Module) -> bool:
    return any(_status(child)[0] == "served" for child in module.modules())


def calls_us(module: nn.Module) -> bool:
    """Whether an attention module that goes through the interface will call `hfp_attention`."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != ATTENTION_NAME:
        return False
    # A modelling file may carry an interface of its own, with local overrides.
    for function in _functions(type(module)):
        interface = function.__globals__.get("ALL_ATTENTION_FUNCTIONS")
        if interface is not None and _INTERFACE_NAMES & _names(function.__code__):
            return interface.get(ATTENTION_NAME) is hfp_attention
    return True


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that `model` or a module of it refers to, nested ones included, each
    once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(value: Any) -> None:
        if isinstance(value, PreTrainedConfig) and id(value) not in found:
            found[id(value)] = value
            for nested in vars(value).values():
                add(nested)

    for module in model.modules():
        for value in vars(module).values():
            add(value)
    return list(found.values())


def pretrained_roots(model: nn.Module) -> list[PreTrainedModel]:
    """The topmost transformers models in `model`: itself, or what a wrapper (peft, DDP, ...)
    holds; none in what is no module, such as a checkpoint's name."""
    if isinstance(model, PreTrainedModel):
        return [model]
    if not isinstance(model, nn.Module):
        return []
    return [root for child in model.children() for root in pretrained_roots(child)]


@cache
def _classify(cls: Any, forward: Any) -> tuple[str, str]:
    """Status and reason of a class whose forward, which others may replace, is this one."""
    if issubclass(cls, PreTrainedModel):
        return "", ""
    names = _names_of(_functions(cls))
    if names & _INTERFACE_NAMES:
        if _branches_on_name(cls):
            return (
                "unsupported",
                "its forward takes another path for names other than those it knows",
            )
        return "served", ""
    names = names.union(*(_names_of(_functions(base)) for base in cls.__mro__))
    if names & _INTERFACE_NAMES:
        return "unsupported", "overrides the code that calls transformers' AttentionInterface"
    if "attention" not in cls.__name__.lower() or not names & _OWN_ATTENTION_NAMES:
        return "", ""
    if any(part in cls.__name__ for part in NOT_TOKEN_ATTENTION):
        return "kept", "not attention from token to token"
    # Interface models use torch's own module in heads with a single query; few for more.
    if cls is nn.MultiheadAttention:
        return "kept", "torch's own module, which computes attention itself"
    return "unsupported", "computes attention itself, not through transformers' AttentionInterface"


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The functions that run in a module of a class, without decorators: its own, and inherited
    ones that are not overridden, or that the override calls."""
    hidden: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            function = _plain(value)
            if not isinstance(function, types.FunctionType) or name in hidden:
                continue
            yield function
            # "__class__" is what super() without arguments refers to.
            calls_bases = {"__class__"}.union(other.__name__ for other in base.__mro__[1:])
            code = function.__code__
            if not calls_bases & {*code.co_freevars, *_names(code)}:
                hidden.add(name)


def _plain(value: Any) -> Any:
    """A method or a decorated function as the function it is; anything else as it is."""
    value = getattr(value, "__func__", value)
    if callable(value):
        value = inspect.unwrap(value)
    return getattr(value, "__func__", value)


def _names_of(functions: Iterable[Any]) -> set[str]:
    codes = (f.__code__ for f in functions if isinstance(f, types.FunctionType))
    return set().union(*map(_names, codes))


@cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes that `code` and the functions nested in it use."""
    nested = (
        _names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)
    )
    return frozenset(code.co_names).union(*nested)


def _branches_on_name(cls: type) -> bool:
    for function in _functions(cls):
        if "_attn_implementation" not in _names(function.__code__):
            continue
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            continue
        if _NAME_BRANCH.search(source):
            return True
    return False
