"""Passes that keep what the model computes and take away what it does not need."""
