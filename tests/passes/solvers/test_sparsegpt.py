"""SparseGPT's solver: the identities of its algebra, plain references, and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.passes.solvers.obs import loss, refit
from graphprune.passes.solvers.sparsegpt import BLOCK, Inputs, output_error, sparsegpt
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_mask

UNSTRUCTURED = parse_pattern("unstructured")
seeds = st.integers(0, 10_000)


def case(seed: int, rows: int, columns: int, samples: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or 3 * columns + 2, columns, generator=generator, dtype=torch.float64)
    x = x @ (mix + 2 * torch.eye(columns))
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x


def random_mask(seed: int, rows: int, columns: int, part: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(rows, columns, generator=generator) < part


def errors_of(old: Tensor, new: Tensor, inputs: Inputs) -> Tensor:
    """The e of every removed weight, from the result alone: W - Ŵ = E U."""
    return torch.linalg.solve_triangular(inputs.upper, old - new, upper=True, left=False)


def reference(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    keep: int = 0,
    of: int = 0,
    block: int = 128,
    mask: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The pseudo-code of the paper, column by column, with every trailing inverse explicit.

    Returns the weight and the sum over removed weights of w² / [inverse]_jj.
    """
    w = weight.clone()
    rows, columns = w.shape
    gone = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask.clone()
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(columns)]
    costs, done = 0.0, 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if mask is None and not of:
            score = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(start, stop)], 1)
            count = min(math.floor(sparsity * rows * stop + 0.5), rows * stop - 1) - done
            done += count
            order = sorted(
                itertools.product(range(rows), range(stop - start)),
                key=lambda rc, score=score: float(score[rc]),  # type: ignore[misc]
            )
            for r, c in order[:count]:
                gone[r, start + c] = True
        for j in range(start, stop):
            if mask is None and of and j % of == 0:
                for r in range(rows):
                    by_cost = sorted(
                        range(j, j + of),
                        key=lambda c, r=r: float(w[r, c] ** 2 / inverses[c][0, 0]),  # type: ignore[misc]
                    )
                    for c in by_cost[: of - keep]:
                        gone[r, c] = True
            for r in range(rows):
                if gone[r, j]:
                    costs += float(w[r, j] ** 2 / inverses[j][0, 0])
                    w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][0]
                    w[r, j] = 0
    return w, costs


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 12))
def test_the_factor_holds_every_trailing_inverse(seed: int, columns: int) -> None:
    """U[j, j:] · U[j, j] is the first row of the inverse of H[j:, j:]."""
    _, gram = case(seed, 1, columns)
    inputs = Inputs.of(gram, 0.01)
    upper = inputs.upper
    assert torch.equal(upper, upper.triu())
    for j in range(columns):
        expected = torch.linalg.inv(inputs.gram[j:, j:])[0]
        torch.testing.assert_close(upper[j, j:] * upper[j, j], expected, rtol=1e-7, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 12), st.floats(0, 0.95))
def test_the_sum_of_squared_errors_is_the_loss(
    seed: int, rows: int, columns: int, sparsity: float
) -> None:
    """Σe² = tr(ΔW H ΔWᵀ), and only removed weights have an error."""
    weight, gram = case(seed, rows, columns)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, sparsity, UNSTRUCTURED)
    errors = errors_of(weight, pruned, inputs)
    scale = float(weight.abs().max())
    assert errors[pruned != 0].abs().sum() <= 1e-9 * scale * inputs.upper.diagonal().max() ** -1
    squared = float(errors[pruned == 0].square().sum())
    assert squared == pytest.approx(loss(weight, pruned, inputs.gram), rel=1e-8, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 10), st.floats(0, 0.95), st.sampled_from([3, 128]))
def test_single_weights_are_those_of_the_plain_algorithm(
    seed: int, rows: int, columns: int, sparsity: float, block: int
) -> None:
    weight, gram = case(seed, rows, columns)
    inputs = Inputs.of(gram, 0.01)
    expected, costs = reference(weight, inputs.gram, sparsity, block=block)
    pruned = sparsegpt(weight, inputs, sparsity, UNSTRUCTURED, block=block)
    assert torch.equal(pruned == 0, expected == 0)
    assert int((pruned == 0).sum()) == min(
        math.floor(sparsity * rows * columns + 0.5), rows * columns - 1
    )
    torch.testing.assert_close(pruned, expected, rtol=1e-6, atol=1e-8)
    assert costs == pytest.approx(loss(weight, pruned, inputs.gram), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("block", [3, 8, 128])
def test_n_of_m_are_chosen_among_the_weights_as_updated(keep: int, of: int, block: int) -> None:
    weight, gram = case(keep * 10 + of, 6, 16)
    inputs = Inputs.of(gram, 0.01)
    expected, _ = reference(weight, inputs.gram, 0.0, keep, of)
    pruned = sparsegpt(weight, inputs, 0.0, parse_pattern(f"{keep}:{of}"), block=block)
    torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal((pruned != 0).reshape(-1, of).sum(1), torch.full((6 * 16 // of,), keep))
    # The case can tell: the weights as they were would have given another mask.
    before = (weight / inputs.upper.diagonal()).square()
    assert not torch.equal(
        pruned == 0, removed_mask(before, 0.0, parse_pattern(f"{keep}:{of}"), False)
    )


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_the_size_of_a_step_changes_nothing_under_a_given_mask(
    seed: int, one: int, other: int
) -> None:
    weight, gram = case(seed, 4, 17)
    inputs, mask = Inputs.of(gram, 0.01), random_mask(seed, 4, 17)
    a, b = (
        sparsegpt(weight, inputs, 0.0, UNSTRUCTURED, mask=mask, block=block)
        for block in (one, other)
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(a, reference(weight, inputs.gram, 0.0, mask=mask)[0])
    assert torch.equal(a == 0, mask)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 7))
def test_a_removed_prefix_gives_least_squares_on_the_rest(seed: int, count: int) -> None:
    weight, gram = case(seed, 4, 8)
    inputs = Inputs.of(gram, 0.01)
    mask = (torch.arange(8) < count).expand(4, 8)
    pruned = sparsegpt(weight, inputs, 0.0, UNSTRUCTURED, mask=mask)
    torch.testing.assert_close(
        pruned, refit(weight, inputs.gram, torch.arange(count, 8)), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x4"])
def test_independent_inputs_need_no_update(pattern: str) -> None:
    """With a diagonal H what is kept stays, and the loss is the sum of |w|² ‖x‖² (Wanda)."""
    weight, _ = case(0, 6, 16)
    norms = torch.rand(16, dtype=torch.float64) + 0.1
    inputs = Inputs.of(norms.square().diag(), 0.0)
    pruned = sparsegpt(weight, inputs, 0.5, parse_pattern(pattern))
    scores = (weight.abs() * norms).square()
    gone = removed_mask(scores, 0.5, parse_pattern(pattern), False)
    torch.testing.assert_close(pruned, weight.masked_fill(gone, 0))
    assert loss(weight, pruned, inputs.gram) == pytest.approx(float(scores[gone].sum()))


def exact(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """The best weights under a mask: least squares row by row."""
    rows = [
        refit(row[None], gram, (~gone).nonzero().flatten())
        for row, gone in zip(weight, mask, strict=True)
    ]
    return torch.cat(rows)


def test_between_the_exact_update_and_none() -> None:
    """exact ≤ SparseGPT for every mask; SparseGPT beats leaving the others alone on average."""
    ours, none = [], []
    for seed in range(12):
        weight, gram = case(seed, 5, 12)
        inputs, mask = Inputs.of(gram, 0.01), random_mask(seed, 5, 12)
        best = loss(weight, exact(weight, inputs.gram, mask), inputs.gram)
        pruned = sparsegpt(weight, inputs, 0.0, UNSTRUCTURED, mask=mask)
        mine = loss(weight, pruned, inputs.gram)
        assert best <= mine * (1 + 1e-9)
        ours.append(mine / best)
        none.append(loss(weight, weight.masked_fill(mask, 0), inputs.gram) / best)
    assert sum(ours) < 0.8 * sum(none)


def test_one_column_at_a_time_is_magnitude_in_each_column() -> None:
    """Within one column every weight is divided by the same number."""
    weight, gram = case(5, 8, 6)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, 0.5, UNSTRUCTURED, block=1)
    assert (pruned == 0).sum(0).tolist() == [4] * 6
    torch.testing.assert_close(
        weight[:, 0].abs().argsort()[:4].sort().values, (pruned[:, 0] == 0).nonzero().flatten()
    )
    for j in range(6):  # by the weights as they were when their turn came
        at_turn = weight - errors_of(weight, pruned, inputs)[:, :j] @ inputs.upper[:j]
        assert at_turn[pruned[:, j] == 0, j].abs().max() <= pruned[pruned[:, j] != 0, j].abs().min()


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 5))
def test_one_weight_of_a_row_costs_what_brute_force_says(seed: int, column: int) -> None:
    """With all columns before it removed too, or none to the left: the exact OBS removal."""
    weight, gram = case(seed, 1, 6)
    inputs = Inputs.of(gram, 0.01)
    trailing = inputs.gram[column:, column:]
    w = weight[:, column:]
    left = torch.arange(1, 6 - column)
    brute = loss(w, refit(w, trailing, left), trailing)
    assert float((w[0, 0] / inputs.upper[column, column]) ** 2) == pytest.approx(brute, rel=1e-8)


def test_the_weight_that_goes_first_is_the_best_by_brute_force() -> None:
    """One of a row of few: where only weights to the right may make up, none is cheaper."""
    for seed in range(10):
        weight, gram = case(seed, 1, 5)
        inputs = Inputs.of(gram, 0.01)
        pruned = sparsegpt(weight, inputs, 0.2, UNSTRUCTURED)
        costs = []
        for column in range(5):
            # Frozen before `column`, free after it.
            w, h = weight[:, column:], inputs.gram[column:, column:]
            costs.append(loss(w, refit(w, h, torch.arange(1, 5 - column)), h))
        assert (pruned == 0)[0].nonzero().flatten().tolist() == [
            min(range(5), key=costs.__getitem__)
        ]
        assert loss(weight, pruned, inputs.gram) == pytest.approx(min(costs))


@pytest.mark.parametrize("pattern", ["1x2", "2x2", "4x3", "1x4", "4x1", "3x5"])
def test_a_block_is_scored_by_what_removing_all_of_it_costs(pattern: str) -> None:
    """The cheapest block by exact least squares on the columns from it on, rows together."""
    height, width = map(int, pattern.split("x"))
    for seed in range(6):
        weight, gram = case(seed, 4, 12)
        inputs = Inputs.of(gram, 0.01)
        costs = {}
        for r, c in itertools.product(range(0, 4, height), range(0, 12, width)):
            w, h = weight[r : r + height, c:], inputs.gram[c:, c:]
            costs[r, c] = loss(w, refit(w, h, torch.arange(min(width, 12 - c), 12 - c)), h)
        r, c = min(costs, key=costs.__getitem__)
        pruned = sparsegpt(weight, inputs, 1 / len(costs), parse_pattern(pattern))
        expected = torch.zeros(4, 12, dtype=torch.bool)
        expected[r : r + height, c : c + width] = True
        assert torch.equal(pruned == 0, expected)
        assert loss(weight, pruned, inputs.gram) == pytest.approx(costs[r, c], rel=1e-7)


@pytest.mark.parametrize("block", [2, 4, 6, 128])
def test_blocks_are_exact_in_number_whatever_the_step(block: int) -> None:
    weight, gram = case(1, 6, 24)
    pruned = sparsegpt(weight, Inputs.of(gram, 0.01), 0.4, parse_pattern("2x3"), block=block)
    blocks = (pruned == 0).reshape(3, 2, 8, 3).transpose(1, 2).reshape(24, 6)
    assert torch.equal(blocks.all(1), blocks.any(1))
    assert int(blocks.all(1).sum()) == math.floor(0.4 * 24 + 0.5)


def test_wider_than_one_step() -> None:
    """Rounding does not add up over steps, and the rest of the columns is updated."""
    columns = BLOCK + 37
    weight, gram = case(2, 3, columns)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, 0.31, UNSTRUCTURED)
    assert int((pruned == 0).sum()) == math.floor(0.31 * 3 * columns + 0.5)
    again = sparsegpt(weight, inputs, 0.0, UNSTRUCTURED, mask=pruned == 0, block=7)
    torch.testing.assert_close(pruned, again, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_is_updated_beyond_its_first_step(rows: int) -> None:
    """A transposed row is contiguous as it is: worked on in place, it had no errors to pass on."""
    weight, gram = case(3, rows, 9)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, 0.4, UNSTRUCTURED, block=3)
    torch.testing.assert_close(pruned, reference(weight, inputs.gram, 0.4, block=3)[0])


def test_columns_are_structured_obs() -> None:
    """What stays is the joint least-squares solution, and no better subset is far."""
    weight, gram = case(4, 5, 7)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, 3 / 7, parse_pattern("columns"))
    gone = (pruned == 0).all(0)
    assert int(gone.sum()) == 3
    stay = (~gone).nonzero().flatten()
    torch.testing.assert_close(pruned, refit(weight, inputs.gram, stay), rtol=1e-8, atol=1e-9)
    subsets = [
        loss(weight, refit(weight, inputs.gram, torch.tensor(s)), inputs.gram)
        for s in itertools.combinations(range(7), 4)
    ]
    assert loss(weight, pruned, inputs.gram) <= sorted(subsets)[3]
    one = sparsegpt(weight, inputs, 1 / 7, parse_pattern("columns"))
    singles = [
        loss(
            weight,
            refit(weight, inputs.gram, torch.tensor([c for c in range(7) if c != g])),
            inputs.gram,
        )
        for g in range(7)
    ]
    assert (one == 0).all(0).nonzero().flatten().tolist() == [
        min(range(7), key=singles.__getitem__)
    ]


def test_rows_go_by_the_energy_of_their_outputs_and_the_others_stay() -> None:
    weight, gram = case(6, 6, 4)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt(weight, inputs, 0.5, parse_pattern("rows"))
    energy = torch.tensor([loss(row[None], 0 * row[None], inputs.gram) for row in weight])
    gone = energy.argsort()[:3]
    expected = weight.clone()
    expected[gone] = 0
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2", "columns", "rows"])
def test_dead_features_lose_their_weights(pattern: str) -> None:
    weight, _ = case(7, 4, 8)
    x = torch.randn(30, 8, dtype=torch.float64)
    x[:, [2, 5]] = 0
    inputs = Inputs.of(x.T @ x, 0.01)
    assert inputs.dead.nonzero().flatten().tolist() == [2, 5]
    pruned = sparsegpt(weight, inputs, 0.5, parse_pattern(pattern))
    assert not pruned[:, [2, 5]].any()
    assert pruned.isfinite().all()
    # They cost nothing, so they count as the first to go: half of the matrix is gone, no more.
    if pattern == "unstructured":
        assert int((pruned == 0).sum()) == 16
    if pattern == "columns":
        assert int((pruned == 0).all(0).sum()) == 4


def test_a_weight_is_not_written_to() -> None:
    weight, gram = case(8, 4, 8)
    gram[3] = gram[:, 3] = 0
    before, gram_before = weight.clone(), gram.clone()
    for pattern in ("unstructured", "2:4", "2x2", "columns", "rows"):
        sparsegpt(weight, Inputs.of(gram, 0.01), 0.5, parse_pattern(pattern))
    assert torch.equal(weight, before)
    assert torch.equal(gram, gram_before)


def test_inputs_that_do_not_span_get_more_damping() -> None:
    weight, _ = case(9, 4, 8)
    x = torch.randn(3, 8, dtype=torch.float64)
    inputs = Inputs.of(x.T @ x, 0.0)
    assert inputs.damping > 0
    pruned = sparsegpt(weight, inputs, 0.5, UNSTRUCTURED)
    assert pruned.isfinite().all()
    assert int((pruned == 0).sum()) == 16
    assert loss(weight, pruned, x.T @ x) < loss(weight, 0 * weight, x.T @ x)
    assert Inputs.of(x.T @ x, 0.01).damping == 0.01


def test_inputs_that_were_never_anything_but_zero() -> None:
    inputs = Inputs.of(torch.zeros(5, 5), 0.0)
    assert bool(inputs.dead.all())
    torch.testing.assert_close(inputs.upper, torch.eye(5, dtype=torch.float64))
    for pattern in ("unstructured", "columns", "rows"):
        weight = torch.randn(2, 5)
        assert not sparsegpt(weight, inputs, 0.5, parse_pattern(pattern)).any()


def test_a_matrix_that_rounding_made_indefinite_is_clamped() -> None:
    """Only when its own size on the diagonal does not help."""
    gram = torch.ones(4, 4, dtype=torch.float64) * 5 - 4 * torch.eye(4)
    gram[0, 1] = gram[1, 0] = -9.0  # an eigenvalue of about -10 beside a diagonal of 1
    inputs = Inputs.of(gram, 0.01)
    assert torch.linalg.eigvalsh(inputs.gram).min() > 0
    torch.testing.assert_close(
        inputs.upper.T @ inputs.upper @ inputs.gram,
        torch.eye(4, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )
    weight = torch.randn(3, 4)
    assert sparsegpt(weight, inputs, 0.5, UNSTRUCTURED).isfinite().all()


def test_the_relative_error_is_that_of_the_outputs() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    a, b = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = (x @ (a - b).T).square().sum() / (x @ a.T).square().sum()
    assert output_error(a, b, x.T @ x) == pytest.approx(float(expected))
    assert output_error(a, a, x.T @ x) == 0
    assert output_error(0 * a, 0 * a, x.T @ x) == 0
