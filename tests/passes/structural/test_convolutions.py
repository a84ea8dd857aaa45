"""Calibrated removal of channels: identities of scores and compensation for convolutions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import AxisGroup, axis_groups
from graphprune.axes.sites import consumers
from graphprune.calibration.stream import Stream
from graphprune.capture.capture import capture
from graphprune.ir.history import kept_indices
from graphprune.ir.program import Program
from graphprune.passes import FoldBatchNorm, LeastSquares, PruneAxis, PruneNeurons, SparseGPT
from graphprune.passes.structural.scores import Evidence, Obs, score_named
from graphprune.passes.structural.statistics import compensate, gather, with_patches
from graphprune.pipeline.base import Context, Pass
from graphprune.verify.error import relative_error


def between(second: nn.Module, channels: int = 4, activation: nn.Module | None = None) -> nn.Module:
    """A convolution, an activation, and what reads its channels."""
    return nn.Sequential(nn.Conv2d(2, channels, 3), activation or nn.ReLU(), second)


READERS = {
    "plain": lambda: between(nn.Conv2d(4, 3, (3, 2), stride=2, padding=1)),
    "dilated": lambda: between(nn.Conv2d(4, 3, 2, dilation=2, padding="same")),
    "grouped": lambda: between(nn.Conv2d(8, 4, 3, groups=2), channels=8),
    "transposed": lambda: between(nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1)),
    "flattened": lambda: between(nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 5))),
    "depthwise": lambda: between(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1))
    ),
}  # fmt: skip


def data(count: int = 3, side: int = 8) -> list[Tensor]:
    return [torch.randn(20, 2, side, side) for _ in range(count)]


def drift(program: Program, other: Program, batches: list[Tensor]) -> float:
    """Squared difference of the outputs over all batches."""
    return sum(float((program.run([x])[0] - other.run([x])[0]).square().sum()) for x in batches)


def the_group(program: Program) -> AxisGroup:
    (group,) = [g for g in axis_groups(program) if g.role == "neuron" and g.size == 4]
    return group


def masked_error(
    program: Program, keep: Sequence[int], batches: list[Tensor], *, bias: bool = True
) -> float:
    """Least squares error of what reads the channels, by torch's own lstsq over all rows.

    Without any of them, and without a bias: the energy of the outputs.
    """
    groups = axis_groups(program)
    group = the_group(program)
    found = consumers(groups, group)
    total = 0.0
    for site, units in found:
        rows: list[Tensor] = []

        def seen(_: Any, some: Tensor, rows: list[Tensor] = rows) -> None:
            rows.append(some)

        Stream(program, batches).collect(program, [site], seen)
        x = torch.cat(rows).double()
        wanted = x @ site.matrix(program).double().T
        if not bias:
            added = site.bias_column(program)
            total += float((wanted if added is None else wanted + added).square().sum())
            continue
        left = x[:, torch.isin(units, torch.tensor(keep)) | (units < 0)]
        if site.bias is not None:
            left = torch.cat([left, left.new_ones(len(left), 1)], 1)
        solution = torch.linalg.lstsq(left, wanted, driver="gelsd").solution
        total += float((left @ solution - wanted).square().sum())
    return total


@pytest.mark.parametrize("name", READERS)
def test_obs_costs_are_least_squares_over_patches(name: str) -> None:
    batches = data(12 if name == "flattened" else 3)
    program = capture(READERS[name](), (batches[0],))
    group, ctx = the_group(program), Context(calibration=batches)
    parts = gather(Stream(program, batches), program, axis_groups(program), group, ctx)
    order, costs = Obs().order(Evidence(program, group, ctx, parts, 1e-12), 2)
    errors = {
        pair: masked_error(program, [u for u in range(4) if u not in pair], batches)
        for size in (1, 2)
        for pair in itertools.combinations(range(4), size)
    }
    first, second = order[:2].tolist()
    assert errors[(first,)] == min(e for pair, e in errors.items() if len(pair) == 1)
    after = tuple(sorted((first, second)))
    assert errors[after] == min(e for pair, e in errors.items() if len(pair) == 2 and first in pair)
    assert float(costs[0]) == pytest.approx(errors[(first,)], rel=1e-4)
    assert float(costs[:2].sum()) == pytest.approx(errors[after], rel=1e-4)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("score", ["obs", "fluctuation", "activation", "taylor"])
def test_every_reader_is_cut_verified_and_compensated(name: str, score: str) -> None:
    batches = data()
    program = capture(READERS[name](), (batches[0],))

    def cut(method: str) -> Program:
        step = PruneNeurons(0.5, score=score, compensate=method)
        compiled = gp.compile(program, [step], calibration=batches)
        assert compiled.report.passes[0].details["verification"]["max_error"] <= 1e-5
        return compiled.program

    plain, fitted = cut("none"), cut("least-squares")
    assert plain.tensors["0.weight"].shape[0] == program.tensors["0.weight"].shape[0] // 2
    assert drift(program, fitted, batches) < 0.9 * drift(program, plain, batches)


def constants() -> nn.Module:
    """Four channels, of which the first two are constants after the activation."""
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, torch.tensor([0.5, 2.0])
        model[2].weight[:, 2:] *= 100  # the constants matter least
    return model


@pytest.mark.parametrize("widest", [8192, 8])
@pytest.mark.parametrize("score", ["fluctuation", "obs"])
@pytest.mark.parametrize("compensation", ["bias", "least-squares"])
def test_constant_channels_go_into_the_bias(
    score: str, compensation: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.axes.sites.WIDEST", widest)
    batches = data()
    program = capture(constants(), (batches[0],))
    step = PruneNeurons(0.5, score=score, compensate=compensation, damping=1e-9)
    compiled = gp.compile(program, [step], calibration=batches)
    assert list(kept_indices(compiled.program.history).values()) == [[2, 3]]
    for x in batches:
        assert relative_error(program.run([x])[0], compiled.program.run([x])[0]) < 1e-4


def test_taps_apart_are_the_product_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Channels in pairs that are equal: the removed one's taps move to the one that stays.
    monkeypatch.setattr("graphprune.axes.sites.WIDEST", 8)
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    with torch.no_grad():
        model[0].weight[2:], model[0].bias[2:] = 0.5 * model[0].weight[:2], 0.5 * model[0].bias[:2]
    batches = data()
    program = capture(model, (batches[0],))
    compiled = gp.compile(
        program, [PruneNeurons(0.5, score="obs", damping=1e-9)], calibration=batches
    )
    for x in batches:
        assert relative_error(program.run([x])[0], compiled.program.run([x])[0]) < 1e-4


@pytest.mark.parametrize("name", ["plain", "dilated", "grouped", "transposed"])
def test_what_stays_of_a_wide_kernel_is_fitted_over_its_patches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen tap by tap; the error is that of torch's own lstsq over the kept columns."""
    batches = data(4)
    program = capture(READERS[name](), (batches[0],))
    group = the_group(program)

    def cut() -> tuple[Program, list[int], float]:
        step = PruneNeurons(0.5, score="obs", damping=1e-12)
        compiled = gp.compile(program, [step], calibration=batches)
        details = compiled.report.passes[0].details
        (keep,) = kept_indices(compiled.program.history).values()
        return compiled.program, keep, details["output_error"][group.id]

    monkeypatch.setattr("graphprune.axes.sites.WIDEST", 8)
    fitted, keep, error = cut()
    monkeypatch.setattr("graphprune.passes.structural.patches.FITTED", 0)
    single, same, _ = cut()
    assert keep == same
    monkeypatch.undo()
    best = masked_error(program, keep, batches)
    assert error == pytest.approx(best / masked_error(program, [], batches, bias=False), rel=1e-3)
    # Errors tap by tap are of another whole: outputs are what can be compared.
    assert drift(program, fitted, batches) == pytest.approx(best, rel=1e-3)
    assert drift(program, fitted, batches) < drift(program, single, batches)


def test_too_few_patches_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.axes.sites.WIDEST", 8)
    batches = [torch.randn(2, 2, 5, 5)]  # 2 samples of 1 patch each
    program = capture(between(nn.Conv2d(4, 3, 3)), (batches[0],))
    ctx, group = Context(calibration=batches), the_group(program)
    stream, groups = Stream(program, batches), axis_groups(program)
    (part,) = gather(stream, program, groups, group, ctx)
    assert with_patches(stream, program, part, groups, torch.tensor([0])).patches is None


class Residual(nn.Module):
    """x + f(x) twice, batch norms inside, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(cast(Tensor, module.running_mean))
                nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.parametrize("folded", [False, True])
def test_the_residual_stream_and_what_is_inside_blocks(folded: bool) -> None:
    batches = data()
    program = capture(Residual().eval(), (batches[0],))
    first = [FoldBatchNorm()] if folded else []
    stream = next(g for g in axis_groups(program) if g.role == "residual")

    def cut(score: str) -> Program:
        steps = [PruneNeurons(0.5, score=score), PruneAxis(0.25, groups=(stream.id,), score=score)]
        return gp.compile(program, [*first, *steps], calibration=batches).program

    small, plain = cut("obs"), cut("magnitude")
    assert small.tensors["stem.weight"].shape[0] == 6
    assert small.tensors["blocks.0.0.weight"].shape == (8, 6, 3, 3)
    assert drift(program, small, batches) < drift(program, plain, batches)


def test_least_squares_and_sparsegpt_take_convolutions() -> None:
    batches = data()
    model: Any = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    program = capture(model, (batches[0],))
    targets = ("0.weight", "2.weight", "4.weight")

    def error(passes: list[Pass]) -> float:
        other = gp.compile(program, passes, calibration=batches).program
        return drift(program, other, batches)

    sparse = SparseGPT(0.5, targets=targets)
    compiled = gp.compile(program, [sparse], calibration=batches)
    for name in targets:
        zeros = (compiled.program.tensors[name] == 0).double().mean()
        assert abs(float(zeros) - 0.5) < 0.05
    cut: list[Pass] = [PruneNeurons(0.5)]
    assert error([*cut, LeastSquares(targets=targets)]) < error(cut)
    assert error([sparse, LeastSquares(targets=targets)]) <= error([sparse])


def test_the_energy_of_a_channel_is_that_of_its_patches() -> None:
    batches = data()
    model: Any = READERS["plain"]()
    program = capture(model, (batches[0],))
    group, ctx = the_group(program), Context(calibration=batches)
    parts = gather(Stream(program, batches), program, axis_groups(program), group, ctx)
    scores = score_named("activation").score(Evidence(program, group, ctx, parts))
    with torch.no_grad():
        x = nn.functional.pad(torch.cat([model[:2](b) for b in batches]), (1, 1, 1, 1))
    patches = nn.functional.unfold(x, (3, 2), stride=2).view(len(x), 4, 6, -1)
    torch.testing.assert_close(
        scores, patches.double().square().sum((0, 2, 3)).sqrt(), rtol=1e-5, atol=0
    )
    assert compensate(program, group, parts, torch.arange(4), "none", 0.01)[1] == 0
