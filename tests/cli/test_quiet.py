"""What commands let through to stderr: our own warnings, and no other library's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import logging, warnings
from graphprune.cli.quiet import quiet_start
quiet_start()
logging.getLogger("graphprune.passes").warning("ours")
logging.getLogger("torch.onnx").warning("theirs")
warnings.warn("a warning of theirs")
"""


@pytest.mark.parametrize("debug", ["", "1"])
def test_only_our_warnings_are_shown_unless_debugging(debug: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "GRAPHPRUNE_DEBUG": debug},
        check=True,
    )
    assert "ours" in done.stderr
    assert ("theirs" in done.stderr) == bool(debug)
    assert ("a warning of theirs" in done.stderr) == bool(debug)


RUNTIME = """
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from graphprune.cli.quiet import quiet_libraries
quiet_libraries()
x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xwy")
ones = numpy_helper.from_array(np.ones(2, np.float32), "w")
graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x, w], [y], [ones])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
import onnxruntime
onnxruntime.InferenceSession(model.SerializeToString())
"""


def test_the_runtime_says_nothing_of_inputs_with_a_default() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
