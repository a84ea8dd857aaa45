"""Passes that zero single weights, n:m groups, blocks, rows or columns of linear sites."""
