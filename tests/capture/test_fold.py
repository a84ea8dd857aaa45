"""Constants are computed at capture; parameters, sizes of inputs and random numbers are none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphprune.axes import AxisGroups, axis_groups
from graphprune.capture.capture import capture
from graphprune.capture.fold import spell_indices
from graphprune.ir.graph import op_name
from graphprune.ir.program import Program
from graphprune.ir.propagate import propagate
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.storage.program import load, save
from graphprune.verify.equivalence import verify_rewrite

Body = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """What a test does with [batch, length, 8]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("base", torch.arange(1.0, 9.0))
        self.register_buffer("last", torch.arange(12) >= 8)
        self.register_buffer("thirds", torch.arange(12) % 3 == 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def captured(body: Body, *sizes: int) -> Program:
    return capture(Small(body), (torch.randn(*(sizes or (2, 5, 8))),))


def ops(program: Program) -> list[str]:
    return [op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"]


def test_arithmetic_on_buffers_and_counting_is_one_tensor() -> None:
    program = captured(lambda m, x: x * (m.base * 2).log() * torch.arange(8) ** 2)
    assert ops(program) == ["mul", "mul"]
    values = [t for name, t in program.tensors.items() if name.startswith("folded_")]
    for expected in ((torch.arange(1.0, 9.0) * 2).log(), torch.arange(8) ** 2):
        assert any(torch.equal(expected, value) for value in values)
    assert "base" not in program.tensors


def test_a_constant_that_two_read_is_there_once() -> None:
    program = captured(lambda m, x: (x + m.base.exp()) * m.base.exp() + m.base)
    assert "base" in program.tensors
    scale = captured(lambda m, x: (lambda s: (x + s) * s)(m.base.exp()))
    assert sum(name.startswith("folded_") for name in scale.tensors) == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * torch.tanh(m.weight),
        lambda m, x: x + torch.arange(x.shape[1])[:, None],
        lambda m, x: x + 0 * torch.rand(8),
        lambda m, x: x + torch.zeros(8),
    ],
    ids=["parameters", "sizes of inputs", "random numbers", "a lone zeros"],
)
def test_what_is_no_constant(body: Body) -> None:
    assert not any(name.startswith("folded_") for name in captured(body).tensors)


def test_what_would_grow_is_computed_from_what_would_not() -> None:
    program = captured(lambda m, x: x + (m.base.exp() * 2).repeat(300, 10), 3, 300, 80)
    assert ops(program) == ["repeat", "add"]
    assert sum(t.numel() for n, t in program.tensors.items() if n.startswith("folded_")) == 8


@pytest.mark.parametrize(("places", "left"), [([1, 2], 0), ([-2, -1], 0), ([6, 7], 1), ([-9], 1)])
def test_a_lookup_outside_its_table_stays_one(places: list[int], left: int) -> None:
    """As a slice of places counted round, it would no longer fail."""
    graph = fx.Graph()
    x, index = graph.placeholder("x"), graph.get_attr("index")
    found = graph.call_function(torch.ops.aten.index_select.default, (x, 1, index))
    graph.output((found,))
    tensors = {"index": torch.tensor(places)}
    propagate(graph, tensors, [torch.randn(2, 5)], {})
    spell_indices(graph, tensors)
    assert sum(op_name(node) == "index_select" for node in graph.nodes) == left


def test_a_folded_graph_belongs_to_no_module_without_its_constants() -> None:
    program = captured(lambda m, x: m.b(m.a(x) * torch.arange(12).cumsum(0)))
    assert any(name.startswith("folded_") for name in program.tensors)
    program.forward.graph.lint()


def test_a_folded_program_can_be_saved(tmp_path: Any) -> None:
    program = captured(lambda m, x: x * m.base[None, None].expand(1, 5, 8).transpose(1, 2).mT.exp())
    save(program, tmp_path / "program")
    x = torch.randn(2, 5, 8)
    assert torch.equal(load(tmp_path / "program")(x), program(x))


EVEN: tuple[Body, ...] = (
    lambda m, h: h[..., [4, 5, 6]],
    lambda m, h: h[..., [-2, -1]],
    lambda m, h: h[..., [3]],
    lambda m, h: h[..., torch.arange(0, 12, 3)],
    lambda m, h: h[..., torch.arange(1, 9, 3)],
    lambda m, h: h[..., m.last],
    lambda m, h: h[..., m.thirds],
    lambda m, h: h.index_select(-1, torch.arange(2, 7)),
    lambda m, h: h.transpose(1, 2)[:, [5, 6]].transpose(1, 2),
)
UNEVEN: tuple[Body, ...] = (
    lambda m, h: h[..., torch.arange(12).flip(0)],
    lambda m, h: h[..., [0, 1, 3]],
    lambda m, h: h[..., [3, 3, 3]],
    lambda m, h: h[..., m.base.repeat(2)[:12] % 4 > 1],
    lambda m, h: h[..., torch.tensor([[2, 3], [4, 5]])].flatten(-2),
    lambda m, h: h[[[1]], [[2]]].expand(3, 5, 12),
)


@pytest.mark.parametrize(("bodies", "left"), [(EVEN, 0), (UNEVEN, len(UNEVEN))])
def test_a_lookup_in_even_steps_is_a_slice(bodies: tuple[Body, ...], left: int) -> None:
    model = Small(lambda m, x: torch.cat([body(m, m.a(x)) for body in bodies], -1))
    x = torch.randn(3, 5, 8)
    program = capture(model, (x,), dynamic_shapes=None)
    assert sum(op in {"index", "index_select"} for op in ops(program)) == left
    assert "nonzero" not in ops(program)
    torch.testing.assert_close(program(x), model(x))


def cut(program: Program, kept: int = 2) -> AxisGroups:
    """Cut each free axis alone and all at once; every cut must move the output."""
    groups = axis_groups(program)
    free = [g for g in groups if not g.frozen and not g.normalized and g.cost]
    for chosen in [*[[g] for g in free], free]:
        keep = {g.id: torch.randperm(g.size)[: min(kept, g.size - 1)] for g in chosen}
        masked = mask(program, keep)
        everywhere = mask(program, keep, everywhere=True)
        verify_rewrite(masked, shrink(program, keep), nodes=False, also=[everywhere])
        example = program.forward.example
        assert not torch.allclose(masked.run(example)[0], program.run(example)[0], atol=1e-3)
    return groups


class Attention(nn.Module):
    """Four heads of eight; `biased` is added to the scores [batch, 4, length, length]."""

    def __init__(self, biased: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.biased = biased
        self.q, self.k, self.v = (nn.Linear(6, 32) for _ in range(3))
        self.out = nn.Linear(32, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = self.biased(q @ k.transpose(-1, -2), q).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


def _slopes(scores: Tensor, q: Tensor) -> Tensor:
    slopes = torch.tensor(0.5) ** torch.arange(1, 5)
    return scores + slopes[:, None, None] * torch.arange(scores.shape[-1])


def _large_slopes(scores: Tensor, q: Tensor) -> Tensor:
    """As large a table as models keep: it is not folded, what it is made of is."""
    slopes = torch.tensor(0.5) ** torch.arange(1, 5)
    table = slopes[:, None, None] * torch.arange(1 - 8192, 1)
    return scores + table[..., -scores.shape[-1] :]


@pytest.mark.parametrize("biased", [_slopes, _large_slopes])
def test_heads_with_constant_slopes_can_go(
    biased: Callable[[Tensor, Tensor], Tensor],
) -> None:
    program = capture(Attention(biased), (torch.randn(2, 5, 6),))
    groups = cut(program)
    (heads,) = groups.with_role("head")
    assert not heads.frozen
    slopes = [name for name in heads.tensors if name.startswith("folded_")]
    assert [program.tensors[name].numel() for name in slopes] == [4]


def test_heads_beside_a_relative_shift_can_go() -> None:
    def shifted(scores: Tensor, q: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        table = torch.cat([q, q.tanh(), q[..., :1]], -1)  # as many distances as it has columns
        n = table.shape[-1]
        moved = table.reshape(batch, heads, n, length)[:, :, 1:].reshape(
            batch, heads, length, n - 1
        )
        return scores + moved[..., :length]

    program = capture(Attention(shifted), (torch.randn(2, 5, 6),))
    (heads,) = cut(program).with_role("head")
    assert not heads.frozen
