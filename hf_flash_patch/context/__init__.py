"""Longer context: extends learned position tables and RoPE, in place and reversibly."""

from .extend import Extension, extend_context, plan_extension

__all__ = ["Extension", "extend_context", "plan_extension"]
