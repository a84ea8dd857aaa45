"""The objective of training: the loss on labels, and the distance to a teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.axes.algebra import find, leaves
from graphprune.calibration.padding import rows_without_padding
from graphprune.calibration.stream import flat_batch
from graphprune.errors import TrainingError
from graphprune.ir.graph import is_op, output_node, value_of
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import JSON, Program
from graphprune.training.losses import Loss, Summed, logits_of, loss_of
from graphprune.validate import check_number

log = logging.getLogger(__name__)

_NORMS = ("layer_norm", "rms_norm")


@final
@dataclass(frozen=True, slots=True)
class Distillation:
    """How to learn from a teacher.

    Attributes:
        temperature: both logits are divided by it; their divergence is multiplied by its square.
        alpha: weight of the loss on labels; 1 - alpha is that of the teacher's outputs. Without
            labels the teacher's outputs are all.
        hidden: weight of the hidden states; 0 leaves them out.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    hidden: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "a number above 0", low=0, open_low=True)
        check_number("alpha", self.alpha, "a weight, 0 to 1", low=0, high=1)
        check_number("hidden_weight", self.hidden, "0 or more", low=0)


@final
class Objective:
    """The terms of the loss of a batch: "labels", and with a teacher "outputs" and "hidden".

    Attributes:
        weights: what each term is multiplied by; the terms there are, in this order.
        nodes: names of the nodes whose values student and teacher share.
        skipped: nodes that were left out, with the reason.
        warnings: about the teacher.
    """

    def __init__(
        self,
        program: Program,
        loss: Loss,
        teacher: Program | None,
        distillation: Distillation | None,
        has_labels: bool,
    ) -> None:
        self.loss = loss
        self.distillation = distillation
        self.has_labels = has_labels
        self.teacher_program = teacher
        self.nodes: list[str] = []
        self.skipped: dict[str, str] = {}
        self.warnings = _warnings(teacher)
        if distillation is None:
            self.weights = {"labels": 1.0}
        else:
            alpha = distillation.alpha if has_labels else 0.0
            self.weights = {"labels": alpha} if alpha else {}
            if alpha < 1:
                self.weights["outputs"] = 1 - alpha
            if distillation.hidden:
                self.weights["hidden"] = distillation.hidden
        self.bind(program)

    @property
    def divergence(self) -> str:
        """How the outputs are compared: "kl" of logits, or "mse"."""
        return "kl" if self.loss in ("classification", "causal-lm") else "mse"

    def bind(self, program: Program) -> None:
        """Take a program whose structure has changed; also the first one."""
        if self.teacher_program is None:
            return
        if "hidden" in self.weights:
            self.nodes, self.skipped = shared_nodes(program, self.teacher_program)
            if not self.nodes:
                del self.weights["hidden"]
        self.teacher = ProgramModule(self.teacher_program, record=self.nodes).requires_grad_(False)

    def module(self, program: Program) -> ProgramModule:
        """The student, which records what the teacher's hidden values are compared with."""
        return ProgramModule(program, record=self.nodes)

    def report(self) -> dict[str, JSON]:
        """The terms of the objective, as JSON."""
        if self.distillation is None:
            return {"terms": self.weights}
        assert self.teacher_program is not None
        return {
            "terms": self.weights,
            "divergence": self.divergence,
            "teacher_parameters": self.teacher_program.num_parameters(),
            "labels": "used" if "labels" in self.weights else "none: the teacher alone",
            "warnings": list(self.warnings),
            "hidden_nodes": list(self.nodes),
            "skipped": dict(self.skipped),
        }

    def terms(self, module: ProgramModule, program: Program, batch: Any) -> dict[str, Summed]:
        """The terms of one batch, differentiable; the module is the student."""
        inputs = inputs_of(program, batch)
        outputs = module(**inputs)
        found = {}
        if "labels" in self.weights:
            found["labels"] = loss_of(self.loss, outputs, batch)
        if self.teacher_program is None:
            return found
        with torch.no_grad():
            wanted = self.teacher(**inputs)
        flat = flat_batch(program.forward, inputs, 0)
        rows = rows_without_padding(program.forward, flat)
        if "outputs" in self.weights:
            found["outputs"] = self._outputs(program, outputs, wanted, rows)
        if "hidden" in self.weights:
            by_name = {node.name: node for node in program.forward.graph.nodes}
            found["hidden"] = self._hidden(module, by_name, rows)
        return found

    def _outputs(self, program: Program, outputs: Any, wanted: Any, rows: Any) -> Summed:
        student, teacher = logits_of(outputs), logits_of(wanted)
        position = [leaf is student for leaf in pytree.tree_leaves(outputs)].index(True)
        values: Any = output_node(program.forward.graph).args[0]
        node = values[position]
        a, b = rows(node, student), rows(node, teacher)
        if self.divergence == "mse":
            return Summed((a - b).square().sum(), len(a))
        assert self.distillation is not None
        t = self.distillation.temperature
        total = F.kl_div(
            F.log_softmax(a / t, -1), F.log_softmax(b / t, -1), reduction="sum", log_target=True
        )
        return Summed(total * t**2, len(a))

    def _hidden(self, module: ProgramModule, by_name: Mapping[str, fx.Node], rows: Any) -> Summed:
        """Σ|s - t|² / |t|² of every row of every node."""
        total: Tensor | None = None
        count = 0
        for name in self.nodes:
            a, b = rows(by_name[name], module.recorded[name]), self.teacher.recorded[name]
            b = rows(by_name[name], b)
            part = ((a - b).square().sum(-1) / b.square().sum(-1).clamp_min(1e-12)).sum()
            total = part if total is None else total + part
            count += len(a)
        assert total is not None  # without nodes there is no such term
        return Summed(total, count)


def inputs_of(program: Program, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The model's inputs in a batch, floats in the type that the model takes.

    Raises:
        TrainingError: one is missing, or there is one that neither the model nor the loss takes.
    """
    entry = program.forward
    names = {argument.name for argument in entry.arguments}
    # A model with a loss of its own has an argument for labels, which capture left empty.
    constant = {a.name for a in entry.arguments if not any(isinstance(x, str) for x in a.leaves)}
    names -= constant & {"labels"}
    inputs = {name: value for name, value in batch.items() if name in names}
    kinds = dict(zip(entry.input_names, entry.example, strict=True))
    for name, value in inputs.items():
        example = kinds.get(name)
        if not isinstance(value, Tensor) or example is None:
            continue
        if value.is_floating_point() and example.is_floating_point():
            inputs[name] = value.to(example.dtype)
    return inputs


def shared_nodes(student: Program, teacher: Program) -> tuple[list[str], dict[str, str]]:
    """Names of the residual stream's values that both graphs have in one shape; others, and why.

    A value of the residual stream is a sum of two values that have its axis, or the normalized
    sum where nothing else reads the sum. Passes keep the names of the nodes that they leave, so one
    name is one place.
    """
    others = {node.name: node for node in teacher.forward.graph.nodes}
    shared, skipped = [], {}
    for node in residual_values(student):
        other = others.get(node.name)
        if other is None:
            skipped[node.name] = "the teacher has no such node"
        elif _static(node) != _static(other):
            skipped[node.name] = f"shape {_static(node)} is {_static(other)} in the teacher"
        else:
            shared.append(node.name)
    if not shared and not skipped:
        skipped["hidden states"] = "the model has no residual stream to compare"
    return shared, skipped


def residual_values(program: Program) -> list[fx.Node]:
    """The values of the residual stream, in execution order; features in the last dimension."""
    groups = axis_groups(program)
    residual = {find(g.axis) for g in groups.with_role("residual")}
    dims = groups.axes.facts["forward"].dims

    def has_axis(node: fx.Node) -> bool:
        axes = dims.get(node)
        last = axes[-1] if isinstance(axes, tuple) and axes else None
        return last is not None and not residual.isdisjoint(leaves(last))

    found = []
    for node in program.forward.graph.nodes:
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not is_op(node, "add", "add_") or len(sources) != 2 or not has_axis(node):
            continue
        if not all(has_axis(source) for source in sources):
            continue
        users = list(node.users)
        found.append(users[0] if len(users) == 1 and is_op(users[0], *_NORMS) else node)
    return found


def _warnings(teacher: Program | None) -> list[str]:
    """Warnings about the teacher."""
    report = None if teacher is None else teacher.report
    if teacher is None or report is None:
        return []
    dense, left = report["before"]["parameters"], teacher.num_parameters()
    if left >= dense:
        return []
    sentence = (
        f"the teacher has {left:,} of the dense model's {dense:,} parameters, because what was "
        "saved does not hold that one: prune and distill in one call to learn from it"
    )
    log.warning("%s", sentence)
    return [sentence]


def _static(node: fx.Node) -> Sequence[int | None]:
    """The sizes of a value that are numbers."""
    return [s if isinstance(s, int) else None for s in value_of(node).shape]


def refuse_unknown(program: Program, batch: Mapping[str, Any], loss: Loss) -> None:
    """Refuse names in a batch that neither the model nor a loss by name takes.

    Raises:
        TrainingError: there are others.
    """
    names = {argument.name for argument in program.forward.arguments} | {"labels"}
    unknown = sorted(set(batch) - names)
    if unknown and isinstance(loss, str):
        raise TrainingError(
            f"the batch has {unknown}, which the model does not take; it was captured with "
            f"{sorted(names - {'labels'})}"
        )
