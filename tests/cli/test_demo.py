"""`graphprune demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


@pytest.mark.slow
def test_demo_on_a_tiny_model(run: Run, tmp_path: Path) -> None:
    result = run("demo", "tiny-bert")
    assert result.exit_code == 0, result.stderr
    assert "what next" in result.stdout
    assert (tmp_path / "demo-out" / "onnx" / "model.onnx").is_file()
