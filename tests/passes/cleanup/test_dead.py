from __future__ import annotations

from collections.abc import Callable

import torch

from graphprune.ir.program import Program
from graphprune.passes import RemoveDeadNodes
from graphprune.pipeline.pipeline import Pipeline

Captured = Callable[[str], Program]


def test_what_no_output_needs_goes(captured: Captured) -> None:
    program = captured("tiny-mlp")
    graphs = program.fork_graphs()
    graph = graphs["forward"]
    node = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_after(node):
        dead = graph.call_function(torch.ops.aten.relu.default, (node,))
    with graph.inserting_after(dead):
        graph.call_function(torch.ops.aten.neg.default, (dead,))
    littered = program.with_graphs(graphs, {**program.tensors, "unread": torch.ones(3)})

    result = Pipeline([RemoveDeadNodes()]).run(littered)
    assert (
        result.results[0].report["nodes"] == {"forward": ["relu", "neg"]}
        or len(result.results[0].report["nodes"]["forward"]) == 2
    )
    assert result.results[0].report["tensors"] == ["unread"]
    assert result.program.tensors.keys() == program.tensors.keys()
    assert [n.name for n in result.program.forward.graph.nodes] == [
        n.name for n in program.forward.graph.nodes
    ]


def test_unused_inputs_are_part_of_the_interface(captured: Captured) -> None:
    program = captured("tiny-bert")
    after = Pipeline([RemoveDeadNodes()]).run(program).program
    assert after.forward.input_names == program.forward.input_names


def test_tied_names_go_with_their_tensor(captured: Captured) -> None:
    program = captured("tiny-mlp")
    tied = program.with_tensors({"unread": torch.ones(3)})
    tied = type(tied)(
        tensors=tied.tensors,
        parameters=tied.parameters | {"unread"},
        aliases={"also_unread": "unread"},
        entries=tied.entries,
    )
    after = Pipeline([RemoveDeadNodes()]).run(tied).program
    assert after.parameters == program.parameters
    assert after.aliases == {}
    assert "unread" not in after.tensors


def test_a_clean_program_stays_the_same_object(captured: Captured) -> None:
    program = captured("tiny-mlp")
    assert Pipeline([RemoveDeadNodes()]).run(program).program is program
