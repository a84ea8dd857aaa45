"""Residual branches: which sums are one, what kind they are, and what dies with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.axes.branches import branches
from graphprune.capture.capture import capture
from graphprune.ir.graph import erase_dead, flat_outputs, op_name
from graphprune.ir.program import Program
from graphprune.passes import PruneHeads

Captured = Callable[[str], Program]

_BERT = [
    ("encoder.layer.0.attention", "attention"),
    ("encoder.layer.0", "ffn"),
    ("encoder.layer.1.attention", "attention"),
    ("encoder.layer.1", "ffn"),
]
_LLAMA = [
    ("model.layers.0.self_attn", "attention"),
    ("model.layers.0.mlp", "ffn"),
    ("model.layers.1.self_attn", "attention"),
    ("model.layers.1.mlp", "ffn"),
]
_ALBERT = "encoder.albert_layer_groups.0.albert_layers.0"
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "tiny-mlp": [],
    "tiny-cnn": [("inner", "other")],
    "tiny-bert": _BERT,
    "tiny-albert": [
        (f"{_ALBERT}.attention", "attention"),
        (_ALBERT, "ffn"),
        (f"{_ALBERT}.attention#2", "attention"),
        (f"{_ALBERT}#2", "ffn"),
    ],
    "tiny-llama": _LLAMA,
    "tiny-mixtral": _LLAMA,
    "tiny-fused-vit": [
        ("blocks.0.attention", "attention"),
        ("blocks.0.mlp", "ffn"),
        ("blocks.1.attention", "attention"),
        ("blocks.1.mlp", "ffn"),
    ],
    "tiny-t5": [
        ("encoder.block.0.layer.0.SelfAttention", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense", "ffn"),
        ("encoder.block.1.layer.0.SelfAttention", "attention"),
        ("encoder.block.1.layer.1.DenseReluDense", "ffn"),
        ("decoder.block.0.layer.0.SelfAttention", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention", "attention"),
        ("decoder.block.0.layer.2.DenseReluDense", "ffn"),
        ("decoder.block.1.layer.0.SelfAttention", "attention"),
        ("decoder.block.1.layer.1.EncDecAttention", "attention"),
        ("decoder.block.1.layer.2.DenseReluDense", "ffn"),
    ],
}


def named(program: Program) -> list[tuple[str, str]]:
    return [(branch.id, branch.kind) for branch in branches(program)]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_sublayer_is_found(name: str, captured: Captured) -> None:
    assert named(captured(name)) == EXPECTED[name]


def test_the_norm_after_a_sum_is_no_part_of_the_branch(captured: Captured) -> None:
    attention, ffn, *_ = branches(captured("tiny-bert"))
    assert "encoder.layer.0.attention.output.LayerNorm.weight" not in attention.tensors
    assert attention.tensors == {
        f"encoder.layer.0.attention.{module}.{kind}"
        for module in ("self.query", "self.key", "self.value", "output.dense")
        for kind in ("weight", "bias")
    }
    assert len(ffn.tensors) == 4


def test_the_norm_before_it_is(captured: Captured) -> None:
    attention, *_ = branches(captured("tiny-llama"))
    assert "model.layers.0.input_layernorm.weight" in attention.tensors


def test_weights_of_several_layers_belong_to_none(captured: Captured) -> None:
    assert all(branch.tensors == frozenset() for branch in branches(captured("tiny-albert")))


def test_nodes_are_what_dies_with_the_sum(captured: Captured) -> None:
    program = captured("tiny-t5").fork()
    for branch in branches(program)[:5:4]:
        dead = {node.name for node in branch.nodes(program, "forward")}
        graph = program.fork_graphs()["forward"]
        of = {node.name: node for node in graph.nodes}
        place = branch.places["forward"]
        of[place.add].replace_all_uses_with(of[place.stream])
        erase_dead(graph)
        left = {node.name for node in graph.nodes}
        assert dead == of.keys() - left
        assert place.add in dead


def test_a_bias_that_later_layers_share_outlives_the_layer_that_makes_it(
    captured: Captured,
) -> None:
    first = branches(captured("tiny-t5"))[0]
    assert not any("relative_attention_bias" in name for name in first.tensors)


class Block(nn.Module):
    """Attention of one head beside two linear layers, both on one normalized stream."""

    def __init__(self, sums: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.sums = sums
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        a = self.out(F.scaled_dot_product_attention(q, k, v))
        return self.sums(x, a, self.down(F.gelu(self.up(h))))


def stacked(sums: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Program:
    model = nn.Sequential(nn.Linear(5, 8), Block(sums), Block(sums), nn.Linear(8, 3))
    return capture(model.eval(), {"input": torch.randn(2, 6, 5)})


def test_a_parallel_block_in_one_sum_is_one_branch() -> None:
    for sums in (lambda x, a, f: x + (a + f), lambda x, a, f: f + a + x):
        assert named(stacked(sums)) == [("1", "attention"), ("2", "attention")]


def test_a_parallel_block_in_two_sums_is_two() -> None:
    program = stacked(lambda x, a, f: x + a + f)
    assert [kind for _, kind in named(program)] == ["attention", "ffn"] * 2
    attention, ffn, *_ = branches(program)
    assert ffn.places["forward"].stream == attention.places["forward"].add
    # Both read the norm.
    assert not any("norm" in name for name in attention.tensors | ffn.tensors)


class Single(nn.Module):
    """One sum of a value and what a function makes of it and of three linear layers."""

    def __init__(self, sums: Callable[..., Tensor]) -> None:
        super().__init__()
        self.sums = sums
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.sums(x, self.b))


@pytest.mark.parametrize(
    ("sums", "count"),
    [
        (lambda x, f: x + f(x), 1),
        (lambda x, f: f(x.tanh()) + x, 1),
        (lambda x, f: torch.add(x, f(x), alpha=2), 0),
        (lambda x, f: x + f(x.mean(0, keepdim=True)), 0),  # not of the sum's shape
        (lambda x, f: x + x.relu(), 0),  # no weights
        (lambda x, f: x * f(x), 0),
        (lambda x, f: x + f(torch.ones(x.shape)), 0),  # reads x's sizes alone
        (lambda x, f: x.relu() + f(x), 0),  # f does not read what it is added to
    ],
)
def test_only_a_sum_with_what_it_reads_is_a_branch(sums: Any, count: int) -> None:
    program = capture(Single(sums).eval(), {"x": torch.randn(4, 8)})
    assert len(branches(program)) == count


def test_a_branch_with_branches_inside_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Outer(), nn.Linear(8, 8)).eval()
    assert named(capture(model, {"input": torch.randn(4, 8)})) == [("1.a", "ffn"), ("1.b", "ffn")]


class Outer(nn.Module):
    """x + f(x) where f is two residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.a(x)
        return x + (y + self.b(y))


def test_branches_of_both_entries_are_the_same_ones(ragged_decoder: Program) -> None:
    found = branches(ragged_decoder)
    assert [branch.kind for branch in found] == ["attention", "ffn"] * 3
    for branch in found:
        assert set(branch.places) == {"forward", "decode"}
        for entry in branch.places:
            read = {
                str(node.target)
                for node in branch.nodes(ragged_decoder, entry)
                if node.op == "get_attr"
            }
            assert read >= branch.tensors
    assert sum(len(branch.tensors) for branch in found) == 3 * 9


def test_a_branch_ends_with_what_it_caches(ragged_decoder: Program) -> None:
    entry = ragged_decoder.entries["decode"]
    results = flat_outputs(entry.graph)
    for number, branch in enumerate(branches(ragged_decoder)[::2]):
        dead = set(branch.nodes(ragged_decoder, "decode"))
        cached = [results[i] in dead for i in entry.cache.values()]
        assert [i // 2 for i, gone in enumerate(cached) if gone] == [number, number]


def test_names_hold_after_a_cut(captured: Captured) -> None:
    program = captured("tiny-bert")
    pruned = gp.compile(program, [PruneHeads(0.5)]).program
    assert named(pruned) == named(program)
    assert sum(g.size for g in axis_groups(pruned).with_role("head")) == 4
    before, after = (
        [[op_name(n) for n in b.nodes(p, "forward")] for b in branches(p)]
        for p in (program, pruned)
    )
    assert before == after
