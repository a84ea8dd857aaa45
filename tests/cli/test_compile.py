"""`graphprune compile`: recipes, flags, calibration, what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from typer.testing import Result

import graphprune as gp
from graphprune.cli.sensitivity import parse_ratios
from graphprune.errors import ExportError, GraphPruneError
from graphprune.models.zoo.tiny import tiny

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


def test_compile_prints_json_alone_on_stdout(run: Run, tmp_path: Path) -> None:
    result = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["report"]["after"]["parameters"] < summary["report"]["before"]["parameters"]
    assert summary["timing"]["batch"] == "1"
    assert set(summary["megabytes"]) == {"pruned", "dense"}
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_compile_without_the_dense_twin_writes_and_times_none(
    run: Run, sentence: Sentence, tmp_path: Path
) -> None:
    result = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "out", "--no-baseline")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "out" / "baseline.onnx").exists()
    assert "faster" not in result.stdout
    again = run("bench", "out")
    assert again.exit_code == 2
    assert "no dense baseline" in sentence(again)


def test_compile_takes_a_recipe_file_and_replaces_its_own_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("passes:\n  - prune-neurons: {ratio: 0.5}\n")
    arguments = ("compile", "tiny-mlp", "--recipe", "my.yaml", "-o", "out", "--no-measure")
    for _ in range(2):
        assert run(*arguments).exit_code == 0


@pytest.mark.slow
def test_compile_goes_on_from_an_artifact(run: Run, artifact: Path) -> None:
    result = run("compile", str(artifact), "--neurons", "0.5", "-o", "more", "--json")
    assert result.exit_code == 0, result.stderr
    passes = [p["name"] for p in json.loads(result.stdout)["report"]["passes"]]
    assert passes == ["prune-neurons", "prune-heads", "prune-neurons"]
    compared = run("bench", "more", "--against", str(artifact), "--json")
    assert json.loads(compared.stdout)["speedup"] > 0


@pytest.mark.parametrize(("given", "ratio"), [("50%", 0.5), ("12.5%", 0.125), ("0.25", 0.25)])
def test_ratios_may_be_per_cent(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str, ratio: float
) -> None:
    found: list[Any] = []

    def stops(model: str, steps: list[Any], *rest: Any) -> Any:
        found.extend(steps)
        raise GraphPruneError("enough")

    monkeypatch.setattr("graphprune.cli.compile.run", stops)
    run("compile", "tiny-bert", "--heads", given, "--neurons", given, "-o", "out")
    assert [step.ratio for step in found] == [ratio, ratio]
    assert parse_ratios(f"{given}, 0.75") == [ratio, 0.75]
    refused = run("compile", "tiny-bert", "--heads", "half", "-o", "out")
    assert refused.exit_code == 2
    assert "write 0.5, or 50%" in refused.stderr


def test_compile_with_calibration_scores_by_it(run: Run, tmp_path: Path, arrays: str) -> None:
    arguments = ("compile", "tiny-mlp", "--neurons", "0.5", "--calibration", arrays, "--json")
    result = run(*arguments, "--quantize", "int8-dynamic", "-o", "out")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    prune, quantize = summary["report"]["passes"]
    assert prune["step"]["prune-neurons"]["score"] == "obs"
    assert quantize["name"] == "quantize"
    assert prune["details"]["output_error"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["results"]["timing"] == summary["timing"]
    assert summary["timing"]["default"]["speedup"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"\d\.\d\dx (faster|slower)", page)
    assert "default session options" in page
    assert run("bench", "out").exit_code == 0  # whose hashes were brought up to date


def test_what_cannot_be_exported_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*args: Any, **options: Any) -> None:
        raise ExportError("no room")

    monkeypatch.setattr(gp.Compiled, "export", refuses)
    (tmp_path / "out-program").mkdir()
    result = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "out")
    assert result.exit_code == 2, result.output
    assert "no room" in result.stderr
    assert not (tmp_path / "out").exists()
    kept = tmp_path / "out-program1"
    assert f"graphprune.load({str(kept)!r})" in caplog.text
    model, _ = tiny("tiny-mlp")
    smaller = gp.load(kept).program.num_parameters()
    assert smaller < sum(p.numel() for p in model.parameters())


def test_seven_bits_on_request(run: Run, tmp_path: Path) -> None:
    int8 = ("--quantize", "int8-dynamic")
    common = ("compile", "tiny-mlp", *int8, "--no-measure", "--no-quality", "--no-baseline")
    for out, flags in (("eight", ()), ("seven", ("--reduce-range",))):
        result = run(*common, *flags, "-o", out)
        assert result.exit_code == 0, result.stderr
    assert largest(tmp_path / "eight") == 127
    assert largest(tmp_path / "seven") == 64


@pytest.mark.slow
def test_a_kit_of_seven_bits(run: Run, tmp_path: Path) -> None:
    int8 = ("--quantize", "int8-dynamic", "--reduce-range")
    assert run("device-kit", "tiny-mlp", *int8, "-o", "kit").exit_code == 0
    assert largest(tmp_path / "kit") == 64


def largest(folder: Path) -> int:
    """The largest of all int8 numbers in a folder's ONNX files."""
    found = [
        int(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max())
        for file in folder.rglob("*.onnx")
        for tensor in onnx.load(file).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims
    ]
    return max(found)


def test_a_finished_artifact_is_exported_for_another_target(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    recipe = "[magnitude: {sparsity: 0.75, pattern: 16x4}, quantize: {scheme: int8-dynamic}]"
    (tmp_path / "blocks.yaml").write_text(recipe)
    made = run("compile", "tiny-mlp", "--recipe", "blocks.yaml", "--no-measure", "-o", "out")
    assert made.exit_code == 0, made.stderr
    target = "onnxruntime+kernels"
    again = run("compile", "out", "--target", target, "--no-measure", "-o", "sparse", "--json")
    assert again.exit_code == 0, again.stderr
    manifest = json.loads((tmp_path / "sparse" / "manifest.json").read_text())
    assert manifest["target"] == target
    passes = json.loads(again.stdout)["report"]["passes"]
    assert [step["name"] for step in passes] == ["magnitude", "quantize"]  # none was added


def test_metadata_of_an_artifact_stays(run: Run, tmp_path: Path) -> None:
    """What a detector's or a recognizer's runtime reads in the file."""
    given = {"names": "{0: 'person'}", "stride": "32", "task": "detect"}
    model, inputs = tiny("tiny-cnn")
    gp.compile(model, [], example_inputs=inputs).export(tmp_path / "first", metadata=given)
    for source, out in (("first", "second"), ("second", "third")):
        made = run("compile", source, "--neurons", "0.25", "--no-measure", "-o", out)
        assert made.exit_code == 0, made.stderr
        artifact = gp.open(tmp_path / out)
        found = artifact.session().get_modelmeta().custom_metadata_map
        assert given.items() <= found.items()
        assert artifact.manifest["metadata"] == given
