"""Passes that train: recovery after pruning, and sparse training."""
