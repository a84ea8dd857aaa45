"""Sessions: feeds by name, files, threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.exporters.onnx.files import file_bytes
from graphprune.exporters.runtime.session import feeds_of, open_session

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
