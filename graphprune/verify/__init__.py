"""Checks that a rewrite does what it claims."""
