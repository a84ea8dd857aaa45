"""What commands let through to stderr: our own warnings, and no other library's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import logging, warnings
from graphprune.cli.quiet import quiet_start
quiet_start()
logging.getLogger("graphprune.passes").warning("ours")
logging.getLogger("torch.onnx").warning("theirs")
warnings.warn("a warning of theirs")
"""


@pytest.mark.parametrize("debug", ["", "1"])
def test_only_our_warnings_are_shown_unless_debugging(debug: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "GRAPHPRUNE_DEBUG": debug},
        check=True,
    )
    assert "ours" in done.stderr
    assert ("theirs" in done.stderr) == bool(debug)
    assert ("a warning of theirs" in done.stderr) == bool(debug)
