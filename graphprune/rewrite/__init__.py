"""Removing units from a program, and masking them instead."""
