"""Running the command line in an empty folder, and an artifact that it made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphprune.cli.app import app

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return invoke


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled tiny model, made by the command line."""
    out = tmp_path_factory.mktemp("made") / "out"
    result = CliRunner().invoke(
        app, ["compile", "tiny-bert", "--heads", "0.5", "--neurons", "0.5", "-o", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    assert "4 of 8 heads" in result.stdout
    assert re.search(r"\d\.\d\dx (faster|slower)", result.stdout)  # a tiny model's time is noise
    assert str(out) in result.stdout.replace("\n", "")
    return out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to break."""
    import shutil

    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def _sentence(result: Result) -> str:
    """The error: one sentence, no traceback."""
    errors = result.stderr[result.stderr.index("error:") :].strip()
    assert "Traceback" not in result.stderr
    assert "\n" not in errors
    return errors


@pytest.fixture
def sentence() -> Sentence:
    """The error of a result: one sentence, no traceback."""
    return _sentence


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """A calibration file for tiny-mlp."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", x=x)
    return "calibration.npz"
