"""Calibration on its way through compile: asked for before any work, read once, kept for export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes import (
    Finetune,
    FoldConstants,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    Quantize,
    RemoveDeadNodes,
    Repeat,
)
from graphprune.passes.structural.sensitivity import sensitivity

Captured = Callable[[str], Program]


class Explodes(nn.Module):
    """A model that must not be run: bad input is refused before capture."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("captured")


def test_passes_say_whether_they_need_data() -> None:
    assert not RemoveDeadNodes().needs_calibration
    assert not PruneHeads(0.5).needs_calibration
    assert not PruneAxis(0.5, role="v_dim").needs_calibration
    assert PruneHeads(0.5, score="obs").needs_calibration
    assert PruneNeurons(0.5, compensate="bias").needs_calibration
    assert Repeat((RemoveDeadNodes(), PruneNeurons(0.5, score="obs"))).needs_calibration
    assert not Repeat((RemoveDeadNodes(),)).needs_calibration


def test_a_pass_without_its_data_is_refused_before_the_model_is_touched() -> None:
    with pytest.raises(RecipeError, match=r"prune-neurons .*calibration=batches.*--calibration"):
        gp.compile(Explodes(), [PruneNeurons(0.5, score="obs")], example_inputs=(torch.ones(2),))
    both = [PruneHeads(0.5, score="obs"), PruneNeurons(0.5, score="obs")]
    with pytest.raises(RecipeError, match="prune-heads and prune-neurons"):
        gp.compile(Explodes(), both, example_inputs=(torch.ones(2),))


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ([], "yields no batch"),
        (iter(()), "yields no batch"),
        ({"x": torch.ones(2)}, r"got a dict.*calibration=\[batch\]"),
        (torch.ones(2), r"got a Tensor"),
        ("file.txt", "got a str"),
        (3, "got a int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_iterable_of_batches_is_refused_before_any_work(
    calibration: Any, says: str
) -> None:
    with pytest.raises(gp.GraphPruneError, match=says):
        gp.compile(
            Explodes(),
            [PruneNeurons(0.5, score="obs")],
            example_inputs=(torch.ones(2),),
            calibration=calibration,
        )


@pytest.mark.parametrize("empty", [(), {}, (torch.ones(0, 2),), {"x": torch.ones(2, 0)}], ids=str)
def test_an_empty_batch_is_refused_before_any_work(empty: Any) -> None:
    with pytest.raises(gp.GraphPruneError, match=r"calibration batch 1 holds nothing"):
        gp.compile(
            Explodes(), [], example_inputs=(torch.ones(2),), calibration=[(torch.ones(2),), empty]
        )


def test_an_empty_batch_is_refused_by_export_and_sensitivity(
    captured: Captured, tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    empty = (torch.ones(0, 12),)
    with pytest.raises(gp.GraphPruneError, match="calibration batch 0"):
        gp.compile(program, []).export(tmp_path / "out", calibration=[empty])
    with pytest.raises(gp.GraphPruneError, match=r"calibration batch 0: input 'x' .*holds nothing"):
        sensitivity(program, [empty])
    # One input of several that holds nothing is seen once the model is known.
    program = captured("tiny-bert")
    ids, mask = program.forward.example
    with pytest.raises(gp.GraphPruneError, match="calibration batch 0: input 'attention_mask'"):
        Stream(program, [{"input_ids": ids, "attention_mask": mask[:0]}])


def test_the_order_and_the_place_of_checkpoints_are_checked_before_any_work() -> None:
    x = (torch.ones(2),)
    with pytest.raises(RecipeError, match=r"'prune-heads' comes after 'quantize' \(int8-dynamic"):
        gp.compile(Explodes(), [Quantize("int8-dynamic"), PruneHeads(0.5)], example_inputs=x)
    training = gp.Training([{"x": x[0]}], loss="regression", checkpoints="/proc/checkpoints")
    with pytest.raises(gp.GraphPruneError, match=r"/proc/checkpoints.* cannot be written"):
        gp.compile(Explodes(), [Finetune()], example_inputs=x, training=training)


def test_names_that_match_nothing_are_refused_before_any_pass_runs(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("worked")

    monkeypatch.setattr("graphprune.pipeline.pipeline.run_pass", works)
    late = PruneNeurons(0.5, ignore=("layers.0.wieght",))
    with pytest.raises(RecipeError, match=r"ignore: 'layers.0.wieght' matches nothing"):
        gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5), Repeat((late,))])
    # A clean-up may give tensors the names that later passes mean.
    with pytest.raises(AssertionError, match="worked"):
        gp.compile(captured("tiny-mlp"), [FoldConstants(), late])


def test_a_generator_serves_several_passes(captured: Captured) -> None:
    program = captured("tiny-bert")
    passes = [PruneHeads(0.5, score="obs"), PruneNeurons(0.5, score="obs")]

    def batches() -> Iterator[Any]:
        yield tuple(program.forward.example)

    once = gp.compile(program, passes, calibration=batches())
    often = gp.compile(program, passes, calibration=list(batches()))
    for name, tensor in once.program.tensors.items():
        assert torch.equal(tensor, often.program.tensors[name])


def test_going_on_from_a_compiled_model_keeps_its_data(captured: Captured) -> None:
    program = captured("tiny-mlp")
    first = gp.compile(program, [], calibration=[tuple(program.forward.example)])
    second = gp.compile(first, [PruneNeurons(0.5, score="obs")])
    assert second.program.num_parameters() < program.num_parameters()
    assert second.calibration == first.calibration


def test_a_batch_that_does_not_fit_is_named(captured: Captured) -> None:
    program = captured("tiny-bert")
    ids, mask = program.forward.example
    good = {"input_ids": ids, "attention_mask": mask}
    for bad, says in (
        ({"input_ids": ids}, "calibration batch 1.*attention_mask"),
        ({**good, "extra": ids}, "calibration batch 1.*extra"),
        ({**good, "input_ids": ids[0]}, "calibration batch 1.*input_ids"),
    ):
        with pytest.raises(gp.GraphPruneError, match=says):
            gp.compile(program, [PruneNeurons(0.5, score="obs")], calibration=[good, bad])
