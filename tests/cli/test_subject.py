"""Artifacts that are broken are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.mark.parametrize(
    "file",
    [
        "onnx/model.onnx",
        "graphprune/program/program.json",
        "graphprune/program/tensors.safetensors",
    ],
)
@pytest.mark.parametrize(
    "command", [("bench",), ("inspect",), ("compile", "--neurons", "0.5", "-o", "x")]
)
def test_a_tampered_artifact_is_refused(
    run: Run, sentence: Sentence, copied: Path, command: Any, file: str
) -> None:
    target = copied / file
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(bytes(data))
    result = run(command[0], str(copied), *command[1:])
    assert result.exit_code == 2
    assert file in sentence(result)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "graphprune-artifact", "sha256": {}}']
)
def test_a_broken_manifest_is_refused(
    run: Run, sentence: Sentence, copied: Path, text: str
) -> None:
    (copied / "graphprune" / "manifest.json").write_text(text)
    result = run("inspect", str(copied))
    assert result.exit_code == 2
    assert "manifest.json" in sentence(result) or "export" in sentence(result)
