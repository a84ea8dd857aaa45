"""Export: what is refused before any work, and what a folder holds afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from graphprune.errors import ExportError
from graphprune.exporters import Artifact, export, measure
from graphprune.exporters.artifact.export import TARGETS
from graphprune.ir.program import Program
from graphprune.ir.quantization import SCHEMES
from graphprune.storage.folders import sha256

Captured = Callable[[str], Program]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(
    program_of: Callable[..., Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Artifact]:
    """A layer that is its own baseline, with more files."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> dict[str, fx.Node]:
        linear = torch.ops.aten.linear.default
        return {"logits": graph.call_function(linear, (node["x"], node["w"]))}

    inputs = {"x": torch.randn(2, 3)}
    program = program_of({"w": torch.randn(4, 3)}, inputs, write, {"x": {0: "batch"}})
    folder = tmp_path_factory.mktemp("made")
    (folder / "names.txt").write_text("a b")
    extra: dict[str, Path | bytes] = {
        "tokenizer/names.txt": folder / "names.txt",
        "labels.json": b"[1]",
    }
    return program, export(program, folder / "out", baseline=program, extra=extra)


def test_a_program_that_is_its_own_baseline_is_written_once(made: Any) -> None:
    program, artifact = made
    hashes = artifact.manifest["sha256"]
    assert hashes["model.onnx"] == hashes["baseline.onnx"]
    x = torch.randn(5, 3)
    (found,) = artifact.session(1).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), program(x)["logits"])


def test_the_manifest_describes_the_file_and_hashes_all_of_the_folder(made: Any) -> None:
    program, artifact = made
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "x", "type": "float", "shape": ["batch_size", 3]}]
    assert manifest["outputs"] == [{"name": "logits", "type": "float", "shape": ["batch_size", 4]}]
    assert manifest["parameters"] == {"model.onnx": program.num_parameters()}
    assert manifest["sizes"]["model.onnx"] == (artifact.path / "model.onnx").stat().st_size
    found = tree(artifact.path)
    found.pop("manifest.json")
    assert manifest["sha256"] == found


def test_more_files_and_a_report_lie_in_the_folder(made: Any) -> None:
    _, artifact = made
    assert (artifact.path / "tokenizer" / "names.txt").read_text() == "a b"
    assert (artifact.path / "labels.json").read_bytes() == b"[1]"
    assert (artifact.path / "report.md").read_text() == "# model\n\n12 parameters.\n"


def test_a_missing_extra_file_is_named(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"extra file '.*nowhere' does not exist"):
        export(made[0], tmp_path / "out", extra={"x": tmp_path / "nowhere"})
    assert list(tmp_path.iterdir()) == []


def test_every_scheme_has_a_target() -> None:
    assert set(SCHEMES) == {scheme for schemes in TARGETS.values() for scheme in schemes}


def test_measure_is_in_milliseconds(captured: Captured) -> None:
    assert 0 < measure(captured("tiny-mlp"), repeats=2) < 100


def refuse_work(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("work was done before the refusal")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "other manifest"])
def test_what_is_not_ours_is_refused_before_any_work(
    kind: str, captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.exporters.artifact.export.to_onnx", refuse_work)
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        (tmp_path / "target").mkdir()
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
        name = "thesis.tex" if kind == "folder" else "manifest.json"
        (path / name).write_text('{"format": "a web page"}')
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="out'"):
        export(captured("tiny-mlp"), path)
    assert tree(tmp_path) == before


def test_unknown_targets_and_reserved_names_are_refused(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.exporters.artifact.export.to_onnx", refuse_work)
    program = captured("tiny-mlp")
    with pytest.raises(ExportError, match="'onnxruntime'"):
        export(program, tmp_path / "out", target="tensorrt")
    for name in ("../x", "model.onnx", "program/x", "/x", ""):
        with pytest.raises(ExportError, match="cannot be called"):
            export(program, tmp_path / "out", extra={name: b""})
    assert list(tmp_path.iterdir()) == []
