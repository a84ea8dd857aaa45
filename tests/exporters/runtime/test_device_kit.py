"""The device kit: its script runs by itself, and what it writes is looked up or refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.errors import ExportError, GraphPruneError
from graphprune.exporters.runtime.device_kit import KitDevice, is_kit, write_kit
from graphprune.exporters.runtime.probe import cpu
from graphprune.exporters.runtime.signature import signature
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark

Captured = Callable[[str], Program]

# As on a device: neither graphprune nor torch are there.
ALONE = """
import runpy, sys
sys.modules["graphprune"] = sys.modules["torch"] = None
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(captured: Captured) -> dict[str, Program]:
    return {"mlp": captured("tiny-mlp"), "again": captured("tiny-mlp"), "cnn": captured("tiny-cnn")}


@pytest.fixture(scope="module")
def kit(models: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(models, folder)
    return folder


@pytest.fixture(scope="module")
def result(kit: Path) -> dict[str, Any]:
    """What the script writes, run where nothing of graphprune is."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ALONE, str(kit / "measure.py"), "--seconds", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "round 15" in run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def written(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_the_script_times_every_model_once(
    kit: Path, result: dict[str, Any], models: dict[str, Program]
) -> None:
    assert is_kit(kit)
    assert result["costs"].keys() == {signature(models["mlp"]), signature(models["cnn"])}
    assert {"cpu", "onnxruntime", "python", "platform", "threads"} < result.keys()
    for cost in result["costs"].values():
        assert 0 < cost["low"] <= cost["ms"] <= cost["high"]


def test_costs_are_looked_up(
    result: dict[str, Any], models: dict[str, Program], tmp_path: Path
) -> None:
    device = KitDevice(written(tmp_path / "d.json", result), threads=1)
    assert (device.name, device.threads) == (cpu()["name"], 1)
    assert not device.can_measure
    costs = device.measure(models)
    assert costs["mlp"] == costs["again"] != costs["cnn"]
    assert costs["cnn"].ms == result["costs"][signature(models["cnn"])]["ms"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not what a device kit's measure.py writes"),
        ("[1]", "its format is not"),
        ('{"format": "x"}', "its format is not"),
        ({"costs": {"a": {"ms": 1}}}, "missing 3 required"),
        ({"costs": {"a": {"ms": -1.0, "bytes": 1, "low": 1, "high": 1}}}, "not positive"),
        ({"threads": "many"}, "its threads is 'many'"),
        (
            {"graphprune": "0.0.1"},
            "a kit of graphprune 0.0.1, and this is .* `graphprune device-kit`",
        ),
        ({"threads": 4}, "measured with 4 threads, and 1 are asked for: .* --threads 1"),
    ],
)
def test_other_files_are_refused(
    text: str | dict[str, Any], why: str, result: dict[str, Any], tmp_path: Path
) -> None:
    data = {**result, **text} if isinstance(text, dict) else text
    with pytest.raises(GraphPruneError, match=why) as refused:
        KitDevice(written(tmp_path / "d.json", data), threads=1)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="cannot be read"):
        KitDevice(tmp_path / "nothing.json")


def test_another_model_is_refused(
    result: dict[str, Any], captured: Captured, models: dict[str, Program], tmp_path: Path
) -> None:
    device = KitDevice(written(tmp_path / "d.json", result))
    other = {"encoder": captured("tiny-encoder")}
    with pytest.raises(GraphPruneError, match=r"no part of this model: .* for 'Mlp'.*device-kit"):
        device.measure(other)
    with pytest.raises(GraphPruneError, match="does not say what 'encoder' costs"):
        device.measure({**models, **other})


def test_another_onnxruntime_is_warned_of(
    result: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        KitDevice(written(tmp_path / "d.json", {**result, "onnxruntime": "1.0"}))
    (record,) = caplog.records
    assert "measured with onnxruntime 1.0" in record.getMessage()


def test_a_kit_of_int8_is_for_int8(
    models: dict[str, Program], result: dict[str, Any], tmp_path: Path
) -> None:
    mark = Mark("int8-dynamic")
    marked = {"mlp": replace(models["mlp"], quantization=mark)}
    write_kit(marked, tmp_path / "kit", threads=2)
    data = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert (data["threads"], data["mark"]["scheme"]) == (2, "int8-dynamic")
    assert list(data["models"]) == [signature(marked["mlp"])] != [signature(models["mlp"])]
    floats = KitDevice(written(tmp_path / "d.json", result))
    with pytest.raises(GraphPruneError, match=r"measured in float, and .* as int8-dynamic: "):
        floats.measure(marked)
    seven = {"mlp": replace(models["mlp"], quantization=replace(mark, reduce_range=True))}
    eights = KitDevice(written(tmp_path / "e.json", {**result, "mark": data["mark"]}))
    with pytest.raises(GraphPruneError, match=r"as int8-dynamic, and .* seven bits \(--reduce-r"):
        eights.measure(seven)


def test_inputs_of_other_sizes_are_other_measurements(
    models: dict[str, Program], tmp_path: Path
) -> None:
    program = models["mlp"]
    larger = tuple(torch.cat([t, t]) for t in program.forward.example)
    write_kit({"mlp": program}, tmp_path / "kit", inputs={"mlp": larger})
    data = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert list(data["models"]) == [signature(program, larger)] != [signature(program)]


def test_somebody_elses_folder_stays(models: dict[str, Program], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="graphprune did not write it"):
        write_kit(models, tmp_path)
    assert not is_kit(tmp_path)
