"""Allocation: what OWL's formulas promise, and one ranking of all matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphprune as gp
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes import SparseGPT, Wanda
from graphprune.passes.sparsity.allocation import (
    blocks_of,
    check_allocation,
    global_sparsities,
    outlier_ratio,
    owl_offsets,
    within_bounds,
)
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_mask

Captured = Callable[[str], Program]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.floats(0.01, 2),
)
def test_owl_keeps_the_density_and_its_range(
    blocks: list[tuple[float, int]], spread: float
) -> None:
    """The offsets weighted by size are zero; they differ by 2 · spread; more outliers, denser."""
    ratios = {str(i): ratio for i, (ratio, _) in enumerate(blocks)}
    sizes = {str(i): size for i, (_, size) in enumerate(blocks)}
    offsets = owl_offsets(ratios, sizes, spread)
    total = sum(sizes.values())
    assert sum(offsets[b] * sizes[b] for b in offsets) / total == pytest.approx(0, abs=1e-9)
    widest = 0 if len(set(ratios.values())) == 1 else 2 * spread
    assert max(offsets.values()) - min(offsets.values()) == pytest.approx(widest)
    for a in offsets:
        for b in offsets:
            assert ratios[a] <= ratios[b] or offsets[a] >= offsets[b]


def test_owl_by_hand() -> None:
    """d = 2λ(D - min)/(max - min) = 0, 0.08, 0.16; its mean by size is 0.1."""
    offsets = owl_offsets({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 1, "c": 2}, 0.08)
    assert offsets == pytest.approx({"a": -0.1, "b": -0.02, "c": 0.06})
    assert owl_offsets({"a": 4.0, "b": 4.0}, {"a": 1, "b": 2}, 0.08) == {"a": 0.0, "b": 0.0}


def test_outliers_are_above_a_multiple_of_the_mean_of_all() -> None:
    """The mean is of the whole block: 19 of 1 and a 31 give 2.5, so 31 alone is above five."""
    scores = [torch.ones(3, 3), torch.cat([torch.ones(10), torch.tensor([31.0])])]
    assert outlier_ratio(scores, 5.0) == pytest.approx(100 / 20)
    assert outlier_ratio(scores, 31 / 2.5) == 0  # above, not equal
    assert outlier_ratio([torch.zeros(4)], 5.0) == 0


@pytest.mark.parametrize("prefix", ["", "0.auto_model.", "model.0."])
def test_a_block_is_named_up_to_the_number_that_counts(prefix: str) -> None:
    """Not a container's that all have, nor an inner one's."""
    names = [f"{prefix}layers.{i}.mlp.{j}.weight" for i in (0, 3, 11) for j in (0, 2)]
    others = [f"{prefix}pooler.dense.weight", f"{prefix}fc1.weight"]
    found = blocks_of([*names, *others])
    assert found == {
        **{name: name.partition(".mlp")[0] for name in names},
        **{name: name for name in others},
    }


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.floats(0.001, 0.999),
)
def test_clamped_parts_keep_their_mean(found: list[tuple[float, int]], mean: float) -> None:
    parts = {str(i): part for i, (part, _) in enumerate(found)}
    sizes = {str(i): size for i, (_, size) in enumerate(found)}
    result = within_bounds(parts, sizes, mean)
    total = sum(sizes.values())
    assert sum(result[n] * sizes[n] for n in result) / total == pytest.approx(mean, abs=1e-6)
    assert all(min(0.01, mean) <= part <= max(0.99, mean) for part in result.values())
    order = sorted(parts, key=lambda n: parts[n])
    assert [result[n] for n in order] == sorted(result.values())


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.sampled_from([1, 2, 5, 10**6]),
)
def test_a_global_ranking_is_one_top_k_over_all(
    seed: int, shapes: list[tuple[int, int]], sparsity: float, distinct: int
) -> None:
    """Exactly so many in total, ties or not, and none stays that is below one that goes."""
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {
        str(i): torch.randint(0, distinct, shape, generator=generator).float()
        for i, shape in enumerate(shapes)
    }
    parts = global_sparsities(scores, sparsity)
    single = parse_pattern("unstructured")
    gone = {n: removed_mask(s, parts[n], single, False) for n, s in scores.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = torch.cat([m.flatten() for m in gone.values()])
    assert int(mask.sum()) == min(int(sparsity * len(flat) + 0.5), len(flat) - len(scores))
    # The best of each matrix is not for the taking.
    free = torch.cat([s.flatten().sort().values[:-1] for s in scores.values()])
    lowest = free.sort().values[: int(mask.sum())]
    assert torch.equal(flat[mask].sort().values, lowest)


def test_unknown_allocations_are_named() -> None:
    with pytest.raises(RecipeError, match="there is no allocation 'owls'; did you mean 'owl'"):
        check_allocation("owls")


def batches_of(program: Program) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (4, 16), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def sites_of(compiled: Any) -> dict[str, Any]:
    return {s["name"]: s for s in compiled.report.passes[0].details["sites"]}


def with_outliers(program: Program) -> Program:
    """Layer 1's feed-forward has a few large weights, layer 0's has none."""
    changed = {}
    for name in ("intermediate.dense.weight", "output.dense.weight"):
        whole = f"encoder.layer.1.{name}"
        weight = program.tensors[whole].clone()
        weight[::8, ::8] *= 50
        changed[whole] = weight
    return program.with_tensors(changed)


def test_owl_gives_a_block_one_sparsity_and_spares_the_one_with_outliers(
    captured: Captured,
) -> None:
    program = with_outliers(captured("tiny-bert"))
    step = SparseGPT(0.5, allocation="owl", ignore=("pooler",))
    compiled = gp.compile(program, [step], calibration=batches_of(program))
    found = sites_of(compiled)
    layers = [
        {round(s["sparsity"], 2) for n, s in found.items() if f"layer.{i}." in n} for i in (0, 1)
    ]
    # Two equal blocks: half of 2 · 0.08 either way.
    assert layers == [{0.58}, {0.42}]
    assert compiled.report.passes[0].details["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_owl_moves_weights_of_every_m(captured: Captured) -> None:
    program = with_outliers(captured("tiny-bert"))
    step = SparseGPT(pattern="4:8", allocation="owl", owl_spread=2.0, ignore=("pooler",))
    compiled = gp.compile(program, [step], calibration=batches_of(program))
    found = sites_of(compiled)
    assert {s["pattern"] for n, s in found.items() if "layer.0." in n} == {"3:8"}
    assert {s["pattern"] for n, s in found.items() if "layer.1." in n} == {"5:8"}
    for name, site in found.items():
        kept = (compiled.program.tensors[name].reshape(-1, 8) != 0).sum(1)
        assert set(kept.tolist()) == {int(site["pattern"][0])}


def test_ranked_globally_matrices_differ_and_the_total_is_exact(captured: Captured) -> None:
    program = captured("tiny-bert")
    batches = batches_of(program)
    step = Wanda(0.5, scope="layer", allocation="global")
    compiled = gp.compile(program, [step], calibration=batches)
    found = sites_of(compiled)
    total = sum(program.tensors[n].numel() for n in found)
    zeros = sum(int((compiled.program.tensors[n] == 0).sum()) for n in found)
    assert zeros == total // 2
    assert len({s["sparsity"] for s in found.values()}) > 3
