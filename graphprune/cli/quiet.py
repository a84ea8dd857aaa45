"""What other libraries write is kept from the commands' stderr; GRAPHPRUNE_DEBUG=1 shows it."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Read by these libraries when they are imported.
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
}


def debugging() -> bool:
    """Whether the user wants to see everything."""
    return bool(os.environ.get("GRAPHPRUNE_DEBUG"))


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is sys.stderr at the moment: a progress display puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def quiet_start() -> None:
    """Let our own warnings through, and no other library's, before any of them is imported."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    if debugging():
        return
    handler.addFilter(logging.Filter("graphprune"))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def quiet_libraries() -> None:
    """Set the levels of torch and ONNX Runtime, which have handlers of their own."""
    if debugging():
        return
    import onnxruntime

    for name in ("torch", "onnxscript", "onnx_ir", "onnxruntime"):
        logging.getLogger(name).setLevel(logging.ERROR)

    onnxruntime.set_default_logger_severity(3)
