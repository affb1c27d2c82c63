"""Which modules of a model attend, and which of them go through transformers' AttentionInterface.

Judged by the code the modules run, not by flags: a model outside the interface accepts any
attention name and ignores it without a word.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
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
        cls: Any = type(module)
        status, reason = _classify(cls)
        if status == "unsupported" and _holds_served(module):
            continue  # a wrapper around attention modules
        if status:
            found.append(AttentionModule(name, module, status, reason))
    return found


def _holds_served(module: nn.Module) -> bool:
    classes: set[Any] = {type(child) for child in module.modules()}
    return any(_classify(cls)[0] == "served" for cls in classes)


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
def _classify(cls: Any) -> tuple[str, str]:
    if issubclass(cls, PreTrainedModel):
        return "", ""
    names = set().union(*(_names(function.__code__) for function in _functions(cls)))
    if names & _INTERFACE_NAMES:
        if _branches_on_name(cls):
            return (
                "unsupported",
                "its forward takes another path for names other than those it knows",
            )
        return "served", ""
    if "attention" not in cls.__name__.lower() or not names & _OWN_ATTENTION_NAMES:
        return "", ""
    if any(part in cls.__name__ for part in NOT_TOKEN_ATTENTION):
        return "kept", "not attention from token to token"
    # Interface models use torch's own module in heads with a single query; few for more.
    if cls is nn.MultiheadAttention:
        return "kept", "torch's own module, which computes attention itself"
    return "unsupported", "computes attention itself, not through transformers' AttentionInterface"


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The functions a module class defines, inherited ones included, without decorators."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for value in vars(base).values():
            value = getattr(value, "__func__", value)
            if callable(value):
                value = inspect.unwrap(value)
            if isinstance(value, types.FunctionType):
                yield value


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
