"""Passes that change shapes: heads, neurons, any free axis."""
