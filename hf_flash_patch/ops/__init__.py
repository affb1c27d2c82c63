"""Attention operators: arguments, two engines behind one differentiable op, dropout, padding."""
