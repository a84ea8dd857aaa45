"""Inputs that need not be fed: zero then, and themselves where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.session import inputs_of, open_session


class Segments(nn.Module):
    """Reads sizes from the optional input too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(9, 4), nn.Embedding(2, 4)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        places = torch.arange(kinds.shape[1]).to(torch.float32)
        hidden = self.words(ids) + self.kinds(kinds).reshape(kinds.shape[0], -1, 4)
        return hidden * places[None, :, None]


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    kinds = torch.zeros(2, 5, dtype=torch.int64)
    kinds[:, 3:] = 1
    return {"ids": torch.arange(10).reshape(2, 5) % 9, "kinds": kinds}


def test_what_is_not_fed_is_zero(inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = Segments()
    program = gp.compile(model, [], example_inputs=inputs).program
    save_onnx(to_onnx(program, optional=("kinds", "no such input")), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    assert [i.name for i in session.get_inputs()] == ["ids"]
    assert inputs_of(session) == ["ids", "kinds"]
    ids = np.arange(21).reshape(3, 7) % 9  # another batch and length
    kinds = (ids > 4).astype(np.int64)
    with torch.no_grad():
        for feeds in ({"ids": ids}, {"ids": ids, "kinds": kinds}):
            given = feeds.get("kinds", np.zeros_like(ids))
            expected = model(torch.from_numpy(ids), torch.from_numpy(given))
            np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-6)


def test_an_artifact_says_what_is_optional(inputs: dict[str, Tensor], tmp_path: Path) -> None:
    from graphprune.exporters import export

    program = gp.compile(Segments(), [], example_inputs=inputs).program
    artifact = export(program, tmp_path / "out", optional=("kinds",))
    assert [i.get("optional", False) for i in artifact.manifest["inputs"]] == [False, True]
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    assert artifact.feeds(given).keys() == {"ids", "kinds"}
    assert artifact.feeds({"ids": given["ids"]}).keys() == {"ids"}
    assert artifact.feeds((given["ids"],)).keys() == {"ids"}
    assert artifact.feeds((given["ids"], given["kinds"])).keys() == {"ids", "kinds"}
    fed, left_out = (
        artifact.session(1).run(None, feeds)[0] for feeds in (given, {"ids": given["ids"]})
    )
    assert np.abs(fed - left_out).max() > 0.1


def test_an_input_whose_shape_no_other_has_stays_required(inputs: dict[str, Tensor]) -> None:
    program = gp.compile(nn.Linear(3, 4), [], example_inputs=(torch.randn(2, 3),)).program
    (name,) = program.forward.input_names
    model = to_onnx(program, optional=(name,))
    assert not model.graph.inputs[0].is_initializer()
