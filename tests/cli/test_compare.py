"""`graphprune compare` and `bench --note`: recorded figures side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from graphprune.exporters import open_artifact

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


def test_what_bench_notes_is_on_the_reports_and_in_a_comparison(
    run: Run, artifact: Path, copied: Path, tmp_path: Path
) -> None:
    before = open_artifact(copied).digest
    noted = run("bench", str(copied), "--against", "dense,int8", "--note", "--json")
    assert noted.exit_code == 0, noted.stderr
    found = json.loads(noted.stdout)
    assert set(found["operators"]) == {"dense", "pruned"}
    assert found["operators"]["dense"]["MatMul"] > 0
    made = open_artifact(copied)
    assert made.digest != before
    assert made.manifest["results"]["timing"]["others"]["int8"]["dense_ms"] > 0
    page = (copied / made.layout.own / "report.html").read_text()
    assert "The dense model in int8 takes" in page
    assert "Where the time goes" in page
    assert "dense int8" in (copied / made.layout.own / "report.md").read_text()

    shown = run("compare", str(artifact), str(copied), "-o", "page.html")
    assert shown.exit_code == 0, shown.stderr
    for part in ("faster", "1.00x", "written to page.html"):
        assert part in shown.stdout
    assert "Artifacts compared" in (tmp_path / "page.html").read_text()
    data = json.loads(run("compare", str(artifact), str(copied), "--json").stdout)
    assert {m["name"] for m in data["models"]} >= {str(artifact), str(copied)}


def test_wrong_calls_are_refused_before_work(run: Run, sentence: Sentence, artifact: Path) -> None:
    out = str(artifact)
    for arguments, says in (
        (("compare", out), "two or more artifacts"),
        (("compare", out, out), "two or more artifacts"),
        (("compare", out, "nowhere"), "nowhere"),
        (("compare", out, "x", "-o", "page.txt"), "give a name in .html"),
        (("bench", out, "--note", "--against", "int8,dense"), "begins with dense"),
        (("sensitivity", "tiny-mlp", "--recipe", "r.txt"), "give a name in .yaml"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert says in sentence(result)


@pytest.mark.parametrize("name", ["tiny-mlp"])
def test_only_an_artifact_takes_notes(run: Run, sentence: Sentence, name: str) -> None:
    assert "compile the model first" in sentence(run("bench", name, "--note"))
