"""Sums and broadcasts are written otherwise and compute the same; what looks alike stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.exporters.onnx.convert import lower, to_onnx
from graphprune.exporters.onnx.names import output_names
from graphprune.ir.batches import second_inputs
from graphprune.ir.graph import op_name
from graphprune.ir.program import Program
from graphprune.verify.error import relative_error

# x: [batch, length, 6]; w: [batch, length, 1]
POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled": lambda x, w: (x * w).sum(1),
    "weights_first": lambda x, w: (w * x).sum(1),
    "kept": lambda x, w: (x * w).sum(-2, keepdim=True),
}
ALIKE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "over_features": lambda x, w: (x * w).sum(2),
    "over_two": lambda x, w: (x * w).sum((0, 1)),
    "weights_alone": lambda x, w: (w * w).sum(1),
    "all_weights": lambda x, w: (x * x).sum(1),
    "one_weight_a_length": lambda x, w: (x * w[:1]).sum(1),
}
BROADCAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normalized": lambda x, w: F.normalize(x[:, 0], dim=-1),
    "expanded": lambda x, w: w.expand_as(x) - x,
}
# Without the expand the result would be smaller.
NEEDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda x, w: w.expand_as(x) + 1,
    "other_is_small": lambda x, w: w.expand_as(x) * w,
}


class Zoo(nn.Module):
    """All cases at once."""

    def forward(self, x: Tensor, w: Tensor) -> dict[str, Tensor]:
        cases = POOLED | ALIKE | BROADCAST | NEEDED
        return {name: case(x, w) for name, case in cases.items()}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Zoo(), {"x": torch.randn(3, 5, 6), "w": torch.rand(3, 5, 1)})


@pytest.mark.parametrize("second", [False, True], ids=["example", "other sizes"])
def test_the_results_stay(program: Program, second: bool) -> None:
    inputs = second_inputs(program.forward) if second else list(program.forward.example)
    names = output_names(program.forward)
    for name, a, b in zip(names, program.run(inputs), lower(program)(*inputs), strict=True):
        assert a.shape == b.shape, name
        assert relative_error(a, b) < 1e-6, name


def test_what_is_rewritten(program: Program) -> None:
    counts = Counter(op_name(node) for node in lower(program).graph.nodes)
    assert counts["matmul"] == len(POOLED)
    assert counts["sum"] == len(ALIKE)
    assert counts["expand"] + counts["expand_as"] == len(NEEDED)


def test_a_number_minus_whole_numbers_becomes_onnx() -> None:
    class Inverted(nn.Module):
        def forward(self, mask: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return 1.0 - mask, torch.rsub(mask, 2, alpha=3), 1.5 - flags.int()

    given = torch.tensor([[1, 0, 1], [0, 2, 5]]), torch.tensor([[True, False, True]] * 2)
    program = capture(Inverted(), given)
    model = to_onnx(program)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    for a, b in zip(program.run(list(given)), session.run(None, feeds), strict=True):
        assert torch.equal(a, torch.from_numpy(b))
