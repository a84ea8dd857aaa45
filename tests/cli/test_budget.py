"""Budgets on the command line: --faster and its kin, `front`, `device-kit`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from graphprune.api import load
from graphprune.cli.budget import as_timed, parse_speedups
from graphprune.cli.names import KERNELS
from graphprune.errors import GraphPruneError
from graphprune.exporters.artifact.artifact import open_artifact
from graphprune.exporters.runtime.latency import OnnxRuntimeDevice
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.passes import Budget, GradualStructure, PruneHeads
from graphprune.pipeline.device import Cost

Captured = Callable[[str], Program]
Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def samples(tmp_path: Path) -> str:
    """Calibration of the tiny multi-layer perceptron."""
    file = tmp_path / "samples.npz"
    x = np.random.default_rng(0).normal(size=(128, 12)).astype(np.float32)
    np.savez(file, x=x)
    return file.name


def budget(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)["report"]["passes"][0]["details"]["budget"]
    return found


@pytest.mark.slow
def test_megabytes_are_kept(run: Run, samples: str) -> None:
    dense = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "half", "--json")
    megabytes = json.loads(dense.stdout)["megabytes"]["dense"] * 0.8
    found = run(
        "compile", "tiny-mlp", "--mb", f"{megabytes:.6f}", "--calibration", samples, "-o", "out",
        "--json",
    )  # fmt: skip
    assert budget(found)["asked"] == {"size_mb": pytest.approx(megabytes, rel=1e-3)}
    assert json.loads(found.stdout)["megabytes"]["pruned"] <= megabytes
    report = Path("out/report.md").read_text()
    assert "asked" in report


@pytest.mark.slow
def test_a_kit_measures_and_its_file_is_used(run: Run, samples: str, tmp_path: Path) -> None:
    made = run("device-kit", "tiny-mlp", "-o", "kit")
    assert made.exit_code == 0, made.stderr
    assert "measure.py" in made.stdout
    measured = subprocess.run(
        [sys.executable, "-P", "kit/measure.py", "--seconds", "0"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    device = json.loads(measured.stdout)
    # Another machine: what is measured here is not known there.
    device["cpu"]["name"] = "a board"
    (tmp_path / "board.json").write_text(json.dumps(device))
    megabytes = sum(file.stat().st_size for file in (tmp_path / "kit").glob("*.onnx")) / 1e6
    found = run(
        "compile", "tiny-mlp", "--mb", f"{megabytes:.6f}", "--device", "board.json",
        "--calibration", samples, "-o", "out", "--json",
    )  # fmt: skip
    assert budget(found)["device"] == "a board"
    assert budget(found)["measured_ms"] is None
    other = run("compile", "tiny-bert", "--faster", "1.5", "--device", "board.json", "-o", "other")
    assert other.exit_code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_zero_blocks_are_chosen_for_another_machine(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    ids = np.random.default_rng(0).integers(0, 99, (64, 8))
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    forms = ("--quantize", "int8-dynamic", "--target", KERNELS)
    made = run("device-kit", "tiny-bert", "-o", "kit", *forms)
    assert made.exit_code == 0, made.stderr
    command = [sys.executable, "-P", "kit/measure.py", "--seconds", "0"]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    device, kit = json.loads(measured.stdout), json.loads(Path("kit/kit.json").read_text())
    # There zero blocks take next to no time, and all else takes long.
    for key, model in kit["models"].items():
        sparse = any("zeros" in name for name in model["names"])
        whole = any(name.startswith("the model") for name in model["names"])
        device["costs"][key]["ms"] = 10.0 if whole else 0.1 if sparse else 2.0
    (tmp_path / "board.json").write_text(json.dumps(device))
    found = run(
        "compile", "tiny-bert", "--faster", "2", "--device", "board.json", *forms,
        "--calibration", "ids.npz", "-o", "out", "--json",
    )  # fmt: skip
    assert any(choice["zeros"] for choice in budget(found)["choices"])
    artifact = open_artifact(tmp_path / "out")
    choices = artifact.manifest["quantization"][artifact.model_path.name]["choices"]
    assert choices
    assert all(record["form"] == "32x4" for record in choices)
    (report,) = (tmp_path / "out").rglob("report.md")
    text = report.read_text(encoding="utf-8")
    assert "zero blocks" in text
    assert "not done" not in text  # verification


@pytest.mark.slow
def test_a_family_and_dense_int8_have_the_bits_that_were_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def by_flops(
        self: OnnxRuntimeDevice, models: Mapping[str, Program], **options: Any
    ) -> dict[str, Cost]:
        times = {name: flops(model, model.deployed) / 1e6 for name, model in models.items()}
        return {name: Cost(ms, models[name].nbytes(), ms, ms) for name, ms in times.items()}

    monkeypatch.setattr(OnnxRuntimeDevice, "measure", by_flops)
    ids = np.random.default_rng(0).integers(0, 99, (64, 8))
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    (tmp_path / "own.py").write_text("def one(model): return 1.0\n")
    found = run(
        "front", "tiny-bert", "-o", "family", "--faster", "1.3,1e6,2e6,1.2", "--quantize",
        "int8-dynamic", "--reduce-range", "--calibration", "ids.npz", "--metric", "own.py:one",
        "--batch", "1x8", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    front = json.loads(found.stdout)
    assert [point["name"] for point in front["family"]] == ["1.2x", "1.3x"]
    assert "1e+06x is left out, like the 1 above it" in caplog.text
    assert "cannot be reached" in caplog.text
    assert "task own.py:one" in found.stderr
    assert not (tmp_path / "family" / "1e+06x").exists()
    for name in ("1.2x", "1.3x", "dense-int8"):
        mark = load(tmp_path / "family" / name).program.quantization
        assert mark is not None
        assert mark.reduce_range
    page = (tmp_path / "family" / "front.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("1.2x", "1.3x", "dense int8"))


def test_budgets_are_for_what_the_command_times(captured: Captured) -> None:
    """Those that a pass trains to as well."""
    program = captured("tiny-bert")
    own = Budget(speedup=2, batch=(4, 64), threads=4)
    steps = [Budget(speedup=2), own, GradualStructure(budget=Budget(speedup=2)), PruneHeads(0.5)]
    first, second, third, last = as_timed(steps, program, (1, 16), 2)
    expected = Budget(speedup=2, batch=(1, 16), threads=2)
    assert (first, second, last) == (expected, own, steps[-1])
    assert third == GradualStructure(budget=expected)


COMPILE = ("compile", "tiny-mlp", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*COMPILE, "--faster", "0.5"), "above 1"),
        ((*COMPILE, "--ms", "0"), "above 0"),
        ((*COMPILE, "--faster", "2"), "does not read text: give --calibration FILE"),
        ((*COMPILE, "--faster", "2", "--heads", "0.5"), "a budget chooses what is removed"),
        ((*COMPILE, "--faster", "2", "--recipe", "edge"), "a budget chooses what is removed"),
        ((*COMPILE, "--max-drop", "0.01"), "give --task NAME"),
        ((*COMPILE, "--max-drop", "0.01", "--task", "stss"), "'sts'"),
        ((*COMPILE, "--max-drop", "0.01", "--task", "neighbors"), "of a task with labels"),
        ((*COMPILE, "--max-drop", "0.01", "--task", "sts", "--data", "none.tsv"), "no file"),
        ((*COMPILE, "--faster", "2", "--data", "none.tsv"), "--max-drop"),
        ((*COMPILE, "--device", "none.json"), "--faster, --ms or --mb"),
        (
            (*COMPILE, "--faster", "2", "--device", "none.json", "--calibration", "samples.npz"),
            "cannot be read",
        ),
        (("front", "tiny-mlp", "-o", "f", "--faster", "2,x"), "numbers with commas"),
        (("front", "tiny-mlp", "-o", "f", "--faster", "1"), "above 1"),
        (("front", "tiny-mlp", "-o", "f", "--task", "stss"), "'sts'"),
        (("front", "tiny-mlp", "-o", "f"), "no task of its own"),
        (("front", "tiny-mlp", "-o", "f", "--task", "sts", "--data", "none.tsv"), "no file"),
        (("front", "tiny-mlp", "-o", "f", "--quantize", "int9"), "int8"),
        (("device-kit", "tiny-mlp", "-o", "foreign"), "did not write it"),
        (("device-kit", "no/model", "-o", "f", "--quantize", "int9"), "int8"),
        (("device-kit", "tiny-mlp", "-o", "f", "--target", KERNELS), "--quantize int8-dynamic"),
        (("front", "tiny-mlp", "-o", "f", "--target", "kernels"), "there is no target"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    run: Run,
    sentence: Sentence,
    tmp_path: Path,
    samples: str,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in sentence(result)
    assert not any((tmp_path / name).exists() for name in ("out", "f"))


def test_speedups_are_sorted_and_checked() -> None:
    assert parse_speedups("3, 1.5,2,2") == [1.5, 2, 3]
    with pytest.raises(GraphPruneError, match="above 1"):
        parse_speedups("0.5,2")
