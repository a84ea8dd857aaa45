"""Folders as the hub has them: what lies beside an ONNX file so that others load it."""
