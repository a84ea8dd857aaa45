"""Sessions of single layers; all tests here are skipped where graphprune-kernels is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.models import Layer

Opens = Callable[..., Any]


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The package graphprune_kernels."""
    return pytest.importorskip(
        "graphprune_kernels",
        reason="graphprune-kernels is not installed: `pip install ./kernels` needs a C++ compiler",
    )


@pytest.fixture(scope="session")
def opened(kernels: Any) -> Opens:
    """`opened(layer, threads=1)` is an onnxruntime.InferenceSession."""
    import onnxruntime

    def open_layer(layer: Layer, threads: int = 1) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        kernels.register(options)
        return onnxruntime.InferenceSession(
            layer.model(), options, providers=["CPUExecutionProvider"]
        )

    return open_layer
