"""Longer context."""
