"""The benchmark behind `hfp bench`: attention against the kernels that it competes with.

cells.py says what is measured, problem.py makes the tensors, contestants.py finds who takes part,
check.py compares results with the formula before timing.py times them, measure.py does both for one
cell, results.py reads and writes what came out, figure.py draws it, command.py is the command.
"""
