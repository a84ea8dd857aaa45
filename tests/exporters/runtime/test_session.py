"""Sessions: feeds by name, and timings on a clock that the test turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.exporters.runtime import session as module
from graphprune.exporters.runtime.session import feeds_of, file_bytes, open_session
from graphprune.exporters.runtime.timing import compare, compare_all, default_clock, interleaved

NAMES = ["x", "past.0.0", "past.0.key"]


@pytest.mark.parametrize(
    "batch",
    [
        {"x": 1, "past": [(2, 0)], "past.0.key": 3},
        {"past": [{"0": 2, "key": 3}], "x": 1, "unknown": 9},
        (1, [2, {"key": 3}]),
        [1, (2, 3), 4],
    ],
)
def test_nested_inputs_are_found_by_name_or_order(batch: Any) -> None:
    found = feeds_of(batch, NAMES)
    assert list(found) == NAMES
    assert [int(v) for v in found.values()] == [1, 2, 3]


def test_tensors_become_arrays_and_halves_float32() -> None:
    x = torch.tensor([0.5, -1.25], requires_grad=True)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        (found,) = feeds_of(x.to(kind), ["x"]).values()
        assert found.dtype == np.float32
        assert found.tolist() == [0.5, -1.25]
    assert feeds_of({"x": torch.tensor([1])}, ["x"])["x"].dtype == np.int64


def test_a_missing_input_is_named_with_what_there_is() -> None:
    with pytest.raises(
        GraphPruneError, match=r"lacks \['y'\].*takes \['x', 'y'\].*has \['x', 'z'\]"
    ):
        feeds_of({"x": 0, "z": 0}, ["x", "y"])


# --- time --------------------------------------------------------------------------------------


class Clock:
    """Milliseconds that pass only while sessions run; who ran, in order."""

    def __init__(self) -> None:
        self.now, self.ran = 0, ""

    def __call__(self) -> int:
        return self.now


class Session:
    """Takes the given milliseconds, one after another, after two runs that do not count."""

    def __init__(self, clock: Clock, name: str, times: list[int]) -> None:
        self.clock, self.name, self.times = clock, name, [1000, 1000, *times]

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, outputs: None, feeds: dict[str, Any]) -> None:
        self.clock.ran += self.name
        self.clock.now += self.times.pop(0) * 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "_CLOCKS", {"wall": made, "cpu": made})
    return made


def test_rounds_go_in_turns_and_each_counts_its_fastest_run(clock: Clock) -> None:
    a = Session(clock, "a", [5, 3, 4, 9, 7, 8])
    b = Session(clock, "b", [10, 30, 20, 2, 1, 3])
    assert interleaved([a, b], {}, repeats=2, runs=3) == [[3, 7], [10, 1]]
    assert clock.ran == "aabb" + "aaabbb" * 2


def test_a_comparison_is_the_median_of_the_rounds_ratios(clock: Clock) -> None:
    """Each round is compared with itself: a machine that slows down slows both."""
    a = Session(clock, "a", [1, 2, 4, 8, 16])
    b = Session(clock, "b", [2, 6, 16, 40, 96])
    found = compare(a, b, {"x": np.zeros((2, 3))}, repeats=5, runs=1, threads=2)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (4, 3, 5)
    assert (found.model.ms, found.model.low, found.model.high) == (4, 2, 8)
    assert (found.against.ms, found.rounds, found.runs, found.threads) == (16, 5, 1, 2)
    assert (found.clock, found.shapes, found.others) == ("wall", {"x": (2, 3)}, {})


def test_several_opponents_share_the_rounds(clock: Clock) -> None:
    a, b, c = (Session(clock, n, [t] * 3) for n, t in (("a", 2), ("b", 4), ("c", 1)))
    found = compare_all(a, {"dense": b, "int8": c}, {}, repeats=3, runs=1)
    assert clock.ran == "aabbcc" + "abc" * 3
    assert (found.ratio, found.others["int8"].ratio) == (2, 0.5)
    assert list(found.others) == ["int8"]
    assert found.to_json()["others"]["int8"]["against"] == {"ms": 1.0, "low": 1.0, "high": 1.0}
    assert (default_clock(1), default_clock(2), found.clock) == ("cpu", "wall", "cpu")


# --- files -------------------------------------------------------------------------------------


def test_a_file_is_opened_with_so_many_threads_or_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    session = open_session(path, 1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_session_options().inter_op_num_threads == 1
    assert session.run(None, {"x": np.ones(2, np.float32)})[0].tolist() == [-1, -1]
    for threads in (0, 10**6):
        with pytest.raises(GraphPruneError, match="threads must be between 1 and"):
            open_session(path, threads)
    size = file_bytes(path)
    assert size == path.stat().st_size
    (tmp_path / "model.onnx.data").write_bytes(b"12345")
    assert file_bytes(path) == size + 5
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"cannot load .*model\.onnx"):
        open_session(path, 1)
