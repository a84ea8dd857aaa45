"""Activations on calibration batches, streamed layer by layer."""
