"""What the running forward is to collect besides its result."""

import torch
from transformers.utils import output_capturing


def wanted(kind: str) -> bool:
    """True inside a forward with output_attentions=True ("attentions") or output_hidden_states=True
    ("hidden_states").

    Most models do not tell their attention modules: a hook picks the weights up, finds None, and
    drops them without a word. The collector of the running forward is the one place that knows.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return False
    # A context variable cannot be read while torch.compile traces; transformers then uses this
    # attribute instead.
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and any(name.endswith(kind) for name in collected)
