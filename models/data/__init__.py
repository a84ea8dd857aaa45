"""Texts, tables and batches."""
