"""Quantizing ONNX models."""
