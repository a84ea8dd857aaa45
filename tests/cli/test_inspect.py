"""`graphprune inspect`: roles, reasons, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Run = Callable[..., Result]


def test_inspect_shows_roles_and_reasons(run: Run, artifact: Path) -> None:
    shown = run("inspect", "tiny-bert")
    assert shown.exit_code == 0, shown.stderr
    assert "head" in shown.stdout
    assert "frozen:" in shown.stdout
    assert "encoder.layer.*" in shown.stdout
    assert "encoder.layer.1" in run("inspect", "tiny-bert", "--all").stdout
    found = json.loads(run("inspect", str(artifact), "--json").stdout)
    assert [g["size"] for g in found["groups"] if g["role"] == "head"] == [2, 2]


def test_sizes_of_images_can_be_dynamic(run: Run) -> None:
    kept = json.loads(run("inspect", "tiny-cnn", "--json").stdout)["limits"]
    assert any("--dynamic height,width" in line for line in kept)
    assert "cannot change" in run("inspect", "tiny-cnn").stdout
    asked = ("tiny-cnn", "--dynamic", "height, width")
    assert not json.loads(run("inspect", *asked, "--json").stdout)["limits"]
    made = run("compile", *asked, "--recipe", "clean", "--no-measure", "-o", "out")
    assert made.exit_code == 0, made.stderr
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["inputs"][0]["shape"] == ["batch_size", 3, "height", "width"]
