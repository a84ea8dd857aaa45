"""Numerical methods that passes share: no graphs, only matrices."""
