"""Magnitude and Wanda: counts, the scores from their definition, and how the two are related."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.gram import Gram
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.passes import Magnitude, SparseGPT, Wanda
from graphprune.passes.solvers.sparsegpt import Inputs
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_mask
from graphprune.pipeline.base import Pass

Captured = Callable[[str], Program]


class Two(nn.Module):
    """A matrix that is no output head, and one that is."""

    def __init__(self, rows: int = 8, columns: int = 12) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(columns, rows), nn.Linear(rows, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.a(x)))
        return result


def pruned(step: Pass, x: Tensor, weight: Tensor) -> Tensor:
    model = Two(*weight.shape)
    with torch.no_grad():
        model.a.weight.copy_(weight)
    program = capture(model, (x[:3],))
    result = gp.compile(program, [step], calibration=[x[: len(x) // 3], x[len(x) // 3 :]])
    return result.program.tensors["a.weight"]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_every_row_loses_exactly_so_many(cls: Any, sparsity: float) -> None:
    """Ties too: a weight of few distinct values."""
    weight = torch.randint(1, 4, (8, 12)).float()
    found = pruned(cls(sparsity, scope="row"), torch.randn(40, 12), weight)
    assert (found == 0).sum(1).tolist() == [math.floor(sparsity * 12 + 0.5)] * 8
    assert torch.equal(found[found != 0], weight[found != 0])


@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_the_matrix_loses_exactly_so_many(cls: Any) -> None:
    weight = torch.randint(1, 4, (8, 12)).float()
    found = pruned(cls(0.4, scope="layer"), torch.randn(40, 12), weight)
    assert int((found == 0).sum()) == math.floor(0.4 * 96 + 0.5)
    assert len(set((found == 0).sum(1).tolist())) > 1


def test_wanda_keeps_what_its_definition_keeps() -> None:
    """|W_ij| · ‖X_j‖ over all rows of all batches, within every row; straight from the inputs."""
    x, weight = torch.randn(60, 12) * torch.linspace(0.1, 3, 12), torch.randn(8, 12)
    found = pruned(Wanda(0.5), x, weight)
    score = weight.abs() * x.norm(dim=0)
    for row, kept in zip(score, found != 0, strict=True):
        assert float(row[kept].min()) >= float(row[~kept].max())
    assert torch.equal(found, weight * (found != 0))
    assert not torch.equal(found, pruned(Magnitude(0.5, scope="row"), x, weight))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_squared_score_is_the_obs_cost_of_independent_inputs(seed: int) -> None:
    """S² = W² H_jj, which is w² / [H⁻¹]_jj for the diagonal of H."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(30, 6, generator=generator), torch.randn(4, 6, generator=generator)
    gram = Gram.empty(6)
    gram.add(x)
    scores = weight.abs() * gram.norm
    inverse = Inputs.of(gram.matrix.diagonal().diag(), 0.0).upper.diagonal().square()
    torch.testing.assert_close(scores.square(), weight.double().square() / inverse)
    torch.testing.assert_close(gram.norm, x.double().norm(dim=0), rtol=1e-5, atol=1e-6)


def test_with_independent_inputs_wanda_and_sparsegpt_are_one() -> None:
    """Inputs that are never there together: H is diagonal, and there is nothing to make up."""
    x = torch.diag(torch.rand(12) + 0.2).repeat(4, 1)
    weight = torch.randn(8, 12)
    a = pruned(Wanda(0.5, scope="layer"), x, weight)
    b = pruned(SparseGPT(0.5, damping=0.0), x, weight)
    assert int((a == 0).sum()) == 48
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x3", "rows"])
def test_inputs_of_equal_size_make_wanda_magnitude(pattern: str) -> None:
    signs = torch.randint(0, 2, (60, 12)) * 2.0 - 1
    weight, sparsity = torch.randn(8, 12), None if ":" in pattern else 0.5
    for scope in ("row", "layer"):
        torch.testing.assert_close(
            pruned(Wanda(sparsity, pattern=pattern, scope=scope), signs, weight),
            pruned(Magnitude(sparsity, pattern=pattern, scope=scope), signs, weight),
        )


def test_a_feature_that_is_never_there_goes_first() -> None:
    x, weight = torch.randn(60, 12), torch.randn(8, 12)
    x[:, 4] = 0
    weight[:, 4] *= 100
    found = pruned(Wanda(1 / 12), x, weight)
    assert not found[:, 4].any()
    assert torch.equal(found[:, :4], weight[:, :4])
    assert pruned(Magnitude(1 / 12), x, weight)[:, 4].all()


@pytest.mark.parametrize("cls", [Magnitude, Wanda])
@pytest.mark.parametrize("pattern", ["rows", "8x3", "columns"])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_half_of_the_units_go_whatever_the_scope(cls: Any, pattern: str, scope: str) -> None:
    """Rows were all of one unit once: then every one of them went."""
    weight = torch.randn(8, 12)
    found = pruned(cls(0.5, pattern=pattern, scope=scope), torch.randn(60, 12), weight)
    assert int((found == 0).sum()) == 48


def test_units_are_scored_by_their_norms() -> None:
    x, weight = torch.randn(60, 12) * torch.linspace(0.1, 3, 12), torch.randn(8, 12)
    for pattern in ("2x3", "4x1", "rows", "columns"):
        parsed = parse_pattern(pattern)
        for cls, score in ((Magnitude, weight.abs()), (Wanda, weight.abs() * x.norm(dim=0))):
            found = pruned(cls(0.25, pattern=pattern, scope="layer"), x, weight)
            units = parsed.units(score)
            gone = parsed.units((found == 0).float()) > 0
            assert int(gone.sum()) == math.floor(0.25 * units.numel() + 0.5)
            assert float(units[gone].max()) <= float(units[~gone].min())


def batches_of(program: Program) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (4, 16), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


@pytest.mark.parametrize("pattern", ["unstructured", "4x4"])
def test_magnitude_ranked_globally_is_one_top_k_of_the_model(
    pattern: str, captured: Captured
) -> None:
    program = captured("tiny-bert")
    step = Magnitude(0.3, pattern=pattern, allocation="global")
    compiled = gp.compile(program, [step])
    names = [s["name"] for s in compiled.report.passes[0].details["sites"]]
    parsed = parse_pattern(pattern)
    units = torch.cat([parsed.units(program.tensors[n].abs()).flatten() for n in names])
    after = torch.cat([parsed.units(compiled.program.tensors[n].abs()).flatten() for n in names])
    count = math.floor(0.3 * len(units) + 0.5)
    assert set((after == 0).nonzero().flatten().tolist()) == set(units.argsort()[:count].tolist())


def test_magnitude_with_owl_looks_at_data_only_to_share(captured: Captured) -> None:
    """What goes is the smallest of each matrix; how much differs from block to block."""
    program = captured("tiny-bert")
    name = "encoder.layer.1.output.dense.weight"
    weight = program.tensors[name].clone()
    weight[::8, ::8] *= 50
    program = program.with_tensors({name: weight})
    step = Magnitude(0.5, allocation="owl")
    assert step.needs_calibration
    compiled = gp.compile(program, [step], calibration=batches_of(program))
    sites = compiled.report.passes[0].details["sites"]
    assert len({round(s["sparsity"], 2) for s in sites}) == 2
    for site in sites:
        dense, found = program.tensors[site["name"]], compiled.program.tensors[site["name"]]
        gone = removed_mask(dense.abs(), site["sparsity"], parse_pattern("unstructured"), False)
        assert torch.equal(found, dense.masked_fill(gone, 0))
