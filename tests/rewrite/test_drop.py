"""Residual branches: dropping them equals closing their gates, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.axes.branches import Branch, branches
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError, VerificationError
from graphprune.exporters.onnx.names import input_names, output_names
from graphprune.ir.decoding import empty_cache, step
from graphprune.ir.graph import copy_graph, erase_dead
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.rewrite.drop import closed, drop, gated
from graphprune.rewrite.shrink import shrink
from graphprune.storage.program import from_bytes, to_bytes
from graphprune.verify.equivalence import verify_rewrite

Captured = Callable[[str], Program]


def masked(program: Program, gone: list[Branch]) -> Program:
    """The program with the gates of some branches closed."""
    behind, gates = gated(program, branches(program))
    return closed(behind, [gates[branch.id] for branch in gone])


def check(program: Program, gone: list[Branch]) -> Program:
    """Drop, compare with closed gates bit for bit, and look for what is left over."""
    dropped = drop(program, gone)
    reference = masked(program, gone)
    report = verify_rewrite(reference, dropped, tolerance=0.0, dense=program)
    assert report["max_error"] == 0.0
    assert report["moved"] > 1e-3
    for entry in dropped.entries.values():
        assert not erase_dead(copy_graph(entry.graph))
    assert dropped.tensors.keys() - dropped.read() == program.tensors.keys() - program.read()
    assert dropped.parameters <= set(dropped.tensors)
    assert set(dropped.aliases.values()) <= set(dropped.tensors)
    lost = frozenset[str]().union(*(branch.tensors for branch in gone))
    assert lost.isdisjoint(dropped.tensors)
    assert dropped.history[-1] == {"dropped": [branch.id for branch in gone]}
    return dropped


CASES: dict[str, list[tuple[int, ...]]] = {
    "tiny-bert": [(0,), (1, 2)],
    "tiny-fused-vit": [(0, 3)],
    "tiny-albert": [(1, 2)],
    "tiny-t5": [(0, 5), (2, 8)],
    "tiny-mixtral": [(1, 2)],
    "tiny-cnn": [(0,)],
}


@pytest.mark.parametrize(("name", "numbers"), [(n, c) for n in CASES for c in CASES[n]])
def test_dropped_equals_gated(name: str, numbers: tuple[int, ...], captured: Captured) -> None:
    program = captured(name)
    found = branches(program)
    check(program, [found[i] for i in numbers])


class Parallel(nn.Module):
    """Attention and two linear layers on one normalized stream, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(self.up(h).relu())


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_parallel_branches_go_one_by_one_or_together(numbers: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Parallel(), Parallel(), nn.Linear(8, 3)).eval()
    program = capture(model, {"input": torch.randn(2, 6, 5)})
    found = branches(program)
    dropped = check(program, [found[i] for i in numbers])
    # The norm goes with the last that reads it.
    assert ("1.norm.weight" in dropped.tensors) == ({0, 1} - set(numbers) != set())


def test_open_gates_change_nothing(captured: Captured) -> None:
    program = captured("tiny-bert")
    behind, gates = gated(program, branches(program))
    assert list(gates) == [branch.id for branch in branches(program)]
    for a, b in zip(*(p.run(program.forward.example) for p in (program, behind)), strict=True):
        assert torch.equal(a, b)
    shapes = {node.name: node.meta["val"] for node in behind.with_graphs({}).forward.graph.nodes}
    for node in behind.forward.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            assert [str(n) for n in value.shape] == [str(n) for n in shapes[node.name].shape]


class Zeros(nn.Module):
    """What a sublayer that is gone adds."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def test_it_is_what_the_model_computes_without_the_sublayer() -> None:
    model, inputs = tiny("tiny-bert")
    program = capture(model, inputs)
    dropped = drop(program, [branches(program)[2]])

    model.get_submodule("encoder.layer.1.attention.output").register_module("dense", Zeros())
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert torch.equal(dropped(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("numbers", [(0,), (2, 3), (0, 1, 4), (5,)])
def test_caches_of_dropped_layers_are_gone(
    numbers: tuple[int, ...], ragged_decoder: Program
) -> None:
    found = branches(ragged_decoder)
    dropped = check(ragged_decoder, [found[i] for i in numbers])
    entry = dropped.entries["decode"]
    count = 3 - sum(i % 2 == 0 for i in numbers)
    pairs = [f"{i}.{part}" for i in range(count) for part in ("key", "value")]
    assert input_names(entry)[2:] == [f"past_key_values.{pair}" for pair in pairs]
    assert output_names(entry) == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert list(entry.cache.values()) == list(range(1, 2 * count + 1))
    assert len(entry.example) == len(entry.input_names) == 2 + 2 * count
    assert set(entry.dynamic) | set(entry.fixed) <= set(entry.input_names)
    # Token by token it computes what it does in one go.
    ids, mask = dropped.forward.example
    cache, steps = empty_cache(entry, len(ids)), []
    for i in range(ids.shape[1]):
        logits, cache = step(dropped, ids[:, i : i + 1], mask[:, : i + 1], cache)
        steps.append(logits)
    seen = mask.bool()
    (whole,) = dropped.run((ids, mask))
    assert torch.allclose(torch.cat(steps, 1)[seen], whole[seen], atol=1e-4)
    # Called as the model is.
    past = [{part: entry.example[2 + 2 * i + j] for j, part in enumerate(("key", "value"))}
            for i in range(count)]  # fmt: skip
    flat = entry.flatten((), dict(input_ids=entry.example[0], attention_mask=entry.example[1],
                                  past_key_values=past))  # fmt: skip
    assert len(entry.unflatten(dropped.run(flat, "decode"))["present"]) == count


def test_one_layer_with_a_cache_stays(ragged_decoder: Program) -> None:
    with pytest.raises(UnsupportedError, match="no layer with a key/value cache would be left"):
        drop(ragged_decoder, branches(ragged_decoder)[::2])


def test_the_wrong_branch_is_caught(ragged_decoder: Program) -> None:
    found = branches(ragged_decoder)
    for wrong, right in ((0, 2), (1, 3)):
        dropped = drop(ragged_decoder, [found[wrong]])
        with pytest.raises(VerificationError):
            verify_rewrite(masked(ragged_decoder, [found[right]]), dropped)


def test_tied_names_go_with_the_last_reader(captured: Captured) -> None:
    program = captured("tiny-bert")
    first, second, *_ = branches(program)
    tied = {"a": min(first.tensors), "b": min(second.tensors)}
    given = replace(program, aliases=tied, zeroed=frozenset(tied), frozen=first.tensors)
    dropped = drop(given, [first])
    assert dropped.aliases == {"b": min(second.tensors)}
    assert dropped.zeroed == {"b"}
    assert not dropped.frozen


def test_groups_keep_their_names(ragged_decoder: Program) -> None:
    """The dimensions of RoPE are one group of all layers, named after the first."""
    before = axis_groups(ragged_decoder)
    dropped = drop(ragged_decoder, branches(ragged_decoder)[:1])
    after = axis_groups(dropped)
    assert {group.id for group in after} < {group.id for group in before}
    (shared,) = (group for group in before.with_role("qk_dim"))
    assert after[shared.id].size == shared.size
    assert not any("layers.0.self_attn" in name for name in after[shared.id].tensors)
    smaller = shrink(dropped, {shared.id: [0, 2]})
    assert smaller.tensors["model.layers.1.self_attn.q_proj.weight"].shape[0] == 3 * 2 * 4


def test_branches_that_are_left_can_be_dropped_later(ragged_decoder: Program) -> None:
    found = branches(ragged_decoder)
    once = drop(ragged_decoder, [found[0], found[3]])
    later = branches(once)
    assert [b.id for b in later] == [b.id for i, b in enumerate(found) if i not in (0, 3)]
    twice = check(once, [later[0]])
    verify_rewrite(drop(ragged_decoder, [found[0], found[1], found[3]]), twice, tolerance=0.0)


def test_a_dropped_program_is_saved_and_loaded(ragged_decoder: Program) -> None:
    dropped = drop(ragged_decoder, branches(ragged_decoder)[:2])
    again = from_bytes(to_bytes(dropped))
    verify_rewrite(dropped, again, tolerance=0.0)
    assert [g.id for g in axis_groups(again)] == [g.id for g in axis_groups(dropped)]


def test_the_program_given_is_left_as_it_is(ragged_decoder: Program) -> None:
    before = [str(entry.graph) for entry in ragged_decoder.entries.values()]
    gated(ragged_decoder, branches(ragged_decoder))
    drop(ragged_decoder, branches(ragged_decoder)[:1])
    assert before == [str(entry.graph) for entry in ragged_decoder.entries.values()]
