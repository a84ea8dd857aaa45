"""SparseLLM: each step of the alternation against brute force, and which blocks it finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes import SparseGPT, SparseLLM
from graphprune.passes.solvers.alternation import (
    Alternation,
    Weights,
)
from graphprune.passes.solvers.sparsegpt import Inputs
from graphprune.passes.sparsity.feedforward import FeedForward, assembled, find_feedforwards

Captured = Callable[[str], Program]
IN, HIDDEN, OUT = 6, 8, 5


def normed(x: Tensor) -> Tensor:
    """What ends a block: no elementwise function."""
    return F.layer_norm(x, x.shape[-1:])


class Plain(nn.Module):
    """down(φ(up(x))) after something, before something: a block that is no output head."""

    def __init__(
        self,
        phi: Callable[[Tensor], Tensor] = F.relu,
        bias: bool = True,
        hidden: int = HIDDEN,
        width: int = IN,
        out: int = OUT,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, out, bias)
        self.head = nn.Linear(out, 3)
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(normed(self.down(self.phi(self.up(x)))))
        return result


class Gated(nn.Module):
    """The gated form with two weights, or one that is cut in halves."""

    def __init__(self, cut: str = "", bias: bool = False) -> None:
        super().__init__()
        self.cut = cut
        if cut:
            self.both = nn.Linear(IN, 2 * HIDDEN, bias)
        else:
            self.gate, self.up = nn.Linear(IN, HIDDEN, bias), nn.Linear(IN, HIDDEN, bias)
        self.down = nn.Linear(HIDDEN, OUT, bias)
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.cut:
            gate, up = self.gate(x), self.up(x)
        elif self.cut == "chunk":
            gate, up = self.both(x).chunk(2, dim=-1)
        elif self.cut == "split":
            gate, up = self.both(x).split(HIDDEN, dim=-1)
        elif self.cut == "swapped":
            up, gate = self.both(x).split([HIDDEN, HIDDEN], dim=-1)
        else:
            both = self.both(x)
            gate, up = both[..., :HIDDEN], both[..., HIDDEN:]
        result: Tensor = self.head(normed(self.down(F.silu(gate) * up)))
        return result


def blocks_of(program: Program) -> list[FeedForward]:
    return find_feedforwards(linear_sites(axis_groups(program)))


def started(model: nn.Module, x: Tensor) -> tuple[Alternation, Program]:
    """The state of a model's only block on its rows, as the pass begins."""
    program = capture(model, (x[:4],))
    (block,) = blocks_of(program)
    hidden = block.hidden(products(block, program, x), program)
    return Alternation.start(block, program, x, hidden), program


def products(block: FeedForward, program: Program, x: Tensor) -> list[Tensor]:
    found = []
    for segment in block.segments:
        value = x @ segment.site.matrix(program).T
        if segment.site.bias is not None:
            value = value + program.tensors[segment.site.bias]
        found.append(value[:, segment.start : segment.stop])
    return found


def objective(state: Alternation, program: Program, c: Weights) -> float:
    """J, written out."""
    total = 0.0
    for z, m in zip(state.z, products(state.block, program, state.x), strict=True):
        total += c.alpha * float((z - m).double().square().sum())
    phi = state.block.hidden(state.z, program)
    total += c.gamma * float((state.p - phi).double().square().sum())
    down = state.block.down
    made = state.p @ down.matrix(program).T
    if down.bias is not None:
        made = made + program.tensors[down.bias]
    return total + c.beta * float((state.y - made).double().square().sum())


def update_p(state: Alternation, program: Program, c: Weights) -> None:
    state.update_p(slice(None), state.gain(program, c), program)


def update_z(state: Alternation, program: Program, c: Weights) -> None:
    state.update_z(slice(None), products(state.block, program, state.x), program, c)


def halved(state: Alternation, program: Program) -> Program:
    """Other weights than the dense ones: half of them zero."""
    for site in (*state.block.ups, state.block.down):
        matrix = site.matrix(program)
        mask = torch.rand(matrix.shape) < 0.5
        program = site.with_matrix(program, matrix.masked_fill(mask, 0))
    return program


MODELS = [Plain, lambda: Plain(F.gelu), lambda: Plain(F.silu, bias=False), Gated,
          lambda: Gated("chunk"), lambda: Gated("swapped", bias=True)]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_p_is_the_least_squares_solution(make: Callable[[], nn.Module]) -> None:
    """Each row: lstsq of [√β W; √γ I] p = [√β (y - b); √γ φ(z)]."""
    state, program = started(make(), torch.randn(30, IN))
    program = halved(state, program)
    c = Weights(0.3, 2.0, 0.7)
    update_p(state, program, c)
    down = state.block.down
    w = down.matrix(program).double()
    b = program.tensors[down.bias].double() if down.bias is not None else torch.zeros(OUT)
    phi = state.block.hidden(state.z, program).double()
    system = torch.cat([c.beta**0.5 * w, c.gamma**0.5 * torch.eye(HIDDEN)])
    target = torch.cat([c.beta**0.5 * (state.y - b), c.gamma**0.5 * phi], 1)
    expected = torch.linalg.lstsq(system.double(), target.double().T).solution.T
    torch.testing.assert_close(state.p.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_every_step_lowers_the_objective(make: Callable[[], nn.Module]) -> None:
    """With the weights fixed p and z only descend; exact steps cannot be repeated to any gain."""
    state, program = started(make(), torch.randn(50, IN))
    program = halved(state, program)
    c = Weights(0.1, 1.0, 1.0)
    last = objective(state, program, c)
    for _ in range(4):
        update_p(state, program, c)
        now = objective(state, program, c)
        assert now <= last * (1 + 1e-5)
        update_p(state, program, c)
        assert objective(state, program, c) == pytest.approx(now, rel=1e-4)
        last = now
        update_z(state, program, c)
        now = objective(state, program, c)
        assert now < last
        last = now


def test_rows_are_worked_on_in_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.passes.solvers import alternation as alternate

    x, results = torch.randn(23, IN), []
    model = Gated("chunk", bias=True)
    for size in (5, 2048):
        monkeypatch.setattr(alternate, "CHUNK", size)
        torch.manual_seed(1)
        state, program = started(model, x)
        program = halved(state, program)
        before = state.error(program)
        assert state.update(program, Weights(1.0, 1.0, 1.0)) == before
        results.append([state.p, *state.z, torch.tensor(state.error(program)), state.gram()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_weights_are_fitted_by_least_squares(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(60, IN)
    state, program = started(make(), x)
    state.z = [z + 0.3 * torch.randn_like(z) for z in state.z]
    state.p = state.p + 0.3 * torch.randn_like(state.p)
    exact = Inputs.of((x.T @ x).double(), 0.0)

    def bias(name: str | None) -> Tensor:
        return program.tensors[name] if name else torch.zeros(())

    for up in state.block.ups:
        parts = [z for s, z in zip(state.block.segments, state.z, strict=True) if s.site is up]
        target = torch.cat(parts, 1) - bias(up.bias)
        expected = torch.linalg.lstsq(x.double(), target.double()).solution.T
        torch.testing.assert_close(state.fit_up(up, exact), expected, rtol=1e-4, atol=1e-5)
    target = (state.y - bias(state.block.down.bias)).double()
    expected = torch.linalg.lstsq(state.p.double(), target).solution.T
    fitted = state.fit_down(Inputs.of(state.gram(), 0.0))
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_phi_and_the_error_are_those_of_the_model(make: Callable[[], nn.Module]) -> None:
    """Of dense weights the error is none; of others it is that of running the layers."""
    model, x = make(), torch.randn(20, IN)
    seen: dict[str, Tensor] = {}
    down: Any = model.down
    down.register_forward_hook(lambda _, args, out: seen.update(p=args[0], y=out))
    with torch.no_grad():
        model(x)
    dense = dict(seen)
    state, program = started(model, x)
    torch.testing.assert_close(state.p, dense["p"])
    torch.testing.assert_close(state.y, dense["y"])
    assert state.error(program) <= 1e-8
    changed = halved(state, program)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(changed.tensors[name])
        model(x)
    expected = float((seen["y"] - dense["y"]).square().sum())
    assert state.error(changed) == pytest.approx(expected, rel=1e-4)
    bias = 0 if down.bias is None else down.bias.detach()
    assert state.energy() == pytest.approx(float((dense["y"] - bias).square().sum()), rel=1e-4)


# The pass.


def batches_of(program: Program, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (4, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def tensors_of(compiled: gp.Compiled) -> dict[str, Tensor]:
    return dict(compiled.program.tensors)


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_one_round_is_sparsegpt(name: str, captured: Captured) -> None:
    program = captured(name)
    batches = batches_of(program)
    one = tensors_of(gp.compile(program, [SparseLLM(0.5, rounds=1)], calibration=batches))
    plain = tensors_of(gp.compile(program, [SparseGPT(0.5)], calibration=batches))
    for key, tensor in plain.items():
        assert torch.equal(tensor, one[key]), key


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_without_sparsity_the_dense_weights_stay(name: str, captured: Captured) -> None:
    program = captured(name)
    result = gp.compile(program, [SparseLLM(0.0)], calibration=batches_of(program))
    (done,) = result.report.passes
    assert not done.modified
    assert all(torch.equal(t, program.tensors[k]) for k, t in tensors_of(result).items())
    for site in done.details["sites"]:
        assert site["sparsity"] == 0
        assert site["error"] <= 1e-8


@pytest.mark.parametrize("make", [lambda: Plain(F.gelu), lambda: Gated("chunk", bias=True)])
def test_the_dense_weights_are_a_fixed_point(make: Callable[[], nn.Module]) -> None:
    """With nothing pruned no step moves: weights, p and z stay where they are."""
    x = torch.randn(80, IN)
    state, program = started(make(), x)
    p, z = state.p.clone(), [part.clone() for part in state.z]
    reading = Inputs.of((x.T @ x).double(), 1e-9)
    changed = program
    for _ in range(3):
        update_p(state, changed, Weights(1.0, 1.0, 1.0))
        update_z(state, changed, Weights(1.0, 1.0, 1.0))
        for up in state.block.ups:
            changed = up.with_matrix(changed, state.fit_up(up, reading))
        fitted = state.fit_down(Inputs.of(state.gram(), 1e-9))
        changed = state.block.down.with_matrix(changed, fitted)
    torch.testing.assert_close(state.p, p, rtol=1e-4, atol=1e-4)
    for a, b in zip(state.z, z, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, tensor in changed.tensors.items():
        torch.testing.assert_close(tensor, program.tensors[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-gpt2", "tiny-llama", "tiny-bert"])
def test_the_best_round_wins(name: str, captured: Captured) -> None:
    """Reported errors are those of the rounds; round 0 is SparseGPT's, and it can be beaten."""
    program = captured(name)
    batches = batches_of(program)
    compiled = gp.compile(program, [SparseLLM(0.7, rounds=4)], calibration=batches)
    sites = {s["name"]: s for s in compiled.report.passes[0].details["sites"]}
    rounds = [s for s in sites.values() if "block_errors" in s]
    assert len(rounds) == 2 * (3 if name == "tiny-llama" else 2)
    for site in rounds:
        errors = site["block_errors"]
        assert len(errors) == 4
        assert site["round"] == errors.index(min(errors))
        assert site["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert any(s["round"] > 0 for s in rounds)


def ffn_error(model: Plain, x: Tensor, up: Tensor, down: Tensor) -> float:
    """Σ|y - block(x)|² with other weights, biases as they are."""
    with torch.no_grad():
        dense = model.down(model.phi(model.up(x)))
        made = F.linear(model.phi(F.linear(x, up, model.up.bias)), down, model.down.bias)
        return float((dense - made).double().square().sum())


def test_what_is_reported_is_what_the_block_does() -> None:
    model, x = Plain(F.gelu), torch.randn(100, IN)
    program = capture(model, (x[:4],))
    compiled = gp.compile(program, [SparseLLM(0.5)], calibration=[x[:60], x[60:]])
    site = next(s for s in compiled.report.passes[0].details["sites"] if s["name"] == "down.weight")
    tensors = tensors_of(compiled)
    measured = ffn_error(model, x, tensors["up.weight"], tensors["down.weight"])
    with torch.no_grad():
        output = model.down(model.phi(model.up(x))) - model.down.bias
    relative = measured / float(output.square().sum())
    assert min(site["block_errors"]) == pytest.approx(relative, rel=1e-3)


def brute_force(model: Plain, x: Tensor, count: int) -> float:
    """The least error found over all masks at once, the weights under each fitted by Adam."""

    def masks(shape: torch.Size) -> Tensor:
        all_gone = list(itertools.combinations(range(shape.numel()), count))
        found = torch.ones(len(all_gone), shape.numel())
        for row, gone in zip(found, all_gone, strict=True):
            row[list(gone)] = 0
        return found.reshape(-1, *shape)

    ups, downs = masks(model.up.weight.shape), masks(model.down.weight.shape)
    up_mask = ups.repeat_interleave(len(downs), 0)
    down_mask = downs.repeat(len(ups), 1, 1)
    up = (model.up.weight.detach() * up_mask).requires_grad_()
    down = (model.down.weight.detach() * down_mask).requires_grad_()
    with torch.no_grad():
        target = model.down(model.phi(model.up(x)))
    step = torch.optim.Adam([up, down], lr=0.03)
    best = float("inf")
    for _ in range(300):
        hidden = model.phi(x @ (up * up_mask).mT + model.up.bias)
        made = hidden @ (down * down_mask).mT + model.down.bias
        errors = (target - made).square().sum((1, 2))
        best = min(best, float(errors.detach().min()))
        step.zero_grad()
        errors.sum().backward()
        step.step()
    return best


def test_it_lies_between_sparsegpt_and_the_best_of_all_masks() -> None:
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = Plain(F.gelu, hidden=3, width=2, out=2)
        x = torch.randn(60, 2)
        program = capture(model, (x[:4],))
        errors = {}
        for step in (SparseGPT(1 / 3), SparseLLM(1 / 3, rounds=8)):
            tensors = tensors_of(gp.compile(program, [step], calibration=[x]))
            up, down = tensors["up.weight"], tensors["down.weight"]
            assert int((up == 0).sum()) == int((down == 0).sum()) == 2
            errors[step.name] = ffn_error(model, x, up, down)
        assert errors["sparsellm"] <= errors["sparsegpt"] * (1 + 1e-6)
        ratios.append(errors["sparsellm"] / errors["sparsegpt"])
        if seed < 2:
            assert brute_force(model, x, 2) <= errors["sparsellm"] * (1 + 1e-4)
    assert sum(r < 0.99 for r in ratios) >= 2, ratios


# Which blocks there are.


@pytest.mark.parametrize(
    ("name", "ups", "downs", "relu"),
    [
        ("tiny-gpt2", ["transformer.h.{}.mlp.c_fc"], "transformer.h.{}.mlp.c_proj", False),
        (
            "tiny-llama",
            ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
            "model.layers.{}.mlp.down_proj",
            False,
        ),
        ("tiny-opt", ["model.decoder.layers.{}.fc1"], "model.decoder.layers.{}.fc2", True),
        (
            "tiny-bert",
            ["encoder.layer.{}.intermediate.dense"],
            "encoder.layer.{}.output.dense",
            False,
        ),
    ],
)
def test_blocks_of_real_models(
    name: str, ups: list[str], downs: str, relu: bool, captured: Captured
) -> None:
    found = blocks_of(captured(name))
    assert [[u.name for u in b.ups] for b in found] == [
        [f"{up.format(i)}.weight" for up in ups] for i in range(2)
    ]
    assert [b.down.name for b in found] == [f"{downs.format(i)}.weight" for i in range(2)]
    assert [b.is_relu for b in found] == [relu] * 2


@pytest.mark.parametrize("cut", ["chunk", "split", "swapped", "slice"])
@pytest.mark.parametrize("lead", [(4,), (2, 5)])
def test_a_fused_gate_is_cut_into_segments(cut: str, lead: tuple[int, ...]) -> None:
    model = Gated(cut, bias=True)
    x = torch.randn(*lead, IN)
    program = capture(model, (x,))
    (block,) = blocks_of(program)
    assert [u.name for u in block.ups] == ["both.weight"]
    assert [(s.start, s.stop) for s in block.segments] == [(0, HIDDEN), (HIDDEN, 2 * HIDDEN)]
    rows = x.reshape(-1, IN)
    values = products(block, program, rows)
    whole = model.both(rows)
    torch.testing.assert_close(assembled(block, block.ups[0], values), whole)
    gate, up = whole.chunk(2, dim=-1)
    expected = F.silu(up) * gate if cut == "swapped" else F.silu(gate) * up
    torch.testing.assert_close(block.hidden(values, program), expected)


def test_two_weights_assemble_each_their_own() -> None:
    model, x = Gated(), torch.randn(4, IN)
    program = capture(model, (x,))
    (block,) = blocks_of(program)
    assert [u.name for u in block.ups] == ["gate.weight", "up.weight"]
    values = [torch.full((1, HIDDEN), float(i)) for i in range(2)]
    for i, up in enumerate(block.ups):
        assert torch.equal(assembled(block, up, values), values[i])


class Variant(nn.Module):
    """One block with something about it that may keep it from being one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.other = nn.Linear(IN, HIDDEN), nn.Linear(IN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.scalar = nn.Linear(IN, 1)
        self.fused = nn.Linear(IN, 2 * HIDDEN)
        self.places = nn.Parameter(torch.rand(5, 1) + 0.5)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.down = nn.Linear(HIDDEN, OUT)
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Any:
        extra: Tensor | None = None
        kind = self.kind
        if kind == "plain":
            h = F.gelu(self.up(x))
        elif kind == "hidden used elsewhere":
            h = F.gelu(self.up(x))
            extra = h.sum(-1)
        elif kind == "product used elsewhere":
            product = self.up(x)
            h, extra = F.gelu(product), product.sum(-1)
        elif kind == "fused product used elsewhere":
            product = self.fused(x)
            a, b = product.chunk(2, dim=-1)
            h, extra = F.silu(a) * b, product.sum(-1)
        elif kind == "norm between":
            h = self.norm(F.gelu(self.up(x)))
        elif kind == "two inputs":
            h = F.gelu(self.up(x)) * self.other(x + 1)
        elif kind == "residual":
            h = F.gelu(self.up(x)) + torch.cat([x, x], -1)[..., :HIDDEN]
        elif kind == "softmax":
            h = self.up(x).softmax(-1)
        elif kind == "nothing between":
            h = self.up(x)
        elif kind == "half of it":
            h = F.gelu(self.fused(x)[..., :HIDDEN])
        elif kind == "one gate for all":
            h = F.gelu(self.up(x)) * torch.sigmoid(self.scalar(x))
        elif kind == "a factor a place":
            h = F.gelu(self.up(x)) * self.places
        elif kind == "a factor a feature":
            h = F.gelu(self.up(x)) * self.scale
        elif kind == "sum of two":
            h = F.gelu(self.up(x) + self.other(x))
        elif kind == "a value that only decides":
            h = self.up(x) * (self.other(x) > 0)
        elif kind == "same weight twice":
            h = F.gelu(self.up(x)) * F.linear(x, self.up.weight)
        else:
            raise AssertionError(kind)
        y = self.head(normed(self.down(h)))
        return y if extra is None else (y, extra)


FOUND = ["plain", "a factor a feature", "sum of two", "a value that only decides"]
NOT_FOUND = [
    "hidden used elsewhere", "product used elsewhere", "fused product used elsewhere",
    "norm between", "two inputs", "residual", "softmax", "nothing between", "half of it",
    "one gate for all", "a factor a place", "same weight twice",
]  # fmt: skip


@pytest.mark.parametrize("kind", FOUND + NOT_FOUND)
def test_a_block_is_only_what_the_formulas_hold_for(kind: str) -> None:
    """Where they do not, its weights are pruned one by one."""
    x = torch.randn(3, 5, IN)
    program = capture(Variant(kind), (x,))
    assert [b.down.name for b in blocks_of(program)] == ["down.weight"] * (kind in FOUND)
    compiled = gp.compile(program, [SparseLLM(0.5)], calibration=[x, x + 1])
    sites = compiled.report.passes[0].details["sites"]
    assert any("block_errors" in s for s in sites) is (kind in FOUND)
    assert all(s["sparsity"] == pytest.approx(0.5, abs=0.1) for s in sites)


def test_only_what_is_pruned_makes_a_block() -> None:
    x = torch.randn(20, IN)
    program = capture(Plain(), (x[:4],))
    compiled = gp.compile(program, [SparseLLM(0.5, ignore=("up",))], calibration=[x])
    assert torch.equal(compiled.program.tensors["up.weight"], program.tensors["up.weight"])
    (site,) = compiled.report.passes[0].details["sites"]
    assert "block_errors" not in site


def test_padding_is_no_row_of_a_block(captured: Captured) -> None:
    """What stands on padding changes nothing."""
    program = captured("tiny-opt")
    results = []
    for filler in (1, 50):
        batch = batches_of(program, 1)[0]
        batch["attention_mask"][:, 10:] = 0
        batch["input_ids"][:, 10:] = filler
        results.append(gp.compile(program, [SparseLLM(0.5)], calibration=[batch] * 2))
    for name, tensor in results[0].program.tensors.items():
        torch.testing.assert_close(tensor, results[1].program.tensors[name])
    notes = results[0].report.passes[0].details
    assert notes["calibration_rows"] == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number from 1, got 0"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
        ({"rounds": True}, "rounds must be a whole number"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"beta": -1.0}, "beta must be a number above 0"),
        ({"gamma": float("nan")}, "gamma must be a number above 0"),
        ({"gamma": float("inf")}, "gamma must be a number above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparseLLM(0.5, **options)


def test_a_narrow_block_is_not_cut_apart() -> None:
    """Fewer hidden values than outputs: the fewest bytes are alive in the middle of the block."""
    model, x = Plain(hidden=2, width=8, out=8), torch.randn(60, 8)
    compiled = gp.compile(model, [SparseLLM(0.5)], example_inputs=(x[:4],), calibration=[x])
    assert any("block_errors" in s for s in compiled.report.passes[0].details["sites"])


def test_a_cast_inside_the_block_is_taken_out() -> None:
    class Half(Plain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.silu(self.up(x).float()).to(x.dtype)
            result: Tensor = self.head(normed(self.down(hidden)))
            return result

    model, x = Half().to(torch.bfloat16), torch.randn(60, IN).bfloat16()
    compiled = gp.compile(model, [SparseLLM(0.5)], example_inputs=(x[:4],), calibration=[x])
    sites = compiled.report.passes[0].details["sites"]
    assert any("block_errors" in s for s in sites)


def test_where_no_block_is_found_it_says_so(captured: Captured) -> None:
    program = captured("tiny-mixtral")
    compiled = gp.compile(program, [SparseLLM(0.5)], calibration=batches_of(program))
    assert any("no feed-forward block" in w for w in compiled.report.passes[0].details["warnings"])
