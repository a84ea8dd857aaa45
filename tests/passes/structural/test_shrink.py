"""Zeros become structure, and the outputs stay: closed forms, brute force, every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.sites import consumers
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import Magnitude, Shrink
from graphprune.passes.quantize.quantize import Quantize
from graphprune.pipeline.base import Context

Captured = Callable[[str], Program]


def _shrunk(program: Program) -> tuple[Program, dict[str, Any]]:
    ctx = Context(reference=program)
    ctx.begin("shrink", 0)
    result = Shrink().run(program, ctx)
    assert result.modified == (result.program is not program)
    return result.program, dict(result.report)


def _wide(program: Program) -> Program:
    return program.cast(torch.float32, torch.float64)


def _output(program: Program, *inputs: Tensor) -> Tensor:
    flat = list(inputs) if inputs else list(program.forward.example)
    return program.run(flat)[0]


class _Mlp(nn.Module):
    """Two hidden layers, with whatever zeros and biases."""

    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 6, bias=bias)
        self.third = nn.Linear(6, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x))
        result: Tensor = self.third(self.activation(self.second(hidden)))
        return result


def _mlp(activation: Any = nn.functional.gelu, bias: bool = True, **zeros: Any) -> Program:
    model = _Mlp(activation, bias)
    with torch.no_grad():
        for name, index in zeros.items():
            getattr(model, name).weight[index] = 0
    return _wide(capture(model.eval(), (torch.randn(4, 5),)))


X = torch.randn(9, 5, dtype=torch.float64)
ALL = slice(None)


def test_a_dead_neurons_constant_goes_into_the_next_bias() -> None:
    program = _mlp(first=[2, 5])
    smaller, report = _shrunk(program)
    assert smaller.tensors["first.weight"].shape == (5, 5)
    old = program.tensors
    phi = nn.functional.gelu(old["first.bias"][[2, 5]])
    expected = old["second.bias"] + old["second.weight"][:, [2, 5]] @ phi
    torch.testing.assert_close(smaller.tensors["second.bias"], expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(_output(smaller, X), _output(program, X), rtol=1e-13, atol=1e-14)
    assert report["folded"] == {"first.weight[0]": 2}
    assert report["groups"][0] == {
        "id": "first.weight[0]", "role": "neuron", "before": 7, "after": 5
    }  # fmt: skip


def test_what_nothing_reads_goes_and_leaves_biases_alone() -> None:
    program = _mlp(second=(ALL, [0, 3]))
    smaller, report = _shrunk(program)
    assert smaller.tensors["second.weight"].shape == (6, 5)
    assert torch.equal(smaller.tensors["second.bias"], program.tensors["second.bias"])
    assert report["folded"] == {}


def test_constants_run_on_through_layers() -> None:
    """A row that reads nothing but constants is a constant."""
    program = _mlp(first=[1, 4])
    weight = program.tensors["second.weight"].clone()
    weight[3] = 0
    weight[3, [1, 4]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    program = program.with_tensors({"second.weight": weight})
    smaller, _ = _shrunk(program)
    assert smaller.tensors["second.weight"].shape == (5, 5)
    torch.testing.assert_close(_output(smaller, X), _output(program, X), rtol=1e-13, atol=1e-14)


def test_what_a_removed_unit_alone_fed_goes_in_the_next_round() -> None:
    """Nothing reads unit 2 of the second layer, and nothing else reads unit 6 of the first."""
    program = _mlp(third=(ALL, 2))
    weight = program.tensors["second.weight"].clone()
    weight[[0, 1, 3, 4, 5], 6] = 0
    program = program.with_tensors({"second.weight": weight})
    smaller, report = _shrunk(program)
    assert smaller.tensors["second.weight"].shape == (5, 6)
    assert {g["id"]: g["after"] for g in report["groups"]} == {
        "first.weight[0]": 6, "second.weight[0]": 5
    }  # fmt: skip


def test_without_a_bias_to_take_it_a_constant_stays() -> None:
    program = _mlp(bias=False, first=[2])
    assert _shrunk(program)[0] is program
    # But zero needs no bias.
    zero = program.with_tensors({"first.bias": torch.zeros(7, dtype=torch.float64)})
    assert _shrunk(zero)[0].tensors["first.weight"].shape == (6, 5)


def test_a_neuron_that_only_happens_to_be_silent_stays() -> None:
    program = _mlp(torch.relu)
    bias = program.tensors["first.bias"].clone()
    bias[3] = -1e9
    silent = program.with_tensors({"first.bias": bias})
    assert _shrunk(silent)[0] is silent


def test_one_unit_of_a_dead_layer_stays() -> None:
    program = _mlp(first=ALL)
    smaller, _ = _shrunk(program)
    assert smaller.tensors["first.weight"].shape == (1, 5)
    torch.testing.assert_close(_output(smaller, X), _output(program, X), rtol=1e-13, atol=1e-14)


def test_nothing_dead_nothing_done(captured: Captured) -> None:
    for name in ("tiny-mlp", "tiny-encoder", "tiny-llama"):
        assert _shrunk(captured(name))[0] is captured(name)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_of_single_zeros_exactly_the_whole_rows_and_columns_count(data: st.DataObject) -> None:
    """Against the definition: neuron j goes iff its row is zero or its column is."""
    model = _Mlp(torch.tanh)
    seed = data.draw(st.integers(0, 2**16))
    part = data.draw(st.sampled_from([0.3, 0.6, 0.8]))
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.first, model.second, model.third):
            layer.weight *= torch.rand(layer.weight.shape, generator=drawn) >= part
    program = _wide(capture(model, (torch.randn(4, 5),)))
    smaller, _ = _shrunk(program)
    torch.testing.assert_close(_output(smaller, X), _output(program, X), rtol=1e-12, atol=1e-13)
    first, second, third = (program.tensors[f"{n}.weight"] for n in ("first", "second", "third"))
    # Forwards what is constant, backwards what nothing reads; until nothing changes.
    one = (first != 0).any(1)
    two = (second[:, one] != 0).any(1)
    used_two = (third != 0).any(0) & two
    used_one = (second[used_two] != 0).any(0) & one
    if int(used_two.sum()) and int(used_one.sum()):
        assert smaller.tensors["first.weight"].shape[0] == int(used_one.sum())
        assert smaller.tensors["second.weight"].shape[0] == int(used_two.sum())


@pytest.mark.parametrize(
    "name",
    ["tiny-encoder", "tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5", "tiny-mixtral",
     "tiny-fused-vit", "tiny-cnn"],
)  # fmt: skip
@pytest.mark.slow
def test_every_storage_loses_units_that_are_not_read(name: str, captured: Captured) -> None:
    program = _wide(captured(name))
    groups = axis_groups(program)
    wanted = {}
    for group in groups.with_role("head", "kv_group", "neuron"):
        found = consumers(groups, group)
        if group.frozen or group.normalized or not found:
            continue
        for site, units in found:
            matrix = site.matrix(program).clone()
            matrix[:, units == group.size - 1] = 0
            program = site.with_matrix(program, matrix)
        wanted[group.id] = group.size - 1
    assert wanted or name == "tiny-cnn"
    smaller, report = _shrunk(program)
    after = {g["id"]: g["after"] for g in report["groups"]}
    assert {name: after[name] for name in wanted} == wanted
    for a, b in zip(_every_output(program), _every_output(smaller), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _every_output(program: Program) -> list[Tensor]:
    return list(program.run(list(program.forward.example)))


def test_heads_without_values_and_gates_that_are_shut_go(captured: Captured) -> None:
    program = captured("tiny-llama")
    groups = axis_groups(program)
    neuron = next(g for g in groups.with_role("neuron") if not g.frozen)
    read = {site.tensor for site, _ in consumers(groups, neuron)}
    made = [o for o in neuron.occurrences if o.tensor not in read]
    assert len(made) == 2, "a gate and what it gates"
    changed = {}
    for number, place in enumerate(made):
        weight = program.tensors[place.tensor].clone()
        weight[number] = 0  # the one's gate, the other's product
        changed[place.tensor] = weight
    group = next(g for g in groups.with_role("kv_group") if not g.frozen)
    values = {o.tensor for g in groups.with_role("v_dim") for o in g.occurrences} & {
        o.tensor for o in group.occurrences
    }
    outgoing = {site.tensor for site, _ in consumers(groups, group)}
    (value,) = values - outgoing
    units = groups.units(group, value, 0)
    weight = program.tensors[value].clone()
    weight[units == 0] = 0
    report = _shrunk(program.with_tensors({**changed, value: weight}))[1]
    after = {g["id"]: g["after"] for g in report["groups"]}
    assert after[neuron.id] == neuron.size - 2
    assert after[group.id] == group.size - 1 or group.size == 2
    assert report["folded"] == {}


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_query_or_key_dimension_that_is_zero_takes_the_other_along(side: str) -> None:
    model = _Attention()
    with torch.no_grad():
        for parameter in getattr(model, side).parameters():
            parameter[1::3] = 0  # dimension 1 of all heads
    program = _wide(capture(model, (torch.randn(2, 5, 12),)))
    smaller, report = _shrunk(program)
    assert [(g["role"], g["before"], g["after"]) for g in report["groups"]] == [("qk_dim", 3, 2)]
    torch.testing.assert_close(_output(smaller), _output(program), rtol=1e-11, atol=1e-12)


def test_channels_that_a_convolution_does_not_read_go() -> None:
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        second.weight[:, [0, 6]] = 0
        first.weight[3] = 0  # a constant, which padding could break
    model = nn.Sequential(first, nn.Tanh(), second)
    program = _wide(capture(model, (torch.randn(2, 3, 9, 9),)))
    smaller, _ = _shrunk(program)
    assert smaller.tensors["0.weight"].shape[0] == 6
    torch.testing.assert_close(_output(smaller), _output(program), rtol=1e-11, atol=1e-12)


def test_silent_channels_go_through_a_pooling() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 2, 3, padding=1)
    )
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, -1
    x = torch.randn(3, 1, 8, 8)
    compiled = gp.compile(model.eval(), [Shrink()], example_inputs=(x,))
    assert compiled.program.tensors["3.weight"].shape == (2, 4, 3, 3)
    torch.testing.assert_close(compiled.program.run([x])[0], model(x))


def test_a_bias_that_two_places_add_takes_only_what_both_lose() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
            self.shared = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            a: Tensor = self.shared(torch.tanh(self.one(x)))
            b: Tensor = self.shared(torch.tanh(self.two(x)))
            return a * 2 + b

    model = Twice()
    with torch.no_grad():
        model.one.weight[0] = model.two.weight[0] = 0
    x = torch.randn(3, 4)
    unlike = capture(model, (x,))
    assert _shrunk(unlike)[0] is unlike
    with torch.no_grad():
        model.two.bias[0] = model.one.bias[0]
    alike = _wide(capture(model, (x,)))
    smaller, _ = _shrunk(alike)
    assert smaller.tensors["shared.weight"].shape == (3, 5)
    torch.testing.assert_close(_output(smaller), _output(alike), rtol=1e-13, atol=1e-14)


def test_a_bias_that_something_else_reads_too_takes_nothing() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.two(torch.tanh(self.one(x))) - self.two.bias
            return result

    model = Peeks()
    with torch.no_grad():
        model.one.weight[0] = 0
    program = capture(model, (torch.randn(3, 4),))
    assert _shrunk(program)[0] is program


class _Attention(nn.Module):
    """Attention without a mask; 4 heads of 3 dims."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (4, 3)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


def _attention(change: Callable[[_Attention], None]) -> Program:
    model = _Attention()
    with torch.no_grad():
        change(model)
    return _wide(capture(model, (torch.randn(2, 5, 12),)))


def _sizes(report: dict[str, Any]) -> dict[str, int]:
    return {g["role"]: g["after"] for g in report["groups"]}


def test_a_heads_constant_goes_into_the_output_bias() -> None:
    """Weights of attention sum to one, so values that all keys share come out as they are."""

    def change(model: _Attention) -> None:
        model.value.weight[3:6] = 0  # head 1: its bias alone

    program = _attention(change)
    smaller, report = _shrunk(program)
    assert _sizes(report) == {"head": 3}
    assert report["folded"]
    torch.testing.assert_close(_output(smaller), _output(program), rtol=1e-11, atol=1e-12)


def test_what_two_groups_share_is_folded_once() -> None:
    """Head 0 is constant, and so is value dim 1 of all heads: one feature belongs to both."""

    def change(model: _Attention) -> None:
        model.value.weight[:3] = 0
        model.value.weight[1::3] = 0

    program = _attention(change)
    smaller, report = _shrunk(program)
    assert _sizes(report) == {"head": 3, "v_dim": 2}
    torch.testing.assert_close(_output(smaller), _output(program), rtol=1e-11, atol=1e-12)


def test_axes_keep_their_names_when_one_beside_them_is_down_to_a_unit() -> None:
    def change(model: _Attention) -> None:
        model.out.weight[:, 3:] = 0  # only head 0 is read
        model.query.weight[2] = 0
        model.query.bias[2] = 0
        model.value.weight[1] = 0
        model.value.bias[1] = 0

    program = _attention(change)
    smaller, report = _shrunk(program)
    before = {g.id: g for g in axis_groups(program)}
    for group in report["groups"]:
        assert before[group["id"]].role == group["role"]
        assert before[group["id"]].size == group["before"]
    assert _sizes(report) == {"head": 1, "qk_dim": 2, "v_dim": 2}
    left = {g.id: g.role for g in axis_groups(smaller) if g.role in ("qk_dim", "v_dim")}
    assert left == {g.id: g.role for g in before.values() if g.role in ("qk_dim", "v_dim")}
    torch.testing.assert_close(_output(smaller), _output(program), rtol=1e-11, atol=1e-12)


def test_half_precision_takes_no_constants_but_loses_what_is_silent() -> None:
    model = _Mlp(nn.functional.gelu).to(torch.bfloat16)
    with torch.no_grad():
        model.first.weight[2] = 0
        model.second.weight[:, 4] = 0
    program = capture(model, (torch.randn(4, 5, dtype=torch.bfloat16),))
    smaller, report = _shrunk(program)
    assert smaller.tensors["first.weight"].shape == (6, 5)
    assert smaller.tensors["first.weight"].dtype is torch.bfloat16
    assert ["too coarse" in entry["reason"] for entry in report["skipped"]] == [True]


@pytest.mark.slow
def test_key_value_groups_go_from_a_cache_too() -> None:
    module, inputs = tiny("tiny-llama")
    cached = gp.compile(module, [], example_inputs=inputs, cache=True).program
    groups = axis_groups(cached)
    group = next(g for g in groups.with_role("kv_group") if not g.frozen)
    for site, units in consumers(groups, group):
        if site.entry == "forward":
            matrix = site.matrix(cached).clone()
            matrix[:, units == 0] = 0
            cached = site.with_matrix(cached, matrix)
    compiled = gp.compile(cached, [Shrink()])  # the pipeline compares both entries
    after = {g["id"]: g["after"] for g in compiled.report.passes[-1].details["groups"]}
    assert after == {group.id: group.size - 1}


def test_constants_that_stay_are_told() -> None:
    report = _shrunk(_mlp(bias=False, first=[2]))[1]
    (skipped,) = report["skipped"]
    assert skipped["units"] == 1
    assert "no bias" in skipped["reason"]


def test_what_cannot_go_is_reported(captured: Captured) -> None:
    program = captured("tiny-encoder")
    groups = axis_groups(program)
    residual = groups.with_role("residual")[0]
    for site, units in consumers(groups, residual):
        matrix = site.matrix(program).clone()
        matrix[:, units == 3] = 0
        program = site.with_matrix(program, matrix)
    found = _shrunk(program)[1]
    assert all(entry["features"] >= 1 for entry in found["unread"])
    assert found["unread"]
    names = {name for entry in found["unread"] for name in entry["read_by"]}
    assert names == {site.name for site, _ in consumers(groups, residual)}


def test_rows_that_magnitude_zeroed_become_a_smaller_model(captured: Captured) -> None:
    """The way from zeros to speed: rows of the first feed-forward weights, then Shrink."""
    program = captured("tiny-encoder")
    groups = axis_groups(program)
    neuron = next(g for g in groups.with_role("neuron") if not g.frozen)
    up = next(o.tensor for o in neuron.occurrences if program.tensors[o.tensor].dim() == 2)
    zeroed = gp.compile(program, [Magnitude(0.5, pattern="rows", targets=(up,))])
    both = gp.compile(program, [Magnitude(0.5, pattern="rows", targets=(up,)), Shrink()])
    assert axis_groups(both.program)[neuron.id].size == neuron.size // 2
    torch.testing.assert_close(_output(both.program), _output(zeroed.program), rtol=1e-5, atol=1e-6)


def test_marked_for_quantization_is_refused(captured: Captured) -> None:
    with pytest.raises(gp.GraphPruneError, match="quantiz"):
        gp.compile(captured("tiny-encoder"), [Quantize("int8-dynamic"), Shrink()])
