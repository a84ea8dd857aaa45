"""Where an artifact's files are, and what of them may be gone or changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import ArtifactError
from graphprune.exporters import Artifact
from graphprune.storage.layout import FLAT, HUB, layout_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    compiled = gp.compile(nn.Linear(3, 4), [], example_inputs=(torch.randn(2, 3),))
    compiled.files = {"task.json": b"{}", "more/notes.txt": b"x"}
    return compiled.export(tmp_path_factory.mktemp("hub") / "out", layout="hub", weights="beside")


def copy_of(made: Artifact, folder: Path) -> Path:
    for name in (HUB.manifest, *made.manifest["sha256"]):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((made.path / name).read_bytes())
    return folder


def test_a_folder_is_known_by_its_manifest(made: Artifact, tmp_path: Path) -> None:
    assert layout_of(made.path) is HUB
    assert layout_of(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{}")
    assert layout_of(tmp_path) is FLAT
    files = set(made.manifest["sha256"])
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "graphprune/baseline.onnx"} <= files
    assert {"README.md", "graphprune/task.json", "more/notes.txt"} <= files
    assert all(
        f.startswith(("onnx/", "graphprune/", "more/", "README", "export.json")) for f in files
    )
    assert made.model_path == made.path / "onnx" / "model.onnx"
    assert made.baseline_path == made.path / "graphprune" / "baseline.onnx"


def test_what_travels_with_a_program_keeps_its_name(made: Artifact) -> None:
    assert set(gp.load(made.path).files) == {"task.json", "more/notes.txt"}


def test_an_upload_may_lack_baselines_and_its_card_may_be_edited(
    made: Artifact, tmp_path: Path
) -> None:
    folder = copy_of(made, tmp_path / "copy")
    whole = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    manifest = (folder / HUB.manifest).stat().st_size
    baseline = [folder / "graphprune" / f"baseline.onnx{end}" for end in ("", "_data")]
    assert made.upload_bytes == whole - manifest - sum(f.stat().st_size for f in baseline)
    (folder / "README.md").write_text("mine")
    for file in baseline:
        file.unlink()
    artifact = gp.open(folder)
    assert not artifact.has_baseline
    assert gp.load(folder).program.num_parameters() == 16
    with pytest.raises(gp.GraphPruneError, match="baseline"):
        artifact.baseline_session()
    (folder / "onnx" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx' is missing"):
        gp.open(folder)


def test_a_changed_baseline_is_refused_before_it_is_copied(made: Artifact, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path / "copy")
    (folder / "graphprune" / "baseline.onnx_data").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"baseline\.onnx_data' is not the file"):
        gp.load(folder)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "README.txt"])
def test_a_manifest_names_no_files_outside_of_its_hashes(
    made: Artifact, tmp_path: Path, name: str
) -> None:
    folder = copy_of(made, tmp_path / "copy")
    manifest = json.loads((folder / HUB.manifest).read_text())
    for part in ("model", "baseline"):
        changed = {**manifest, "files": {**manifest["files"], part: name}}
        (folder / HUB.manifest).write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=f"has no hash of '{name}'"):
            gp.open(folder)


@pytest.mark.parametrize("name", ["graphprune/program/program.json", "onnx/model.onnx"])
def test_more_files_do_not_replace_graphprunes_own(name: str, tmp_path: Path) -> None:
    compiled = gp.compile(nn.Linear(3, 4), [], example_inputs=(torch.randn(2, 3),))
    compiled.files = {name: b"mine"}
    with pytest.raises(gp.GraphPruneError, match="an extra file cannot be called"):
        compiled.export(tmp_path / "out", layout="hub")
    assert not (tmp_path / "out").exists()


def test_a_layout_of_another_version_is_refused_in_one_sentence(
    made: Artifact, tmp_path: Path
) -> None:
    folder = copy_of(made, tmp_path / "copy")
    manifest = json.loads((folder / HUB.manifest).read_text())
    (folder / HUB.manifest).write_text(json.dumps({**manifest, "layout": "tower"}))
    with pytest.raises(
        ArtifactError, match=r"layout 'tower'.*install the graphprune that wrote it"
    ):
        gp.open(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "tower"}, "layout is one of"),
        ({"weights": "outside"}, "weights is one of"),
        ({"opset": 19}, "opset is one of"),
        ({"target": "toaster"}, "unknown target 'toaster'"),
        ({"target": "genai"}, r"makes genai_config\.json of the model's configuration"),
        ({"tokenizer": 5}, "tokenizer is a folder"),
        ({"tokenizer": "nowhere"}, "'nowhere' is no folder with a tokenizer"),
    ],
)
def test_wrong_forms_are_refused_before_any_work(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    compiled = gp.compile(nn.Linear(3, 4), [], example_inputs=(torch.randn(2, 3),))
    with pytest.raises(gp.GraphPruneError, match=words):
        compiled.export(tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
