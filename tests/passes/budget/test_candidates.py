"""Candidates at the old shapes are the models that are built of the same levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from graphprune.axes import axis_groups
from graphprune.axes.branches import Branch, branches
from graphprune.axes.sites import linear_sites
from graphprune.calibration.gram import Remarks
from graphprune.ir.program import Program
from graphprune.passes.budget.blocks import Blocks, block_sites, thinned_out
from graphprune.passes.budget.candidates import (
    Candidates,
    errors_and_sensitivities,
    level_errors,
    statistics,
)
from graphprune.passes.budget.items import ZEROS, find_items
from graphprune.passes.budget.sized import ROLES
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_count
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.statistics import in_execution_order
from graphprune.pipeline.base import Context
from graphprune.rewrite.drop import drop
from graphprune.rewrite.shrink import shrink
from tests.passes.budget.test_budget import batches

Captured = Callable[[str], Program]


PATTERN = parse_pattern("8x4")  # no kernel's, but these models are small


def candidates(program: Program, *, sparse: bool = False) -> Candidates:
    groups, found = axis_groups(program), branches(program)
    usable = [g for g in groups.with_role(*ROLES) if not g.frozen and not g.normalized]
    ids = [branch.id for branch in found]
    sites = {branch.id: block_sites(groups, branch.tensors, PATTERN) for branch in found}
    names = {name: [site.tensor for site in some] for name, some in sites.items()}
    items = find_items(
        groups, usable, found, droppable=ids, round_to=16, sparse=names if sparse else {}
    )
    data = batches(program)
    blocks = None
    if sparse:
        blocks = Blocks.collect(program, data, sites, PATTERN, 0.01)
    order = in_execution_order(groups, [g for item in items for g in item.groups])
    seen = statistics(program, groups, order, Context(calibration=data), 0.01, Remarks())
    return Candidates(program, groups, items, seen, data, blocks)


def smaller_model(program: Program, found: Candidates, levels: Sequence[int]) -> Program:
    """The model of these levels, with the weights that the candidate at the old shapes has."""
    masked = found.at(levels)
    gone, keep = [], {}
    for item, j in zip(found.items, levels, strict=True):
        level = item.levels[j]
        if level is None:
            assert item.branch is not None
            gone.append(item.branch)
            continue
        for group, kept in zip(item.groups, level.units, strict=True):
            order = torch.tensor(found.seen[group.id].order, dtype=torch.int64)
            if kept < group.size:
                keep[group.id] = others(group.size, order[: group.size - kept])
    plain = program.with_tensors({n: masked.tensors[n] for n in program.tensors})
    return shrink(drop(plain, gone) if gone else plain, keep)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama", "tiny-vit", "tiny-cnn", "tiny-mlp"])
def test_units_and_branches_that_are_gone_make_no_difference_to_the_shrunk_model(
    captured: Captured, name: str
) -> None:
    program = captured(name)
    found = candidates(program)
    levels = [i % len(item.levels) for i, item in enumerate(found.items)]
    masked = found.at(levels)
    smaller = smaller_model(program, found, levels)
    assert smaller.num_parameters() < program.num_parameters()
    for batch in batches(program, 2):
        flat = program.forward.flatten((), batch)
        for ours, theirs in zip(smaller.run(flat), masked.run(flat), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "narrow"), [("tiny-bert", True), ("tiny-llama", True), ("tiny-mlp", False)]
)
def test_narrower_weights_compute_the_same(captured: Captured, name: str, narrow: bool) -> None:
    """Neurons between two products may go from tensors alone; heads are in the sizes of views."""
    program = captured(name)
    found = candidates(program)
    levels = [1 for _ in found.items]
    wide, thin = (found.at(levels, narrow=n) for n in (False, True))
    assert (sum(t.numel() for t in thin.tensors.values()) < wide.num_parameters()) == narrow
    for batch in batches(program, 2):
        flat = program.forward.flatten((), batch)
        for a, b in zip(wide.run(flat), thin.run(flat), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_groups_of_one_tensor_are_both_cut(captured: Captured) -> None:
    found = candidates(captured("tiny-mlp"))
    levels = [0 for _ in found.items]
    both = found.at(levels)
    for i, item in enumerate(found.items):
        alone = [0 if i == k else other.dense for k, other in enumerate(found.items)]
        cut = found.at(alone)
        for name in item.groups[0].tensors:
            zero = (cut.tensors[name] == 0) & (found.program.tensors[name] != 0)
            assert bool((both.tensors[name][zero] == 0).all())


def test_the_dense_candidate_loses_nothing_and_others_do(captured: Captured) -> None:
    found = candidates(captured("tiny-bert"))
    dense = [item.dense for item in found.items]
    assert found.loss(dense) == pytest.approx(0, abs=1e-6)
    assert found.loss([0] * len(dense)) > 1e-3
    assert found.difference(captured("tiny-bert")) == pytest.approx(0, abs=1e-6)


def test_errors_rise_as_units_go(captured: Captured) -> None:
    found = candidates(captured("tiny-bert"))
    for item in found.items:
        errors = level_errors(item, found.seen, {})
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == 1
        assert errors[-1] == 0


def zero_blocks(program: Program, branch: Branch) -> list[float]:
    """The fraction of zero blocks of each product in a branch."""
    found = []
    for site in block_sites(axis_groups(program), branch.tensors, PATTERN):
        alive = PATTERN.units(site.matrix(program).abs()) > 0
        found.append(1 - float(alive.double().mean()))
    return found


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-vit"])
def test_blocks_are_zero_in_what_stays(captured: Captured, name: str) -> None:
    """Heads and neurons that go leave a smaller matrix, whose blocks are others."""
    program = captured(name)
    found = candidates(program, sparse=True)
    levels = [
        next(j for j, level in enumerate(item.levels) if level is not None and level.zeros == 0.5)
        for item in found.items
    ]
    smaller = smaller_model(program, found, levels)
    assert smaller.num_parameters() < program.num_parameters()
    wide, thin = (found.at(levels, narrow=narrow) for narrow in (False, True))
    for batch in batches(program, 2):
        flat = program.forward.flatten((), batch)
        both = zip(smaller.run(flat), wide.run(flat), thin.run(flat), strict=True)
        for ours, masked, narrow in both:
            torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours, narrow, rtol=1e-4, atol=1e-5)
    for item in found.items:
        assert item.branch is not None
        sites = block_sites(axis_groups(smaller), item.branch.tensors, PATTERN)
        assert sites
        for site, zeros in zip(sites, zero_blocks(smaller, item.branch), strict=True):
            units = torch.Size(PATTERN.shape(*site.matrix(smaller).shape)).numel()
            assert zeros == pytest.approx(removed_count(0.5, units) / units)


def test_blocks_cost_the_error_that_costs_the_loss(captured: Captured) -> None:
    """By it zero blocks and removed units compare: an item's loss over its sensitivity."""
    program = captured("tiny-bert")
    found = candidates(program, sparse=True)
    errors, sensitivities = errors_and_sensitivities(found, Context())
    plain, same = errors_and_sensitivities(candidates(program), Context())
    assert sensitivities == pytest.approx(same)
    dense = [item.dense for item in found.items]
    for i, item in enumerate(found.items):
        assert [errors[i][j] for j in item.whole] == pytest.approx(plain[i][1:])
        rates = []
        for j, level in enumerate(item.levels):
            if level is not None and level.zeros and level.units == (item.groups[0].size,):
                loss = found.loss([*dense[:i], j, *dense[i + 1 :]])
                assert 0 < errors[i][j] < 1
                rates.append(loss / errors[i][j])
        assert rates == pytest.approx([rates[0]] * len(ZEROS))
        assert rates[0] / sensitivities[i] == pytest.approx(_scale(found, errors, sensitivities))


def _scale(found: Candidates, errors: Sequence[Sequence[float]], g: Sequence[float]) -> float:
    """Loss over error and sensitivity, of the first item in the middle of what it has."""
    dense = [item.dense for item in found.items]
    item = found.items[0]
    levels = [0, *item.whole]
    middle = levels[(len(levels) - 1) // 2]
    return found.loss([middle, *dense[1:]]) / errors[0][middle] / g[0]


def test_any_blocks_do_for_the_time(captured: Captured) -> None:
    program = captured("tiny-bert")
    first, second, *_ = branches(program)
    thin = thinned_out(program, PATTERN, dict.fromkeys(first.tensors, 0.7))
    units = torch.Size(PATTERN.shape(32, 32)).numel()
    part = removed_count(0.7, units) / units
    assert zero_blocks(thin, first) == pytest.approx([part] * 4)
    assert zero_blocks(thin, second) == [0, 0]
    assert thinned_out(program, PATTERN, {}) is program


def test_products_that_no_kernel_takes_have_no_blocks(captured: Captured) -> None:
    """Convolutions, and weights that are used twice (here: by all layers)."""
    for name in ("tiny-cnn", "tiny-albert"):
        program = captured(name)
        groups = axis_groups(program)
        uses = Counter(site.tensor for site in linear_sites(groups))
        unfit = {n for n, count in uses.items() if count > 1 or program.tensors[n].dim() > 2}
        assert unfit
        found = {site.tensor for site in block_sites(groups, uses, PATTERN)}
        assert found
        assert not found & unfit
