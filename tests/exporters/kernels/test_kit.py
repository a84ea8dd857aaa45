"""A device kit of sparse products: what it measures is what chooses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graphprune import compile
from graphprune.errors import GraphPruneError
from graphprune.exporters import export
from graphprune.exporters.kernels.choose import timed_feeds
from graphprune.exporters.kernels.kit import write_forms_kit
from graphprune.exporters.kernels.library import needs_library
from graphprune.exporters.runtime.device_kit import KitDevice, write_kit
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.passes import Budget, Magnitude, Quantize, SparseGPT
from graphprune.passes.budget.sized import named_models, sized_for
from tests.passes.budget.test_budget import batches

Captured = Callable[[str], Program]


def pruned(program: Program) -> Program:
    passes = [Magnitude(0.75, pattern="16x4", indivisible="skip"), Quantize("int8-dynamic")]
    return compile(program, passes).program


@pytest.fixture(scope="module")
def kit(captured: Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit of a tiny model."""
    program = pruned(captured("tiny-mlp"))
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_forms_kit(program, folder, timed_feeds(program, ()))
    return folder


def test_every_form_of_every_group_is_in_it(kit: Path) -> None:
    described = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    names = [name for model in described["models"].values() for name in model["names"]]
    assert described["library"] is True
    for form in ("float", "int8", "32x4 at 50% zeros", "32x4 at 80% zeros"):
        assert any(name.endswith(f"as {form}") for name in names)
    for model in described["models"].values():
        assert (kit / model["file"]).is_file()


def test_what_it_measured_chooses(kit: Path, captured: Captured, tmp_path: Path) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    script = [sys.executable, str(kit / "measure.py"), "--seconds", "1"]
    said = subprocess.run(script, capture_output=True, text=True, check=False)
    assert not said.returncode, said.stderr
    device = tmp_path / "device.json"
    data = json.loads(said.stdout)
    # The other machine is one where sparse products win.
    models = json.loads((kit / "kit.json").read_text(encoding="utf-8"))["models"]
    for key, model in models.items():
        stock = any(name.endswith(("as float", "as int8")) for name in model["names"])
        data["costs"][key]["ms"] = 2.0 if stock else 1.0
    data["cpu"]["name"] = "another machine"
    device.write_text(json.dumps(data), encoding="utf-8")
    program = pruned(captured("tiny-mlp"))
    target = "onnxruntime+kernels"
    artifact = export(program, tmp_path / "out", target=target, device=device)
    notes = artifact.manifest["quantization"]["model.onnx"]
    assert notes["sparse"] == len([x for r in notes["choices"] for x in r["layers"]]) > 0
    assert artifact.manifest["kernels"]["cpu"] == "another machine"
    with pytest.raises(GraphPruneError, match=r"device\.json.*knows no part of this model"):
        export(program, tmp_path / "other", target=target, device=device, batch=(7,))


def test_a_model_without_zeros_has_nothing_to_time(captured: Captured, tmp_path: Path) -> None:
    program = compile(captured("tiny-mlp"), [Quantize("int8-dynamic")]).program
    with pytest.raises(GraphPruneError, match="no product of this model has zeros"):
        write_forms_kit(program, tmp_path / "kit", timed_feeds(program, ()))
    assert not (tmp_path / "kit").exists()


def test_a_float_model_is_refused(captured: Captured, tmp_path: Path) -> None:
    program = captured("tiny-mlp")
    with pytest.raises(GraphPruneError, match="quantized"):
        write_forms_kit(program, tmp_path / "kit", timed_feeds(program, ()))


@pytest.mark.slow
def test_a_budget_times_zero_blocks_elsewhere_and_export_takes_its_word(
    captured: Captured, tmp_path: Path
) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    program = captured("tiny-bert")
    options = Budget(speedup=2, blocks="32x4", round_to=32)
    models, inputs = named_models(sized_for(options, program, Mark("int8-dynamic")))
    script = write_kit(models, tmp_path / "kit", inputs=inputs)
    kit = json.loads((tmp_path / "kit" / "kit.json").read_text(encoding="utf-8"))
    assert kit["library"] is True
    for model in kit["models"].values():
        sparse = any("zeros" in name for name in model["names"])
        assert needs_library(tmp_path / "kit" / model["file"]) == sparse
    command = [sys.executable, str(script), "--seconds", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not said.returncode, said.stderr
    file = tmp_path / "device.json"
    file.write_text(said.stdout, encoding="utf-8")
    found = KitDevice(file).measure(models, inputs=inputs)
    assert found.keys() == models.keys()
    # The same machine, measured with a kit for stock ONNX Runtime.
    data = json.loads(said.stdout)
    del data["mark"]["blocks"]
    for key, model in kit["models"].items():
        if any("zeros" in name for name in model["names"]):
            del data["costs"][key]
    stock = tmp_path / "stock.json"
    stock.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(GraphPruneError, match=r"stock\.json.*without zero blocks of 32x4"):
        KitDevice(stock).measure(models, inputs=inputs)
    passes = [SparseGPT(0.5, pattern="32x4"), Quantize("int8-dynamic")]
    compiled = compile(program, passes, calibration=batches(program))
    target = "onnxruntime+kernels"
    artifact = export(compiled.program, tmp_path / "out", target=target, device=file)
    notes = artifact.manifest["quantization"]["model.onnx"]
    assert notes["sparse"] > 0
    assert {r["form"] for r in notes["choices"]} == {"32x4"}
    assert artifact.manifest["kernels"]["cpu"] == KitDevice(file).name
