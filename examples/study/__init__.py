"""The parts of extend_and_evaluate.py."""
