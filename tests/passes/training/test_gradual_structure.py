"""GradualStructure: slopes are gates' derivatives, costs are parameters, cutting is masking."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.sites import consumers
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.history import kept_indices
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import GradualStructure, PruneNeurons, Quantize
from graphprune.passes.training.gradual_structure import TRAINED_ROLES, _State
from graphprune.passes.training.schedule import scheduled
from graphprune.passes.training.units import DIMS, Ledger, Units, find_units, position_sums
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.rewrite.mask import MASK, mask
from graphprune.rewrite.shrink import shrink
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training

Captured = Callable[[str], Program]
MODELS = ("tiny-encoder", "tiny-gpt2", "tiny-llama")


def _float64(program: Program) -> Program:
    return program.cast(torch.float32, torch.float64)


def _units(program: Program, *roles: str) -> list[Units]:
    groups = axis_groups(program)
    found = [find_units(groups, group) for group in groups.with_role(*(roles or TRAINED_ROLES))]
    assert all(isinstance(unit, Units) for unit in found)
    return [unit for unit in found if isinstance(unit, Units)]


def _loss(module: nn.Module, program: Program, gates: dict[str, Tensor] | None = None) -> Tensor:
    outputs = torch.func.functional_call(module, gates or {}, tuple(program.forward.example))
    logits = outputs[0]
    drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    return (logits * drawn).mean()


def _slopes(program: Program, units: list[Units]) -> dict[str, Tensor]:
    """Σ g·w of all units for the loss above."""
    module = graph_module(program)
    _loss(module, program).backward()
    sums = position_sums(units, dict(module.named_parameters(remove_duplicate=False)))
    return {unit.id: unit.slopes(sums) for unit in units}


# --- scores --------------------------------------------------------------------------------------


def _gated(program: Program, unit: Units) -> tuple[Program, dict[str, Tensor]]:
    """The program with a factor at every position where a unit is summed over: all ones."""
    size = axis_groups(program)[unit.id].size
    gated = mask(program, {unit.id: list(range(1, size))})
    for node in gated.forward.graph.nodes:
        if node.op == "call_function" and node.name.startswith(MASK):
            node.target, node.args = torch.ops.aten.mul.Tensor, node.args[:2]
    gates = {
        n: torch.ones_like(t, dtype=torch.float64)
        for n, t in gated.tensors.items()
        if n.startswith(MASK)
    }
    return gated.with_tensors(gates), gates


def _labels(program: Program, unit: Units, length: int) -> Tensor:
    """The unit of each position of a gate: over what reads it, or over a head's dims."""
    groups = axis_groups(program)
    read = {len(u): u for _, u in consumers(groups, groups[unit.id])}
    return read[length] if length in read else torch.arange(length) % unit.size


@pytest.mark.parametrize("model", [*MODELS, "tiny-bert", "tiny-mixtral"])
def test_slopes_are_derivatives_by_gates(model: str, captured: Captured) -> None:
    """Autograd and finite differences on gates that are put where each unit is summed over."""
    program = _float64(captured(model))
    units = _units(program)
    slopes = _slopes(program, units)
    assert {unit.role for unit in units} >= {"neuron", "qk_dim"}
    for unit in units:
        gated, gates = _gated(program, unit)
        module = graph_module(gated)
        leaves = {name: gate.requires_grad_() for name, gate in gates.items()}
        found = torch.autograd.grad(_loss(module, gated, leaves), list(leaves.values()))
        total = torch.zeros(unit.size, dtype=torch.float64)
        for slope in found:
            labels = _labels(program, unit, slope.numel())
            total.index_add_(0, labels[labels >= 0], slope.flatten()[labels >= 0])
        torch.testing.assert_close(slopes[unit.id].sum(0), total, rtol=1e-9, atol=1e-14)

        step = 1e-5
        number = int(total.abs().argmax())
        sides = []
        for sign in (1, -1):
            moved = {}
            for name, gate in gates.items():
                here = _labels(program, unit, gate.numel()) == number
                moved[name] = gate.detach() + sign * step * here.view(gate.shape)
            sides.append(float(_loss(module, gated, moved).detach()))
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(total[number]), rel=1e-5)


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-encoder"])
def test_slopes_of_dims_are_those_of_each_head(model: str, captured: Captured) -> None:
    """One gate for each dim of each head, on the query before it meets the key."""
    program = _float64(captured(model))
    for unit in _units(program, "qk_dim", "v_dim"):
        assert (unit.rows, unit.size) == (4, 8)
        gated, gates = _gated(program, unit)
        # A factor [heads, 1, dims] instead of [dims]; what reads values has [heads · dims] already.
        leaves = {
            name: (gate.expand(4, 1, 8) if gate.numel() == 8 else gate).clone().requires_grad_()
            for name, gate in gates.items()
        }
        found = torch.autograd.grad(_loss(graph_module(gated), gated, leaves), [*leaves.values()])
        total = torch.stack([slope.reshape(4, 8) for slope in found]).sum(0)
        torch.testing.assert_close(_slopes(program, [unit])[unit.id], total, rtol=1e-9, atol=1e-14)
        assert float(total.abs().max()) > 1e-6


def test_query_and_key_say_the_same(captured: Captured) -> None:
    """Half of both is the query's rows with their biases, as the source has it."""
    program = _float64(captured("tiny-bert"))
    unit = _units(program, "qk_dim")[0]
    sides = []
    for side in ("query", "key"):
        read = tuple(p for p in unit.read if f".{side}." in p.tensor)
        assert len(read) == 2
        sides.append(_slopes(program, [replace(unit, read=read, share=1.0)])[unit.id])
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(_slopes(program, [unit])[unit.id], sides[0], rtol=1e-9, atol=1e-15)


def _state(program: Program, **options: Any) -> _State:
    step = GradualStructure(**options)
    return _State(step, Ledger(program, _units(program, *step.roles)), Context())


def _given(program: Program, seed: int) -> dict[str, nn.Parameter]:
    """Parameters with random gradients."""
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for name in sorted(program.parameters):
        found[name] = nn.Parameter(program.tensors[name].clone())
        found[name].grad = torch.randn(found[name].shape, generator=drawn).to(found[name])
    return found


@pytest.mark.parametrize("score", ["grain", "taylor"])
def test_scores_are_weighted_means_over_steps(score: str, captured: Captured) -> None:
    program = _float64(captured("tiny-gpt2"))
    state = _state(program, score=score, smoothing=0.7, regularize=0.3)
    slopes: dict[str, list[Tensor]] = {name: [] for name in state.means}
    for seed in range(5):
        given = _given(program, seed)
        state.observe(given)
        sums = position_sums(list(state.ledger.units.values()), given)
        for name, unit in state.ledger.units.items():
            slopes[name].append(unit.slopes(sums))
    weights = torch.tensor([0.7**k for k in range(4, -1, -1)], dtype=torch.float64)
    expected = {}
    for name, unit in state.ledger.units.items():
        each = torch.stack(slopes[name]).abs() * (math.tanh(1 / 0.3) if unit.values else 1)
        each = each.square() if score == "taylor" else each
        expected[name] = (each * weights[:, None, None]).sum(0) / weights.sum()
    found = state.scores()
    for name, unit in state.ledger.units.items():
        # A head is the sum of its query, key and value dims.
        dims = [expected[u.id].sum(1) for u in state.ledger.units.values() if u.heads == name]
        assert len(dims) == (2 if unit.role == "head" else 0)
        wanted = torch.stack(dims).sum(0)[None] if dims else expected[name]
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=0)


def test_a_head_alone_counts_by_its_own_slope(captured: Captured) -> None:
    program = _float64(captured("tiny-gpt2"))
    state = _state(program, roles=("head", "neuron"), smoothing=0.0)
    given = _given(program, 0)
    state.observe(given)
    unit = next(u for u in state.ledger.units.values() if u.role == "head")
    weight = given["transformer.h.0.attn.c_proj.weight"]  # stored [in, out]
    assert weight.grad is not None
    slopes = (weight.grad * weight).detach().reshape(4, -1).sum(1)
    torch.testing.assert_close(state.scores()[unit.id][0], slopes.abs(), rtol=1e-12, atol=0)


def test_value_dims_count_less_where_few_are_left(captured: Captured) -> None:
    program = _float64(captured("tiny-gpt2"))
    units = _units(program, "v_dim")
    gone = torch.zeros(4, 8, dtype=torch.bool)
    gone[:, 2:] = True
    means = []
    for regularize in (0.3, 0):
        state = _state(program, smoothing=0.0, regularize=regularize)
        state.ledger.load({units[0].id: gone})
        state.observe(_given(program, 0))
        means.append(state.means)
    factors = {units[0].id: math.tanh(0.25 / 0.3), units[1].id: math.tanh(1 / 0.3)}
    for name, mean in means[1].items():
        expected = factors.get(name, 1.0) * mean
        torch.testing.assert_close(means[0][name], expected, rtol=1e-12, atol=0)


# --- what it costs, and what goes ----------------------------------------------------------------


def _random_scores(ledger: Ledger, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(gone.shape, generator=drawn, dtype=torch.float64)
        for name, gone in ledger.gone.items()
    }


@pytest.mark.parametrize("model", [*MODELS, "tiny-t5"])
def test_what_is_removed_is_what_shrinking_saves(model: str, captured: Captured) -> None:
    """Parameters of two units count once; masks leave out exactly as many."""
    program = captured(model)
    ledger = Ledger(program, _units(program))
    before = program.num_parameters()
    parameters = _given(program, 0)
    masks: dict[str, Tensor] = {}
    for part in (0.2, 0.6):
        assert ledger.remove(_random_scores(ledger), part * ledger.total)
        assert ledger.removed <= part * ledger.total
        small = shrink(program.with_tensors(ledger.arranged(program.tensors)), ledger.keep())
        assert before - small.num_parameters() == ledger.removed
        later = ledger.masks(parameters)
        assert sum(int((~m).sum()) for m in later.values()) == ledger.removed
        assert all(not (later[name] & ~m).any() for name, m in masks.items())
        assert all(m.shape == parameters[name].shape for name, m in later.items())
        masks = later
    least = Ledger(program, _units(program)).drain()
    sizes = {len(kept) for kept in least.keep().values()}
    assert sizes == {1}
    assert least.density == pytest.approx(1 - least.removed / least.total)


def test_the_ranking_is_that_of_brute_force(captured: Captured) -> None:
    """On a small network: lowest score for its cost first, until one does not fit."""
    program = captured("tiny-mlp")
    groups = axis_groups(program)
    units = _units(program, "neuron")
    costs = {group.id: group.cost for group in groups.with_role("neuron")}
    assert len(set(costs.values())) == 2
    for seed, part in itertools.product(range(2), range(0, 20_000, 1_300)):
        ledger = Ledger(program, units)
        scores = _random_scores(ledger, seed)
        budget = part / 20_000 * ledger.total
        order = sorted(
            (float(scores[name][0, u]) / costs[name], name, u)
            for name in costs
            for u in range(groups[name].size)
        )
        kept = {name: set(range(groups[name].size)) for name in costs}
        for _, name, u in order:
            smaller = {**kept, name: kept[name] - {u}}
            if not smaller[name]:
                continue
            saved = program.num_parameters() - groups.num_parameters(
                {n: sorted(k) for n, k in smaller.items()}
            )
            if saved > budget:
                break
            kept = smaller
        ledger.remove(scores, budget)
        gone = {name: set(g[0].nonzero().flatten().tolist()) for name, g in ledger.gone.items()}
        assert gone == {name: set(range(groups[name].size)) - kept[name] for name in kept}


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-llama", "tiny-mlp"])
def test_the_last_time_all_goes_that_fits(model: str, captured: Captured) -> None:
    """Never more than the budget, no unit before a weaker one, and no room for one more."""
    program = captured(model)
    units = _units(program)
    improved = False
    for seed, part in enumerate((0.13, 0.29, 0.37, 0.61, 0.73)):
        budget = part * Ledger(program, units).total
        waiting, ledger = Ledger(program, units), Ledger(program, units)
        scores = _random_scores(ledger, seed)
        waiting.remove(scores, budget)
        assert ledger.remove(scores, budget, fill=True)
        assert waiting.removed <= ledger.removed <= budget
        improved |= waiting.removed < ledger.removed
        assert all(not (waiting.gone[name] & ~gone).any() for name, gone in ledger.gone.items())
        for name, unit in ledger.units.items():
            for row in ledger.living_rows(unit):
                gone = ledger.gone[name][row]
                weakest = scores[name][row].argsort()[: int(gone.sum())]
                assert set(gone.nonzero().flatten().tolist()) == set(weakest.tolist())
        arranged = program.with_tensors(ledger.arranged(program.tensors))
        small = shrink(arranged, ledger.keep())
        left = axis_groups(small)
        for group in left.with_role(*TRAINED_ROLES):
            if group.size > 1:
                fewer = left.num_parameters({group.id: range(group.size - 1)})
                assert program.num_parameters() - fewer > budget
    assert improved
    assert not ledger.remove(scores, budget, fill=True)


def test_every_head_loses_its_own_weakest_dims(captured: Captured) -> None:
    program = captured("tiny-gpt2")
    ledger = Ledger(program, _units(program, "v_dim"))
    assert {unit.rows for unit in ledger.units.values()} == {4}
    scores = _random_scores(ledger)
    ledger.remove(scores, 0.5 * ledger.total)
    ragged = False
    for name, gone in ledger.gone.items():
        count = int(gone[0].sum())
        assert gone.sum(1).tolist() == [count] * 4
        for row, values in zip(gone, scores[name], strict=True):
            assert set(row.nonzero().flatten().tolist()) == set(values.argsort()[:count].tolist())
        ragged |= bool((gone != gone[0]).any())
    assert ragged
    # The two layers share one ranking by the sums over heads.
    sums = {name: scores[name].sort(dim=1).values.sum(0) for name in scores}
    taken = {name: int(gone[0].sum()) for name, gone in ledger.gone.items()}
    last = max(float(sums[name][count - 1]) for name, count in taken.items() if count)
    first = min(float(sums[name][count]) for name, count in taken.items())
    assert last < first


def test_shared_tables_tie_the_dims_of_all_heads(captured: Captured) -> None:
    program = captured("tiny-llama")
    rows = {unit.role: (unit.heads is not None, unit.rows) for unit in _units(program)}
    assert rows == {
        "kv_group": (False, 1),
        "qk_dim": (False, 1),
        "v_dim": (True, 2),
        "neuron": (False, 1),
    }


# --- order inside heads --------------------------------------------------------------------------


def _half(program: Program, part: float = 0.5) -> Ledger:
    ledger = Ledger(program, _units(program))
    ledger.remove(_random_scores(ledger), part * ledger.total)
    return ledger


def _zeroed(program: Program, ledger: Ledger) -> Program:
    masks = ledger.masks(program.tensors)
    return program.with_tensors(
        {name: program.tensors[name].masked_fill(~living, 0) for name, living in masks.items()}
    )


def _outputs(program: Program) -> Tensor:
    return logits_of(tuple(program.run(program.forward.example)))


@pytest.mark.parametrize("model", [*MODELS, "tiny-t5", "tiny-fused-vit"])
def test_order_inside_heads_changes_nothing(model: str, captured: Captured) -> None:
    program = _float64(captured(model))
    ledger = _half(program)
    moved = program.with_tensors(ledger.arranged(program.tensors))
    changed = [n for n, t in program.tensors.items() if not t.equal(moved.tensors[n])]
    assert changed
    dense = _outputs(program)
    assert float((_outputs(moved) - dense).abs().max() / dense.abs().max()) < 1e-12
    # One tensor left in its order would be seen.
    matrix = next(name for name in changed if program.tensors[name].dim() == 2)
    wrong = moved.with_tensors({matrix: program.tensors[matrix]})
    assert float((_outputs(wrong) - dense).abs().max() / dense.abs().max()) > 1e-6
    single = captured(model)
    again = single.with_tensors(ledger.arranged(single.tensors))
    torch.testing.assert_close(_outputs(again), _outputs(single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [*MODELS, "tiny-t5", "tiny-mixtral", "tiny-fused-vit"])
@pytest.mark.slow
def test_cutting_ragged_heads_is_zeroing_them(model: str, captured: Captured) -> None:
    program = _float64(captured(model))
    ledger = _half(program, 0.6)
    dead = _zeroed(program, ledger)
    small = shrink(dead.with_tensors(ledger.arranged(dead.tensors)), ledger.keep())
    assert small.num_parameters() < program.num_parameters()
    expected = _outputs(dead)
    assert float((_outputs(small) - expected).abs().max() / expected.abs().max()) < 1e-12
    assert float((expected - _outputs(program)).abs().max() / expected.abs().max()) > 1e-3


# --- the pass ------------------------------------------------------------------------------------


def _data(program: Program, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches like the example, of other tokens."""
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    first = program.forward.input_names[0]
    return [{**batch, first: batch[first].roll(i, -1)} for i in range(count)]


def _squares(outputs: Any, batch: Any) -> Tensor:
    return logits_of(outputs).square().mean()


def _run(program: Program, step: GradualStructure, data: Any = None, **options: Any) -> Any:
    training = Training(data or _data(program), loss=options.pop("loss", _squares), **options)
    return Pipeline([step]).run(program, Context(training=training))


@pytest.mark.parametrize("density", [0.6, 0.3])
@pytest.mark.parametrize("model", [*MODELS, "tiny-mlp"])
@pytest.mark.slow
def test_the_density_is_reached_and_cut(density: float, model: str, captured: Captured) -> None:
    program = captured(model)
    seen: list[Program] = []

    def evaluate(now: Program) -> float:
        seen.append(now)
        return 0.0

    step = GradualStructure(density, epochs=4, lr=1e-3, begin=0.1, end=0.6)
    result = _run(program, step, eval=evaluate)
    (finished,) = result.results
    report = finished.report
    json.dumps(report)
    units = _units(program)
    total = Ledger(program, units).total
    removed = program.num_parameters() - result.program.num_parameters()
    assert report["density"] == pytest.approx(1 - removed / total, abs=1e-12)
    assert density <= report["density"] + 1e-9
    # As near as units can be: one more of any axis, and it would be below.
    left = axis_groups(result.program)
    for group in left.with_role(*TRAINED_ROLES):
        if group.size > 1:
            fewer = left.num_parameters({group.id: range(group.size - 1)})
            assert 1 - (program.num_parameters() - fewer) / total < density
    *order, step_of_history = result.program.history[-1]["steps"]
    own = {unit.id for unit in units if unit.heads is not None}
    dims = [name for name in step_of_history["removed"] if name in own]
    assert order == ([{"rearranged": dims}] if dims else [])
    kept = {name: len(cut["kept"]) for name, cut in step_of_history["removed"].items()}
    assert report["groups"] == [
        {"id": u.id, "role": u.role, "before": u.size, "after": kept.get(u.id, u.size)}
        for u in units
    ]
    # Three epochs at the old shapes, zeros growing; then the small model trains.
    counts = [p.num_parameters() for p in seen]
    assert counts[:3] == [program.num_parameters()] * 3
    assert counts[3:] == [result.program.num_parameters()] * 2
    names = {p.tensor for u in units for p in u.places if p.tensor in program.parameters}
    zeros = [{name: now.tensors[name] == 0 for name in names} for now in seen[:3]]
    for earlier, later in itertools.pairwise(zeros):
        assert all(not (earlier[name] & ~later[name]).any() for name in names)
        assert sum(int(z.sum()) for z in later.values()) > sum(
            int(z.sum()) for z in earlier.values()
        )
    for epoch, now in enumerate(zeros[1:], 1):
        wanted = scheduled(epoch / 4, 0.1, 0.6, 1.0, density)
        reached = report["epochs"][epoch - 1]["density"]
        assert sum(int(z.sum()) for z in now.values()) == round((1 - reached) * total)
        assert wanted <= reached + 1e-9
    assert report["verification"]["cuts"] == 1
    assert report["verification"]["max_error"] < 1e-5
    assert set(report["scores"]) == {unit.id for unit in units}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_kept_is_told_where_it_is_the_same_in_all_heads(
    dtype: torch.dtype, captured: Captured
) -> None:
    """With tiny steps weights are still those of the kept units; dims of heads are not reported."""
    program = captured("tiny-encoder").cast(torch.float32, dtype)
    result = _run(program, GradualStructure(0.4, epochs=2, lr=1e-6, weight_decay=0.0))
    report = result.results[0].report
    cut = {g["id"]: g for g in report["groups"] if g["after"] < g["before"]}
    reported = {name for name, g in cut.items() if g["role"] not in DIMS}
    assert reported
    assert cut.keys() - reported
    assert report["kept"].keys() == reported
    assert report["kept"] == kept_indices(result.program.history)
    for name, kept in report["kept"].items():
        assert len(kept) == cut[name]["after"]
        if cut[name]["role"] == "neuron":
            weight = name.removesuffix("[0]")
            expected = program.tensors[weight][kept]
            torch.testing.assert_close(result.program.tensors[weight], expected, rtol=0, atol=1e-3)


def test_neurons_that_nothing_reads_go_first(captured: Captured) -> None:
    program = captured("tiny-mlp")
    unread = {"layers.2.weight": range(3, 17), "layers.4.weight": range(0, 24, 2)}
    changed = {name: program.tensors[name].clone() for name in unread}
    for name, neurons in unread.items():
        changed[name][:, list(neurons)] = 0
    program = program.with_tensors(changed)
    dead = 14 * (12 + 1 + 24) + 12 * (32 + 1 + 5) - 14 * 12
    step = GradualStructure(1 - (dead + 5) / 1328, epochs=1, begin=0, end=0, distill=False)
    report = _run(program, step).results[0].report
    assert [group["after"] for group in report["groups"]] == [32 - 14, 24 - 12]
    assert report["density"] == pytest.approx(1 - dead / 1328)


def test_training_after_the_cut_is_training_the_zeroed_model(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments of ragged heads go on as if they had only been zeroed: float64."""
    program = _float64(captured("tiny-gpt2"))
    step = GradualStructure(0.5, epochs=4, lr=1e-3, begin=0.0, end=0.25, distill=False)
    small = _run(program, step).program
    whole: list[Ledger] = []

    def masked(self: _State, now: Program, epoch: int) -> tuple[Program, None]:
        self.reached.append(self.ledger.density)
        whole[:] = [self.ledger]
        return now, None

    monkeypatch.setattr(_State, "after_epoch", masked)
    large = _run(program, step).program
    (ledger,) = whole
    assert any((g != g[0]).any() for g in ledger.gone.values() if len(g) > 1)
    expected = shrink(large.with_tensors(ledger.arranged(large.tensors)), ledger.keep())
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(small.tensors[name], tensor, rtol=1e-8, atol=1e-10)


def test_hidden_states_move_no_scores(captured: Captured) -> None:
    """Gradients are separated: before the first step only labels and outputs are looked at."""
    program = captured("tiny-encoder")
    dense = program
    pruned = Pipeline([PruneNeurons(0.25)]).run(dense).program
    scores = []
    cases: list[dict[str, Any]] = [{"hidden_weight": 0.0}, {"hidden_weight": 5.0}, {"alpha": 0.0}]
    for options in cases:
        step = GradualStructure(1.0, epochs=1, end=0.2, **options)
        training = Training(_data(program, 1), loss=_squares)
        ctx = Context(training=training, reference=dense)
        ctx.begin(step.name, 0)
        scores.append(step.run(pruned, ctx).report["scores"])
    for name, found in scores[0].items():
        assert scores[1][name] == pytest.approx(found, rel=1e-5)
    assert scores[2] != scores[0]


@pytest.mark.parametrize("at", [5, 10, 18], ids=lambda at: f"batch {at}")
@pytest.mark.slow
def test_resumed_is_as_if_never_stopped(
    at: int, captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    """Before units go, while they go, and after they are cut; with dropout."""
    program = captured("tiny-encoder")
    data = _data(program)
    step = GradualStructure(0.4, epochs=5, lr=1e-3, begin=0.3, end=0.6)
    whole = _run(program, step, data)
    folder: Any = {"checkpoints": tmp_path / "checkpoints", "every": 1}
    with pytest.raises(Exception, match="crashed with Stops"):
        _run(program, step, breaks(data, at), **folder)
    resumed = _run(program, step, data, **folder, resume=True)
    assert resumed.program.tensors.keys() == whole.program.tensors.keys()
    for name, tensor in whole.program.tensors.items():
        assert tensor.equal(resumed.program.tensors[name])
    first, second = (r.results[0].report for r in (whole, resumed))
    for key in ("density", "groups", "scores"):
        assert first[key] == second[key]
    assert [e["density"] for e in first["epochs"]] == [e["density"] for e in second["epochs"]]


def test_a_checkpoint_of_other_options_is_refused(captured: Captured, tmp_path: Path) -> None:
    program = captured("tiny-mlp")
    folder: Any = {"checkpoints": tmp_path / "checkpoints"}
    _run(program, GradualStructure(0.5, epochs=1), **folder)
    with pytest.raises(gp.GraphPruneError, match=r"was made with density=0\.5, now it is 0\.6"):
        _run(program, GradualStructure(0.6, epochs=1), **folder, resume=True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_what_is_left_exports(model: str, captured: Captured, tmp_path: Path) -> None:
    program = captured(model)
    training = Training(_data(program, 2), loss=_squares)
    steps = [GradualStructure(0.4, epochs=2, lr=1e-3)]
    compiled = gp.compile(program, steps, training=training)
    artifact = compiled.export(tmp_path / "out", baseline=False)
    names = [i.name for i in artifact.session().get_inputs()]
    feeds = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    found = artifact.session().run(None, {n: feeds[n].numpy() for n in names})[0]
    torch.testing.assert_close(
        torch.from_numpy(found), _outputs(compiled.program), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_the_cached_form_is_cut_alike() -> None:
    model, inputs = tiny("tiny-gpt2")
    program = gp.compile(model, [], example_inputs=inputs, cache=True).program
    result = _run(program, GradualStructure(0.4, epochs=2))
    assert set(result.program.entries) == {"forward", "decode"}
    report = result.results[0].report
    assert {g["role"] for g in report["groups"] if g["after"] < g["before"]} >= {"qk_dim", "v_dim"}
    assert report["verification"]["max_error"] < 1e-5


# --- refusals ------------------------------------------------------------------------------------


def test_refusals(captured: Captured) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"density": 0}, "density must be a fraction above 0, at most 1"),
        ({"density": 1.5}, "density must be"),
        ({"score": "tailor"}, "did you mean 'taylor'"),
        ({"smoothing": 1}, "smoothing must be below 1"),
        ({"smoothing": -0.1}, "smoothing must be"),
        ({"regularize": -1}, "regularize must be 0"),
        ({"begin": 0.5, "end": 0.3}, "ends at 0.3, before it begins at 0.5"),
        ({"schedule": "cubik"}, "did you mean 'cubic'"),
        ({"lr_schedule": "linar"}, "did you mean 'linear'"),
        ({"roles": ()}, "roles is a list of some of"),
        ({"roles": "head"}, "roles is a list of some of"),
        ({"roles": ("head", "neuron", "head")}, "roles names one twice"),
        ({"roles": ("residual",)}, "there is no role 'residual' here"),
        ({"distill": 1}, "distill is true or false"),
        ({"temperature": 0}, "temperature must be"),
        ({"epochs": 0}, "epochs must be"),
    )
    for options, says in cases:
        with pytest.raises(RecipeError, match=says):
            GradualStructure(**options)
    program = captured("tiny-encoder")
    with pytest.raises(RecipeError, match=r"cannot reach density 0\.01: one unit of each of 6"):
        _run(program, GradualStructure(0.01))
    with pytest.raises(UnsupportedError, match="no linear layer"):
        _run(captured("tiny-cnn"), GradualStructure())
    with pytest.raises(UnsupportedError, match="there is no axis group with role head"):
        _run(captured("tiny-mlp"), GradualStructure(roles=("head",)))
    with pytest.raises(RecipeError, match="needs data and a loss"):
        Pipeline([GradualStructure()]).run(program)
    marked = Pipeline([Quantize("int8-dynamic")]).run(program).program
    with pytest.raises(UnsupportedError, match="quantiz"):
        _run(marked, GradualStructure())


class _Normed(nn.Module):
    """Two feed-forward layers, with a norm over the neurons of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.norm, self.outward = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outward(F.relu(self.norm(self.inward(x))))
        return x + self.plain(x)


def test_what_cannot_go_is_left_and_said() -> None:
    program = capture(_Normed(), {"x": torch.randn(3, 8)})
    result = _run(program, GradualStructure(0.5, epochs=1, distill=False))
    report = result.results[0].report
    assert [group["id"] for group in report["groups"]] == ["plain.0.weight[0]"]
    assert "normalization" in report["skipped"]["inward.weight[0]"]
    assert result.program.tensors["inward.weight"].shape == (16, 8)


class _Summed(_Normed):
    """The neurons of the first layer are sorted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.outward(self.inward(x).sort(-1).values)


def test_what_an_operator_freezes_is_in_the_report() -> None:
    program = capture(_Summed(), {"x": torch.randn(3, 8)})
    result = _run(program, GradualStructure(0.5, epochs=1, distill=False))
    (frozen,) = result.results[0].report["frozen"]
    assert frozen["groups"] == ["inward.weight[0]", "outward.weight[1]"]
    assert frozen["text"].endswith("stay: fixed by `sort`")


class _Shifted(nn.Module):
    """Attention whose queries and keys have a constant: a dead dim is not a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(F.elu(q) + 1, k + x.mean(-1)[:, None, :, None], v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_units_that_outlive_their_weights_are_refused() -> None:
    program = capture(_Shifted(), {"x": torch.randn(2, 5, 16)})
    with pytest.raises(UnsupportedError, match="such units still give something"):
        _run(program, GradualStructure(0.5, epochs=1), loss=_squares)
