"""Extends rotary position embeddings: `rope_parameters`, and the frequencies made from them."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ContextExtensionError
from ..integration.configs import quiet_transformers
from ..integration.living import undo_on
from . import scaling
from .plan import Change, Settings, copies_of, record_of, set_attribute, set_record

# Layers that see a window of neighbours never meet a distance they were not trained with.
_LOCAL = ("sliding_attention", "chunked_attention")
# Where composite configs keep the configs of what reads and writes text.
_TEXT_CONFIGS = ("text_config", "text_encoder", "encoder", "decoder", "generator", "thinker_config")
_TYPES = (*scaling.METHODS, "default", "proportional")


class _UnloadableError(ContextExtensionError):
    """The model's own config does not take a type of rope."""


@dataclass
class RopePart:
    """The rotary modules that read one config.

    Attributes:
        root: the model.
        where: path of the first of them.
        config: the config.
        modules: all of them.
    """

    root: PreTrainedModel
    where: str
    config: Any
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def flat(self) -> dict[str, dict[str, Any]]:
        """As the model is now: layer type -> flat rope_parameters; "" if they are not nested."""
        return _flat(self.config.rope_parameters)

    @property
    def came(self) -> dict[str, dict[str, Any]]:
        """As the model came, before any extension."""
        return _flat(record_of(self.config).get("rope_parameters", self.config.rope_parameters))

    @property
    def came_with(self) -> int:
        """Tokens the model took before any extension."""
        record = record_of(self.config)
        if record:
            return record["original_max_length"]
        maximum = self.config.max_position_embeddings
        factors = [p["factor"] for p in self.flat.values() if scaling.rope_type(p) == "dynamic"]
        # Dynamic scaling leaves max_position_embeddings at what the model was trained with.
        return round(maximum * max(factors, default=1.0))

    @property
    def length(self) -> int:
        """Tokens the model takes now."""
        return record_of(self.config).get("max_length", self.came_with)

    @property
    def method(self) -> str:
        """How the model is scaled now; a type of rope."""
        return scaling.rope_type(self.flat[self._far(self.flat)[0]])

    def plan(self, settings: Settings) -> RopePlan:
        """What it takes to reach `settings.max_length`.

        Raises:
            ContextExtensionError: it cannot be reached as asked.
        """
        if settings.rope != "auto":
            return self._plan(settings.rope, "", settings)
        native = scaling.rope_type(self.came[self._far(self.came)[0]])
        method, why = scaling.choose(native, settings.max_length / self.came_with)
        try:
            return self._plan(method, why, settings)
        except _UnloadableError:
            why = f"{type(self.config).__name__} cannot be loaded with {method} scaling"
            return self._plan("longrope", why, settings)

    @staticmethod
    def _far(parameters: dict[str, Any]) -> list[str]:
        """The layer types that see further than a window; all, if there are none."""
        return [kind for kind in parameters if kind not in _LOCAL] or list(parameters)

    def _plan(self, method: str | dict[str, Any], why: str, settings: Settings) -> RopePlan:
        new, before = settings.max_length, self.came_with
        scaled_types = self._far(self.came)
        if isinstance(method, dict) and set(method) & set(self.came):
            scaled_types = list(method)  # by layer type: those it names
            unknown = sorted(set(method) - set(self.came))
            if unknown:
                raise ContextExtensionError(
                    f"rope names the layer types {', '.join(unknown)}; {self.where} has "
                    f"{', '.join(self.came)}."
                )
        parameters = copy.deepcopy(self.came)
        for kind in scaled_types:
            parameters[kind] = self._scaled(kind, method, settings)
        name = scaling.rope_type(parameters[scaled_types[0]])
        config = copy.deepcopy(self.config)
        nested = _nested(parameters, self.config.rope_parameters)
        _write(config, nested, self._maximum(parameters, new))
        _refuse_unloadable(config, name)
        plan = RopePlan(
            part=self,
            parameters=nested,
            maximum=config.max_position_embeddings,
            record={
                "max_length": new,
                "original_max_length": before,
                "method": name,
                "rope_parameters": _nested(self.came, self.config.rope_parameters),
                "max_position_embeddings": record_of(self.config).get(
                    "max_position_embeddings", self.config.max_position_embeddings
                ),
            },
            fresh=[_build(module, config) for module in self.modules],
            scales=_attention_scales(self.root, self.config, config),
            change=Change(self.where, "RoPE", name, why, self.length, new, 0),
        )
        plan.change.exact_up_to = self._exact_up_to(parameters)
        self._describe(plan, scaled_types)
        return plan

    def _maximum(self, parameters: dict[str, dict[str, Any]], new: int) -> int:
        kinds = {scaling.rope_type(p) for p in parameters.values()}
        if "dynamic" in kinds:
            # The base of the formula: raising it would undo the scaling.
            return record_of(self.config).get(
                "max_position_embeddings", self.config.max_position_embeddings
            )
        return new

    def _original(self, kind: str) -> int:
        maximum = record_of(self.config).get(
            "max_position_embeddings", self.config.max_position_embeddings
        )
        return scaling.original_length(self.came[kind], maximum)

    def _scaled(self, kind: str, method: Any, settings: Settings) -> dict[str, Any]:
        parameters, new, old = self.came[kind], settings.max_length, self.came_with
        given = method.get(kind, method) if isinstance(method, dict) else {"rope_type": method}
        if not isinstance(given, dict):
            raise ContextExtensionError(
                f"rope[{kind!r}]={given!r}; it has to be a rope_parameters dict, such as "
                '{"rope_type": "yarn"}.'
            )
        if kind and scaling.rope_type(given) == "longrope":
            raise ContextExtensionError(
                f'rope="longrope": {self.where} has frequencies for each layer type, where '
                "transformers' longrope fails on the second long input; allowed are 'linear', "
                "'dynamic', 'yarn' and 'llama3'."
            )
        if isinstance(method, dict):
            return scaling.completed(
                given,
                parameters,
                ratio=new / old,
                original=self._original(kind),
                frequencies=self._frequencies(kind),
            )
        if method == "longrope" and scaling.rope_type(parameters) == "longrope":
            parameters = {**parameters, "attention_factor": float(self._attention_factor())}
        long_factor = None
        if method == "longrope" and scaling.rope_type(parameters) == "default":
            long_factor = self._by_parts(kind, new / old)
        return scaling.scaled(
            parameters,
            method,
            old=old,
            new=new,
            original=self._original(kind),
            long_factor=long_factor,
        )

    def _attention_factor(self) -> float:
        return getattr(self.modules[0], "attention_scaling", 1.0)

    def _frequencies(self, kind: str) -> int:
        buffers = dict(_floats(self.modules[0]))
        # A layer type that no layer has, has no buffer.
        return len(buffers.get(f"{kind}_inv_freq", next(iter(buffers.values()))))

    def _by_parts(self, kind: str, ratio: float) -> list[float]:
        """What YaRN divides each frequency by: 1 for the fast ones, `ratio` for the slow ones."""
        inv_freq = []
        for method in ("linear", "yarn"):
            parameters = scaling.scaled(
                self.came[kind],
                method,
                old=self.came_with,
                new=round(ratio * self.came_with),
                original=self._original(kind),
            )
            config = copy.deepcopy(self.config)
            _write(config, parameters, self.config.max_position_embeddings)
            name = f"{kind}_inv_freq" if kind else "inv_freq"
            inv_freq.append(getattr(_build(self.modules[0], config), name).double())
        return (inv_freq[0] * ratio / inv_freq[1]).clamp(min=1.0).tolist()

    def _exact_up_to(self, parameters: dict[str, dict[str, Any]]) -> int:
        if any(buffer.dtype != torch.float32 for m in self.modules for _, buffer in _floats(m)):
            return 0
        before = copy.deepcopy(self.came)
        if scaling.rope_type(next(iter(before.values()))) == "longrope":
            for flat in before.values():
                flat["attention_factor"] = float(self._attention_factor())
        changed = [kind for kind in parameters if parameters[kind] != before[kind]]
        return min(
            (
                scaling.keeps_up_to(parameters[kind], before[kind], self._original(kind))
                for kind in changed
            ),
            default=self.came_with,
        )

    def _describe(self, plan: RopePlan, scaled_types: list[str]) -> None:
        change, parameters = plan.change, _flat(plan.parameters)
        for kind in scaled_types:
            shown = {k: v for k, v in parameters[kind].items() if not isinstance(v, list)}
            change.details.append(f"rope_parameters{f'[{kind!r}]' if kind else ''} = {shown}")
        kept = [kind for kind in parameters if kind not in scaled_types]
        if kept:
            change.notes.append(
                f"{', '.join(kept)} layers keep their frequencies: they never see further than "
                "their window."
            )
        old = self.config.max_position_embeddings
        if plan.maximum != old:
            change.details.append(f"max_position_embeddings {old} -> {plan.maximum}")
        if change.method == "dynamic":
            change.notes.append(
                f"config.max_position_embeddings stays {plan.maximum}: dynamic scaling computes "
                "from it. The frequencies follow the longest input so far."
            )
        if change.method in ("dynamic", "longrope"):
            change.notes.append(
                "generate() across the old maximum mixes keys of both frequency sets in its cache; "
                "transformers reads the length on the host, so torch.compile breaks the graph."
            )
        if any(b.dtype != torch.float32 for m in self.modules for _, b in _floats(m)):
            change.notes.append(
                "the rotary frequencies had been cast with the model; they are fp32 again, as "
                "from_pretrained makes them."
            )
        factor = getattr(plan.fresh[0], "attention_scaling", 1.0)
        if factor != 1.0:
            change.details.append(f"attention factor {factor:.6g} on cos and sin")


@dataclass
class RopePlan:
    """Everything that the extension of a part needs, computed.

    Attributes:
        part: what it is for.
        parameters: the new rope_parameters.
        maximum: the new max_position_embeddings.
        record: goes to config.hfp.
        fresh: the rotary modules as the new config makes them, on the CPU.
        scales: attention modules that fold the scaling into their softmax scale, and that scale.
        change: for the report.
    """

    part: RopePart
    parameters: dict[str, Any]
    maximum: int
    record: dict[str, Any]
    fresh: list[nn.Module]
    scales: list[tuple[nn.Module, float]]
    change: Change

    def apply(self, undo: contextlib.ExitStack) -> None:
        """Change the model; `undo` collects the way back."""
        part = self.part
        copies = copies_of(part.root, part.config, "rope_parameters", "max_position_embeddings")
        for config in copies:
            set_attribute(config, "rope_parameters", copy.deepcopy(self.parameters), undo)
            set_attribute(config, "max_position_embeddings", self.maximum, undo)
            original = _own_original(config, self.parameters)
            if original is not None:
                set_attribute(config, "original_max_position_embeddings", original, undo)
            set_record(config, self.record, undo)
        for module, fresh in zip(self.part.modules, self.fresh, strict=True):
            _take_over(module, fresh, undo)
        for module, scale in self.scales:
            set_attribute(module, "scaling", scale, undo)


def rope_parts(root: PreTrainedModel) -> list[RopePart]:
    """The rotary modules of the text side of `root`, one part a config.

    Raises:
        ContextExtensionError: their frequencies are not those of their config.
    """
    texts = _text_configs(root.config)
    parts: dict[int, RopePart] = {}
    for name, module in root.named_modules():
        config = getattr(module, "config", None)
        if "RotaryEmbedding" not in type(module).__name__ or config is None:
            continue
        parameters = getattr(config, "rope_parameters", None)
        kinds = {scaling.rope_type(p) for p in _flat(parameters or {}).values() if p}
        of_text = id(config) in map(id, texts) or config.model_type in {t.model_type for t in texts}
        if not kinds or not kinds <= set(_TYPES) or not of_text:
            continue
        if not isinstance(getattr(config, "max_position_embeddings", None), int):
            continue
        parts.setdefault(id(config), RopePart(root, name, config)).modules.append(module)
    for part in parts.values():
        for module in part.modules:
            _refuse_stale(part.where, module)
    return list(parts.values())


def _text_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    found = [config]
    for name in _TEXT_CONFIGS:
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig):
            found += _text_configs(nested)
    return found


def _flat(parameters: Any) -> dict[str, dict[str, Any]]:
    nested = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    return nested or {"": dict(parameters)}


def _nested(parameters: dict[str, dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `_flat`; `like` has the layer types without positions, too, as None."""
    return parameters[""] if "" in parameters else {**like, **parameters}


def _own_original(config: Any, parameters: dict[str, Any]) -> int | None:
    """The original length, where a config states it outside rope_parameters, too (Phi-3)."""
    if not hasattr(config, "original_max_position_embeddings"):
        return None
    return parameters.get("original_max_position_embeddings")


def _write(config: Any, parameters: dict[str, Any], maximum: int) -> None:
    config.rope_parameters = copy.deepcopy(parameters)
    original = _own_original(config, parameters)
    if original is not None:
        config.original_max_position_embeddings = original
    config.max_position_embeddings = maximum


def _build(module: nn.Module, config: Any) -> Any:
    """A module like `module` from another config, on the CPU: where from_pretrained computes it."""
    try:
        with torch.device("cpu"):
            return type(module)(config)  # type: ignore[call-arg]
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ContextExtensionError(
            f"{type(module).__name__} cannot be made with rope_parameters="
            f"{config.rope_parameters}: {error!r}."
        ) from error


def _attention_scales(root: nn.Module, config: Any, new: Any) -> list[tuple[nn.Module, float]]:
    """DeepSeek's attention computes its softmax scale from the factor when it is made."""
    if not any(p.get("mscale_all_dim") for p in _flat(new.rope_parameters).values()):
        return []
    found = []
    for module in root.modules():
        if getattr(module, "config", None) is config and hasattr(module, "scaling"):
            with torch.device("meta"):
                fresh: Any = type(module)(new, module.layer_idx)  # type: ignore[call-arg]
            found.append((module, fresh.scaling))
    return found


def _refuse_unloadable(config: Any, method: str) -> None:
    """Some configs take fewer types of rope than transformers has (Phi-3: longrope only)."""
    try:
        with quiet_transformers():
            reloaded = type(config).from_dict(config.to_dict())
    except Exception as error:  # validators raise classes of their own
        reason = " ".join(str(error).split())
        raise _UnloadableError(
            f"rope={method!r}: {type(config).__name__} could not be loaded again: {reason}"
        ) from error
    if reloaded.rope_parameters != config.rope_parameters:
        raise ContextExtensionError(
            f"rope={method!r}: {type(config).__name__} would be loaded with "
            f"{reloaded.rope_parameters} instead of {config.rope_parameters}."
        )


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, b) for n, b in module.named_buffers(recurse=False) if b.is_floating_point()]


def _refuse_stale(where: str, module: nn.Module) -> None:
    """A rope_parameters edited after loading has no effect; extending it would be a surprise."""
    expected = dict(_floats(_build(module, module.config)))
    for name, actual in _floats(module):
        if "original" not in name or actual.is_meta or name not in expected:
            continue  # the other buffers follow the inputs
        # Frequencies that were cast with the model keep three digits.
        tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-2
        wanted = expected[name].to(actual.dtype).float()
        if actual.shape != wanted.shape or not torch.allclose(
            actual.float().cpu(), wanted, rtol=tolerance, atol=0.0
        ):
            raise ContextExtensionError(
                f"{where}: the frequencies are not those of config.rope_parameters; was the config "
                "edited after loading? Load the model again and extend that."
            )


def _take_over(module: nn.Module, fresh: nn.Module, undo: contextlib.ExitStack) -> None:
    """Make `module` what `fresh` is, in place: whoever refers to it, and its hooks, stay."""
    plain = set(vars(nn.Module())) | {"config"}
    before, buffers = dict(vars(module)), dict(module._buffers)
    persistent = set(module._non_persistent_buffers_set)
    device = next((b.device for b in module.buffers(recurse=False)), torch.device("cpu"))
    undo_on(undo, module, _give_back, before, buffers, persistent)
    for name in set(before) - set(vars(fresh)):
        if name.endswith(("inv_freq", "max_seq_len_cached")):
            del vars(module)[name]  # what an earlier forward cached
    for name, value in vars(fresh).items():
        if name not in plain:
            vars(module)[name] = value.to(device) if isinstance(value, Tensor) else value
    module._buffers.clear()
    module._buffers.update({n: b.to(device) for n, b in fresh._buffers.items() if b is not None})
    module._non_persistent_buffers_set = set(fresh._non_persistent_buffers_set)


def _give_back(
    module: nn.Module, before: dict[str, Any], buffers: dict[str, Any], persistent: set[str]
) -> None:
    device = next((b.device for b in module.buffers(recurse=False)), None)
    hooks = {n: v for n, v in vars(module).items() if n.startswith("_")}
    vars(module).clear()
    vars(module).update({**before, **hooks})
    module._buffers.clear()
    module._buffers.update({n: b if b is None else b.to(device) for n, b in buffers.items()})
    module._non_persistent_buffers_set = persistent
