"""What operators freeze, and how much it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import algebra, axis_groups, frozen_parameters
from graphprune.axes.rules import RULES
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny_names
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.report import page as html
from graphprune.report.report import Report

Captured = Callable[[str], Program]


class Upscaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 32, 3, padding=1)
        self.c = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        result: Tensor = self.c(nn.functional.pixel_shuffle(x, 2))
        return result


class Ordered(nn.Module):
    """Hidden units that a running product tells apart; those of the other branch are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x).cumprod(-1)) + self.d(torch.relu(self.c(x)))
        return result


@pytest.fixture
def upscaled(monkeypatch: pytest.MonkeyPatch) -> Program:
    """A model that calls an operator without a rule."""
    program = capture(Upscaled(), (torch.randn(2, 3, 8, 8),))
    monkeypatch.delitem(RULES, "pixel_shuffle")
    return program


def test_channels_at_an_operator_without_a_rule(upscaled: Program) -> None:
    program = upscaled
    (found,) = frozen_parameters(axis_groups(program))
    assert found.op == "pixel_shuffle"
    assert found.groups == ("b.weight[0]", "c.weight[1]")
    # All of b; of c all but the bias.
    expected = sum(program.tensors[n].numel() for n in ("b.weight", "b.bias", "c.weight"))
    assert found.parameters == expected
    assert found.share == expected / program.num_parameters()
    assert found.text == (
        f"32 channels before and 8 after `pixel_shuffle` ({100 * found.share:.1f} % of parameters) "
        "stay: no rule for `pixel_shuffle`"
    )


def test_only_what_a_slice_holds_counts() -> None:
    """Half of a fused weight is free: the other half is what an operator freezes."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.a(x).split(8, -1)
            result: Tensor = self.b(torch.relu(one)) + self.c(two.cumprod(-1))
            return result

    program = capture(Fused(), (torch.randn(3, 6),))
    (found,) = frozen_parameters(axis_groups(program))
    assert found.parameters == 8 * 6 + 8 + 5 * 8
    assert found.reason == "fixed by `cumprod`"
    assert found.text.startswith("8 units at `cumprod` (")


def test_weights_that_an_operator_without_a_rule_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Bilinear(4, 6, 7)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(torch.relu(self.a(x))), self.c(x, x[:, :3].repeat(1, 2))

    program = capture(Paired(), (torch.randn(3, 4),))
    monkeypatch.delitem(RULES, "bilinear")
    (found,) = frozen_parameters(axis_groups(program))
    assert found.text.startswith("weights of `bilinear` (")
    assert found.parameters == 4 * 6 * 7 + 7


@pytest.mark.parametrize("model", tiny_names())
@pytest.mark.slow
def test_nothing_is_said_of_models_that_every_rule_knows(model: str, captured: Captured) -> None:
    """Vocabularies, outputs, routers and the three of a fused projection are as they must be."""
    assert frozen_parameters(axis_groups(captured(model))) == []


def test_the_report_says_so_once_and_survives_json() -> None:
    program = capture(Ordered(), (torch.randn(3, 6),))
    report = gp.compile(program, [PruneNeurons(0.25), PruneNeurons(0.25)]).report
    (line,) = report.frozen_lines()
    (fact,) = frozen_parameters(axis_groups(program))
    assert line == fact.text
    for text in (str(report), report.to_markdown(), html.report_page(report, {})):
        assert text.count("8 units at `cumprod`") == 1
    assert report.passes[0].details["frozen"] == [fact.to_json()]
    assert Report.from_json(report.to_json()).frozen_lines() == [line]


def test_a_report_without_such_axes_says_nothing(captured: Captured) -> None:
    report = gp.compile(captured("tiny-bert"), [PruneHeads(0.5)]).report
    assert report.frozen_lines() == []
    assert "frozen" not in str(report)
    assert "Frozen" not in report.to_markdown()


def test_few_lines_are_enough(upscaled: Program) -> None:
    report = gp.compile(upscaled, [PruneNeurons(0.5)]).report
    details = report.passes[0].details["frozen"]
    details += [{**details[0], "reason": f"{i}", "text": f"{i}", "share": 0.01} for i in range(12)]
    lines = report.frozen_lines()
    assert lines[0] == details[0]["text"]
    assert len(lines) == 9
    assert lines[-1] == "and 5 more"


def test_a_refusal_names_what_freezes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 5, 1))
    program = capture(model, (torch.randn(2, 3, 8, 8),))
    monkeypatch.delitem(RULES, "pixel_shuffle")
    with pytest.raises(UnsupportedError, match="16 channels before and 4 after `pixel_shuffle`"):
        gp.compile(program, [PruneNeurons(0.5)])


def test_terms_are_a_sum_of_products() -> None:
    a, b, c, d = (algebra.leaf(size) for size in (2, 3, 4, 5))
    axis = algebra.concat([algebra.product([algebra.concat([a, b]), c]), d])
    assert algebra.terms(axis) == [(a, c), (b, c), (d,)]
    assert sum(x.size * y.size for x, y in algebra.terms(axis)[:2]) + d.size == axis.size
