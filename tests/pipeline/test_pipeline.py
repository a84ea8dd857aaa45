"""The pipeline runs, times and reports passes, and catches each kind of pass that lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch

from graphprune.errors import PassError, UnsupportedError, VerificationError
from graphprune.ir.graph import output_node
from graphprune.ir.program import Program
from graphprune.passes import PruneNeurons, RemoveDeadNodes, Repeat
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.events import (
    Event,
    PassFinished,
    PassProgress,
    PassStarted,
    PipelineFinished,
    PipelineStarted,
)
from graphprune.pipeline.pipeline import Pipeline

Captured = Callable[[str], Program]


@final
@dataclass(frozen=True, slots=True)
class Step(Pass):
    """A pass that does what the test says, and claims what the test says."""

    name: ClassVar[str] = "step"
    preserves: ClassVar[Invariant] = Invariant.ALL

    action: Callable[[Program, Context], PassResult]

    def run(self, program: Program, ctx: Context) -> PassResult:
        return self.action(program, ctx)


@final
@dataclass(frozen=True, slots=True)
class Cutter(Pass):
    """The same, claiming to preserve the interface only."""

    name: ClassVar[str] = "cutter"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE

    action: Callable[[Program, Context], PassResult]

    def run(self, program: Program, ctx: Context) -> PassResult:
        return self.action(program, ctx)


@pytest.fixture
def program(captured: Captured) -> Program:
    return captured("tiny-mlp")


def _weight(program: Program) -> str:
    return next(name for name in sorted(program.parameters) if name.endswith("weight"))


def _nothing(program: Program, ctx: Context) -> PassResult:
    return PassResult(program, False)


def _copy(program: Program, ctx: Context) -> PassResult:
    """An honest pass that changes graphs without changing anything they compute."""
    return PassResult(program.with_graphs(program.fork_graphs()), True)


def _run(program: Program, *passes: Pass, **options: Any) -> Program:
    return Pipeline(passes, **options).run(program).program


# --- running -----------------------------------------------------------------------------------


def test_passes_run_in_the_given_order_and_are_recorded(program: Program) -> None:
    result = Pipeline([PruneNeurons(0.25), RemoveDeadNodes(), PruneNeurons(0.5)]).run(program)
    assert [r.name for r in result.results] == [
        "prune-neurons",
        "remove-dead-nodes",
        "prune-neurons",
    ]
    assert [r.modified for r in result.results] == [True, False, True]
    assert result.modified
    first, second = result.program.history[len(program.history) :]
    assert first["pass"] == {"prune-neurons": {"ratio": 0.25}}
    assert first["parameters_before"] == program.num_parameters()
    assert first["parameters_after"] == second["parameters_before"]
    assert second["parameters_after"] == result.program.num_parameters()
    assert set(first["steps"][0]["removed"]) == set(second["steps"][0]["removed"])
    assert first["verification"]["max_error"] <= 1e-5
    assert result.seconds >= sum(r.seconds + r.verify_seconds for r in result.results)


def test_an_empty_pipeline_returns_its_program(program: Program) -> None:
    result = Pipeline([]).run(program)
    assert result.program is program
    assert not result.modified


def test_events_come_in_order(program: Program) -> None:
    seen: list[Event] = []
    Pipeline([PruneNeurons(0.5), Step(_nothing)], observers=[seen.append]).run(program)
    kinds = [type(event) for event in seen if not isinstance(event, PassProgress)]
    assert kinds == [
        PipelineStarted,
        PassStarted,
        PassFinished,
        PassStarted,
        PassFinished,
        PipelineFinished,
    ]
    assert seen[0] == PipelineStarted(("prune-neurons", "step"))
    progress = [event for event in seen if isinstance(event, PassProgress)]
    assert progress
    assert progress[-1].done == progress[-1].total
    assert {event.name for event in progress} == {"prune-neurons"}
    finished = [event for event in seen if isinstance(event, PassFinished)]
    assert [(event.index, event.total, event.modified) for event in finished] == [
        (0, 2, True),
        (1, 2, False),
    ]


def test_observers_hear_of_a_pass_inside_another(program: Program) -> None:
    seen: list[Event] = []
    nested = Repeat((PruneNeurons(0.5),), at_most=1)
    Pipeline([nested], observers=[seen.append]).run(program, Context())
    assert len([e for e in seen if isinstance(e, PipelineStarted)]) == 1
    progress = {(e.name, e.unit) for e in seen if isinstance(e, PassProgress)}
    assert {name for name, _ in progress} == {"repeat", "prune-neurons"}
    assert {unit for name, unit in progress if name == "repeat"} == {"repeats"}


def test_the_reference_is_the_program_that_it_began_with(program: Program) -> None:
    references = []

    def look(current: Program, ctx: Context) -> PassResult:
        references.append(ctx.reference)
        return PassResult(current, False)

    Pipeline([PruneNeurons(0.5), Step(look)]).run(program)
    assert references == [program]


def test_the_same_seed_gives_the_same_program(program: Program) -> None:
    def kept(seed: int) -> Any:
        passes = [PruneNeurons(0.5, score="random")]
        return Pipeline(passes).run(program, Context(seed=seed)).results[0].report["kept"]

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_randomness_of_a_pass_does_not_depend_on_what_others_drew(program: Program) -> None:
    drawn = []

    def draw(current: Program, ctx: Context) -> PassResult:
        drawn.append(float(torch.rand((), generator=ctx.generator)))
        return PassResult(current, False)

    Pipeline([Step(draw), Step(draw)]).run(program, Context(seed=3))
    Pipeline([Step(_nothing), Step(draw)]).run(program, Context(seed=3))
    assert drawn[1] == drawn[2]
    assert drawn[0] != drawn[1]


def test_analyses_are_computed_once_a_program(program: Program) -> None:
    calls = []

    def analysis(current: Program) -> int:
        calls.append(current)
        return len(calls)

    ctx = Context()
    assert ctx.get(analysis, program) == ctx.get(analysis, program) == 1
    other = program.record({"something": "else"})
    assert ctx.get(analysis, other) == 2
    ctx.run.forget(other)
    assert ctx.get(analysis, other) == 2
    assert ctx.get(analysis, program) == 3


# --- planted faults ----------------------------------------------------------------------------


def test_a_pass_that_crashes_is_named_with_the_passes_before_it(program: Program) -> None:
    def crash(current: Program, ctx: Context) -> PassResult:
        raise ZeroDivisionError("by accident")

    with pytest.raises(PassError, match=r"'step' \(after remove-dead-nodes, step\) crashed") as e:
        Pipeline([RemoveDeadNodes(), Step(_nothing), Step(crash)]).run(program)
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_pass_that_declines_says_so_itself(program: Program) -> None:
    def decline(current: Program, ctx: Context) -> PassResult:
        raise UnsupportedError("quantize after pruning, not before")

    with pytest.raises(UnsupportedError, match="quantize after pruning"):
        _run(program, Step(decline))


def _write_tensor(program: Program, ctx: Context) -> PassResult:
    with torch.no_grad():
        program.tensors[_weight(program)].mul_(1.0)
    return PassResult(program, False)


def _write_graph(program: Program, ctx: Context) -> PassResult:
    node = next(n for n in program.forward.graph.nodes if n.op == "call_function")
    node.name = f"{node.name}_renamed"
    return _copy(program, ctx)


def _write_metadata(program: Program, ctx: Context) -> PassResult:
    node = next(n for n in program.forward.graph.nodes if n.op == "call_function")
    node.meta["val"] = torch.empty(1)
    return PassResult(program, False)


@pytest.mark.parametrize("action", [_write_tensor, _write_graph, _write_metadata])
def test_a_pass_that_writes_to_its_input_is_caught(
    program: Program, action: Callable[[Program, Context], PassResult]
) -> None:
    own = program.with_tensors({k: t.clone() for k, t in program.tensors.items()}).with_graphs(
        program.fork_graphs()
    )
    with pytest.raises(VerificationError, match="'step': it wrote to its input"):
        _run(own, Step(action))


def test_a_lost_modification_is_caught(program: Program) -> None:
    with pytest.raises(VerificationError, match="nothing modified but returned another"):
        _run(program, Step(lambda p, ctx: PassResult(p.record("x"), False)))


def test_a_claimed_modification_is_caught(program: Program) -> None:
    with pytest.raises(VerificationError, match="a modified program but returned its input"):
        _run(program, Step(lambda p, ctx: PassResult(p, True)))


def test_stale_metadata_is_caught(program: Program) -> None:
    def stale(current: Program, ctx: Context) -> PassResult:
        made = current.with_graphs(current.fork_graphs())
        node = next(n for n in made.forward.graph.nodes if n.op == "call_function")
        node.meta["val"] = node.meta["val"][..., :1]
        return PassResult(made, True)

    with pytest.raises(VerificationError, match=r"'step': entry 'forward', node .* stores .* but"):
        _run(program, Step(stale))


def test_a_forgotten_bias_is_caught(program: Program) -> None:
    """A weight loses rows, the bias and the next weight do not."""

    def forget(current: Program, ctx: Context) -> PassResult:
        name = _weight(current)
        return PassResult(current.with_tensors({name: current.tensors[name][:-1]}), True)

    with pytest.raises(VerificationError, match=r"'cutter': node .* does not fit its inputs"):
        _run(program, Cutter(forget))


def test_a_missing_tensor_is_caught(program: Program) -> None:
    def lose(current: Program, ctx: Context) -> PassResult:
        left = {k: t for k, t in current.tensors.items() if k != _weight(current)}
        return PassResult(dataclasses.replace(current, tensors=left), True)

    with pytest.raises(VerificationError, match="which is gone"):
        _run(program, Cutter(lose))


def test_a_reshaped_weight_is_caught(program: Program) -> None:
    def widen(current: Program, ctx: Context) -> PassResult:
        return PassResult(current.with_tensors({"unused": torch.zeros(3)}), True)

    with pytest.raises(VerificationError, match="preserves shapes but tensor 'unused'"):
        _run(program, Step(widen))


def test_a_changed_output_is_caught(program: Program) -> None:
    def twice(current: Program, ctx: Context) -> PassResult:
        graphs = current.fork_graphs()
        node = output_node(graphs["forward"])
        (first,) = node.all_input_nodes
        node.args = ((first, first),)
        return PassResult(current.with_graphs(graphs), True)

    with pytest.raises(VerificationError, match="preserves the interface but the outputs"):
        _run(program, Cutter(twice))


def test_a_renamed_input_is_caught(program: Program) -> None:
    def rename(current: Program, ctx: Context) -> PassResult:
        graphs = current.fork_graphs()
        node = next(n for n in graphs["forward"].nodes if n.op == "placeholder")
        was, node.name = node.name, "renamed"
        entry = current.forward
        dynamic = {("renamed" if k == was else k): v for k, v in entry.dynamic.items()}
        entries = {"forward": dataclasses.replace(entry, dynamic=dynamic)}
        return PassResult(dataclasses.replace(current, entries=entries).with_graphs(graphs), True)

    with pytest.raises(VerificationError, match="preserves the interface but the input names"):
        _run(program, Cutter(rename))


def test_a_fold_that_adds_one_is_caught(program: Program) -> None:
    def add_one(current: Program, ctx: Context) -> PassResult:
        graphs = current.fork_graphs()
        node = output_node(graphs["forward"])
        (first,) = node.all_input_nodes
        with graphs["forward"].inserting_before(node):
            more = graphs["forward"].call_function(torch.ops.aten.add.Tensor, (first, 1))
        node.args = ((more,),)
        return PassResult(current.with_graphs(graphs), True)

    with pytest.raises(VerificationError, match="'step'"):
        _run(program, Step(add_one))
    # The same change is fine for a pass that does not claim to keep numerics.
    assert _run(program, Cutter(add_one)) is not program


def test_a_changed_weight_is_caught(program: Program) -> None:
    def scale(current: Program, ctx: Context) -> PassResult:
        name = _weight(current)
        return PassResult(current.with_tensors({name: current.tensors[name] * 1.001}), True)

    with pytest.raises(VerificationError, match="'step'"):
        _run(program, Step(scale))


def test_resizing_without_a_proof_is_caught(program: Program) -> None:
    def unproven(current: Program, ctx: Context) -> PassResult:
        result = PruneNeurons(0.5).run(current, ctx)
        report = {k: v for k, v in result.report.items() if k != "verification"}
        return PassResult(result.program, True, report)

    with pytest.raises(VerificationError, match=r"'cutter': it resized .* ctx\.shrink"):
        _run(program, Cutter(unproven))


def test_nothing_is_checked_when_switched_off(program: Program) -> None:
    def scale(current: Program, ctx: Context) -> PassResult:
        name = _weight(current)
        return PassResult(current.with_tensors({name: current.tensors[name] * 2}), True)

    assert _run(program, Step(scale), verify=False) is not program
    result = Pipeline([PruneNeurons(0.5)], verify=False).run(program)
    assert result.results[0].report["verification"] == {"skipped": "verification was switched off"}


def test_a_wrong_cut_names_pass_and_axis(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shrink step takes other units than the mask: only the comparison can see that."""
    from graphprune.rewrite import shrink as rewrite

    right = rewrite.shrink

    def wrong(current: Program, keep: Any) -> Program:
        return right(current, {k: [int(i) ^ 1 for i in v] for k, v in keep.items()})

    monkeypatch.setattr(rewrite, "shrink", wrong)
    with pytest.raises(VerificationError, match=r"'prune-neurons': removing units of '.*\[.\]'"):
        _run(program, PruneNeurons(0.5))


# --- dumps and repetition ----------------------------------------------------------------------


def _fail(program: Program, ctx: Context) -> PassResult:
    name = _weight(program)
    return PassResult(program.with_tensors({name: program.tensors[name] + 1}), True)


@final
@dataclass(frozen=True, slots=True)
class Faulty(Pass):
    name: ClassVar[str] = "faulty"

    def run(self, program: Program, ctx: Context) -> PassResult:
        return _fail(program, ctx)


def test_a_failure_leaves_graphs_and_recipe_where_asked(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dump"
    monkeypatch.setenv("GRAPHPRUNE_DUMP", str(folder))
    with pytest.raises(VerificationError):
        _run(program, RemoveDeadNodes(), Faulty())
    assert {p.name for p in folder.iterdir()} == {
        "before-forward.txt",
        "after-forward.txt",
        "recipe.yaml",
    }
    assert "linear" in (folder / "before-forward.txt").read_text()
    assert (folder / "recipe.yaml").read_text().startswith("# failed at pass 2 of 2: faulty\n")


def test_a_dump_that_cannot_be_written_hides_no_error(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHPRUNE_DUMP", str(tmp_path / "file"))
    with pytest.raises(VerificationError):
        _run(program, Step(_fail))


def test_repeat_stops_when_nothing_changes(program: Program) -> None:
    runs = []

    def twice(current: Program, ctx: Context) -> PassResult:
        runs.append(1)
        return _copy(current, ctx) if len(runs) < 3 else PassResult(current, False)

    result = Pipeline([Repeat((Step(twice),), at_most=9)]).run(program)
    assert len(runs) == 3
    assert result.results[0].report["settled"]
    assert len(result.program.history) == len(program.history) + 1


def test_repeat_says_when_it_did_not_settle(program: Program) -> None:
    result = Pipeline([Repeat((Step(_copy),), at_most=2)]).run(program)
    assert not result.results[0].report["settled"]
    assert len(result.results[0].report["rounds"]) == 2


def test_repeat_of_nothing_to_do_returns_its_input(program: Program) -> None:
    result = Pipeline([Repeat((RemoveDeadNodes(),))]).run(program)
    assert not result.modified
    assert result.program is program


def test_repeat_verifies_what_is_inside(program: Program) -> None:
    with pytest.raises(VerificationError, match="'step'"):
        _run(program, Repeat((Step(_fail),)))
