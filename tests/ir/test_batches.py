"""Batches made from the examples, against written-out rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from graphprune.ir.batches import bounds_not_run, fresh_inputs, second_inputs, second_sizes
from graphprune.ir.program import Program

aten = torch.ops.aten


@pytest.fixture(scope="module")
def text(program_of: Callable[..., Program]) -> Program:
    """Two tables, a mask and a bias along [batch, sequence]."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        call = graph.call_function
        words = call(aten.embedding.default, (node["words"], node["ids"]))
        types = call(aten.embedding.default, (node["types"], node["kinds"]))
        weight = call(aten.mul.Tensor, (node["bias"], node["mask"]))
        total = call(aten.add.Tensor, (words, types))
        return (call(aten.mul.Tensor, (total, call(aten.unsqueeze.default, (weight, -1)))),)

    ids = torch.randint(3, 9, (2, 9), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 9, dtype=torch.int64)
    inputs = {"ids": ids, "kinds": ids * 0, "mask": ones, "bias": ids / 9}
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs}
    tables = {"words": torch.randn(50, 8), "types": torch.randn(1, 8)}
    return program_of(tables, inputs, write, dynamic)


def test_the_second_batch_is_padded_and_of_other_sizes(text: Program) -> None:
    ids, kinds, mask, _ = second_inputs(text.forward)
    assert ids.shape == mask.shape == (3, 6)
    assert mask.tolist() == [[1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0]]
    # Numbers of a table's rows are no mask, although they are all zero.
    assert not kinds.any()


def test_fresh_values_reach_all_of_a_table_and_pad_in_earnest(text: Program) -> None:
    entry = text.forward
    ids, kinds, mask, bias = fresh_inputs(entry)
    assert ids.max() > 9
    assert 0 <= int(ids.min()) <= int(ids.max()) < 50
    assert not kinds.any()
    assert mask[0].all()
    assert bool((mask[:, 0] == 1).all())
    assert (mask == 0).any()
    assert bool((bias >= 0).all())
    assert not torch.equal(bias, entry.example[3])
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh_inputs(entry), (ids, kinds, mask, bias), strict=True)
    )


def test_fresh_floats_have_the_sign_of_the_examples(text: Program) -> None:
    bias = fresh_inputs(text.forward)[3]
    negative = replace(text.forward, example=(*text.forward.example[:3], -text.forward.example[3]))
    assert bool((bias >= 0).all())
    assert bool((fresh_inputs(negative)[3] < 0).any())


def test_a_second_batch_has_one_more_sample_and_two_thirds_of_a_length() -> None:
    example: tuple[Tensor, ...] = (torch.zeros(2, 9),)
    dynamic = {"x": {0: "batch", 1: "sequence"}}
    own = {"batch": 2, "sequence": 9}
    assert second_sizes(("x",), example, dynamic) == [
        {"batch": 3, "sequence": 6}, {"batch": 3, "sequence": 9}, own,
    ]  # fmt: skip
    bounds = {"batch": (2, 2), "sequence": (8, None)}
    assert second_sizes(("x",), example, dynamic, bounds)[0] == {"batch": 2, "sequence": 8}


def test_bounds_that_are_too_large_to_run_are_named(text: Program) -> None:
    bounds = {"batch": (2, 1024), "sequence": (2, 1025), "past": (0, None)}
    assert bounds_not_run(replace(text.forward, bounds=bounds)) == ["sequence <= 1025"]
