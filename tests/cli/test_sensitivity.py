"""`graphprune sensitivity` as table, JSON and page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Run = Callable[..., Result]


def test_sensitivity_as_table_json_and_page(run: Run, tmp_path: Path, arrays: str) -> None:
    common = ("sensitivity", "tiny-mlp", "--ratios", "0.5", "--calibration", arrays)
    shown = run(*common, "--plot", "page.html")
    assert shown.exit_code == 0, shown.stderr
    assert "50 % removed" in shown.stdout
    assert "faster" in shown.stdout
    assert "Sensitivity of tiny-mlp" in (tmp_path / "page.html").read_text()
    found = json.loads(run(*common, "--no-measure", "--json").stdout)
    assert found["samples"] == 40
    assert found["times"] == []
    assert all(cost["error"] > 0 for cost in found["costs"])
    few = json.loads(run(*common, "--no-measure", "--json", "--calibration-lines", "7").stdout)
    assert few["samples"] == 7
    none = run("sensitivity", "tiny-mlp", "--ratios", "0.5", "--no-measure")
    assert "example inputs only" in none.stdout
