"""The artifact: whole or absent, checked when opened, measured, and never a folder of others."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.capture.capture import capture
from graphprune.errors import ArtifactError, ExportError, GraphPruneError
from graphprune.exporters import Artifact, export, open_artifact
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.rewrite.shrink import shrink
from graphprune.storage.folders import sha256
from graphprune.storage.program import load

Captured = Callable[[str], Program]
KEPT = list(range(0, 32, 2))


def pruned(captured: Captured) -> Program:
    from graphprune.axes import axis_groups

    program = captured("tiny-mlp")
    group = next(g for g in axis_groups(program) if g.size == 32)
    return shrink(program, {group.id: KEPT})


@pytest.fixture(scope="module")
def made(captured: Captured, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("made") / "out"
    extra = {"labels.json": b"[1]", "tokenizer/vocab.txt": b"a"}
    return export(pruned(captured), path, baseline=captured("tiny-mlp"), extra=extra)


@pytest.fixture
def copy(made: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(made.path, tmp_path / "out")
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def test_the_manifest_tells_what_was_done(made: Artifact, captured: Captured) -> None:
    manifest = made.manifest
    files = {"model.onnx", "baseline.onnx", "report.md", "labels.json", "tokenizer/vocab.txt"}
    program = {f"program/{n}" for n in ("program.json", "tensors.safetensors")}
    assert files | program <= set(manifest["sha256"])
    assert tree(made.path).keys() == {*manifest["sha256"], "manifest.json"}
    assert list(manifest["kept"].values()) == [KEPT]
    assert manifest["inputs"] == [{"name": "x", "type": "float", "shape": ["batch_size", 12]}]
    dense, small = captured("tiny-mlp").num_parameters(), pruned(captured).num_parameters()
    assert manifest["parameters"] == {"model.onnx": small, "baseline.onnx": dense}
    assert small == dense - 16 * (12 + 1 + 24)
    assert manifest["sizes"]["model.onnx"] < manifest["sizes"]["baseline.onnx"]
    for file in ("model.onnx", "baseline.onnx"):
        assert [p["shape"] for p in manifest["parity"][file]] == [[3, 5], [4, 5], [3, 5]]
        assert max(p["error"] for p in manifest["parity"][file]) < 1e-5
    assert manifest["measurements"][0]["ratio"] > 0
    assert manifest["versions"]["onnxruntime"]
    assert manifest["precision"] == {"program": ["float32"], "onnx": "float32"}


def test_the_model_and_its_twin_compute_their_programs(made: Artifact, captured: Captured) -> None:
    x = torch.randn(5, 12)
    for session, program in (
        (made.session(1), load(made.path)),
        (made.session(1), pruned(captured)),
        (made.baseline_session(1), captured("tiny-mlp")),
    ):
        (actual,) = session.run(None, made.feeds({"x": x}))
        torch.testing.assert_close(torch.from_numpy(actual), program(x=x))


def test_benchmark_measures_both_in_turns(made: Artifact) -> None:
    result = made.benchmark({"x": torch.randn(7, 12)}, repeats=3, clock="cpu")
    assert result.shapes == {"x": (7, 12)}
    assert (result.rounds, result.threads, result.clock) == (3, 1, "cpu")
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.model.low <= result.model.ms <= result.model.high
    itself = made.benchmark((torch.randn(7, 12),), against=made.path, repeats=3)
    assert itself.model.ms > 0
    assert json.loads(json.dumps(itself.to_json()))["rounds"] == 3
    assert result.default is not None
    assert result.default.rounds == 3
    assert 0 < result.default.model.ms != result.model.ms


def test_footprint_is_of_a_fresh_process(made: Artifact) -> None:
    held = torch.ones(200 << 20, dtype=torch.uint8)  # would show if the probe inherited our peak
    small = made.footprint({"x": torch.randn(7, 12)})
    assert 0 < small.load_ms < 10_000
    assert 10 << 20 < small.peak_bytes < 300 << 20
    assert 0 <= small.model_bytes < small.peak_bytes
    assert small.private_bytes is None or 0 < small.private_bytes < small.peak_bytes
    del held


@pytest.mark.parametrize(
    ("batch", "message"),
    [({"y": torch.randn(2, 12)}, r"lacks \['x'\]"), ((), r"lacks \['x'\]")],
)
def test_a_batch_that_does_not_fit_is_named(made: Artifact, batch: Any, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        made.benchmark(batch)


def test_one_thread_is_measured_by_its_cpu_time_and_more_by_the_wall_clock(made: Artifact) -> None:
    batch = {"x": torch.randn(2, 12)}
    clocks = [made.benchmark(batch, threads=n, repeats=1).clock for n in (1, 2)]
    assert clocks == ["cpu", "wall"]


def test_cpu_time_of_many_threads_is_refused(made: Artifact) -> None:
    with pytest.raises(GraphPruneError, match="one thread"):
        made.benchmark({"x": torch.randn(2, 12)}, threads=2, clock="cpu")


def test_without_a_twin_there_is_nothing_to_measure_against(
    captured: Captured, tmp_path: Path
) -> None:
    artifact = export(captured("tiny-mlp"), tmp_path / "out")
    assert not artifact.has_baseline
    with pytest.raises(GraphPruneError, match="no dense baseline"):
        artifact.benchmark({"x": torch.randn(2, 12)})


@pytest.mark.parametrize("name", ["model.onnx", "report.md", "program/tensors.safetensors"])
@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "link"])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / name
    data = file.read_bytes()
    if damage == "change":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    if damage == "link":
        (copy.parent / "elsewhere").write_bytes(data)
        file.symlink_to(copy.parent / "elsewhere")
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        open_artifact(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sha256"][name] = "0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        open_artifact(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "{" * 100_000])
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(copy)


def test_no_artifact_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a folder that graphprune wrote"):
        open_artifact(tmp_path)


def refuse_work(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("work was done before the refusal")


def test_files_that_somebody_put_into_an_artifact_are_not_removed(
    copy: Path, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.exporters.artifact.export.to_onnx", refuse_work)
    (copy / "runs").mkdir()
    (copy / "runs" / "notes").write_text("mine")
    before = tree(copy)
    with pytest.raises(ExportError, match="holds 'runs/notes', which graphprune did not write"):
        export(captured("tiny-mlp"), copy)
    assert tree(copy) == before


def test_artifacts_of_other_models_are_not_measured_against(
    made: Artifact, captured: Captured, tmp_path: Path
) -> None:
    other = export(captured("tiny-fused-vit"), tmp_path / "other")
    with pytest.raises(GraphPruneError, match=r"takes inputs .*pixel_values"):
        made.benchmark({"x": torch.randn(2, 12)}, against=other)


def test_an_artifact_is_not_timed_at_sizes_that_it_was_not_captured_for(
    made: Artifact, tmp_path: Path
) -> None:
    fixed = capture(*tiny("tiny-mlp"), dynamic_shapes=None)
    other = export(fixed, tmp_path / "other")
    with pytest.raises(GraphPruneError, match=r"'x'.*3"):
        made.benchmark({"x": torch.randn(2, 12)}, against=other)
    made.benchmark({"x": torch.randn(3, 12)}, against=other, repeats=1)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_cannot_be_are_refused(made: Artifact, threads: int) -> None:
    with pytest.raises(GraphPruneError, match="threads must be between 1 and"):
        made.session(threads=threads)


def disk_full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["save_onnx", "save_files", "open_session"])
@pytest.mark.parametrize("failure", [disk_full, interrupt])
def test_a_failed_export_leaves_the_old_artifact_and_no_litter(
    step: str,
    failure: Callable[..., Any],
    copy: Path,
    captured: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree(copy.parent)
    monkeypatch.setattr(f"graphprune.exporters.artifact.export.{step}", failure)
    with pytest.raises(ExportError if failure is disk_full else KeyboardInterrupt) as error:
        export(captured("tiny-mlp"), copy)
    if failure is disk_full:
        assert "No space left on device" in str(error.value)
    assert tree(copy.parent) == before
    open_artifact(copy)


def test_an_artifact_is_replaced_as_a_whole(copy: Path, captured: Captured) -> None:
    export(captured("tiny-mlp"), copy)
    assert "labels.json" not in tree(copy)
    assert [p.name for p in copy.parent.iterdir()] == ["out"]
    assert open_artifact(copy).manifest["kept"] == {}
