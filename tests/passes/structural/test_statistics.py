"""Removal that looks at data: identities of scores and compensation, on real little models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.calibration.stream import Stream
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.history import kept_indices
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.passes.structural.scores import Evidence, Fluctuation, Obs, taylor_scores
from graphprune.passes.structural.statistics import (
    COMPENSATIONS,
    compensate,
    gather,
)
from graphprune.pipeline.base import Context
from graphprune.verify.error import relative_error

Captured = Callable[[str], Program]


def batches_of(program: Program, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        batch = {}
        for name, example in zip(program.forward.input_names, program.forward.example, strict=True):
            if example.is_floating_point():
                batch[name] = torch.randn(example.shape, generator=generator)
            elif "mask" in name:
                batch[name] = example
            else:
                batch[name] = torch.randint(3, 99, example.shape, generator=generator)
        result.append(batch)
    return result


def drift(program: Program, other: Program, batches: list[dict[str, Tensor]]) -> float:
    """Mean squared difference of the first output over the batches, as a fraction of its square."""
    error = energy = 0.0
    for batch in batches:
        flat = [batch[n] for n in program.forward.input_names]
        a, b = program.run(flat)[0], other.run(flat)[0]
        error += float((a - b).square().sum())
        energy += float(a.square().sum())
    return error / energy


@pytest.mark.parametrize(
    "name", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5", "tiny-mixtral", "tiny-encoder"]
)
@pytest.mark.slow
def test_every_storage_is_found_cut_and_compensated(name: str, captured: Captured) -> None:
    program = captured(name)
    batches = batches_of(program)
    compiled = gp.compile(
        program, [PruneHeads(0.5, score="obs"), PruneNeurons(0.5, score="obs")], calibration=batches
    )
    plain = gp.compile(program, [PruneHeads(0.5), PruneNeurons(0.5)])
    assert compiled.program.num_parameters() == plain.program.num_parameters()
    for result in compiled.report.passes:
        assert result.details["verification"]["max_error"] <= 1e-5
    assert drift(program, compiled.program, batches) < drift(program, plain.program, batches)


@pytest.mark.parametrize("score", ["obs", "fluctuation", "activation", "taylor", "magnitude"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_scores_and_allocations_combine(score: str, allocation: str, captured: Captured) -> None:
    program = captured("tiny-bert")
    step = PruneNeurons(0.5, score=score, allocation=allocation, compensate="least-squares")
    compiled = gp.compile(program, [step], calibration=batches_of(program))
    groups = axis_groups(compiled.program).with_role("neuron")
    assert sum(g.size for g in groups) == 64
    if allocation == "uniform":
        assert [g.size for g in groups] == [32, 32]
    for curve in compiled.report.passes[0].details["score_curves"].values():
        assert 1 < len(curve) <= 64
        assert 0 <= min(curve) <= max(curve) <= 1


class Duplicates(nn.Module):
    """Neurons in pairs that compute the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.a.weight[4:] = self.a.weight[:4]
            self.a.bias[4:] = self.a.bias[:4]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(x)))
        return result


def test_of_two_equal_neurons_one_goes_for_free() -> None:
    x = torch.randn(200, 6)
    program = capture(Duplicates(), (x[:5],))
    step = PruneNeurons(0.5, score="obs", damping=1e-9)
    compiled = gp.compile(program, [step], calibration=[x])
    assert relative_error(program.run([x])[0], compiled.program.run([x])[0]) < 1e-4
    plain = gp.compile(program, [PruneNeurons(0.5)])
    assert relative_error(program.run([x])[0], plain.program.run([x])[0]) > 1e-2


class Dead(nn.Module):
    """Two layers read 24 neurons, of which four alone ever fire."""

    def __init__(self, scale: float, readers: int) -> None:
        super().__init__()
        self.a = nn.Linear(6, 24)
        self.readers = nn.ModuleList(nn.Linear(24, 5) for _ in range(readers))
        with torch.no_grad():
            self.a.weight[:20], self.a.bias[:20] = 0, -1
            self.a.weight[20:] *= scale
            self.a.bias[20:] *= scale

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.relu(self.a(x))
        return [read(hidden) for read in self.readers]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("damping", [0.01, 0.0])
@pytest.mark.parametrize(("scale", "readers"), [(1.0, 1), (0.01, 2)])
def test_dead_neurons_go_and_the_live_ones_stay(
    scale: float, readers: int, damping: float, allocation: str
) -> None:
    model, x = Dead(scale, readers), torch.randn(300, 6)
    program = capture(model, (x[:5],))
    step = PruneNeurons(0.75, score="obs", damping=damping, allocation=allocation)
    compiled = gp.compile(program, [step], calibration=[x])
    (kept,) = kept_indices(compiled.program.history).values()
    assert set(kept) >= {20, 21, 22, 23}
    for before, after in zip(program.run([x]), compiled.program.run([x]), strict=True):
        assert relative_error(before, after) < 1e-5
    error = compiled.report.passes[0].details["output_error"]
    assert max(error.values()) < 1e-10
    # Least squares has nothing to say of a dead neuron that stays.
    small, wide = (p.tensors["readers.0.weight"] for p in (compiled.program, program))
    torch.testing.assert_close(small[:, :2], wide[:, kept[:2]])


def test_dead_units_cost_nothing_and_are_no_output_either() -> None:
    """What a unit costs is a fraction of the output of the units that make one."""
    model, x = Dead(1.0, 1), torch.randn(300, 6)
    program = capture(model, (x[:5],))
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    parts = gather(Stream(program, [x]), program, groups, group, Context())
    costs = Obs().score(Evidence(program, group, Context(), parts, 0.01))
    assert not costs[:20].any()
    assert (costs[20:] > 0).all()
    alone = program.with_tensors(
        {"readers.0.weight": program.tensors["readers.0.weight"].index_fill(
            1, torch.arange(20), 0
        )}
    )  # fmt: skip
    again = Obs().score(Evidence(alone, group, Context(), parts, 0.01))
    torch.testing.assert_close(costs, again)


class Difference(nn.Module):
    """The output is the difference of two inputs, which are nearly alike, and of a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(3))
            self.b.weight.copy_(torch.tensor([[5.0, -5.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x))
        return result


def _difference() -> tuple[Program, Tensor]:
    common, noise = torch.randn(500, 1), 0.1 * torch.randn(500, 2)
    x = torch.cat([common + noise, torch.randn(500, 1)], 1)
    return capture(Difference(), (x[:5],)), x


def test_marginal_costs_rise_along_the_order_of_removal() -> None:
    """Once one of two is gone the other is of no use; it does not count as cheaper for that."""
    program, x = _difference()
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    parts = gather(Stream(program, [x]), program, groups, group, Context())
    seen = Evidence(program, group, Context(), parts, 1e-6)
    order, costs = Obs().order(seen, 2)
    assert sorted(order.tolist()) == [0, 1]
    assert costs[1] < costs[0] / 2
    found = Obs().score(seen)
    assert found[order[0]] == found[order[1]] == found[2]
    output = program.run([x])[0].double().square().sum()
    assert float(found[order[0]]) == pytest.approx(float(costs[0] / output), rel=1e-3)


def test_fluctuation_is_the_squared_error_when_means_are_kept() -> None:
    """Σ over all rows that a weight has seen, so that weights which see more rows count more."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return self.b(h), self.c(h.amax(1))

    model, x = Pooled(), torch.randn(10, 7, 6)
    program = capture(model, (x,))
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    parts = gather(Stream(program, [x[:4], x[4:]]), program, groups, group, Context())
    hidden = torch.relu(model.a(x)).detach().double()
    expected = torch.zeros(8, dtype=torch.float64)
    for rows, read in ((hidden.flatten(0, 1), model.b), (hidden.amax(1), model.c)):
        away = (rows - rows.mean(0)).square().sum(0)
        expected += away * read.weight.detach().double().square().sum(0)
    found = Fluctuation().score(Evidence(program, group, Context(), parts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", COMPENSATIONS)
def test_the_predicted_error_is_the_measured_one(method: str) -> None:
    """compensate() knows the error from the Gram matrix alone; running the layer agrees."""
    model, x = Duplicates(), torch.randn(300, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    program = capture(model, (x[:5],))
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    parts = gather(Stream(program, [x]), program, groups, group, Context())
    keep = torch.tensor([0, 2, 5])
    changed, predicted = compensate(program, group, parts, keep, method, 0.0)
    before, after = program.run([x])[0].double(), changed.run([x])[0].double()
    measured = float((before - after).square().sum() / before.square().sum())
    assert predicted == pytest.approx(measured, rel=1e-3)
    if method != "none":  # the bias takes the mean along: FLAP, and the column of ones
        torch.testing.assert_close(before.mean(0), after.mean(0), rtol=1e-3, atol=1e-4)


def test_a_weight_with_two_biases_is_fitted_once_and_leaves_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return self.b(h), self.c(h * h)

    x = torch.randn(100, 6)
    program = capture(Shared(), (x[:5],))
    compiled = gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[x])
    for name in ("b.bias", "c.bias"):
        assert torch.equal(compiled.program.tensors[name], program.tensors[name])


def test_least_squares_is_the_best_of_the_three() -> None:
    model, x = Duplicates(), torch.randn(300, 6)
    with torch.no_grad():
        model.b.weight.normal_()
    program = capture(model, (x[:5],))
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    parts = gather(Stream(program, [x]), program, groups, group, Context())
    keep = torch.tensor([1, 4, 7])
    none, bias, fitted = (
        compensate(program, group, parts, keep, method, 1e-9)[1] for method in COMPENSATIONS
    )
    assert fitted <= bias <= none


def test_taylor_is_the_derivative_by_a_gate() -> None:
    """Σ g·w over a unit's columns is what closing its gate a little does to the output."""
    model, x = Duplicates(), torch.randn(7, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    program = capture(model, (x,))
    groups = axis_groups(program)
    group = groups["a.weight[0]"]
    context = Context(calibration=[x], seed=3)
    context.begin("test", 0)
    found = taylor_scores(program, groups, [group], context)[group.id]
    context.begin("test", 0)
    hidden = torch.relu(model.a(x)).detach().double()
    expected = torch.zeros(8, dtype=torch.float64)
    for _ in range(2):
        direction = torch.randn(7, 4, generator=context.generator).double() / 28**0.5
        gates = torch.ones(8, dtype=torch.float64, requires_grad=True)
        weight = model.b.weight.detach().double()
        ((hidden * gates) @ weight.T * direction).sum().backward()
        assert gates.grad is not None
        expected += gates.grad.square()
    torch.testing.assert_close(found, expected.sqrt(), rtol=1e-4, atol=1e-5)


def test_taylor_uses_the_loss_of_a_model_captured_with_labels() -> None:
    class Labeled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Duplicates()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            loss = nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    model, x = Labeled(), torch.randn(7, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    batch = {"x": x, "labels": torch.arange(7) % 4}
    program = capture(model, batch)
    groups = axis_groups(program)
    group = groups["inner.a.weight[0]"]
    found = taylor_scores(program, groups, [group], Context(calibration=[batch]))[group.id]
    hidden = torch.relu(model.inner.a(x)).detach()
    gates = torch.ones(8, requires_grad=True)
    logits = model.inner.b(hidden * gates)
    nn.functional.cross_entropy(logits, batch["labels"]).backward()
    assert gates.grad is not None
    torch.testing.assert_close(found, gates.grad.abs().double(), rtol=1e-4, atol=1e-6)


def test_later_layers_are_fitted_to_what_the_pruned_ones_make(captured: Captured) -> None:
    """Sequential: the second layer's statistics come from the cut first layer."""
    program = captured("tiny-bert")
    batches = batches_of(program)
    both = gp.compile(program, [PruneNeurons(0.75, score="obs")], calibration=batches)
    apart: Any = program
    for layer in (0, 1):
        step = PruneNeurons(0.75, score="obs", targets=(f"encoder.layer.{layer}",))
        apart = gp.compile(apart, [step], calibration=batches).program
    for name, tensor in both.program.tensors.items():
        torch.testing.assert_close(tensor, apart.tensors[name], rtol=1e-3, atol=1e-4)


def test_fewer_rows_than_features_are_told(captured: Captured) -> None:
    program = captured("tiny-bert")
    few = [{k: v[:1, :3] for k, v in batches_of(program, 1)[0].items()}]
    compiled = gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=few)
    notes = compiled.report.passes[0].details["warnings"]
    (note,) = notes
    first, second = (f"encoder.layer.{i}.output.dense.weight" for i in range(2))
    assert note.startswith(f"{first} and 1 more: 3 calibration rows for 64 features")
    assert second not in note


class Summed(nn.Module):
    """A sum reads the hidden units beside a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        result: Tensor = self.b(hidden) + hidden.sum(-1, keepdim=True)
        return result


def test_what_is_no_linear_consumer_is_refused() -> None:
    x = torch.randn(20, 6)
    program = capture(Summed(), (x,))
    with pytest.raises(UnsupportedError, match=r"`sum.*score='magnitude'"):
        gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[x])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "obss"}, "there is no score 'obss'; did you mean"),
        ({"compensate": "bais"}, "there is no compensation 'bais'; did you mean 'bias'"),
        ({"damping": -1.0}, "damping must be 0 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PruneNeurons(0.5, **options)


def test_data_is_needed_where_data_decides(captured: Captured) -> None:
    with pytest.raises(RecipeError, match="calibration"):
        gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5, score="obs")])


def test_too_little_rank_says_what_helps() -> None:
    program = capture(Duplicates(), (torch.randn(5, 6),))
    step = PruneNeurons(0.5, score="obs", damping=0.0)
    with pytest.raises(UnsupportedError, match="raise damping"):
        gp.compile(program, [step], calibration=[torch.randn(2, 6)])


def test_all_padding_and_broken_weights_are_told(captured: Captured) -> None:
    program = captured("tiny-bert")
    batch = batches_of(program, 1)[0]
    empty = {k: torch.zeros_like(v) if "mask" in k else v for k, v in batch.items()}
    with pytest.raises(UnsupportedError, match="no calibration row reaches"):
        gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[empty])
    name = "encoder.layer.0.output.dense.weight"
    broken = program.with_tensors({name: program.tensors[name] * float("nan")})
    with pytest.raises(UnsupportedError, match="hold NaN or infinity"):
        gp.compile(broken, [PruneNeurons(0.5, score="obs")], calibration=[batch])


@pytest.mark.parametrize("score", ["obs", "fluctuation", "taylor"])
@pytest.mark.slow
def test_a_decoder_with_its_cache_loses_the_same_units(score: str, captured: Captured) -> None:
    """The weights of both entries are chosen and fitted once, by what flows through `forward`."""
    module, inputs = tiny("tiny-llama")
    batches = batches_of(captured("tiny-llama"))
    steps = [PruneHeads(0.5, score=score), PruneNeurons(0.25, score=score)]
    plain, cached = (
        gp.compile(module, steps, example_inputs=inputs, calibration=batches, cache=cache).program
        for cache in (False, True)
    )
    assert set(cached.entries) == {"forward", "decode"}
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(cached.tensors[name], tensor)
