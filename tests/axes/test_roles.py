"""Roles of axes in small models: what PruneNeurons takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.passes import PruneNeurons


class Excited(nn.Module):
    """Squeeze and excitation: channels are weighted by what a bottleneck makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1))))
        h = F.relu(self.b(h * gate.sigmoid()))
        result: Tensor = self.head(h.mean((2, 3)))
        return result


class Graph(nn.Module):
    """Two layers over the nodes of a graph, which an adjacency mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        mixing = adjacency / adjacency.abs().sum(-1, keepdim=True).clamp_min(1)
        h = F.relu(mixing @ self.a(x))
        result: Tensor = self.head(F.relu(torch.einsum("bij,bjd->bid", mixing, self.b(h))))
        return result


class LinearlyExcited(Excited):
    """The same with linear layers in the bottleneck, on channels without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        gate = self.up(F.silu(self.down(h.mean((2, 3))))).sigmoid()[:, :, None, None]
        result: Tensor = self.head(F.relu(self.b(h * gate)).mean((2, 3)))
        return result


class Messages(nn.Module):
    """Two layers over the nodes of a graph, which sends along a list of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = F.relu(self.b(h + torch.zeros_like(h).index_add(0, targets, h[sources])))
        to = targets[:, None].expand(-1, 12)
        sent = torch.zeros_like(h).scatter_add(0, to, h.index_select(0, sources))
        result: Tensor = self.head(sent)
        return result


class Scanned(nn.Module):
    """A selective scan over six steps, with inner channels as in state space models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Linear(5, 8), nn.Linear(8, 32), nn.Linear(16, 8)
        self.conv = nn.Conv1d(16, 16, 4, groups=16, padding=3)
        self.step, self.state = nn.Linear(16, 16), nn.Linear(16, 8)
        self.decay = nn.Parameter(torch.randn(16, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        a, gate = self.inner(x).chunk(2, -1)
        a = F.silu(self.conv(a.mT)[..., :6]).mT
        write, read = self.state(a).chunk(2, -1)
        step = F.softplus(self.step(a))[..., None]
        kept, added = (-step * self.decay.exp()).exp(), step * write[:, :, None] * a[..., None]
        state, values = torch.zeros(x.shape[0], 16, 4), []
        for t in range(6):
            state = kept[:, t] * state + added[:, t]
            values.append((state @ read[:, t, :, None]).squeeze(-1))
        result: Tensor = self.head(x + self.out(torch.stack(values, 1) * F.silu(gate)))
        return result


class Fields(nn.Module):
    """A feed-forward network on each of some fields, and a head that reads all of them together."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Linear(3, 8) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([field(x[:, i]) for i, field in enumerate(self.fields)], 1)
        h = self.norm(h + self.down(self.up(h).relu()))
        return self.head(h.flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[tuple[str, int]]]] = {
    "squeeze and excitation": (Excited, (torch.randn(2, 3, 8, 8),), [("squeeze.weight", 4)]),
    "excitation of linear layers": (
        LinearlyExcited,
        (torch.randn(2, 3, 8, 8),),
        [("a.weight", 16), ("down.weight", 4)],
    ),
    "messages": (
        Messages,
        (torch.randn(7, 6), torch.randint(0, 7, (9,)), torch.randint(0, 7, (9,))),
        [("a.weight", 16), ("b.weight", 12)],
    ),
    "graph": (
        Graph,
        (torch.randn(2, 7, 6), torch.randn(2, 7, 7)),
        [("a.weight", 16), ("b.weight", 12)],
    ),
    "fields, flattened in the end": (Fields, (torch.randn(2, 4, 3),), [("up.weight", 16)]),
    "scan": (Scanned, (torch.randn(2, 6, 5),), [("conv.weight", 16)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_inner_units_are_neurons_and_can_go(name: str) -> None:
    build, example, wanted = MODELS[name]
    torch.manual_seed(2)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    program = capture(model, example)
    groups = axis_groups(program)
    for tensor, size in wanted:
        assert ("neuron", size) in [(g.role, g.size) for g in groups.of(tensor, 0)]
    small = gp.compile(program, [PruneNeurons(0.5)]).program
    for tensor, size in wanted:
        assert small.tensors[tensor].shape[0] == size // 2


def test_what_a_classifier_reads_of_pooled_features_is_pooled() -> None:
    groups = axis_groups(capture(Excited().eval(), (torch.randn(2, 3, 8, 8),)))
    assert groups["b.weight[0]"].role == "pooled"
