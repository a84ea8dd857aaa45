"""MergeLora: a layer and what adapters add to it are one layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import MergeLora, PruneAxis, PruneNeurons

RANK = 3


class Adapted(nn.Module):
    """A layer from 8 to 12 features with an adapter, written in one of several ways."""

    def __init__(self, way: str = "linear") -> None:
        super().__init__()
        self.way = way
        self.base = nn.Linear(8, 12)
        self.down, self.up = nn.Linear(8, RANK, bias=False), nn.Linear(RANK, 12, bias=False)
        self.more_down, self.more_up = nn.Linear(8, 2), nn.Linear(2, 12)
        self.magnitude = nn.Parameter(torch.rand(12) + 0.5)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.gelu(self.adapted(x)))
        return result

    def adapted(self, x: Tensor) -> Tensor:
        y, narrow = self.base(x), self.down(self.drop(x))
        added: Tensor = self.up(narrow)
        if self.way == "scaled inside":
            return self.up(narrow * 0.5) / 4 + y
        if self.way == "two":
            return y + 2 * added + self.more_up(self.more_down(x)) * 0.3
        if self.way == "subtracted":
            return torch.sub(y, added, alpha=3)
        if self.way == "stored the other way":
            flat = x.reshape(-1, 8)
            y = torch.addmm(self.base.bias, flat, self.base.weight.T).view(*x.shape[:-1], 12)
            return y + (x @ self.down.weight.T) @ self.up.weight.T
        if self.way == "magnitudes":
            whole = self.base.weight + self.up.weight @ self.down.weight
            scale = self.magnitude / whole.norm(dim=1)
            return y + ((scale - 1) * (y - self.base.bias) + scale * added)
        return y + 1.5 * added


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(4, 10, 3, stride=2, padding=1)
        self.down, self.up = nn.Conv2d(4, RANK, 3, 2, 1, bias=False), nn.Conv2d(RANK, 10, 1)
        self.head = nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.relu(self.base(x) + 2 * self.up(self.down(x))))
        return result


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Embedding(20, 8), nn.Embedding(20, RANK)
        self.up, self.head = nn.Linear(RANK, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.base(x) + 2 * self.up(self.down(x)))
        return result


LINEAR = ("linear", "scaled inside", "two", "subtracted", "stored the other way", "magnitudes")
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{way: (functools.partial(Adapted, way), torch.randn(2, 7, 8)) for way in LINEAR},
    "convolution": (Convolved, torch.randn(2, 4, 9, 9)),
    "embedding": (Looked, torch.randint(0, 20, (2, 7))),
}


def captured(model: nn.Module, *inputs: Tensor) -> Program:
    return capture(model.eval(), inputs)


def details(program: Program) -> dict[str, Any]:
    return dict(gp.compile(program, [MergeLora()]).report.passes[-1].details)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_layer_is_one_layer(name: str) -> None:
    make, x = MODELS[name]
    model = make()
    program = captured(model, x)
    result = gp.compile(program, [MergeLora()])
    torch.testing.assert_close(result.program.run([x])[0], model(x), rtol=1e-4, atol=1e-5)
    assert {n.split(".")[0] for n in result.program.tensors} == {"base", "head"}
    found = result.report.passes[0].details
    assert found["merged"] == ["base.weight"]
    gone = set(program.tensors) - set(result.program.tensors)
    assert set(found["tensors"]) == gone
    assert found["values"] == sum(program.tensors[n].numel() for n in gone) > 0
    assert not gp.compile(result.program, [MergeLora()]).report.passes[-1].modified


def test_the_weight_is_the_sum() -> None:
    model = Adapted()
    merged = gp.compile(captured(model, torch.randn(2, 8)), [MergeLora()]).program
    expected = model.base.weight + 1.5 * model.up.weight @ model.down.weight
    torch.testing.assert_close(merged.tensors["base.weight"], expected.detach())
    assert torch.equal(merged.tensors["base.bias"], model.base.bias)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_are_no_neurons(name: str) -> None:
    make, x = MODELS[name]
    program = captured(make(), x)
    roles = {g.role for g in axis_groups(program) if g.size in (2, RANK) and g.cost > 3}
    assert "rank" in roles
    assert "neuron" not in roles
    if name in LINEAR:
        cut = gp.compile(program, [PruneNeurons(0.5)]).program
        assert cut.tensors["up.weight"].shape == (6, RANK)
        asked = gp.compile(program, [PruneAxis(0.4, role="rank", normalized=True)]).program
        assert asked.tensors["up.weight"].shape == (12, 2)


class Other(nn.Module):
    """What is no adapter, or cannot be merged."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        rank = 8 if way == "wide" else RANK
        self.base, self.down = nn.Linear(8, 12), nn.Linear(8, rank)
        self.up, self.other = nn.Linear(rank, 12, bias=False), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y, narrow = self.base(x), self.down(x)
        if self.way == "alone":
            return self.up(narrow)
        if self.way == "curved":
            return y + self.up(narrow.relu())
        if self.way == "of another input":
            return self.base(x.sin()) + self.up(narrow)
        if self.way == "scaled by the input":
            return y + self.up(narrow) * x.mean()
        return y + self.up(narrow)


@pytest.mark.parametrize(
    "way", ["alone", "curved", "of another input", "scaled by the input", "wide"]
)
def test_other_pairs_stay(way: str) -> None:
    program = captured(Other(way), torch.randn(2, 5, 8))
    found = details(program)
    assert (found["merged"], found["skipped"]) == ([], [])
    assert not any(g.role == "rank" for g in axis_groups(program))


class Shared(nn.Module):
    """An adapted table that is the output head too, or whose layer is read beside the sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.base, self.down = nn.Linear(8, 12), nn.Linear(8, RANK)
        self.up, self.again = nn.Linear(RANK, 12, bias=False), nn.Linear(RANK, 12, bias=False)

    def forward(self, x: Tensor) -> Any:
        y, z = self.base(x) + self.up(self.down(x)), x.cos()
        if self.way == "twice":
            return y, self.base(z) + self.again(self.down(z))
        if self.way == "alike":
            return y, self.base(z) + self.up(self.down(z))
        if self.way == "tied":
            return y @ self.base.weight
        return y, self.base(x).relu()


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("twice", "base.weight is adapted in two ways"),
        ("tied", "base.weight is read elsewhere too"),
        ("beside", "base.weight is read elsewhere too"),
    ],
)
def test_a_weight_that_is_read_elsewhere_stays(way: str, reason: str) -> None:
    found = details(captured(Shared(way), torch.randn(2, 5, 8)))
    assert found["merged"] == []
    assert reason in found["skipped"][0]["reason"]


def test_a_weight_that_is_adapted_alike_everywhere_is_merged() -> None:
    model, x = Shared("alike"), torch.randn(2, 5, 8)
    merged = gp.compile(captured(model, x), [MergeLora()]).program
    assert set(merged.tensors) == {"base.weight", "base.bias"}
    for got, expected in zip(merged.run([x]), model(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_and_set_zeros_stay() -> None:
    half = captured(Adapted().bfloat16(), torch.randn(2, 8, dtype=torch.bfloat16))
    assert "round it again" in details(half)["skipped"][0]["reason"]
    sparse = gp.compile(captured(Adapted(), torch.randn(2, 8)), [gp.passes.Magnitude(0.5)])
    assert "merge before" in details(sparse.program)["skipped"][0]["reason"]


def test_biases_of_adapters_need_one_to_be_added_to() -> None:
    model = Adapted("two")
    model.base = nn.Linear(8, 12, bias=False)
    found = details(captured(model, torch.randn(2, 8)))
    assert "has none to add them to" in found["skipped"][0]["reason"]


def test_the_merged_weight_trains_where_the_adapter_did() -> None:
    for adapter_trains in (True, False):
        model = Adapted()
        model.base.requires_grad_(False)
        model.up.requires_grad_(adapter_trains)
        model.down.requires_grad_(False)
        merged = gp.compile(captured(model, torch.randn(2, 8)), [MergeLora()]).program
        assert ("base.weight" not in merged.frozen) is adapter_trains
        assert "base.bias" in merged.frozen


class LoraLinear(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return result


def test_both_forms_of_a_decoder_are_merged() -> None:
    torch.manual_seed(0)
    model, inputs = tiny("tiny-llama")
    for layer in model.modules():
        for name, child in list(layer.named_children()):
            if name in ("q_proj", "down_proj"):
                setattr(layer, name, LoraLinear(child))
    result = gp.compile(model, [MergeLora()], example_inputs=inputs, cache=True)
    assert set(result.program.entries) == {"forward", "decode"}
    assert len(result.report.passes[0].details["merged"]) == 4
    assert not [n for n in result.program.tensors if "down.weight" in n or "up.weight" in n]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv, self.head = nn.Conv1d(16, 24, 3, padding=1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.down(F.relu(self.up(h)))
        result: Tensor = self.head(F.relu(self.conv(h.mT)).mean(-1))
        return result


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_of_peft(options: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["table", "up", "down", "conv"],
        init_lora_weights=False,
        **options,
    )
    adapted, x = peft.get_peft_model(Small(), config), torch.randint(0, 20, (2, 7))
    merged = gp.compile(captured(adapted, x), [MergeLora()])
    torch.testing.assert_close(merged.program.run([x])[0], adapted(x), rtol=1e-4, atol=1e-5)
    assert len(merged.report.passes[0].details["merged"]) == 4
    # "Default" is the adapter's name there: nothing of it is left.
    assert not [name for name in merged.program.tensors if "default" in name]
    plain = adapted.merge_and_unload()
    for name, tensor in merged.program.tensors.items():
        own = name.removeprefix("base_model.model.").replace("base_layer.", "")
        torch.testing.assert_close(tensor, plain.state_dict()[own], rtol=1e-4, atol=1e-6)
