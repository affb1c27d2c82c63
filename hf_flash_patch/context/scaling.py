"""What to write into `rope_parameters`: one flat dict in, one flat dict out.

The frequencies themselves are transformers' (`ROPE_INIT_FUNCTIONS`); nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ContextExtensionError

METHODS = ("linear", "dynamic", "yarn", "longrope", "llama3")

# Up to here dynamic scaling needs no training to stay close to the model, and keeps it bit for bit
# at the old lengths; above, YaRN degrades less and is what a short fine-tuning repairs fastest.
DYNAMIC_UP_TO = 2.0

_ORIGINAL = "original_max_position_embeddings"
# What a type needs, and what it takes beyond that.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    "llama3": (("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"), ()),
}
_SCALING_KEYS = {"rope_type", "type"}.union(*(set(a + b) for a, b in _KEYS.values()))
_ANY_TYPE = ("rope_theta", "partial_rotary_factor")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type of a flat `rope_parameters`."""
    return parameters.get("rope_type", parameters.get("type", "default"))


def original_length(parameters: Mapping[str, Any], maximum: int) -> int:
    """Tokens the unscaled frequencies were trained with.

    Args:
        parameters: flat `rope_parameters`.
        maximum: the config's max_position_embeddings.
    """
    return int(parameters.get(_ORIGINAL) or maximum)


def choose(native: str, factor: float) -> tuple[str, str]:
    """The method that `rope="auto"` takes.

    Args:
        native: type that the model came with.
        factor: new length / old length.

    Returns:
        the method and, in words, why.
    """
    if native != "default":
        return native, f"the model was trained with {native} scaling, which goes on"
    if factor <= DYNAMIC_UP_TO:
        return "dynamic", (
            f"factor {factor:.4g} is at most {DYNAMIC_UP_TO:g}: good without training, and exact "
            "at the old lengths"
        )
    return "yarn", (
        f"factor {factor:.4g} is above {DYNAMIC_UP_TO:g}: the least loss without training, and the "
        "fewest steps of fine-tuning"
    )


def scaled(
    parameters: Mapping[str, Any],
    method: str,
    *,
    old: int,
    new: int,
    original: int,
    long_factor: list[float] | None = None,
) -> dict[str, Any]:
    """`rope_parameters` for a longer context.

    Args:
        parameters: flat, as the model came.
        method: one of `METHODS`, or the type that the model came with.
        old: its maximum in tokens.
        new: the maximum to reach.
        original: tokens the unscaled frequencies were trained with.
        long_factor: for "longrope" on a model without scaling: what to divide each frequency by.

    Raises:
        ContextExtensionError: the model came with another scaling than `method`.
    """
    native = rope_type(parameters)
    ratio = new / old
    kept = {k: v for k, v in parameters.items() if k not in _SCALING_KEYS}
    if native == method and native != "default":
        return _scaled_further(parameters, ratio)
    if native != "default":
        raise ContextExtensionError(
            f"rope={method!r}: the model was trained with {native} scaling; allowed are "
            f'rope="auto", rope={native!r}, or a rope_parameters dict that says what is meant.'
        )
    grown: dict[str, Any] = {**kept, "rope_type": method, "factor": ratio}
    if method in ("yarn", "longrope", "llama3"):
        grown[_ORIGINAL] = original
    if method == "llama3":
        grown |= _LLAMA3
    if method == "longrope":
        assert long_factor is not None
        # An attention factor other than 1 would also change what the short factors keep.
        grown |= {
            "short_factor": [1.0] * len(long_factor),
            "long_factor": long_factor,
            "attention_factor": 1.0,
        }
    return grown


def _scaled_further(parameters: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    grown = dict(parameters)
    if rope_type(parameters) == "longrope":
        # The short factors, up to the original length, stay what they are.
        grown["long_factor"] = [value * ratio for value in parameters["long_factor"]]
    if grown.get("factor") is not None or rope_type(parameters) != "longrope":
        grown["factor"] = (grown.get("factor") or 1.0) * ratio
    return grown


def completed(
    given: Mapping[str, Any],
    parameters: Mapping[str, Any],
    *,
    ratio: float,
    original: int,
    frequencies: int,
) -> dict[str, Any]:
    """A user's `rope_parameters`, checked, with what it leaves out filled in.

    Args:
        given: flat dict of the user.
        parameters: flat, as the model came; its rope_theta and the like are kept.
        ratio: new length / old length, for a factor that is left out.
        original: tokens the unscaled frequencies were trained with.
        frequencies: how many the model has; the length of longrope's factors.

    Raises:
        ContextExtensionError: an unknown type or key, a missing key, or a value out of range.
    """
    kind = given.get("rope_type", given.get("type"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ContextExtensionError(
            f'rope={{"rope_type": {kind!r}, ...}}; "rope_type" may be '
            f"{', '.join(map(repr, _KEYS))}."
        )
    required, optional = _KEYS[kind]
    kept = {k: v for k, v in parameters.items() if k not in _SCALING_KEYS}
    allowed = {"rope_type", "type", *required, *optional, *_ANY_TYPE, *kept}
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ContextExtensionError(
            f"rope of type {kind!r} has unknown keys {', '.join(unknown)}; allowed are "
            f"{', '.join(sorted(allowed - {'type'}))}."
        )
    filled = {"factor": ratio, _ORIGINAL: original, **(_LLAMA3 if kind == "llama3" else {})}
    full = {**kept, **{k: filled[k] for k in required if k in filled}, **given, "rope_type": kind}
    full.pop("type", None)
    _check_values(kind, full, required, frequencies)
    return full


def _check_values(
    kind: str, full: Mapping[str, Any], required: tuple[str, ...], frequencies: int
) -> None:
    def number(key: str, least: float) -> None:
        value = full.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value < float("inf"):  # type: ignore[operator]
            raise ContextExtensionError(
                f"rope of type {kind!r} has {key}={value!r}; it has to be a number from {least:g} "
                "on."
            )

    for key in ("short_factor", "long_factor"):
        if key not in required:
            continue
        values = full.get(key)
        good = isinstance(values, list) and len(values) == frequencies
        if not good or not all(isinstance(v, (int, float)) and v > 0 for v in values or ()):
            raise ContextExtensionError(
                f"rope of type {kind!r} has {key}={values!r}; it has to be a list of {frequencies} "
                "positive numbers, one a frequency."
            )
    for key, least in (("factor", 1.0), (_ORIGINAL, 1), ("low_freq_factor", 0.0)):
        if key in required or (key == "factor" and full.get(key) is not None):
            number(key, least)
    if kind == "llama3":
        number("high_freq_factor", full["low_freq_factor"])
        if full["high_freq_factor"] == full["low_freq_factor"]:
            raise ContextExtensionError(
                "rope of type 'llama3' has high_freq_factor == low_freq_factor; it has to be above."
            )
    for key in ("rope_theta", "attention_factor", "beta_fast", "beta_slow"):
        if full.get(key) is not None:
            number(key, 0.0)


def keeps_up_to(parameters: Mapping[str, Any], before: Mapping[str, Any], original: int) -> int:
    """Tokens up to which a model with `parameters` computes bit for bit what it did with `before`.

    Args:
        parameters: flat, scaled.
        before: flat, as the model came; with longrope, its attention_factor filled in.
        original: tokens the unscaled frequencies were trained with.
    """
    kind, native = rope_type(parameters), rope_type(before)
    if any(parameters.get(k) != v for k, v in before.items() if k not in _SCALING_KEYS):
        return 0  # another base
    if kind == "dynamic" and native in ("default", "dynamic"):
        return original
    if kind == "longrope" and native in ("default", "longrope"):
        length = len(parameters["short_factor"])
        short = before.get("short_factor", [1.0] * length)
        same = parameters.get("attention_factor") == before.get("attention_factor", 1.0)
        if same and parameters["short_factor"] == short and parameters[_ORIGINAL] == original:
            return original
    return 0
