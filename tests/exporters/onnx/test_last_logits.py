"""num_logits_to_keep: fed or not, the logits are those of the last positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.exporters import Artifact, export
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.last_logits import keep_last_logits
from graphprune.exporters.runtime.generate import Decoder
from graphprune.ir.decoding import KEEP
from graphprune.ir.program import Program
from graphprune.passes import Quantize


@pytest.fixture(scope="module")
def artifact(ragged_artifact: Callable[[str], Artifact]) -> Artifact:
    return ragged_artifact("onnxruntime")


def feeds_of(artifact: Artifact) -> dict[str, Any]:
    ids = torch.randint(5, 99, (2, 6))
    return artifact.feeds({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize(("keep", "length"), [(0, 6), (1, 1), (4, 4), (99, 6)])
def test_so_many_positions_are_kept(artifact: Artifact, keep: int, length: int) -> None:
    session, feeds = artifact.session(1), feeds_of(artifact)
    whole, *present = session.run(None, feeds)
    assert whole.shape == (2, 6, 99)
    found, *others = session.run(None, {**feeds, KEEP: np.array(keep, np.int64)})
    assert found.shape == (2, length, 99)
    np.testing.assert_allclose(found, whole[:, -length:], rtol=1e-5, atol=1e-6)
    for a, b in zip(present, others, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_need_not_be_fed(artifact: Artifact) -> None:
    session = artifact.session(1)
    assert KEEP not in [i.name for i in session.get_inputs()]
    assert KEEP in [i.name for i in session.get_overridable_initializers()]
    (described,) = (i for i in artifact.manifest["inputs"] if i["name"] == KEEP)
    assert described == {"name": KEEP, "type": "int64", "shape": [], "optional": True}
    # Positional batches do not count it.
    ids = torch.randint(5, 99, (2, 6))
    assert KEEP not in artifact.feeds((ids, torch.ones_like(ids)))


def test_generation_asks_for_one(artifact: Artifact) -> None:
    session = artifact.session(1)
    shapes = []
    run = session.run_with_ort_values

    def watched(names: Any, feeds: Any) -> Any:
        results = run(names, feeds)
        shapes.append(results[0].shape())
        return results

    session.run_with_ort_values = watched
    decoder = Decoder(session)
    decoder.prefill(np.full((2, 6), 7))
    decoder.step(np.full(2, 7))
    assert shapes == [[2, 1, 99], [2, 1, 99]]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "int4-weights"])
@pytest.mark.slow
def test_quantized_files_have_it_too(scheme: str, ragged_decoder: Program, tmp_path: Path) -> None:
    entry = ragged_decoder.forward
    batch = dict(zip(entry.input_names, entry.example, strict=True))
    compiled = gp.compile(ragged_decoder, [Quantize(scheme)], calibration=[batch])
    program, out = compiled.program, tmp_path / "out"
    artifact = export(program, out, target="genai", calibration=compiled.calibration)
    session, feeds = artifact.session(1), feeds_of(artifact)
    whole = session.run(None, feeds)[0]
    (last,) = session.run(["logits"], {**feeds, KEEP: np.array(1, np.int64)})
    # Dynamic scales are of all positions that the head reads: one of its own rounds otherwise.
    step = 0.03 * np.abs(whole).max() if scheme == "int8-dynamic" else 1e-6
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-5, atol=step)
    assert np.abs(whole[:, -2:-1] - whole[:, -1:]).max() > 2 * step


def test_through_what_scales_and_caps(artifact: Artifact) -> None:
    """logits = tanh(logits / 30) · 30, as some models have them."""
    import onnx_ir as ir

    model = ir.load(artifact.path / "model.onnx")
    _without_input(model)
    logits = model.graph.outputs[0]
    logits.name = "raw"
    factor = ir.node("Constant", [], {"value": ir.tensor(np.array(30.0, np.float32))})
    steps = [factor]
    for kind in ("Div", "Tanh", "Mul"):
        operands = [steps[-1].outputs[0] if len(steps) > 1 else logits]
        operands += [] if kind == "Tanh" else [factor.outputs[0]]
        steps.append(ir.node(kind, operands))
    model.graph.extend(steps)
    last = steps[-1].outputs[0]
    last.name, last.shape, last.type = "logits", logits.shape, logits.type
    model.graph.outputs[0] = last
    assert keep_last_logits(model)
    assert logits.shape is not None
    assert str(logits.shape[1]) == KEEP
    assert last.shape is not None
    assert str(last.shape[1]) != KEEP


def _without_input(model: Any) -> None:
    """Undo what `to_onnx` added."""
    graph = model.graph
    product = next(n for n in graph if n.outputs[0] is graph.outputs[0])
    product.replace_input_with(0, product.inputs[0].producer().inputs[0])
    graph.initializers.pop(graph.inputs.pop().name)


def test_logits_that_are_no_product_of_positions_stay(captured: Callable[[str], Program]) -> None:
    model = to_onnx(captured("tiny-bert"))
    assert not keep_last_logits(model)
    assert KEEP not in [v.name for v in model.graph.inputs]
