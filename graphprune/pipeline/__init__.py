"""Passes, recipes, and running them one after the other."""
