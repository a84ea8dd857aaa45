"""Competing units: slopes, costs and removals against loops over parameters, by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphprune.axes import axis_groups
from graphprune.ir.program import Program
from graphprune.passes.training.units import (
    Ledger,
    Place,
    Sublayer,
    Units,
    find_units,
    position_sums,
)

aten = torch.ops.aten
SHAPES = {"up": (6, 3), "bias": (6,), "down": (4, 6), "out": (2, 4)}


def along(tensor: str, dim: int, *units: int) -> Place:
    return Place(tensor, dim, torch.tensor(units))


def made(name: str, size: int, places: tuple[Place, ...], **more: object) -> Units:
    options = {"role": "neuron", "heads": None, "rows": 1, "read": places, "share": 1.0}
    return Units(name, size=size, places=places, values=False, **options | more)  # type: ignore[arg-type]


def neurons() -> list[Units]:
    """Three units of two positions each between up and down; four between down and out."""
    twice = (0, 0, 1, 1, 2, 2)
    first = along("up", 0, *twice), along("bias", 0, *twice), along("down", 1, *twice)
    second = along("down", 0, 0, 1, 2, 3), along("out", 1, 0, 1, 2, 3)
    return [made("a", 3, first), made("b", 4, second)]


def program() -> Program:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return Program(tensors, frozenset(tensors), {}, {})


def lost(gone: dict[str, set[int]]) -> int:
    """Parameters in any position of a unit that is gone, each counted once."""
    count = 0
    for name, shape in SHAPES.items():
        places = [(u.id, p) for u in neurons() for p in u.places if p.tensor == name]
        for index in itertools.product(*map(range, shape)):
            count += any(int(p.units[index[p.dim]]) in gone[i] for i, p in places)
    return count


CHOICES = st.tuples(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 3)))


@settings(max_examples=30, deadline=None)
@given(CHOICES)
def test_parameters_of_several_units_count_once(chosen: tuple[set[int], set[int]]) -> None:
    ledger = Ledger(program(), neurons())
    gone = dict(zip("ab", chosen, strict=True))
    ledger.load(
        {n: torch.tensor([[u in gone[n] for u in range(k)]]) for n, k in (("a", 3), ("b", 4))}
    )
    assert ledger.removed == lost(gone)
    assert ledger.total == lost({"a": {0, 1, 2}, "b": {0, 1, 2, 3}})
    assert ledger.density == pytest.approx(1 - ledger.removed / ledger.total)
    masks = ledger.masks(program().tensors)
    assert sum(int((~m).sum()) for m in masks.values()) == ledger.removed
    expected = {n: sorted(set(range(k)) - gone[n]) for n, k in (("a", 3), ("b", 4)) if gone[n]}
    assert {name: kept.tolist() for name, kept in ledger.keep().items()} == expected


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 60), st.booleans())
def test_the_lowest_for_their_cost_go_until_one_does_not_fit(
    order: list[int], budget: int, fill: bool
) -> None:
    scores = {"a": [float(1 + o) for o in order[:3]], "b": [float(1 + o) for o in order[3:]]}
    ledger = Ledger(program(), neurons())
    ledger.remove({n: torch.tensor([s]) for n, s in scores.items()}, budget, fill=fill)
    none: dict[str, set[int]] = {"a": set(), "b": set()}
    costs = {name: lost({**none, name: {0}}) for name in scores}
    gone, closed = {"a": set[int](), "b": set[int]()}, set[str]()
    for _, name, u in sorted((s / costs[n], n, u) for n in scores for u, s in enumerate(scores[n])):
        if name in closed or len(gone[name]) == len(scores[name]) - 1:  # the last one stays
            continue
        more = {**gone, name: gone[name] | {u}}
        if lost(more) <= budget:
            gone = more
        elif fill:
            closed.add(name)
        else:
            break
    found = {n: set(g[0].nonzero().flatten().tolist()) for n, g in ledger.gone.items()}
    assert found == gone
    assert ledger.removed == lost(gone) <= max(budget, 0)


def test_all_but_the_first_may_go() -> None:
    ledger = Ledger(program(), neurons()).drain()
    assert {n: g.tolist() for n, g in ledger.gone.items()} == {
        "a": [[False, True, True]], "b": [[False, True, True, True]],
    }  # fmt: skip
    assert ledger.removed == lost({"a": {1, 2}, "b": {1, 2, 3}})


# --- prices and sublayers ------------------------------------------------------------------------


def priced(budget: float = 0.0, base: float = 5.0) -> Ledger:
    """Parameters of up and its bias cost half, and the first layer may go with 5 more."""
    layer = Sublayer("layer", frozenset({"up", "bias", "extra"}), base)
    prices = {"up": 0.5, "bias": 0.5, "down": 1.0, "out": 1.0}
    first = made("a", 3, (along("up", 0, 0, 0, 1, 1, 2, 2), along("bias", 0, 0, 0, 1, 1, 2, 2)))
    ledger = Ledger(program(), [first, neurons()[1]], prices, [layer])
    ledger.limit = budget
    return ledger


def test_prices_of_one_change_nothing() -> None:
    ones = dict.fromkeys(SHAPES, 1.0)
    for fill in (False, True):
        plain, same = Ledger(program(), neurons()), Ledger(program(), neurons(), ones)
        scores = {"a": torch.tensor([[3.0, 1, 2]]), "b": torch.tensor([[4.0, 2, 1, 9]])}
        assert plain.remove(scores, 30, fill=fill) == same.remove(scores, 30, fill=fill)
        assert plain.removed == same.removed
        assert all(torch.equal(gone, same.gone[name]) for name, gone in plain.gone.items())


def test_a_sublayer_costs_what_it_still_has() -> None:
    scores = {"a": torch.tensor([[1.0, 8, 8]]), "b": torch.full((1, 4), 1e9)}
    ledger = priced(17)
    assert ledger.total == 24 * 0.5 + 24 + 8 + 5
    # The first unit, 4 for a score of 1; then the sublayer, 8 + 5 for 16; a unit would be 4 for 8.
    assert ledger.remove(scores, 4)
    assert ledger.gone["a"].tolist() == [[True, False, False]]
    assert not ledger.remove(scores, 16.9)
    assert ledger.remove(scores, 17)
    assert ledger.dropped == ["layer"]
    assert ledger.removed == 17 == ledger.lost(SHAPES) + 5
    masks = ledger.masks({**program().tensors, "extra": torch.ones(2)})
    assert masks.keys() == {"up", "bias", "extra"}
    assert not any(mask.any() for mask in masks.values())
    # What is left of its units is nobody's to cut.
    assert ledger.keep() == {}
    assert ledger.left(ledger.units["a"]) == 0
    again = priced(17)
    again.load(ledger.gone, ledger.dropped)
    assert again.removed == ledger.removed


def test_a_sublayer_that_costs_too_much_in_the_end_is_not_waited_for() -> None:
    scores = {"a": torch.full((1, 3), 1.0), "b": torch.full((1, 4), 1e9)}
    waiting, going = priced(17, base=50), priced(62, base=50)
    assert waiting.remove(scores, 8)
    assert waiting.gone["a"].sum() == 2
    assert not going.remove(scores, 8)
    assert going.remove(scores, 62)
    assert going.dropped == ["layer"]


def test_what_must_go_goes_at_once() -> None:
    least = priced(base=20).drain()
    assert least.removed == 2 * 4 + 3 * 8
    assert least.required(32) == []
    assert least.required(33) == ["layer"]
    ledger = priced(33, base=20)
    ledger.must = ["layer"]
    scores = {"a": torch.tensor([[1.0, 2, 3]]), "b": torch.tensor([[7.0, 1, 6, 5]])}
    assert not ledger.remove(scores, 0)
    assert ledger.remove(scores, 1)
    assert ledger.dropped == ["layer"]
    assert ledger.removed == 32
    assert not ledger.gone["a"].any()


def test_the_last_one_is_the_weakest_that_is_enough() -> None:
    scores = {"a": torch.tensor([[2.0, 3, 4]]), "b": torch.tensor([[7.0, 1, 6, 5]])}
    ledger = priced(3)
    assert not ledger.remove(scores, 3, fill=True)
    assert ledger.meet(scores, 3)
    # Of "b" a unit costs 8, of "a" one costs 4: both are enough.
    assert ledger.gone["b"].tolist() == [[False, True, False, False]]
    assert not ledger.meet(scores, 3)
    assert ledger.meet(scores, 12)
    assert ledger.gone["a"].tolist() == [[True, False, False]]


def test_units_that_cost_nothing_stay() -> None:
    ledger = Ledger(program(), neurons(), {"out": 1.0})
    scores = {"a": torch.zeros(1, 3), "b": torch.ones(1, 4)}
    assert ledger.remove(scores, 100, fill=True)
    assert not ledger.gone["a"].any()
    assert ledger.gone["b"].sum() == 3


# --- dims of heads -----------------------------------------------------------------------------


def heads() -> list[Units]:
    """Two heads of three dims each, along the rows of up."""
    dims = made("d", 3, (along("up", 0, *range(6)),), role="v_dim", heads="h", rows=2)
    return [made("h", 2, (along("up", 0, 0, 0, 0, 1, 1, 1),), role="head"), dims]


def test_every_head_loses_its_own_weakest_dim_and_living_ones_come_first() -> None:
    ledger = Ledger(program(), heads())
    scores = {"h": torch.full((1, 2), 1e9), "d": torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])}
    assert ledger.remove(scores, budget=6)
    assert ledger.gone["d"].tolist() == [[True, False, False], [False, False, True]]
    assert {name: kept.tolist() for name, kept in ledger.keep().items()} == {"d": [0, 1]}
    tensors = program().tensors
    moved = ledger.arranged(tensors)["up"]
    assert torch.equal(moved, tensors["up"][[1, 2, 0, 3, 4, 5]])
    assert not ledger.remove(scores, budget=6)


def test_dims_of_a_head_that_is_gone_no_longer_count() -> None:
    ledger = Ledger(program(), heads())
    ledger.load({"h": torch.tensor([[True, False]])})
    dims = ledger.units["d"]
    assert ledger.living_rows(dims).tolist() == [1]
    assert ledger.left(dims) == 3
    assert ledger.removed == 9


# --- slopes ------------------------------------------------------------------------------------


def test_slopes_are_sums_of_gradient_times_weight() -> None:
    unit, other = neurons()
    parameters = {name: nn.Parameter(t.double()) for name, t in program().tensors.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    del parameters["out"]
    sums = position_sums([unit, other], parameters)
    assert sums.keys() == {("up", 0), ("bias", 0), ("down", 1), ("down", 0)}
    expected = torch.zeros(3, dtype=torch.float64)
    for place in unit.places:
        parameter = parameters[place.tensor]
        assert parameter.grad is not None
        product = (parameter.grad * parameter).detach().movedim(place.dim, 0).reshape(6, -1)
        for position, number in enumerate(place.units.tolist()):
            expected[number] += product[position].sum()
    torch.testing.assert_close(unit.slopes(sums), expected[None])


def test_positions_of_no_unit_go_nowhere() -> None:
    place = along("bias", 0, 1, -1, 0, -1)
    unit = made("a", 2, (place,), share=0.5)
    assert unit.slopes({("bias", 0): torch.tensor([1.0, 9.0, 4.0, 9.0]).double()}).tolist() == [
        [2, 0.5]
    ]
    assert place.marked(torch.tensor([True, False])).tolist() == [False, False, True, False]


def test_units_of_a_graph_are_found_with_all_that_goes_with_them(
    program_of: Callable[..., Program],
) -> None:
    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        def linear(x: fx.Node, *names: str) -> fx.Node:
            return graph.call_function(aten.linear.default, (x, *map(node.__getitem__, names)))

        up = linear(node["x"], "up", "bias")
        hidden = graph.call_function(aten.relu.default, (up,))
        return (linear(hidden, "down"),)

    tensors: dict[str, Tensor] = {n: torch.randn(SHAPES[n]) for n in ("up", "bias", "down")}
    groups = axis_groups(program_of(tensors, {"x": torch.randn(5, 3)}, write))
    (group,) = groups.with_role("neuron")
    found = find_units(groups, group)
    assert isinstance(found, Units)
    assert {(p.tensor, p.dim) for p in found.places} == {("up", 0), ("bias", 0), ("down", 1)}
    assert [(p.tensor, p.dim) for p in found.read] == [("down", 1)]
    (last,) = [g for g in groups if g.size == 4]
    assert isinstance(find_units(groups, last), str)
