"""patch(): plan, validate everything, apply, verify, restore."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .context import Extension, plan_extension
from .context.plan import record_of
from .errors import (
    ContextExtensionError,
    MaskError,
    UnsupportedKernelError,
    UnsupportedModelError,
)
from .families import family_of
from .integration import unpadding
from .integration.assignment import Assigned, as_settings, assign, describe, set_patterns
from .integration.registry import ATTENTION_NAME, register
from .integration.survey import AttentionModule, calls_us, configs_of, pretrained_roots, survey
from .integration.switch import switch
from .integration.wrappers import compiled_or_sharded
from .masks.pattern import Pattern
from .ops.arguments import MAX_HEAD_DIM
from .ops.library import extension_status
from .report import ModuleRow, Report

BACKENDS = ("auto", "cuda", "torch", "flash_attn")

# Model -> the patch on it. Weak: a patch must not keep a model alive.
_patched: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()


def patch(
    model: nn.Module,
    *,
    max_length: int | None = None,
    rope: str | dict = "auto",
    positions: str = "auto",
    mask: Pattern | Callable[[int], Pattern | None] | None = None,
    tokenizer: Any = None,
    backend: str = "auto",
    strict: bool = True,
    remove_padding: bool | None = None,
) -> Patch:
    """Make a transformers model compute its attention here; exact, and undone by `Patch.restore()`.

    Args:
        model: a PreTrainedModel, a PeftModel, or any module around one.
        max_length: maximum context in tokens to extend to, see `extend_context`; None leaves it.
        rope: with max_length, how to scale RoPE, as in `extend_context`.
        positions: with max_length, how to grow a learned position table, as in `extend_context`.
        mask: a pattern of `hf_flash_patch.masks`, a text of one such as "sliding_window(4096)", or
            a callable from a layer's index to a pattern or None; on top of what the model masks
            itself, in every self-attention of its text part. Kept in `model.config.hfp`, unless it
            is code; None keeps what stands there.
        tokenizer: its model_max_length follows `max_length`; without it, nothing happens to a
            tokenizer.
        backend: "auto" (the compiled kernels where they can serve, else the torch engine), "cuda"
            (the compiled kernels, or an error), "torch" (any device), "flash_attn" (the flash-attn
            package). "auto" keeps what `model.config.hfp` says, so that a reloaded model needs no
            arguments.
        strict: raise if any attention module cannot be served; False: those keep their own
            attention, with one warning, and the reason stands in the report.
        remove_padding: of encoders like BERT: pack a batch's real tokens before the first layer
            and unpack them behind the last, with zeros at padding; exact at real tokens, for one
            synchronisation a forward where there is an attention_mask. Dropout draws other numbers.
            None keeps what `model.config.hfp` says, at first False.

    Returns:
        A `Patch`: the report as text, HTML and data, `restore()`, and a context manager that
        restores.

    Raises:
        UnsupportedModelError: nothing to patch, something cannot be served, patched already,
            compiled or sharded, or without an encoder to remove padding in. The model is as it was.
        UnsupportedKernelError: the backend is unknown or not available here. The model is as it
            was.
        ContextExtensionError: the context cannot be extended as asked, or rope, positions or
            tokenizer was given without max_length. The model is as it was.
        MaskError: mask is neither, or has patterns for other numbers of heads.
        ValueError: strict or remove_padding is neither True nor False.
    """
    for name, flag in (("strict", strict), ("remove_padding", remove_padding or False)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}; it has to be True or False.")
    roots = pretrained_roots(model)
    if not roots:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model and holds none; patch takes a "
            "PreTrainedModel that is loaded, a PeftModel, or a module around one."
        )
    _refuse_wrapped(model)
    for root in roots:
        _refuse_patched(root)
    backend = _chosen_backend(backend, roots[0].config)
    plans = [_plan(root, strict, backend, mask, remove_padding) for root in roots]
    extension = None
    if max_length is not None:
        extension = plan_extension(
            model, max_length, rope=rope, positions=positions, tokenizer=tokenizer
        )
    else:
        _refuse_without_length(rope=rope, positions=positions, tokenizer=tokenizer)
    register()  # someone may have cleared transformers' table
    return Patch(roots, plans, backend, extension)


def unpatch(model: nn.Module) -> None:
    """Restore `model`, or what of it was patched, to what it was before `patch`.

    Raises:
        UnsupportedModelError: nothing in the model is patched, or only a model around it.
    """
    inside = {id(module) for root in pretrained_roots(model) for module in root.modules()}
    found = [applied for root, applied in list(_patched.items()) if id(root) in inside]
    if not found:
        raise UnsupportedModelError(_nothing_to_undo(model))
    for applied in found:  # restoring one twice does nothing
        applied.restore()


@contextlib.contextmanager
def patched(model: nn.Module, **settings: Any) -> Iterator[Patch]:
    """`patch(model, **settings)` for the time of a with block; same arguments, same errors."""
    with patch(model, **settings) as applied:
        yield applied


class Patch:
    """A patch on a model; made by `patch`.

    Attributes:
        reports: one `Report` for each transformers model found in what was patched (one, as a
            rule).
        backend: the backend in force.
    """

    def __init__(
        self,
        roots: list[PreTrainedModel],
        plans: list[_Plan],
        backend: str,
        extension: Extension | None = None,
    ):
        self.backend = backend
        self.reports: tuple[Report, ...] = ()
        self._undo = contextlib.ExitStack()
        self._roots = [weakref.ref(root) for root in roots]
        self._extension = extension
        texts: list[str] = []
        with self._undo as undo:  # an error below undoes what was done
            if extension is not None:
                texts = extension.apply(undo)
            for root, plan in zip(roots, plans, strict=True):
                plan.warnings += switch(root, plan.modules, plan.settings, undo)
                set_patterns(root, plan.of("served"), plan.assigned, undo)
                unpadding.remove_padding(root, plan.encoders, undo)
            self.reports = tuple(
                _report(root, plan, extension) for root, plan in zip(roots, plans, strict=True)
            )
            for text in texts + [text for plan in plans for text in plan.warnings]:
                warnings.warn(text, stacklevel=3)  # may be an error to the caller
            for root in roots:
                _patched[root] = self
            self._undo = undo.pop_all()

    def restore(self) -> None:
        """Give the model its exact prior state back. A second call does nothing.

        Raises:
            ContextExtensionError: a position table that the patch extended has been trained, or
                something holds it (an optimizer, DDP, FSDP, torch.compile); nothing is undone.
        """
        if self._extension is not None:
            self._extension.check_undo()
            self._extension = None
        self._undo.close()
        for reference in self._roots:
            root = reference()
            if root is not None and _patched.get(root) is self:
                del _patched[root]

    def to_dict(self) -> dict:
        """The report as plain data; a list under "models" if more than one was patched."""
        data = [report.to_dict() for report in self.reports]
        return data[0] if len(data) == 1 else {"models": data}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return "\n\n".join(str(report) for report in self.reports)

    def __repr__(self) -> str:
        models = ", ".join(report.model for report in self.reports)
        return f"Patch({models}, backend={self.backend!r})"

    def _repr_html_(self) -> str:
        return "".join(report._repr_html_() for report in self.reports)


@dataclass
class _Plan:
    """What is to happen to one model; nothing has been touched yet."""

    modules: list[AttentionModule]
    before: dict[str, str]
    settings: dict[str, Any]
    assigned: list[Assigned] = field(default_factory=list)
    encoders: list[nn.Module] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of(self, status: str) -> list[AttentionModule]:
        return [module for module in self.modules if module.status == status]


def _refuse_without_length(*, rope: Any, positions: Any, tokenizer: Any) -> None:
    given = {"rope": rope != "auto", "positions": positions != "auto", "tokenizer": tokenizer}
    for name, is_given in given.items():
        if is_given is not None and is_given is not False:
            raise ContextExtensionError(
                f"patch({name}=...) says how to extend the context and needs max_length; give both "
                "or neither."
            )


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse what holds on to the attention it was made with."""
    for where, what in compiled_or_sharded(model):
        first = "torch.compile it (or patch the original module)"
        then = first if what == "compiled" else "shard it"
        raise UnsupportedModelError(f"{where} is {what}; patch the model first, then {then}.")


def _nothing_to_undo(model: nn.Module) -> str:
    text = f"{type(model).__name__} is not patched; nothing to undo."
    configs = configs_of(model) if isinstance(model, nn.Module) else []
    if not any(config._attn_implementation == ATTENTION_NAME for config in configs):
        return text
    for other, applied in list(_patched.items()):
        if any(module is model for module in other.modules()):
            return (
                f"{type(model).__name__} is part of a {type(other).__name__} that is patched, by "
                f"{applied!r}; call its restore(), or unpatch that model."
            )
    return (
        f"{text} Its attention is {ATTENTION_NAME!r} all the same, as in a copy of a patched "
        'model; set_attn_implementation("sdpa") changes that.'
    )


def _refuse_patched(root: PreTrainedModel) -> None:
    mine = set(map(id, root.modules()))
    for other, applied in list(_patched.items()):
        if any(id(module) in mine for module in other.modules()):
            raise UnsupportedModelError(
                f"{type(root).__name__} is patched already, by {applied!r}; call its restore(), "
                "or unpatch(model), first."
            )


def _chosen_backend(backend: str, config: PreTrainedConfig) -> str:
    stored = (getattr(config, "hfp", None) or {}).get("backend", "auto")
    if backend == "auto" and stored != "auto":
        try:
            return _chosen_backend(stored, config)
        except UnsupportedKernelError as error:
            raise UnsupportedKernelError(
                f"{error} It stands in model.config.hfp: del model.config.hfp['backend'] to be rid "
                "of it."
            ) from None
    if backend not in BACKENDS:
        raise UnsupportedKernelError(
            f"backend={backend!r}; allowed are {', '.join(map(repr, BACKENDS))}."
        )
    if backend == "cuda" and not extension_status().loaded:
        raise UnsupportedKernelError(
            f'backend="cuda" needs the compiled kernels: {extension_status().reason} '
            'Use backend="auto" or "torch" without them.'
        )
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UnsupportedKernelError(
            'backend="flash_attn" needs the package flash-attn, which is not installed.'
        )
    return backend


def _plan(
    root: PreTrainedModel, strict: bool, backend: str, mask: Any, remove_padding: bool | None
) -> _Plan:
    name = type(root).__name__
    modules = survey(root)
    before = {module.name: module.implementation for module in modules}
    plan = _Plan(modules, before, {"backend": backend})
    served, unsupported = plan.of("served"), plan.of("unsupported")
    if any(getattr(config, "output_attentions", False) for config in configs_of(root)):
        raise UnsupportedModelError(
            f"{name} has config.output_attentions=True; attention weights are never formed here. "
            "Set it to False, or keep the eager implementation."
        )
    if unsupported:
        reasons = {module.class_name: module.reason for module in unsupported}
        text = "; ".join(f"{class_name} {reason}" for class_name, reason in reasons.items())
        if strict:
            raise UnsupportedModelError(
                f"{name} cannot be patched as a whole: {text}. With strict=False these modules "
                f"keep their own attention ({len(served)} others would be patched)."
            )
        plan.warnings.append(
            f"{name}: {text}; {len(unsupported)} modules keep their own attention."
        )
    elif not served:
        raise UnsupportedModelError(
            f"{name} has no attention that goes through transformers' AttentionInterface."
        )
    kept = getattr(root.config, "hfp", None) or {}
    if remove_padding is None:
        remove_padding = kept.get("remove_padding", False)
    if remove_padding:
        plan.encoders = unpadding.padded_encoders(root)
        plan.settings["remove_padding"] = True
    if mask is None:
        mask = kept.get("mask")
    if mask is not None:
        plan.assigned = assign(root, modules, mask)
        if not plan.assigned:
            raise MaskError(f"{name} has no self-attention that a mask could be for.")
        with contextlib.suppress(MaskError):  # code; the report says so
            plan.settings["mask"] = as_settings(plan.assigned)
    return plan


def _report(root: PreTrainedModel, plan: _Plan, extension: Extension | None) -> Report:
    rows: dict[tuple, int] = {}
    for module in plan.modules:
        after = ATTENTION_NAME if module.status == "served" and calls_us(module.module) else "own"
        before = plan.before[module.name] if module.status == "served" else "own"
        key = (module.class_name, _shape(module.module), before, after, module.reason)
        rows[key] = rows.get(key, 0) + 1
    family = family_of(root.config)
    text_config = root.config.get_text_config()
    notes = []
    wants_fp32 = family.fp32_scores if family is not None else None
    if wants_fp32 and getattr(root.config, wants_fp32, False):
        notes.append(f"{wants_fp32}: honoured; scores and softmax are fp32 in every backend.")
    parameter = next(root.parameters(), torch.empty(0))
    family_text = "not in the table"
    if family is not None:
        family_text = f"{family.name} ({family.positions} positions)"
    if plan.assigned and "mask" not in plan.settings:
        notes.append(
            "mask: made of code, which config.hfp cannot keep; give it again on reloading."
        )
    left = sum(module.status == "served" for module in plan.modules) - len(plan.assigned)
    if plan.assigned and left:
        notes.append(f"mask: not for {left} modules that attend to another sequence or modality.")
    if plan.encoders:
        notes.append("padding: removed before the encoder's first layer, put back behind its last.")
    served = [module.module for module in plan.modules if module.status == "served"]
    wide = sorted({dim for dim in map(_head_dim, served) if dim and dim > MAX_HEAD_DIM})
    if wide:
        notes.append(
            f"heads of {', '.join(map(str, wide))}: more than the kernels' {MAX_HEAD_DIM}; those "
            "layers run in the torch engine."
        )
    backend = plan.settings["backend"]
    if not extension_status().loaded:
        backend += f" (compiled kernels: {extension_status().reason})"
    return Report(
        model=type(root).__name__,
        family=family_text,
        backend=backend,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        max_length=record_of(text_config).get("max_length")  # dynamic RoPE leaves the other
        or getattr(text_config, "max_position_embeddings", None),
        modules=tuple(ModuleRow(k[0], count, *k[1:]) for k, count in rows.items()),
        mask=describe(plan.assigned) if plan.assigned else None,
        notes=tuple(notes),
        context=extension.report if extension is not None else None,
    )


def _says(module: nn.Module, *names: str) -> int | None:
    """The first of these numbers that a module has, or else its config."""
    config = getattr(module, "config", None)
    values = (getattr(owner, name, None) for name in names for owner in (module, config))
    return next((value for value in values if isinstance(value, int)), None)


def _head_dim(module: nn.Module) -> int | None:
    return _says(module, "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head")


def _shape(module: nn.Module) -> str:
    heads = _says(module, "num_heads", "num_attention_heads", "n_heads")
    if heads is None:
        return ""
    heads_k = _says(module, "num_key_value_heads") or heads
    head_dim = _head_dim(module)
    return f"{heads}/{heads_k} heads" + (f" of {head_dim}" if head_dim else "")
