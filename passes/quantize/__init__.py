"""Passes that mark a program for quantisation at export."""
