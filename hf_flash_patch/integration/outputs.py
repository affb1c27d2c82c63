"""Whether the running forward is to collect attention weights or hidden states."""

import torch
from transformers.utils import output_capturing


def attention_weights_wanted() -> bool:
    """True inside a forward with output_attentions=True.

    Most models do not tell their attention modules: a hook picks the weights up, finds None, and
    drops them without a word. The collector of the running forward is the one place that knows.
    """
    return any(name.endswith("attentions") for name in _collected())


def hidden_states_wanted() -> bool:
    """True inside a forward with output_hidden_states=True."""
    return "hidden_states" in _collected()


def _collected() -> dict:
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return {}
    # A context variable cannot be read while torch.compile traces; transformers then uses this
    # attribute instead.
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return collected or {}
