"""NeuroPrune and L1: penalties in closed form, merging that changes nothing, counted zeros."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import L1, Finetune, NeuroPrune, PruneNeurons
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern
from graphprune.passes.training.merge import (
    Merge,
    merge_units,
    plan_merge,
    unit_distances,
)
from graphprune.passes.training.penalties import (
    Part,
    attachment_penalty,
    connections,
    connectivity,
    find_parts,
    group_penalty,
)
from graphprune.passes.training.zeros import sparsity_of, topology, zero_small
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.rewrite.shrink import shrink
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training

Captured = Callable[[str], Program]


# --- penalties ---------------------------------------------------------------------------------


def test_full_rows_pay_plain_l1_and_poor_ones_more() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, -2.0, 0.0, 5e-5], [0.0, 0.0, 0.0, 0.0]])
    assert connectivity(weight, 1e-4).tolist() == [1.0, 0.25, 0.25]  # a dead row counts as one
    expected = 10.0 + 4 * (2.0 + 5e-5) + 0.0
    assert float(attachment_penalty(weight, 1e-4)) == pytest.approx(expected)
    alive = [connectivity((torch.arange(8) < n).float(), 0.5).item() for n in range(1, 9)]
    assert alive == sorted(alive)


@pytest.mark.parametrize("experts", [(), (3,)])
def test_gradients_are_the_analytic_ones(experts: tuple[int, ...]) -> None:
    weight = torch.randn(*experts, 5, 7, dtype=torch.float64)
    weight[..., 0, :4] = 0
    weight[..., 1, :] = 0
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(attachment_penalty(leaf, 1e-4), leaf)
    share = ((weight.abs() >= 1e-4).sum(-1, keepdim=True) / 7).clamp_min(1 / 7)
    torch.testing.assert_close(slope, weight.sign() / share)

    other = torch.randn(*experts, 5, 4, dtype=torch.float64)
    other[..., 1, :] = 0
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(group_penalty([leaf, other]), leaf)
    total = weight.abs().sum(-1, keepdim=True) + other.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(slope, 0.5 * weight.sign() * (total + 1e-8) ** -0.5)
    assert (slope[..., 1, :] == 0).all()  # no NaN at a dead group


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 11))
@pytest.mark.parametrize("text", ["1x1", "3x2", "4x4"])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_penalties_on_blocks_are_those_of_their_norms(
    text: str, lead: tuple[int, ...], seed: int, units: int, others: int
) -> None:
    """Block by block, from the definition; of blocks of one they are the plain ones."""
    pattern, generator = parse_pattern(text), torch.Generator().manual_seed(seed)
    weight = torch.randn(*lead, units, others, generator=generator, dtype=torch.float64)
    weight[..., :3, :4] *= 7e-5  # a block's norm is above the threshold, not its mean
    attached, grouped = 0.0, 0.0
    for one in weight.reshape(-1, units, others):
        for r in range(0, units, pattern.height):
            row = one[r : r + pattern.height]
            blocks = [row[:, c : c + pattern.width] for c in range(0, others, pattern.width)]
            strengths = [math.sqrt(b.numel()) * float(b.norm()) for b in blocks]
            alive = sum(float(b.square().mean().sqrt()) >= 1e-4 for b in blocks)
            attached += sum(strengths) * len(blocks) / max(alive, 1)
            grouped += math.sqrt(2 * sum(strengths) + 1e-8)
    assert float(attachment_penalty(weight, 1e-4, pattern)) == pytest.approx(attached)
    assert float(group_penalty([weight, weight], pattern)) == pytest.approx(grouped)
    if text == "1x1":
        assert float(attachment_penalty(weight, 1e-4)) == pytest.approx(attached)
        assert float(group_penalty([weight, weight])) == pytest.approx(grouped)


def test_gradients_on_blocks_shrink_whole_blocks() -> None:
    """v √n w / ‖w‖, by the block's size at the edges; 0 at a dead block, not NaN."""
    pattern = parse_pattern("2x3")
    weight = torch.randn(5, 7, dtype=torch.float64)
    weight[:2, :3] = 0
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(attachment_penalty(leaf, 1e-4, pattern), leaf)
    expected = torch.zeros_like(weight)
    for r, c in itertools.product(range(0, 5, 2), range(0, 7, 3)):
        block = weight[r : r + 2, c : c + 3]
        v = 3 / 2 if r == 0 else 1.0
        if block.any():
            expected[r : r + 2, c : c + 3] = v * math.sqrt(block.numel()) * block / block.norm()
    torch.testing.assert_close(slope, expected)
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(group_penalty([leaf], pattern), leaf)
    assert slope.isfinite().all()
    assert not slope[:2, :3].any()


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-gpt2", "tiny-mixtral"])
@pytest.mark.parametrize("columns", [False, True])
def test_blocks_are_of_outputs_and_inputs_whatever_the_units(
    model: str, columns: bool, captured: Captured
) -> None:
    """A part's matrix is the site's, and its blocks of units x others are the site's OUTxIN."""
    program = captured(model)
    groups = axis_groups(program)
    sites = {s.tensor: s for s in linear_sites(groups)}
    for part in find_parts(groups, columns).all:
        tensor = program.tensors[part.tensor]
        matrix = part.matrix(tensor)
        site = sites[part.tensor]
        one = matrix if site.expert is None else matrix[site.expert]
        assert torch.equal(one, site.matrix(program))
        blocks = parse_pattern("8x4")
        if part.units is part.others is None:
            seen = connections(part.view(tensor), part.oriented(blocks))
            expected = connections(matrix, blocks)
            torch.testing.assert_close(seen if part.by_outputs else seen.mT, expected)


def test_query_may_die_while_value_stays() -> None:
    """The group's root couples them, but each weight has its own slope."""
    query, value = torch.zeros(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    group_penalty([query, value]).backward()
    assert query.grad is not None
    assert value.grad is not None
    assert not query.grad.any()
    assert value.grad.allclose(torch.full((3, 4), 0.25))


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-mixtral"])
def test_parts_are_the_same_whatever_the_storage(model: str, captured: Captured) -> None:
    """Transposed, fused, gated, grouped and stacked weights: the same layers, by their sizes."""
    parts = find_parts(axis_groups(captured(model)))
    program = captured(model)
    seen = [p.view(program.tensors[p.tensor]) for p in parts.expanding]
    lead = {"tiny-mixtral": (4, 128), "tiny-gpt2": (128,)}.get(model, (64,))
    assert {tuple(v.shape) for v in seen} == {(*lead, 32)}
    wide = 128 if model == "tiny-gpt2" else 64
    assert {p.view(program.tensors[p.tensor]).shape[-2:] for p in parts.contracting} == {(32, wide)}
    assert len(parts.attention) == 2
    for group in parts.attention:
        views = [p.view(program.tensors[p.tensor]) for p in group]
        assert all(v.shape[-2] == 32 for v in views)  # units are input features
        keys = 2 * (16 if model in ("tiny-llama", "tiny-mixtral") else 32)
        assert sum(v.shape[-1] for v in views) == 32 + keys
    by_columns = find_parts(axis_groups(program), columns=True).contracting
    assert {p.view(program.tensors[p.tensor]).shape[-2:] for p in by_columns} == {(wide, 32)}


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (1, 1)])
def test_what_all_heads_share_is_under_penalty_too(heads: int, groups: int) -> None:
    """Neither keys and values of all heads, nor a single head, are an axis of heads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    parts = find_parts(axis_groups(gp.compile(model, [], example_inputs=inputs).program))
    names = [[p.tensor.split(".")[-2] for p in group] for group in parts.attention]
    alone = [["q_proj", "k_proj"], ["v_proj"]]
    assert names == (alone if heads == 1 else [["q_proj", "k_proj", "v_proj"]])


def test_a_part_of_a_weight_is_seen_alone() -> None:
    weight = torch.arange(24.0).reshape(4, 6)
    part = Part("w", 1, 0, units=(0, 5), others=(1, 2))
    assert part.view(weight).equal(weight[[1, 2]][:, [0, 5]].T)
    assert float(connections(part.view(weight)).sum()) == 6 + 11 + 12 + 17


# --- redundant heads ---------------------------------------------------------------------------


def _duplicated(program: Program, group: Any, noise: float = 0.0) -> Program:
    """The program with everything that comes into unit 2 of a group copied from unit 0."""
    groups = axis_groups(program)
    leaving = {p.tensor for p in _outgoing(groups, group)}
    changed: dict[str, Tensor] = {}
    for place in group.occurrences:
        if place.tensor in leaving:
            continue
        units = groups.units(group, place.tensor, place.dim)
        tensor = changed.get(place.tensor, program.tensors[place.tensor]).clone()
        moved = tensor.movedim(place.dim, 0)
        source = moved[units == 0]
        moved[units == 2] = source + noise * torch.ones_like(source)
        changed[place.tensor] = tensor
    return program.with_tensors(changed)


def _outgoing(groups: Any, group: Any) -> list[Any]:
    from graphprune.axes.sites import consumers

    return [site for site, _ in consumers(groups, group)]


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-gpt2", "tiny-encoder", "tiny-fused-vit"])
def test_merging_equal_heads_changes_nothing(model: str, captured: Captured) -> None:
    group = axis_groups(captured(model)).with_role("head")[0]
    program = _duplicated(captured(model), group)
    groups = axis_groups(program)
    plan = plan_merge(program, groups, groups[group.id], 0.0)
    assert isinstance(plan, Merge)
    assert plan.into == (2, 1, 2, 3)
    small = shrink(merge_units(program, groups, groups[group.id], plan.into), {group.id: plan.kept})
    example = program.forward.example
    before, after = logits_of(tuple(program.run(example))), logits_of(tuple(small.run(example)))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    # Leaving the outgoing weights out would be seen.
    dropped = logits_of(tuple(shrink(program, {group.id: plan.kept}).run(example)))
    assert (dropped - before).abs().max() > 1e-3


def test_distances_are_largest_differences_biases_included(captured: Captured) -> None:
    group = axis_groups(captured("tiny-bert")).with_role("head")[0]
    program = _duplicated(captured("tiny-bert"), group, noise=0.125)
    distances = unit_distances(program, axis_groups(program), group)
    assert float(distances[0, 2]) == pytest.approx(0.125, abs=1e-6)
    assert float(distances[2, 0]) == float(distances[0, 2])
    assert not distances.diagonal().any()
    bias = next(o.tensor for o in group.occurrences if program.tensors[o.tensor].dim() == 1)
    shifted = program.tensors[bias].clone()
    shifted[0] += 3
    moved = program.with_tensors({bias: shifted})
    assert float(unit_distances(moved, axis_groups(moved), group)[0, 2]) > 2


def test_grouped_queries_merge_by_whole_groups(captured: Captured) -> None:
    program = captured("tiny-llama")
    groups = axis_groups(program)
    group = groups.with_role("kv_group")[0]
    changed = {}
    for place in group.occurrences:
        if place.tensor not in {s.tensor for s in _outgoing(groups, group)}:
            units = groups.units(group, place.tensor, place.dim)
            tensor = program.tensors[place.tensor].clone()
            moved = tensor.movedim(place.dim, 0)
            moved[units == 1] = moved[units == 0]
            changed[place.tensor] = tensor
    dense = program.with_tensors(changed)
    groups = axis_groups(dense)
    plan = plan_merge(dense, groups, groups[group.id], 0.0)
    assert isinstance(plan, Merge)
    assert plan.kept == [1]
    small = shrink(merge_units(dense, groups, groups[group.id], plan.into), {group.id: plan.kept})
    before, after = (logits_of(tuple(p.run(dense.forward.example))) for p in (dense, small))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


# --- zeros -------------------------------------------------------------------------------------


def test_so_many_weights_are_zeroed_and_no_others(captured: Captured) -> None:
    program = captured("tiny-encoder")
    parts = find_parts(axis_groups(program)).all
    zeroed = zero_small(program, parts, 0.0, 0.3)
    count = sum(program.tensors[p.tensor].numel() for p in parts)
    assert round(sparsity_of(zeroed, parts, 0.0) * count) == int(0.3 * count + 0.5)
    names = {p.tensor for p in parts}
    assert zeroed.zeroed == set(names)
    largest = 0.0
    for name, tensor in program.tensors.items():
        gone = zeroed.tensors[name] != tensor
        assert name in names or not gone.any()
        largest = max(largest, float((tensor.abs() * gone).max()))
    kept = min(float(zeroed.tensors[n][zeroed.tensors[n] != 0].abs().min()) for n in names)
    assert largest <= kept
    by_size = zero_small(program, parts, largest, None)
    assert sparsity_of(by_size, parts, 0.0) == pytest.approx(0.3, abs=2 / count)


def test_only_the_part_is_zeroed(captured: Captured) -> None:
    program = captured("tiny-mlp")
    part = Part("layers.2.weight", 1, 0, units=(0, 5), others=(1, 2))
    weight = zero_small(program, [part], 0.0, 1.0).tensors["layers.2.weight"]
    assert sorted((weight == 0).nonzero().tolist()) == [[1, 0], [1, 5], [2, 0], [2, 5]]


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-gpt2", "tiny-mixtral"])
@pytest.mark.parametrize("text", ["8x4", "5x3"])
def test_of_blocks_exactly_a_fraction_goes_the_lowest_norms(
    model: str, text: str, captured: Captured
) -> None:
    program, pattern = captured(model), parse_pattern(text)
    parts = find_parts(axis_groups(program)).all
    zeroed = zero_small(program, parts, 0.0, 0.3, pattern)
    norms, dead = [], []
    for part in {part.tensor: part for part in parts}.values():
        before, after = (part.matrix(p.tensors[part.tensor]) for p in (program, zeroed))
        alive = pattern.units(after.abs()) > 0
        assert torch.equal(after, before * pattern.spread(alive, *after.shape[-2:]))
        norms.append(pattern.units(before.abs()).flatten())
        dead.append(~alive.flatten())
    norm, gone = torch.cat(norms), torch.cat(dead)
    assert int(gone.sum()) == int(0.3 * len(norm) + 0.5)
    assert float(norm[gone].max()) <= float(norm[~gone].min())
    largest = max(
        float(n[d].max()) / math.sqrt(pattern.height * pattern.width)
        for n, d in zip(norms, dead, strict=True)
        if d.any()
    )
    small = zero_small(program, parts, 2 * largest, None, pattern)
    for part in parts:  # those of smaller root mean square, the smaller ones at the edges too
        matrix, after = (part.matrix(p.tensors[part.tensor]) for p in (program, small))
        sizes = pattern.units(torch.ones_like(matrix))
        below = pattern.units(matrix.abs()) / sizes < 2 * largest
        assert torch.equal(after == 0, pattern.spread(below, *matrix.shape[-2:]))


def test_a_block_that_a_part_holds_a_piece_of_stays(captured: Captured) -> None:
    program = captured("tiny-mlp")
    part = Part("layers.2.weight", 0, 1, units=tuple(range(5)), others=tuple(range(2, 9)))
    weight = zero_small(program, [part], 0.0, 1.0, parse_pattern("4x2")).tensors[part.tensor]
    expected = torch.zeros_like(weight, dtype=torch.bool)
    expected[:4, 2:8] = True
    assert torch.equal(weight == 0, expected)


def test_topology_counts_living_connections(captured: Captured) -> None:
    program = captured("tiny-mlp")
    weight = torch.ones(32, 12)
    weight[0], weight[1, 3:] = 0, 1e-6
    parts = [Part("layers.0.weight", 0, 1)]
    found = topology(program.with_tensors({"layers.0.weight": weight}), parts, 1e-4)
    assert (found["units"], found["dead"]) == (32, 1)
    assert found["mean"] == pytest.approx((30 * 12 + 3) / 32)
    assert sum(found["histogram"]["counts"]) == 32
    assert found["histogram"]["to"] == 12


# --- the passes --------------------------------------------------------------------------------


def _training(program: Program, **options: Any) -> Training:
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    return Training([batch] * 4, loss=_nothing, **options)


def _nothing(outputs: Any, batch: Any) -> Tensor:
    return 0 * logits_of(outputs).sum()


def test_alike_heads_are_merged_after_an_epoch(captured: Captured) -> None:
    group = axis_groups(captured("tiny-bert")).with_role("head")[1]
    program = _duplicated(captured("tiny-bert"), group, noise=0.01)
    step = NeuroPrune(alpha=0, beta=0, theta=0.02, zero_below=0, epochs=2, lr=1e-6)
    result = Pipeline([step]).run(program, Context(training=_training(program)))
    report = result.results[0].report
    (merge,) = report["merges"]
    assert (merge["epoch"], merge["into"]) == (1, [2, 1, 2, 3])
    assert merge["largest_difference"] == pytest.approx(0.01, abs=1e-4)
    assert report["heads"][group.id] == {"before": 4, "after": 3}
    assert report["verification"]["cuts"] == 1
    assert report["verification"]["max_error"] < 1e-5
    before, after = (
        logits_of(tuple(p.run(program.forward.example))) for p in (program, result.program)
    )
    assert float((before - after).abs().max() / before.abs().max()) < 0.05
    json.dumps(report)
    none = NeuroPrune(alpha=0, beta=0, theta=None, epochs=1, lr=1e-6)
    kept = Pipeline([none]).run(program, Context(training=_training(program)))
    assert kept.results[0].report["merges"] == []


def test_merges_are_reported_after_an_interruption_too(
    captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    group = axis_groups(captured("tiny-bert")).with_role("head")[1]
    program = _duplicated(captured("tiny-bert"), group, noise=0.01)
    step = NeuroPrune(alpha=0, beta=0, theta=0.02, epochs=2, lr=1e-6)
    options: Any = {"checkpoints": tmp_path / "a"}
    whole = Pipeline([step]).run(program, Context(training=_training(program, **options)))
    options["checkpoints"] = tmp_path / "b"
    training = _training(program, **options)
    broken = replace(training, data=breaks(training.data, 7))
    with pytest.raises(gp.GraphPruneError, match="crashed with Stops"):
        Pipeline([step]).run(program, Context(training=broken))
    resumed = Pipeline([step]).run(program, Context(training=replace(training, resume=True)))
    merges = [run.results[0].report["merges"] for run in (whole, resumed)]
    assert len(merges[0]) == 1
    assert merges[0] == merges[1]


def test_penalties_make_weights_die_and_zeros_stay(captured: Captured) -> None:
    program = captured("tiny-encoder")
    step = NeuroPrune(alpha=1, beta=1, theta=None, zero_below=0.03, epochs=25, lr=0.01, clip=0)
    result = Pipeline([step]).run(program, Context(training=_training(program)))
    report = result.results[0].report
    assert report["sparsity"] > 0.9
    after, before = (
        report["degrees"]["after"]["expanding"],
        report["degrees"]["before"]["expanding"],
    )
    assert after["mean"] < 0.2 * before["mean"]
    zeros = {n: t == 0 for n, t in result.program.tensors.items() if n in result.program.zeroed}
    data = _training(program)
    tuned = Pipeline([Finetune(1, lr=0.1)]).run(
        result.program,
        Context(training=Training(data.data, loss=lambda o, b: logits_of(o).square().mean())),
    )
    assert all((tuned.program.tensors[n][z] == 0).all() for n, z in zeros.items())


@pytest.mark.parametrize(
    "step",
    [NeuroPrune(sparsity=0.6, epochs=2, lr=1e-3), L1(sparsity=0.6, epochs=2, lr=1e-3)],
    ids=lambda step: step.name,
)
def test_the_asked_sparsity_is_met_after_early_stopping_too(step: Any, captured: Captured) -> None:
    program = captured("tiny-gpt2")
    scores = iter([0.5, 0.9, 0.1, 0.7])
    training = _training(program, eval=lambda now: next(scores), patience=1)
    result = Pipeline([step]).run(program, Context(training=training))
    report = result.results[0].report
    assert report["best_epoch"] == 1
    assert report["metric_after"] == 0.7  # evaluated after zeroing: it is what is given back
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-3)
    again = (
        Pipeline([Finetune(1)])
        .run(result.program, Context(training=_training(program)))
        .results[0]
        .report
    )
    assert again["masked_weights"] > 0


def test_after_other_passes_positions_are_found_anew(captured: Captured) -> None:
    """Neurons are gone before, and heads go in between."""
    group = axis_groups(captured("tiny-gpt2")).with_role("head")[0]
    program = _duplicated(captured("tiny-gpt2"), group)
    small = Pipeline([PruneNeurons(0.5)]).run(program).program
    step = NeuroPrune(theta=1e-3, epochs=3, lr=1e-5, sparsity=0.3)
    result = Pipeline([step]).run(small, Context(training=_training(program)))
    assert len(result.results[0].report["merges"]) == 1
    assert result.results[0].report["sparsity"] == pytest.approx(0.3, abs=1e-3)


class _Parallel(nn.Module):
    """Attention and feed-forward side by side, all that reads the input in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(16, 48 + 24)
        self.attended = nn.Linear(16, 16)
        self.contracted = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, hidden = self.fused(x).split([16, 16, 16, 24], -1)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.attended(mixed) + self.contracted(F.gelu(hidden))


def test_parts_of_one_matrix_are_followed_when_heads_go() -> None:
    """Its rows move up when heads before them are removed; the penalty sees the same neurons."""
    program = capture(_Parallel(), {"x": torch.randn(2, 5, 16)})
    groups = axis_groups(program)
    parts = find_parts(groups)
    assert [(p.tensor, p.units) for p in parts.expanding] == [
        ("fused.weight", tuple(range(48, 72)))
    ]
    assert [p.others for p in parts.attention[0]] == [tuple(range(48))]
    group = groups.with_role("head")[0]
    dense = _duplicated(program, group)
    step = NeuroPrune(
        alpha=1, beta=0, theta=1e-6, zero_below=0.02, epochs=30, lr=0.01, weight_decay=0, clip=0
    )
    result = Pipeline([step]).run(dense, Context(training=_training(program)))
    report = result.results[0].report
    assert len(report["merges"]) == 1
    weight = result.program.tensors["fused.weight"]
    assert weight.shape == (3 * 12 + 24, 16)
    assert not weight[36:].any()  # neurons, under penalty
    assert (weight[:36].abs() > 0.02).float().mean() > 0.8  # heads, under none


def test_the_last_judgment_is_of_the_zeroed_model(captured: Captured) -> None:
    program = captured("tiny-encoder")
    seen: list[float] = []

    def evaluate(now: Program) -> float:
        seen.append(sparsity_of(now, find_parts(axis_groups(now)).all, 0.0))
        return 0.0

    for step in (NeuroPrune(sparsity=0.5, epochs=2), L1(sparsity=0.5, epochs=2)):
        seen.clear()
        Pipeline([step]).run(program, Context(training=_training(program, eval=evaluate)))
        assert seen == [0, 0, 0, pytest.approx(0.5, abs=1e-3)]


def test_refusals(captured: Captured) -> None:
    for options, says in (
        ({"alpha": -1}, "alpha must be 0 or more"),
        ({"beta": float("nan")}, "beta must be"),
        ({"theta": -0.1}, "theta must be 0 or more, or null"),
        ({"threshold": 0}, "threshold must be a number above 0"),
        ({"zero_below": -1}, "zero_below must be 0 or more"),
        ({"sparsity": 1.5}, "sparsity must be a fraction of all weights"),
        ({"contracting": "colums"}, "did you mean 'columns'"),
        ({"epochs": 0}, "epochs must be"),
    ):
        with pytest.raises(RecipeError, match=says):
            NeuroPrune(**options)
    with pytest.raises(RecipeError, match="alpha must be"):
        L1(alpha=-1)
    program = captured("tiny-cnn")
    for step in (NeuroPrune(), L1()):
        with pytest.raises(UnsupportedError, match="neither feed-forward nor attention"):
            Pipeline([step]).run(program, Context(training=_training(program)))


@pytest.mark.parametrize("step", [NeuroPrune, L1])
def test_zeros_are_whole_blocks_and_survive_finetuning(step: Any, captured: Captured) -> None:
    program, pattern = captured("tiny-bert"), parse_pattern("16x4")
    pruning = step(alpha=1e-3, sparsity=0.5, pattern="16x4", epochs=2, lr=1e-2)
    training = _training(program)
    steps = [PruneNeurons(0.4), pruning, Finetune(2, lr=1e-2)]
    done = Pipeline(steps).run(program, Context(training=replace(training, loss=_squares)))
    blocks, gone = 0, 0
    for part in {p.tensor: p for p in find_parts(axis_groups(done.program)).all}.values():
        matrix = part.matrix(done.program.tensors[part.tensor])
        alive = pattern.units(matrix.abs()) > 0
        assert torch.equal(pattern.spread(alive, *matrix.shape), matrix != 0)
        blocks, gone = blocks + alive.numel(), gone + int((~alive).sum())
    assert gone == int(0.5 * blocks + 0.5)


def _squares(outputs: Any, batch: Any) -> Tensor:
    return logits_of(outputs).square().mean()


@pytest.mark.parametrize("step", [NeuroPrune(0.1, 0.1, None), L1(0.1)], ids=["neuroprune", "l1"])
def test_penalized_blocks_die_whole(step: Any, captured: Captured) -> None:
    """Weights of a block shrink together: more of them are dead than under the plain penalty."""
    program, pattern = captured("tiny-mlp"), parse_pattern("8x4")
    dead = []
    for text in ("unstructured", "8x4"):
        same = replace(step, pattern=text, zero_below=0.0, epochs=40, lr=3e-3)
        training = replace(_training(program), loss=_squares)
        found = Pipeline([same]).run(program, Context(training=training)).program
        norms = [
            pattern.units(p.matrix(found.tensors[p.tensor]).abs()) / math.sqrt(32)
            for p in find_parts(axis_groups(found)).all
        ]
        dead.append(sum(int((n < 1e-2).sum()) for n in norms))
    assert dead[1] > dead[0]


@pytest.mark.parametrize("pattern", ["2:4", "rows", "columns"])
def test_patterns_that_no_penalty_has(pattern: str) -> None:
    with pytest.raises(RecipeError, match="neuroprune acts on single weights or blocks"):
        NeuroPrune(pattern=pattern)
    with pytest.raises(RecipeError, match="there is no pattern"):
        L1(pattern="32x")
