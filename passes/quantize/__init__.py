"""Passes that mark a program for quantization at export."""
