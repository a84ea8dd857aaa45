"""Passes that run passes."""
