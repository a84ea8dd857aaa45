"""What depends on inputs: never said of what does not change, and exactly so where zeros decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes.dependence import Known, dependence
from graphprune.capture.capture import capture
from graphprune.ir.graph import flat_outputs
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny

Captured = Callable[[str], Program]


def _walk(program: Program) -> dict[str, Known]:
    nodes = [
        n.name
        for n in program.forward.graph.nodes
        if n.op == "call_function" and isinstance(n.meta["val"], Tensor)
    ]
    return dependence(program, "forward", nodes)


def _of(module: nn.Module, *inputs: Tensor) -> Known:
    """What is said of the output."""
    program = capture(module, inputs)
    output = flat_outputs(program.forward.graph)[0].name
    return dependence(program, "forward", [output])[output]


def _thinned(program: Program, part: float, seed: int) -> Program:
    """Random values instead of all floats, with rows and columns of zeros."""
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in program.tensors.items():
        if tensor.is_floating_point():
            new = torch.randn(tensor.shape, generator=drawn).to(tensor.dtype)
            for dim in range(tensor.dim()):
                alive = torch.rand(tensor.shape[dim], generator=drawn) >= part
                new = new * alive.reshape([-1] + [1] * (tensor.dim() - dim - 1))
            tensors[name] = new
    return program.with_tensors(tensors)


@pytest.mark.parametrize(
    "name",
    ["tiny-mlp", "tiny-cnn", "tiny-encoder", "tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5",
     "tiny-mixtral", "tiny-fused-vit"],
)  # fmt: skip
def test_what_is_called_constant_does_not_change(name: str, captured: Captured) -> None:
    program = _thinned(captured(name), 0.5, seed=len(name))
    known = _walk(program)
    constant = sum(int((~k.varies).sum()) for k in known.values())
    assert constant, "the test looks at nothing"
    drawn = torch.Generator().manual_seed(1)
    for _ in range(3):
        example = tuple(
            torch.randn(t.shape, generator=drawn)
            if t.is_floating_point()
            else torch.randint(0, 2 if "mask" in n else 90, t.shape, generator=drawn).to(t.dtype)
            for n, t in zip(program.forward.input_names, program.forward.example, strict=True)
        )
        entry = replace(program.forward, example=example)
        other = replace(program, entries={"forward": entry})
        again = dependence(other, "forward", list(known))
        for name, k in known.items():
            a, b = k.value[~k.varies], again[name].value[~k.varies]
            torch.testing.assert_close(a, b, equal_nan=True, msg=name)


class _Product(nn.Module):
    def __init__(self, how: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.how = how
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, *self.buffers())


X = torch.randn(2, 4)
SPARSE = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 2, 3, 0]])


def test_a_weight_of_zero_passes_nothing_on() -> None:
    known = _of(_Product(nn.functional.linear, w=SPARSE, b=torch.tensor([0.0, 5, 0])), X)
    assert known.varies.tolist() == [[True, False, True]] * 2
    assert known.value[:, 1].tolist() == [5.0, 5.0]
    assert _of(_Product(torch.matmul, w=SPARSE.T), X).varies.tolist() == [[True, False, True]] * 2


def test_zero_times_anything_is_zero() -> None:
    scale = torch.tensor([0.0, 1, 0, 2])
    assert (
        _of(_Product(lambda x, s: x * s, s=scale), X).varies.tolist()
        == [[False, True, False, True]] * 2
    )
    assert _of(_Product(lambda x, s: x + s, s=scale), X).varies.all()
    # What became a constant on the way counts like a weight.
    assert not _of(_Product(lambda x, s: (x * (s * 0) + 1) * s, s=scale), X).varies.any()


def test_a_relu_that_is_silent_on_the_examples_depends_on_them() -> None:
    known = _of(_Product(lambda x, b: torch.relu(x - b), b=torch.full((4,), 1e6)), X)
    assert not known.value.any()
    assert known.varies.all()


def test_a_sum_whose_length_is_the_inputs_is_no_constant() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x).sum(0) + torch.zeros_like(x)

    assert _of(Counts(), X).varies.all()
    assert not _of(_Product(lambda x, w: torch.ones_like(x) * w, w=torch.ones(4)), X).varies.any()


def test_what_is_cut_to_the_inputs_length_counts_if_it_is_the_same_everywhere() -> None:
    """Rows 0 to 7 of a table say nothing of those that longer inputs would read."""
    table = torch.zeros(40, 4)
    table[10:, 3] = 1
    table[:, 1] = 5

    class Reads(nn.Module):
        def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.register_buffer("table", table)
            self.how = how

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x) + self.how(x, self.table)  # type: ignore[arg-type]

    x = torch.randn(2, 8, 4)
    cuts: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, t: t[: x.shape[1]],
        lambda x, t: t.narrow(0, 0, x.shape[1]),
        lambda x, t: t[: x.shape[1]][-1],
    ]
    for cut in cuts:
        assert _of(Reads(cut), x).varies[0, 0].tolist() == [False, False, False, True]
    # A part that is the same for all lengths is what it is.
    assert not _of(Reads(lambda x, t: t[:1]), x).varies.any()


def test_a_fill_with_a_size_is_no_constant() -> None:
    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x) + torch.full((4,), x.shape[1])

    assert _of(Fills(), torch.randn(2, 8, 4)).varies.all()


def test_batch_norm_keeps_channels_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0  # type: ignore[operator]
    known = _of(model, torch.randn(2, 3, 5, 5))
    assert known.varies.any(dim=(0, 2, 3)).tolist() == [True, True, False, True]


def test_attention_hands_on_what_all_keys_share() -> None:
    class Attends(nn.Module):
        def __init__(self, masked: bool) -> None:
            super().__init__()
            self.masked = masked

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            v = torch.cat([x[..., :2], torch.zeros_like(x)[..., :2] + 7], -1)
            mask = (x[..., 0] > -9).unsqueeze(-2) if self.masked else None
            return nn.functional.scaled_dot_product_attention(x, x, v, mask)

    x = torch.randn(2, 3, 4)
    assert _of(Attends(False), x).varies[..., 0, :].tolist() == [[[True, True, False, False]]] * 2
    # Behind a mask a query may see no key at all.
    assert _of(Attends(True), x).varies.all()


def test_only_what_is_asked_for_is_kept() -> None:
    model, inputs = tiny("tiny-mlp")
    program = capture(model, inputs)
    node = next(n for n in program.forward.graph.nodes if n.op == "call_function")
    assert list(dependence(program, "forward", [node.name])) == [node.name]


class Pooled(nn.Module):
    """Two channels of which the second is constant, then a pooling."""

    def __init__(self, pool: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 2, 3), pool
        with torch.no_grad():
            self.conv.weight[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.mean((2, 3)) if self.pool is None else self.pool(y)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2, padding=1), nn.AvgPool2d(3, 1), nn.AdaptiveAvgPool2d(2), None],
    ids=["max", "average", "adaptive", "mean"],
)
def test_a_pooling_keeps_channels_apart(pool: nn.Module | None) -> None:
    known = _of(Pooled(pool).eval(), torch.randn(2, 1, 8, 8))
    assert bool(known.varies[:, 0].all())
    assert not bool(known.varies[:, 1].any())


def test_a_window_of_a_pooling_varies_where_one_of_its_values_does() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.max_pool1d(torch.cat([torch.zeros_like(x), x], 2), 2)

    known = _of(Joined(), torch.randn(2, 1, 3))
    assert known.varies.flatten(1).tolist() == 2 * [[False, True, True]]


def test_the_mean_over_more_of_what_differs_is_another_one() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0 * x + torch.arange(x.shape[1])).mean(1)

    sized = capture(Mean(), (torch.randn(2, 4),), dynamic_shapes=({1: torch.export.Dim("n")},))
    output = flat_outputs(sized.forward.graph)[0].name
    assert bool(dependence(sized, "forward", [output])[output].varies.all())
