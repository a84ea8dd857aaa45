"""`graphprune bench`: what is timed against what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


def test_bench_measures_an_artifact_and_a_model(run: Run, artifact: Path) -> None:
    row = json.loads(run("bench", str(artifact), "--batch", "2x16", "--json").stdout)
    assert row["batch"] == "2x16"
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["default"]["speedup_low"] <= row["default"]["speedup"]
    assert row["memory"].keys() == {"dense", "pruned"}
    assert row["memory"]["pruned"]["load_ms"] > 0
    shown = run("bench", str(artifact)).stdout
    for text in ("faster than dense, default session options", "private memory", "MB"):
        assert text in shown
    alone = json.loads(run("bench", "tiny-mlp", "--json").stdout)
    assert alone["default"].keys() == alone.keys() - {"model", "default", "memory"}
    assert alone["memory"].keys() == {"dense"}


def test_bench_takes_several_opponents(run: Run, artifact: Path) -> None:
    arguments = ("bench", str(artifact), "--batch", "2x16", "--against", "dense,int8")
    row = json.loads(run(*arguments, "--json").stdout)
    assert row["against"] == "dense"
    assert row["others"]["int8"]["dense_ms"] > 0
    shown = run(*arguments).stdout
    assert "faster than dense" in shown
    assert "faster than int8" in shown


@pytest.mark.slow
def test_compile_with_cache_alone_and_bench_a_step(
    run: Run, sentence: Sentence, tmp_path: Path
) -> None:
    result = run("compile", "tiny-gpt2", "--cache", "-o", "out", "--batch", "2x20")
    assert result.exit_code == 0, result.stderr
    assert "2x1 after 20" in result.stdout
    timing = json.loads(run("bench", "out", "--batch", "3x30", "--json").stdout)
    assert timing["batch"] == "3x1 after 30"
    assert json.loads(run("bench", "out", "--json").stdout)["batch"] == "1x1 after 32"
    refused = run("bench", "out", "--batch", "1x64")
    assert refused.exit_code == 2
    assert "one more token after 64" in sentence(refused)


def test_a_twin_that_is_not_there_is_missed_before_the_program_is_read(
    run: Run, sentence: Sentence, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr("graphprune.api.load", reads)
    monkeypatch.setattr("graphprune.exporters.Artifact.has_baseline", False)
    for against in ("dense", "int8"):
        result = run("bench", str(copied), "--against", against)
        assert result.exit_code == 2, result.output
        assert "no dense baseline" in sentence(result)
