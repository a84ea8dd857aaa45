"""Running ONNX models: sessions, timing, agreement, generation."""
