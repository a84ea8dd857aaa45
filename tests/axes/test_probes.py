"""Operators between two weights: which leave the axis between them free, and why others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import AxisGroups, algebra, axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite
from tests.axes.probes import BUILDS, PROBES, WIDTH, Modules, Probe

NAMES = {f"p{number}": probe for number, probe in enumerate(PROBES)}
FREE = [key for key, probe in NAMES.items() if not probe.expected]


class Between(nn.Module):
    """A weight, an operator and a weight, for each of some probes."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.keys = keys
        self.extra = nn.ModuleDict({key: Modules(BUILDS.get(NAMES[key].name)) for key in keys})
        self.into = nn.ModuleDict({key: _into(NAMES[key]) for key in keys})
        self.out = nn.ModuleDict()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)
        with torch.no_grad():
            for key in keys:
                given = torch.randn(2, 6, 8) if not NAMES[key].image else torch.randn(2, 4, 8, 8)
                self.out[key] = _out(NAMES[key], self.between(key, given))

    def between(self, key: str, given: Tensor) -> Tensor:
        probe = NAMES[key]
        extra = self.extra[key]
        assert isinstance(extra, Modules)
        return probe.function(extra, self.into[key](given))

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        given = {True: image, False: x}
        return tuple(self.out[key](self.between(key, given[NAMES[key].image])) for key in self.keys)


def _into(probe: Probe) -> nn.Module:
    return nn.Conv2d(4, WIDTH, 1) if probe.image else nn.Linear(8, WIDTH)


def _out(probe: Probe, read: Tensor) -> nn.Module:
    if probe.image and read.dim() == 4:
        return nn.Conv2d(read.shape[1], 3, 1)
    return nn.Linear(read.shape[-1], 3)


def captured(keys: list[str]) -> Program:
    """Batch and sizes static: some probes have tensors of their own for every row."""
    example = (torch.randn(2, 6, 8), torch.randn(2, 4, 8, 8))
    return capture(Between(keys).eval(), example, dynamic_shapes=None)


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(list(NAMES))


def outcome(groups: AxisGroups, key: str) -> str:
    """ "" where every unit next to both weights can go, by one factor of its axis or another."""
    for tensor, dim in ((f"into.{key}.weight", 0), (f"out.{key}.weight", 1)):
        named = {algebra.find(group.axis): group for group in groups.of(tensor, dim)}
        terms = algebra.terms(groups.axes.tensors[tensor][dim])
        bound = [[named[part] for part in term if part in named] for term in terms]
        free = [any(not (g.frozen or g.normalized) for g in term) for term in bound]
        # A picked unit, or a group of channels over two inputs, may stay; most of them go.
        sizes = [int(algebra.sympy_product([part.size for part in term])) for term in terms]
        if 2 * sum(s for s, ok in zip(sizes, free, strict=True) if ok) < sum(sizes):
            reasons = [r for term in bound for g in term for r in g.frozen]
            statistic = any(g.normalized for term in bound for g in term)
            return "; ".join(dict.fromkeys(reasons)) or ("normalized" if statistic else "tied")
    return ""


def test_there_are_128_and_112_are_free() -> None:
    assert len({probe.name for probe in PROBES}) == 128
    assert len(FREE) >= 112


def test_each_is_free_or_has_its_reason(program: Program) -> None:
    groups = axis_groups(program)
    found = {probe.name: outcome(groups, key) for key, probe in NAMES.items()}
    wanted = {
        probe.name: found[probe.name]
        if probe.expected and probe.expected in found[probe.name]
        else probe.expected
        for probe in PROBES
    }
    assert found == wanted


@pytest.mark.parametrize("left", [1, 2])
def test_what_is_free_can_go(program: Program, left: int) -> None:
    """All free axes at once: half of their units, and all but one."""
    generator = torch.Generator().manual_seed(left)
    kept = {
        group.id: torch.randperm(group.size, generator=generator)[: max(group.size // 2, 1)]
        if left == 2
        else [group.size - 1]
        for group in axis_groups(program)
        if not group.frozen and not group.normalized
    }
    verify_rewrite(
        mask(program, kept), shrink(program, kept), also=[mask(program, kept, everywhere=True)]
    )
