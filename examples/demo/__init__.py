"""Parts of examples/quickstart.py."""
