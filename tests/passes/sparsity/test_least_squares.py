"""LeastSquares: the closed forms by other hands, zeros that stay, and errors that only fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.passes import (
    GradualStructure,
    LeastSquares,
    Magnitude,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Wanda,
)
from graphprune.passes.sparsity.least_squares import solve_masked
from graphprune.passes.training.penalties import site_dims
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training

Captured = Callable[[str], Program]


def _rows(count: int, seed: int = 0, batches: int = 3) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    shape = (count // batches, 12)
    return [{"x": torch.randn(shape, generator=drawn, dtype=torch.float64)} for _ in range(batches)]


def _texts(program: Program, seed: int, count: int = 12) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return [
        {
            name: mask if "mask" in name else torch.randint(3, 60, (4, 8), generator=drawn)
            for name in program.forward.input_names
        }
        for _ in range(count)
    ]


def _mlp(captured: Captured) -> Program:
    return captured("tiny-mlp").cast(torch.float32, torch.float64)


def _refitted(
    program: Program, dense: Program, batches: Sequence[Any], step: LeastSquares | None = None
) -> Any:
    context = Context(reference=dense, calibration=batches)
    return Pipeline([step or LeastSquares()]).run(program, context)


def _pruned(dense: Program, *passes: Any, calibration: Any = None) -> Program:
    context = Context(reference=dense, calibration=calibration)
    return Pipeline(passes).run(dense, context).program


def _seen(program: Program, tensor: str, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of the site of a weight, by running the whole graph."""
    (site,) = (s for s in linear_sites(axis_groups(program)) if s.tensor == tensor)
    names = [site.operand.name, site.node.name]
    recorder = ProgramModule(program, record=names)
    inputs, outputs = [], []
    with torch.no_grad():
        for batch in batches:
            recorder(**batch)
            inputs.append(recorder.recorded[names[0]].flatten(0, -2))
            outputs.append(recorder.recorded[names[1]].flatten(0, -2))
    return torch.cat(inputs), torch.cat(outputs)


# --- closed forms ------------------------------------------------------------------------------


def test_a_layer_that_lost_inputs_is_numpys_least_squares(captured: Captured) -> None:
    dense, batches = _mlp(captured), _rows(120)
    program = _pruned(dense, PruneNeurons(0.5, targets=("layers.0",)))
    name = "layers.2"
    result = _refitted(program, dense, batches, LeastSquares(0.0, targets=(name,)))
    x, _ = _seen(program, f"{name}.weight", batches)
    _, y = _seen(dense, f"{name}.weight", batches)
    assert x.shape[1] < _seen(dense, f"{name}.weight", batches)[0].shape[1]
    ones = np.concatenate([x.numpy(), np.ones((len(x), 1))], 1)
    expected = np.linalg.lstsq(ones, y.numpy(), rcond=None)[0].T
    found = result.program.tensors
    np.testing.assert_allclose(found[f"{name}.weight"], expected[:, :-1], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found[f"{name}.bias"], expected[:, -1], rtol=1e-8, atol=1e-9)
    (report,) = result.results[0].report["sites"]
    error = np.square(y.numpy() - ones @ expected.T).sum() / np.square(y.numpy()).sum()
    assert report["error"] == pytest.approx(error, rel=1e-8)
    assert report["error_before"] > 1.5 * report["error"]
    assert report["steps"] == 0


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_weights_of_dead_inputs_stay_and_the_others_are_fitted_without_them(
    sparsity: float, damping: float, captured: Captured
) -> None:
    """Dead neurons are correlated with nothing: both solvers leave their columns as they are."""
    dense, batches = _mlp(captured), _rows(120)
    weight, bias = (dense.tensors[f"layers.0.{kind}"].clone() for kind in ("weight", "bias"))
    weight[::3], bias[::3] = 0, -1
    dense = dense.with_tensors({"layers.0.weight": weight, "layers.0.bias": bias})
    passes = [PruneNeurons(0.4, "random", targets=("layers.0",))]
    program = _pruned(dense, *passes, *([Magnitude(sparsity)] if sparsity else []))
    name = "layers.2.weight"
    x, _ = _seen(program, name, batches)
    dead = ~x.any(0)
    assert 0 < int(dead.sum()) < len(dead)
    step = LeastSquares(damping, targets=(name,))
    result = _refitted(program, dense, batches, step)
    old, new = program.tensors[name], result.program.tensors[name]
    assert new[:, dead].equal(old[:, dead])
    assert not new[:, ~dead].equal(old[:, ~dead])
    # As if the columns were none: the same fit of the others.
    without = program.with_tensors({name: old.masked_fill(dead, 0)})
    other = _refitted(without, dense, batches, step).program.tensors[name]
    torch.testing.assert_close(new[:, ~dead], other[:, ~dead], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_masked_rows_are_least_squares_on_their_supports(
    damping: float, captured: Captured
) -> None:
    """Row by row; damping holds the weights, not the bias, as extra rows of the system do."""
    dense, batches = _mlp(captured), _rows(150)
    program = _pruned(dense, Magnitude(0.6))
    name = "layers.2"
    result = _refitted(program, dense, batches, LeastSquares(damping, targets=(name,)))
    x, now = _seen(program, f"{name}.weight", batches)
    _, y = _seen(dense, f"{name}.weight", batches)
    weight, bias = program.tensors[f"{name}.weight"], program.tensors[f"{name}.bias"]
    level = damping * float(x.square().sum(0).mean())
    found = result.program.tensors[f"{name}.weight"]
    assert torch.equal(found == 0, weight == 0)
    for row in range(len(weight)):
        alive = (weight[row] != 0).nonzero().flatten()
        count = len(alive)
        system = np.zeros((len(x) + count, count + 1))
        system[: len(x), :count] = x[:, alive]
        system[: len(x), count] = 1
        system[len(x) :, :count] = np.sqrt(level) * np.eye(count)
        target = np.concatenate([(y - now)[:, row], np.zeros(count)])
        change = np.linalg.lstsq(system, target, rcond=None)[0]
        expected = weight[row, alive].numpy() + change[:-1]
        np.testing.assert_allclose(found[row, alive], expected, rtol=1e-5, atol=1e-6)
        moved = float(result.program.tensors[f"{name}.bias"][row] - bias[row])
        assert moved == pytest.approx(change[-1], rel=1e-4, abs=1e-6)


def test_both_solvers_find_the_same_and_singular_systems_have_a_solution() -> None:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=drawn, dtype=torch.float64)
    x[:, 3] *= 100
    gram = x.T @ x
    slope = torch.randn(7, 12, generator=drawn, dtype=torch.float64)
    exact, none = solve_masked(gram, slope, None)
    found, steps = solve_masked(gram, slope, torch.ones(7, 12, dtype=torch.bool))
    torch.testing.assert_close(exact, torch.linalg.solve(gram, slope.T).T)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    assert none == 0
    assert 0 < steps <= 14
    # Twice the same feature: any split between the two will do.
    double = torch.cat([x, x[:, :1]], 1)
    wide = double.T @ double
    right = torch.randn(7, 50, generator=drawn, dtype=torch.float64) @ double
    found, _ = solve_masked(wide, right, None)
    torch.testing.assert_close(found @ wide, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "step", "target"),
    [
        ("tiny-encoder", PruneNeurons(0.5), "neuron"),
        ("tiny-encoder", PruneHeads(0.5), "head"),
        ("tiny-gpt2", PruneHeads(0.5), "head"),
        ("tiny-llama", PruneHeads(0.5), "kv_group"),
    ],
    ids=lambda p: getattr(p, "name", p),
)
@pytest.mark.slow
def test_what_is_left_of_a_cut_layer_finds_its_own_rows(
    model: str, step: Any, target: str, captured: Captured
) -> None:
    """Cut twice, then spoilt: the inputs are the dense ones, so nothing of the error is left.

    Outputs are compared: behind a layer norm several weights give the same ones.
    """
    dense = captured(model).cast(torch.float32, torch.float64)
    program = _pruned(dense, step, replace(step, score="random", ratio=0.34))
    group = axis_groups(dense).with_role(target)[0]
    named = {o.tensor for o in group.occurrences}
    site = next(s for s in linear_sites(axis_groups(program)) if s.tensor in named)
    exact = program.tensors[site.tensor]
    drawn = torch.Generator().manual_seed(2)
    noise = torch.randn(exact.shape, generator=drawn, dtype=exact.dtype)
    spoilt = program.with_tensors({site.tensor: exact + 0.1 * noise})
    batches = _texts(dense, 5, 40)
    result = _refitted(spoilt, dense, batches, LeastSquares(0.0, targets=(site.tensor,)))
    (report,) = result.results[0].report["sites"]
    assert report["error_before"] > 1e-3
    assert report["error"] < 1e-9
    (_, found), (_, expected) = (
        _seen(p, site.tensor, batches[:1]) for p in (result.program, program)
    )
    keep = batches[0]["attention_mask"].bool().flatten()
    torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=1e-3)


# --- on models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-gpt2", "tiny-llama", "tiny-fused-vit"])
def test_without_pruning_nothing_changes(model: str, captured: Captured) -> None:
    program = captured(model)
    if model == "tiny-fused-vit":
        batches = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(2)]
    else:
        batches = _texts(program, 0, 3)
    result = _refitted(program, program, batches)
    assert not result.modified
    report = result.results[0].report
    assert report["sites"]
    assert all(site["error_before"] == 0 for site in report["sites"])


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(
    "passes",
    [
        (Magnitude(0.6),),
        (Magnitude(pattern="2:4"),),
        (PruneNeurons(0.5),),
        (PruneHeads(0.5), PruneNeurons(0.3), Wanda(0.3)),
    ],
    ids=lambda ps: "+".join(p.name for p in ps),
)
@pytest.mark.slow
def test_the_model_comes_nearer_to_the_dense_one(
    passes: Any, model: str, captured: Captured
) -> None:
    dense = captured(model)
    batches = _texts(dense, 0)
    program = _pruned(dense, *passes, calibration=batches)
    result = _refitted(program, dense, batches)
    report = result.results[0].report
    assert report["skipped"] == [] or all("head" in s["reason"] for s in report["skipped"])
    for site in report["sites"]:
        assert site["error"] <= site["error_before"]
    # On rows that it has not seen.
    test = _texts(dense, 99, 6)

    def distance(now: Program) -> float:
        pairs = [(logits_of(now(**b)), logits_of(dense(**b))) for b in test]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    assert distance(result.program) < 0.85 * distance(program)
    for name in program.zeroed:
        zeros = program.tensors[name] == 0
        assert bool((result.program.tensors[name][zeros] == 0).all())
    assert result.program.zeroed == program.zeroed


def test_errors_are_those_of_the_final_model_on_these_rows(captured: Captured) -> None:
    """Each layer was fitted on what the final ones before it make."""
    dense, batches = _mlp(captured), _rows(90)
    program = _pruned(dense, PruneNeurons(0.5))
    result = _refitted(program, dense, batches)
    reports = {site["name"]: site for site in result.results[0].report["sites"]}
    assert set(reports) == {"layers.0.weight", "layers.2.weight"}
    _, mine = _seen(result.program, "layers.2.weight", batches)
    _, theirs = _seen(dense, "layers.2.weight", batches)
    kept = program.history[-1]["steps"][0]["removed"]["layers.2.weight[0]"]["kept"]
    wanted = theirs[:, kept]
    error = float((mine - wanted).square().sum() / wanted.square().sum())
    assert reports["layers.2.weight"]["error"] == pytest.approx(error, rel=1e-8)


class _Shared(nn.Module):
    """One weight at three places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.again = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(3):
            x = x + self.again(x).tanh()
        return torch.tanh(self.last(x)).sum(-1, keepdim=True) + x


def test_a_shared_weight_is_fitted_for_all_of_its_places() -> None:
    torch.manual_seed(0)
    dense = capture(_Shared().double(), (torch.randn(6, 12, dtype=torch.float64),))
    batches = _rows(150)
    program = _pruned(dense, Magnitude(0.5, targets=("again",)))
    result = _refitted(program, dense, batches, LeastSquares(0.0, targets=("again",)))
    sites = [s for s in linear_sites(axis_groups(program)) if s.tensor == "again.weight"]
    assert len(sites) == 3
    x, y = [], []
    for site in sites:
        names = [site.operand.name, site.node.name]
        small, large = (ProgramModule(p, record=names) for p in (program, dense))
        with torch.no_grad():
            for batch in batches:
                small(**batch)
                large(**batch)
                x.append(small.recorded[names[0]])
                y.append(large.recorded[names[1]] - dense.tensors["again.bias"])
    inputs, outputs = torch.cat(x).numpy(), torch.cat(y).numpy()
    weight = program.tensors["again.weight"]
    found = result.program.tensors["again.weight"]
    for row in range(16):
        alive = (weight[row] != 0).nonzero().flatten()
        expected = np.linalg.lstsq(inputs[:, alive], outputs[:, row], rcond=None)[0]
        np.testing.assert_allclose(found[row, alive], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(result.program.tensors["again.bias"], dense.tensors["again.bias"])


def test_what_is_left_alone_is_told(captured: Captured) -> None:
    dense = captured("tiny-mlp")
    batches = [{"x": torch.randn(9, 12)} for _ in range(3)]
    program = _pruned(dense, PruneNeurons(0.5))
    # As if another tool had cut it: no record of what went.
    silent = replace(program, history=())
    report = _refitted(silent, dense, batches).results[0].report
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    assert reasons["layers.0.weight"] == "which of its output units are left is not on record"
    named = _refitted(program, dense, batches, LeastSquares(ignore=("layers.2",)))
    reasons = {s["name"]: s["reason"] for s in named.results[0].report["skipped"]}
    assert reasons["layers.2.weight"] == "ignored on request"


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-gpt2"])
def test_dims_that_each_head_has_its_own_of_are_left_alone(model: str, captured: Captured) -> None:
    """No record says which they are; the layers that read them are fitted like all others."""
    dense = captured(model)
    batches = _texts(dense, 0)
    training = Training(batches, loss=lambda outputs, _: logits_of(outputs).square().mean())
    step = GradualStructure(0.55, epochs=1, lr=1e-6, begin=0, end=0.5, roles=("qk_dim", "v_dim"))
    context = Context(reference=dense, training=training)
    program = Pipeline([step, PruneNeurons(0.25)]).run(dense, context).program
    dims = axis_groups(dense).with_role("qk_dim", "v_dim")
    places = {(o.tensor, o.dim) for group in dims for o in group.occurrences}
    rows = {s.name: (s.tensor, site_dims(s)[0]) for s in linear_sites(axis_groups(dense))}
    cut = {
        name
        for name, (tensor, dim) in rows.items()
        if dense.tensors[tensor].shape[dim] != program.tensors[tensor].shape[dim]
    }
    silent = {name for name in cut if rows[name] in places}
    assert silent
    assert cut - silent
    report = _refitted(program, dense, batches).results[0].report
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    assert {reasons.get(name) for name in silent} == {
        "which of its output units are left is not on record"
    }
    errors = {site["name"]: site["error_before"] for site in report["sites"]}
    assert errors.keys() >= rows.keys() - silent - reasons.keys() >= cut - silent
    assert not errors.keys() & silent
    # The neurons that are left are compared with their own, not with the first ones.
    assert max(errors[name] for name in cut - silent) < 0.1


def test_experts_and_tied_tables_are_left_alone(captured: Captured) -> None:
    dense = captured("tiny-gpt2")
    program = _pruned(dense, PruneNeurons(0.5))
    (head,) = (s for s in linear_sites(axis_groups(program)) if s.tensor.endswith("wte.weight"))
    step = LeastSquares(targets=(head.tensor,))
    report = _refitted(program, dense, _texts(dense, 0), step).results[0].report
    assert report["skipped"] == [{"name": head.name, "reason": "it is a table of embeddings too"}]
    assert report["summary"] == "refitted 0 of 0 matrices"


def test_residual_width_that_was_cut_is_mapped_too(captured: Captured) -> None:
    dense = captured("tiny-encoder")
    program = _pruned(dense, PruneAxis(0.25, role="residual", normalized=True))
    report = _refitted(program, dense, _texts(dense, 0)).results[0].report
    assert all("head" in s["reason"] for s in report["skipped"])
    assert sum(site["error"] for site in report["sites"]) < 0.7 * sum(
        site["error_before"] for site in report["sites"]
    )


def test_bfloat16_gets_better_as_bfloat16(captured: Captured) -> None:
    dense = captured("tiny-llama").cast(torch.float32, torch.bfloat16)
    program = _pruned(dense, Magnitude(0.5))
    batches = _texts(dense, 0, 4)
    result = _refitted(program, dense, batches)
    assert {t.dtype for t in result.program.tensors.values() if t.is_floating_point()} == {
        t.dtype for t in dense.tensors.values() if t.is_floating_point()
    }
    assert result.results[0].report["summary"].startswith("refitted ")
    assert any(site["fitted"] for site in result.results[0].report["sites"])


# --- refusals ----------------------------------------------------------------------------------


def test_refusals(captured: Captured) -> None:
    program = captured("tiny-mlp")
    with pytest.raises(RecipeError, match="damping must be 0 or more"):
        LeastSquares(-1)
    with pytest.raises(RecipeError, match="needs calibration batches"):
        Pipeline([LeastSquares()]).run(program)
    ctx = Context(calibration=[{"x": torch.ones(2, 12)}])
    with pytest.raises(RecipeError, match="no reference"):
        LeastSquares().run(program, ctx)
    with pytest.raises(RecipeError, match="'nowhere' matches nothing"):
        _refitted(program, program, [{"x": torch.ones(2, 12)}], LeastSquares(targets=("nowhere",)))
    quantized = Pipeline([Quantize("int8-dynamic")]).run(program).program
    with pytest.raises(UnsupportedError, match="quanti"):
        _refitted(quantized, program, [{"x": torch.ones(2, 12)}])
    nan = program.tensors["layers.2.weight"].clone()
    nan[0, 0] = float("nan")
    spoilt = program.with_tensors({"layers.2.weight": nan})
    with pytest.raises(UnsupportedError, match=r"weight 'layers\.2\.weight', or .* NaN"):
        _refitted(spoilt, program, [{"x": torch.randn(9, 12)}])
