"""Parts of graphs as programs of their own: they compute what the whole program computes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from graphprune.axes import axis_groups
from graphprune.errors import GraphPruneError
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.graph import op_name
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.rewrite.extract import extract
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite

Captured = Callable[[str], Program]
MODELS = ("tiny-encoder", "tiny-gpt2", "tiny-llama", "tiny-fused-vit", "tiny-cnn")


def calls(program: Program, entry: str = "forward") -> list[fx.Node]:
    return [n for n in program.entries[entry].graph.nodes if n.op == "call_function"]


def between(program: Program, first: str, last: str, entry: str = "forward") -> list[str]:
    """Names from one node to another, in the order of the graph."""
    names = [node.name for node in calls(program, entry)]
    return names[names.index(first) : names.index(last) + 1]


def values(program: Program, entry: str, flat: Sequence[Tensor], names: list[str]) -> list[Tensor]:
    """What nodes compute in the whole program."""
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Recorder(graph_module(program, entry)).run(*flat)
    return [seen[name] for name in names]


def assert_equals_whole(program: Program, part: Program, entry: str = "forward") -> None:
    """The part's outputs on its examples are the values of the same nodes in the program."""
    output = next(n for n in part.forward.graph.nodes if n.op == "output")
    names = [node.name for node in output.args[0]]
    assert names
    wanted = values(program, entry, program.entries[entry].example, names)
    for got, expected in zip(part.run(part.forward.example), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not any("sym_size" in node.name for node in part.forward.graph.nodes)


@pytest.mark.parametrize("model", MODELS)
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_a_run_of_nodes_computes_what_the_program_computes(
    captured: Captured, model: str, data: st.DataObject
) -> None:
    program = captured(model)
    nodes = calls(program)
    first = data.draw(st.integers(0, len(nodes) - 2))
    last = data.draw(st.integers(first + 1, min(len(nodes), first + 40)))
    names = [node.name for node in nodes[first:last]]
    if not any(isinstance(n.meta["val"], Tensor) for n in nodes[first:last]):
        with pytest.raises(GraphPruneError, match="nothing outside reads"):
            extract(program, names, program.forward.example)
        return
    part = extract(program, names, program.forward.example)
    assert_equals_whole(program, part)
    assert set(part.tensors) <= set(program.tensors)
    assert part.parameters == program.parameters & set(part.tensors)
    for name, tensor in part.tensors.items():
        assert tensor is program.tensors[name]


def attention(program: Program, entry: str = "forward") -> list[str]:
    """From the first product of the second layer's attention to the product behind it."""
    nodes = calls(program, entry)
    at = [i for i, n in enumerate(nodes) if op_name(n) == "scaled_dot_product_attention"][1]
    products = [i for i, n in enumerate(nodes) if op_name(n) in ("linear", "addmm", "mm")]
    before = [i for i in products if i < at]
    behind = next(i for i in products if i > at)
    first = before[-3] if len(before) >= 3 else before[0]
    return [n.name for n in nodes[first : behind + 1]]


def test_heads_go_in_a_part_with_a_cache(ragged_decoder: Program) -> None:
    program = ragged_decoder
    part = extract(
        program, attention(program, "decode"), program.entries["decode"].example, "decode"
    )
    assert_equals_whole(program, part, "decode")
    assert len(part.forward.cache) == 2
    (group,) = axis_groups(part).with_role("kv_group")
    whole = {g.id for g in axis_groups(program).with_role("kv_group")}
    assert group.id in whole
    assert not group.frozen
    kept = {group.id: [0, 2]}
    cut = shrink(part, kept)
    verify_rewrite(mask(part, kept), cut)
    past = next(iter(cut.forward.cache))
    assert cut.forward.example[cut.forward.input_names.index(past)].shape[1] == 2


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-llama"])
def test_a_part_shrinks_and_runs_in_onnx_runtime(
    captured: Captured, model: str, tmp_path: Path
) -> None:
    program = captured(model)
    part = extract(program, attention(program), program.forward.example)
    assert_equals_whole(program, part)
    (group, *_) = axis_groups(part).with_role("head", "kv_group")
    kept = {group.id: range(1, group.size)}
    cut = shrink(part, kept)
    verify_rewrite(mask(part, kept), cut)
    for number, each in enumerate((part, cut)):
        save_onnx(to_onnx(each), tmp_path / f"{number}.onnx")
        check_parity(each, open_session(tmp_path / f"{number}.onnx"))


def test_a_part_is_refused_by_a_sentence(captured: Captured) -> None:
    program = captured("tiny-encoder")
    example = program.forward.example
    with pytest.raises(GraphPruneError, match="has no node 'nothing'"):
        extract(program, ["nothing"], example)
    with pytest.raises(GraphPruneError, match="nothing outside reads what these 0 nodes"):
        extract(program, [program.forward.input_names[0]], example)
    with pytest.raises(GraphPruneError, match="has 3 dimensions"):
        extract(program, [calls(program)[0].name], [t[..., None] for t in example])


def test_tied_tensors_are_one_in_a_part(captured: Captured) -> None:
    program = captured("tiny-gpt2")
    every = [node.name for node in calls(program)]
    part = extract(program, every, program.forward.example)
    assert_equals_whole(program, part)
    assert part.tensors.keys() == program.tensors.keys()
    assert part.aliases == program.aliases != {}
