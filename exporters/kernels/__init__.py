"""Sparse products for ONNX Runtime: packed weights, and which layers they make faster."""
