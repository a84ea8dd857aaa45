"""The process of its own: what is set there, what it says, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime import probe
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.footprint import footprint
from graphprune.exporters.runtime.session import DEFAULT, TUNED, UNFUSED

WIDTH = 16
DENORMAL = np.float32(1e-40)
FEEDS = {"x": np.ones((2, 3, WIDTH), np.float32)}


def saved(path: Path, weights: Mapping[str, Any] | None = None) -> Path:
    """y = x * w, and LayerNormalization(x + y), which ORT's SkipLayerNormFusion looks for."""
    w, scale = np.ones(WIDTH, np.float32), np.ones(WIDTH, np.float32)
    arrays = {"w": w, "scale": scale, "bias": 0 * scale, **(weights or {})}
    size: list[str | int | None] = ["n", 3, WIDTH]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "w"], ["y"]),
            helper.make_node("Add", ["x", "y"], ["sum"]),
            helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["normed"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, size) for n in ("y", "normed")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("files") / "model.onnx")


IN_A_FRESH_PROCESS = """
import json, runpy, sys
import numpy as np
path, probe, config = sys.argv[1:]
session = runpy.run_path(probe)["new_session"](path, 1, json.loads(config), profile="p")
y, _ = session.run(None, {"x": np.full((2, 3, 16), 1e-40, np.float32)})
operators = {e["args"].get("op_name") for e in json.load(open(session.end_profiling()))}
heavy = [name for name in ("torch", "graphprune") if name in sys.modules]
print(json.dumps([float(y[0, 0, 0]), "SkipLayerNormalization" in operators, heavy]))
"""


@pytest.mark.parametrize(
    ("config", "flushes", "fuses"),
    [(DEFAULT, False, True), (UNFUSED, False, False), (TUNED, True, False)],
)
def test_the_options_do_what_they_are_called(
    config: Mapping[str, str], flushes: bool, fuses: bool, file: Path, tmp_path: Path
) -> None:
    """ONNX Runtime takes any key without a word, so that a wrong one would do nothing."""
    command = [sys.executable, "-P", "-c", IN_A_FRESH_PROCESS]
    arguments = [str(file), probe.__file__, json.dumps(dict(config))]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    y, fused, heavy = json.loads(done.stdout)
    assert (y == 0, fused) == (flushes, fuses)
    assert heavy == []


def test_a_profile_is_of_operators_and_counts_no_warm_up(file: Path) -> None:
    with child([file, file], 1, TUNED, profile=True) as process:
        process.warm_up(FEEDS)
        process.round(3, "wall")
        for found in process.operators():
            assert set(found) == {"Mul", "Add", "LayerNormalization"}
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert 0 < sum(found.values()) < 100


def test_a_profile_is_summed_by_operator_and_run() -> None:
    def run(start: int, length: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": length}

    def node(kind: str, start: int, length: int, suffix: str = "_kernel_time") -> dict[str, Any]:
        args = {"op_name": kind}
        return {"cat": "Node", "name": f"n{suffix}", "ts": start, "dur": length, "args": args}

    events = [node("Add", 1, 900), run(0, 1000)]
    for start, more in ((1000, 0), (2000, 500), (3000, 100)):
        events += [node("MatMul", start + 1, 100 + more), node("MatMul", start + 300, 100)]
        events += [node("Add", start + 700, 50), node("Add", start + 699, 1, "_fence_before")]
        # What is inside an If has events of its own.
        events += [node("If", start + 1, 900), run(start, 1000)]
    assert probe.by_operator(events, 1) == {"MatMul": 0.3, "Add": 0.05}
    assert probe.by_operator(events[:2], 1) == {"Add": 0.0}


def test_denormals_stay_what_they_are_here(file: Path) -> None:
    with child([file], 1, TUNED) as process:
        process.warm_up(FEEDS)
        assert process.round(2, "cpu")[0] > 0
    assert np.multiply(DENORMAL, np.float32(1)) == DENORMAL != 0


def test_one_file_can_be_there_twice(file: Path) -> None:
    with child([file, file], 1, DEFAULT) as process:
        assert [list(shapes) for shapes in process.inputs] == [["x"], ["x"]]
        process.warm_up(FEEDS)
        assert len(process.round(1, "wall")) == 2


def test_inputs_may_be_called_like_arguments_of_numpy(tmp_path: Path) -> None:
    model = onnx.load(saved(tmp_path / "model.onnx"))
    model.graph.input[0].name = "file"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "file" if name == "x" else name
    onnx.save(model, tmp_path / "model.onnx")
    with child([tmp_path / "model.onnx"], 1, DEFAULT) as process:
        process.warm_up({"file": FEEDS["x"]})


def test_what_need_not_be_fed_may_be(tmp_path: Path) -> None:
    model = onnx.load(saved(tmp_path / "model.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [WIDTH]))
    onnx.save(model, tmp_path / "model.onnx")
    wrong = np.ones(WIDTH + 1, np.float32)
    with child([tmp_path / "model.onnx"], 1, DEFAULT) as process:
        assert list(process.inputs[0]) == ["x"]
        process.warm_up(FEEDS)
        with pytest.raises(GraphPruneError, match="does not run in a process of its own"):
            process.warm_up({**FEEDS, "w": wrong})


def test_a_file_that_is_none_is_named(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(b"no graph")
    with (
        pytest.raises(GraphPruneError, match=r"other\.onnx' does not run in a process") as error,
        child([file, path], 1, DEFAULT),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_file_that_fails_is_named(file: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.onnx", {"w": np.ones((5, 3, WIDTH), np.float32)})
    with (
        child([other, file], 1, DEFAULT) as process,
        pytest.raises(GraphPruneError, match=r"other\.onnx' does not run in a process"),
    ):
        process.warm_up(FEEDS)


def test_a_process_that_is_killed_is_one_sentence(file: Path) -> None:
    with child([file], 1, DEFAULT) as process:
        os.kill(process._process.pid, signal.SIGKILL)
        for _ in range(2):  # the second request finds nobody who reads
            with pytest.raises(GraphPruneError, match=r"ended with exit code -9.*smaller batch"):
                process.round(1, "cpu")


def test_threads_are_refused_before_a_process_starts(file: Path) -> None:
    with (
        pytest.raises(GraphPruneError, match="threads must be between 1 and"),
        child([file], 0, DEFAULT),
    ):
        pass


def test_private_memory_is_without_what_is_mapped(tmp_path: Path) -> None:
    """12 MiB of weights: parsed into the process, or mapped from a file beside the graph."""
    pytest.importorskip("resource", reason="memory is asked of POSIX systems")
    if not Path("/proc/self/status").exists():
        pytest.skip("private memory is read in /proc")
    weights = {"w": np.ones((1 << 16, 3, WIDTH), np.float32)}
    path = saved(tmp_path / "model.onnx", weights)
    feeds = {"x": np.ones((1, 3, WIDTH), np.float32)}
    inside = footprint(path, feeds)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data")
    beside = footprint(path, feeds)
    assert inside.private_bytes is not None
    assert beside.private_bytes is not None
    assert inside.private_bytes - beside.private_bytes > 10 << 20
    assert inside.private_bytes < inside.peak_bytes


def test_without_proc_private_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "open", _no_file, raising=False)
    assert probe._status("RssAnon:") is None
    peak = probe._peak()
    assert peak is not None
    assert peak > 1 << 20


def _no_file(*args: Any, **kwargs: Any) -> Any:
    raise FileNotFoundError
