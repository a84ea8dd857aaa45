"""The terms of distillation, each written out for a model made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.errors import RecipeError, TrainingError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.training.objective import (
    Distillation,
    Objective,
    inputs_of,
    refuse_unknown,
    residual_values,
    shared_nodes,
)

aten = torch.ops.aten
Make = Callable[[int], Program]


@pytest.fixture
def make(program_of: Callable[..., Program]) -> Make:
    """head(h + down(relu(up(h)))) with h = stem(x), of a seed."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> dict[str, fx.Node]:
        def linear(x: fx.Node, name: str) -> fx.Node:
            return graph.call_function(aten.linear.default, (x, node[name]))

        stem = linear(node["x"], "stem")
        inner = graph.call_function(aten.relu.default, (linear(stem, "up"),))
        stream = graph.call_function(aten.add.Tensor, (stem, linear(inner, "down")))
        return {"logits": linear(stream, "head")}

    def made(seed: int) -> Program:
        drawn = torch.Generator().manual_seed(seed)
        shapes = {"stem": (6, 3), "up": (8, 6), "down": (6, 8), "head": (4, 6)}
        tensors = {n: torch.randn(s, generator=drawn) for n, s in shapes.items()}
        return program_of(tensors, {"x": torch.randn(5, 3, generator=drawn)}, write)

    return made


BATCH = {"x": torch.linspace(-1, 1, 15).view(5, 3), "labels": torch.tensor([0, 3, 1, 2, 2])}


def means(objective: Objective, student: Program, batch: Any = None) -> dict[str, float]:
    terms = objective.terms(objective.module(student), student, batch or BATCH)
    return {name: float(t.total.detach()) / t.count for name, t in terms.items()}


def test_terms_are_their_formulas_by_hand(make: Make) -> None:
    """α CE(labels) + (1 - α) T² KL(teacher ‖ student at T) + Σ|s - t|² / Σ|t|² a row."""
    student, teacher = make(0), make(1)
    objective = Objective(student, "classification", teacher, Distillation(3.0, 0.25, 0.5), True)
    assert objective.weights == {"labels": 0.25, "outputs": 0.75, "hidden": 0.5}
    a, b = student(x=BATCH["x"])["logits"], teacher(x=BATCH["x"])["logits"]
    p, q = (b / 3).softmax(-1), (a / 3).softmax(-1)
    (name,) = objective.nodes
    hidden = []
    for program in (student, teacher):
        module = ProgramModule(program, record=[name])
        module(BATCH["x"])
        hidden.append(module.recorded[name].detach())
    s, t = hidden
    assert means(objective, student) == {
        "labels": pytest.approx(float(F.cross_entropy(a, BATCH["labels"])), rel=1e-5),
        "outputs": pytest.approx(9 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-4),
        "hidden": pytest.approx(
            float(((s - t).square().sum(-1) / t.square().sum(-1)).mean()), rel=1e-5
        ),
    }


def test_a_teacher_teaches_itself_nothing(make: Make) -> None:
    teacher = make(0)
    objective = Objective(teacher, "classification", teacher, Distillation(), False)
    assert means(objective, teacher) == pytest.approx({"outputs": 0, "hidden": 0}, abs=1e-6)


def test_outputs_of_other_losses_are_compared_by_distance(make: Make) -> None:
    student, teacher = make(0), make(1)
    objective = Objective(student, "regression", teacher, Distillation(hidden=0), False)
    a, b = (p(x=BATCH["x"])["logits"] for p in (student, teacher))
    assert means(objective, student) == {
        "outputs": pytest.approx(float((a - b).square().sum(-1).mean()), rel=1e-5)
    }


@pytest.mark.parametrize(
    ("alpha", "has_labels", "weights"),
    [(0.25, True, {"labels": 0.25, "outputs": 0.75}), (1.0, True, {"labels": 1.0}),
     (0.0, True, {"outputs": 1.0}), (0.25, False, {"outputs": 1.0})],
)  # fmt: skip
def test_weights_are_those_of_the_terms_there_are(
    make: Make, alpha: float, has_labels: bool, weights: dict[str, float]
) -> None:
    given = Distillation(alpha=alpha, hidden=0)
    objective = Objective(make(0), "classification", make(1), given, has_labels)
    assert objective.weights == weights
    assert means(objective, make(0)).keys() == weights.keys()
    alone = Objective(make(0), "classification", None, None, has_labels)
    assert alone.weights == {"labels": 1.0}


def test_gradients_reach_the_student_alone(make: Make) -> None:
    student, teacher = make(0), make(1)
    objective = Objective(student, "classification", teacher, Distillation(), True)
    module = objective.module(student)
    terms = objective.terms(module, student, BATCH)
    torch.autograd.backward([t.total for t in terms.values()])
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())


def test_the_residual_stream_is_what_is_added_to(make: Make) -> None:
    program = make(0)
    (node,) = residual_values(program)
    assert node.target is aten.add.Tensor
    assert shared_nodes(program, program) == ([node.name], {})
    graphs = program.fork_graphs()
    next(n for n in graphs["forward"].nodes if n.name == node.name).name = "renamed"
    entry = replace(program.forward, graph=graphs["forward"])
    other = replace(program, entries={"forward": entry})
    assert shared_nodes(other, program) == ([], {"renamed": "the teacher has no such node"})


def test_inputs_are_those_of_the_model_in_its_type(make: Make) -> None:
    program = make(0)
    found = inputs_of(program, {"x": BATCH["x"].double(), "labels": BATCH["labels"], "extra": 1})
    assert found.keys() == {"x"}
    assert found["x"].dtype is torch.float32
    with pytest.raises(TrainingError, match=r"\['extra'\], which the model does not take"):
        refuse_unknown(program, {"x": 0, "labels": 0, "extra": 0}, "classification")
    refuse_unknown(program, {"x": 0, "extra": 0}, lambda outputs, batch: Tensor())


@pytest.mark.parametrize(
    ("options", "says"),
    [({"temperature": 0}, "temperature"), ({"alpha": 1.5}, "alpha"), ({"hidden": -1}, "hidden"),
     ({"hidden": True}, "hidden_weight")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Distillation(**options)
