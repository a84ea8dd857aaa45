"""Finetune and Distill: what they minimize, and that pruned models recover."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import RecipeError, TrainingError, UnsupportedError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import Distill, Finetune, PruneAxis, PruneHeads, PruneNeurons, Quantize
from graphprune.passes.training.training_pass import trained_report
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.pipeline.recipe import dump, loads
from graphprune.training.loop import Fitted
from graphprune.training.losses import logits_of
from graphprune.training.objective import Distillation, Objective, residual_values
from graphprune.training.records import Epoch, TrainingReport
from graphprune.training.spec import Training

Captured = Callable[[str], Program]


def _text(program: Program, **more: Any) -> dict[str, Tensor]:
    return dict(zip(program.forward.input_names, program.forward.example, strict=True)) | more


def _pruned(program: Program, *passes: Any) -> Program:
    return Pipeline(passes or (PruneNeurons(0.5), PruneHeads(0.5))).run(program).program


def _objective(student: Program, teacher: Program, *, labels: bool = False, **options: Any) -> Any:
    loss = options.pop("loss", "classification")
    return Objective(student, loss, teacher, Distillation(**options), labels)


def _terms(objective: Any, student: Program, batch: Any) -> dict[str, float]:
    module = objective.module(student)  # in eval mode
    found = objective.terms(module, student, batch)
    return {name: float(term.total.detach()) / term.count for name, term in found.items()}


# --- distillation's terms ----------------------------------------------------------------------


def test_a_teacher_that_is_not_the_dense_model_is_told(captured: Captured, tmp_path: Path) -> None:
    """What was saved does not hold the dense one; in memory it is at hand."""
    program = captured("tiny-encoder")
    training = Training([_text(program, labels=torch.tensor([1, 4]))])
    pruned = gp.compile(program, [PruneNeurons(0.5)])
    pruned.save(tmp_path / "m")
    for start, count in ((pruned, 0), (gp.load(tmp_path / "m"), 1)):
        report = gp.compile(start, [Distill(epochs=1)], training=training).report
        warnings = report.passes[-1].details["warnings"]
        assert len(warnings) == count
        assert all("of the dense model's" in sentence for sentence in warnings)


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-gpt2", "tiny-llama", "tiny-fused-vit"])
def test_the_teacher_itself_has_nothing_to_learn(model: str, captured: Captured) -> None:
    program = captured(model)
    objective = _objective(program, program)
    assert objective.nodes
    terms = _terms(objective, program, _text(program))
    assert terms["outputs"] == pytest.approx(0, abs=1e-6)
    assert terms["hidden"] == pytest.approx(0, abs=1e-9)


def test_terms_are_their_formulas(captured: Captured) -> None:
    teacher = captured("tiny-encoder")
    student = _pruned(teacher)
    batch = _text(teacher, labels=torch.tensor([1, 4]))
    objective = _objective(student, teacher, labels=True, temperature=3.0, alpha=0.25)
    assert objective.weights == {"labels": 0.25, "outputs": 0.75, "hidden": 1.0}
    terms = _terms(objective, student, batch)

    names = [node.name for node in residual_values(teacher)]
    assert objective.nodes == names
    small, large = ProgramModule(student, record=names), ProgramModule(teacher, record=names)
    text = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        a, b = small(**text), large(**text)
    p, q = (b / 3).softmax(-1), (a / 3).softmax(-1)
    assert terms["outputs"] == pytest.approx(
        9 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-4
    )
    assert terms["labels"] == pytest.approx(float(F.cross_entropy(a, batch["labels"])), rel=1e-5)
    keep = batch["attention_mask"].bool()
    assert not keep.all()
    errors = []
    for name in names:
        s, t = small.recorded[name][keep], large.recorded[name][keep]
        errors.append((s - t).square().sum(-1) / t.square().sum(-1))
    assert terms["hidden"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)
    assert terms["hidden"] > 1e-3


def test_padding_has_no_part_in_it(captured: Captured) -> None:
    teacher = captured("tiny-llama")
    student = _pruned(teacher)
    batch = _text(teacher)
    longer = {name: F.pad(t, (0, 5)) for name, t in batch.items()}
    objective = _objective(student, teacher, loss="causal-lm")
    short, long = (_terms(objective, student, b) for b in (batch, longer))
    assert short == pytest.approx(long, rel=1e-4)


def test_outputs_that_are_no_logits_are_compared_by_distance(captured: Captured) -> None:
    teacher = captured("tiny-fused-vit")
    student = _pruned(teacher)
    objective = _objective(student, teacher, loss=lambda o, b: o.sum(), hidden=0.0)
    batch = _text(teacher)
    a, b = (logits_of(p(**batch)) for p in (student, teacher))
    found = _terms(objective, student, batch)
    assert found == {"outputs": pytest.approx(float((a - b).square().sum(-1).mean()), rel=1e-5)}


def test_nodes_of_another_shape_are_left_out_and_named(captured: Captured) -> None:
    teacher = captured("tiny-encoder")
    narrow = _pruned(teacher, PruneAxis(0.25, role="residual", normalized=True))
    result = Pipeline([Distill(epochs=1)]).run(
        narrow, Context(reference=teacher, training=Training([_text(teacher)]))
    )
    report = result.results[0].report
    assert report["hidden_nodes"] == []
    assert "[None, None, 24] is [None, None, 32] in the teacher" in report["skipped"]["layer_norm"]
    assert report["terms"] == {"outputs": 1.0}
    assert report["epochs"][0]["loss"] > 0


# --- the passes --------------------------------------------------------------------------------


def test_distilling_needs_no_labels_and_brings_the_teacher_back(captured: Captured) -> None:
    teacher = captured("tiny-fused-vit")
    drawn = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(8, 3, 16, 16, generator=drawn)} for _ in range(4)]
    test = {"pixel_values": torch.randn(64, 3, 16, 16, generator=drawn)}
    program = _pruned(teacher, PruneNeurons(0.5))
    context = Context(reference=teacher, training=Training(data))
    result = Pipeline([Distill(epochs=12, lr=3e-3)]).run(program, context)
    report = result.results[0].report
    assert report["labels"] == "none: the teacher alone"
    assert report["teacher_parameters"] == teacher.num_parameters()
    assert report["terms"] == {"outputs": 1.0, "hidden": 1.0}

    def distance(now: Program) -> float:
        return float((logits_of(now(**test)) - logits_of(teacher(**test))).norm())

    assert distance(result.program) < 0.5 * distance(program)
    json.dumps(report)


def test_finetuning_through_compile_reaches_the_export(tmp_path: Path) -> None:
    import onnxruntime

    model, inputs = tiny("tiny-mlp")
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=drawn)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    data = [{"x": x[i : i + 6], "labels": labels[i : i + 6]} for i in range(0, 60, 6)]
    passes = [PruneNeurons(0.75), Finetune(epochs=15, lr=1e-2)]
    training = gp.Training(data, eval=data)
    compiled = gp.compile(model, passes, example_inputs=inputs, training=training)
    details = compiled.report.passes[1].details
    assert details["metric"] == "accuracy"
    assert details["metric_after"] > details["metric_before"] + 0.15
    assert "accuracy" in str(compiled.report)
    assert "not compared: finetune" in compiled.report.verification()
    again = gp.compile(model, passes, example_inputs=inputs, training=training)
    for name, tensor in compiled.program.tensors.items():
        assert tensor.equal(again.program.tensors[name])

    compiled.export(tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (output,) = session.run(None, {"x": x[:5].numpy()})
    np.testing.assert_allclose(output, compiled.program(x[:5]).numpy(), rtol=1e-4, atol=1e-5)
    only = gp.compile(model, [Finetune(1)], example_inputs=inputs, training=training)
    assert only.report.verification().endswith("only values: nothing to verify")
    # And goes on: another round from what there is.
    more = gp.compile(compiled, [Finetune(epochs=1)], training=training)
    assert [p.name for p in more.report.passes] == ["prune-neurons", "finetune", "finetune"]


def test_a_model_with_a_loss_of_its_own_takes_labels_from_the_batch(captured: Captured) -> None:
    """Its `labels` argument was captured empty; the batch's are for our loss."""
    program = captured("tiny-roberta")
    data = [_text(program, labels=torch.tensor([0, 1]))]
    context = Context(training=Training(data, eval=data))
    report = Pipeline([Finetune(epochs=4, lr=1e-3)]).run(program, context).results[0].report
    assert report["epochs"][-1]["loss"] < report["epochs"][0]["loss"]


def test_what_a_user_should_know_is_noted(captured: Captured) -> None:
    program = captured("tiny-mlp")
    training = Training([{"x": torch.ones(2, 12), "labels": torch.tensor([0, 1])}])
    report = Pipeline([Finetune(1)]).run(program, Context(training=training)).results[0].report
    assert report["notes"] == [
        "the graph has no dropout: it was captured without, or a pass removed it"
    ]


def test_refusals(captured: Captured) -> None:
    program = captured("tiny-mlp")
    with pytest.raises(RecipeError, match=r"'finetune' trains and needs data.*training=Training"):
        Pipeline([Finetune()]).run(program)
    training = Training([{"x": torch.ones(2, 12)}])
    with pytest.raises(TrainingError, match="no tensor 'labels'"):
        Pipeline([Finetune()]).run(program, Context(training=training))
    with pytest.raises(UnsupportedError, match="'distill' comes after 'quantize'"):
        Pipeline([Quantize("int8-dynamic"), Distill()]).run(program, Context(training=training))
    for options, says in (
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"alpha": 1.5}, "alpha must be a weight, 0 to 1"),
        ({"hidden_weight": -1}, "hidden_weight must be 0 or more"),
        ({"hidden": 2}, "hidden is true or false"),
    ):
        with pytest.raises(RecipeError, match=says):
            Distill(**options)


def test_recipes_know_them() -> None:
    text = "passes:\n- distill: {temperature: 2, hidden: true, epochs: 2}\n- finetune\n"
    assert loads(text) == [Distill(2.0, True, epochs=2), Finetune()]
    assert loads(dump(loads(text))) == loads(text)


def test_the_sentence_tells_labels_apart_and_an_early_end(captured: Captured) -> None:
    program = captured("tiny-mlp")
    losses = [{"loss": 6.5, "labels": 1.1}, {"loss": 2.25, "labels": 1.125}]
    epochs = [Epoch(i + 1, means) for i, means in enumerate(losses)]
    record = TrainingReport(epochs=epochs, steps=16)
    plain = trained_report(Fitted(program, record))["summary"]
    assert plain == "trained 16 steps, loss 6.5 to 2.25 (labels 1.1 to 1.12)"
    early = trained_report(Fitted(program, replace(record, stopped_early=True)))["summary"]
    assert early.endswith(", stopped early after epoch 2")
