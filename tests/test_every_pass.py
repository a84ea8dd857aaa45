"""The contract of a pass, checked for every registered pass on every kind of tiny model.

A new pass needs one line in EXAMPLES.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import (
    L1,
    Budget,
    Distill,
    DropSublayers,
    Finetune,
    FoldBatchNorm,
    FoldConstants,
    FoldParametrizations,
    GradualMagnitude,
    GradualStructure,
    LeastSquares,
    Magnitude,
    MergeLora,
    NeuroPrune,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    PruneRecover,
    Quantize,
    RecalibrateBatchNorm,
    RemoveDeadNodes,
    RemoveNoOps,
    Repeat,
    Shrink,
    SparseGPT,
    SparseLLM,
    Wanda,
)
from graphprune.pipeline.base import Context, Invariant, Pass, flat
from graphprune.pipeline.pipeline import Pipeline
from graphprune.pipeline.recipe import dump, loads
from graphprune.pipeline.registry import meanings, options, registered
from graphprune.report.page import report_page
from graphprune.report.report import ModelSize, PassReport, Report
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training
from graphprune.verify.equivalence import verify_rewrite
from graphprune.verify.invariants import fingerprint
from tests.passes.budget.test_budget import Clock

Captured = Callable[[str], Program]

# One or more ways to configure each pass.
EXAMPLES: dict[str, list[Pass]] = {
    "budget": [
        Budget(flops=0.8, evaluations=4, samples=4, round_to=8),
        Budget(flops=0.8, evaluations=4, samples=4, target="output", drop=False),
    ],
    "distill": [Distill(epochs=1), Distill(hidden=False, alpha=0)],
    "drop-sublayers": [
        DropSublayers(0.25),
        DropSublayers(count=1, kind="ffn", score="loss"),
        DropSublayers(0.5, kind="block", score="loss"),
    ],
    "finetune": [Finetune(), Finetune(1, schedule="cosine", clip=0)],
    "fold-batch-norm": [FoldBatchNorm()],
    "fold-constants": [FoldConstants(), FoldConstants(parameters=True)],
    "fold-parametrizations": [FoldParametrizations()],
    "gradual-structure": [
        GradualStructure(0.5, epochs=1),
        GradualStructure(0.6, "taylor", roles=("head", "kv_group", "neuron"), distill=False),
    ],
    "gradual-magnitude": [
        GradualMagnitude(0.8, epochs=2, distill=True),
        GradualMagnitude(pattern="2:4", schedule="linear", end=0.5),
    ],
    "l1": [L1(epochs=1, sparsity=0.5)],
    "least-squares": [LeastSquares(), LeastSquares(0.1)],
    "neuroprune": [
        NeuroPrune(epochs=1, lr=1e-3),
        NeuroPrune(epochs=2, theta=1.2, sparsity=0.5, contracting="columns"),
    ],
    "magnitude": [Magnitude(0.5), Magnitude(pattern="1:4", scope="row")],
    "merge-lora": [MergeLora()],
    "prune-axis": [
        PruneAxis(0.5, role="qk_dim"),
        PruneAxis(0.25, role=("v_dim", "pooled"), score="random"),
        PruneAxis(0.25, role="residual", normalized=True),
    ],
    "prune-heads": [PruneHeads(0.5), PruneHeads(0.25, allocation="global")],
    "prune-neurons": [PruneNeurons(0.5), PruneNeurons(0.3, score="random", round_to=8)],
    "prune-recover": [
        PruneRecover((PruneNeurons(0.5), LeastSquares()), rounds=2),
        PruneRecover((Magnitude(0.5), Finetune(1)), rounds=2),
    ],
    "quantize": [Quantize("int8-dynamic"), Quantize("int4-weights", embeddings=False)],
    "recalibrate-batch-norm": [RecalibrateBatchNorm()],
    "remove-dead-nodes": [RemoveDeadNodes()],
    "remove-no-ops": [RemoveNoOps()],
    "repeat": [Repeat((RemoveNoOps(), RemoveDeadNodes()))],
    "shrink": [Shrink()],
    "sparsegpt": [SparseGPT(0.5), SparseGPT(0.25, pattern="4x4")],
    "sparsellm": [SparseLLM(0.5, rounds=2), SparseLLM(pattern="2:4")],
    "wanda": [Wanda(0.5), Wanda(0.3, scope="layer", allocation="global")],
}
QUICK = ("tiny-mlp", "tiny-encoder")  # the others are for `make test-slow`
MODELS = ("tiny-mlp", "tiny-cnn", "tiny-encoder", "tiny-fused-vit", "tiny-gpt2", "tiny-llama")

every_class = pytest.mark.parametrize("cls", registered().values(), ids=lambda cls: cls.name)
every_pass = pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=f"{name}-{i}")
        for name, examples in EXAMPLES.items()
        for i, step in enumerate(examples)
    ],
)


def test_every_pass_has_an_example() -> None:
    assert set(registered()) == set(EXAMPLES)


@every_class
def test_classes_are_final_frozen_slotted_and_documented(cls: type[Pass]) -> None:
    assert getattr(cls, "__final__", False), "mark it @final"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert not hasattr(object.__new__(cls), "__dict__"), "use slots=True"
    assert not set(cls.__bases__) & set(registered().values()), (
        "inherit from Pass or from owners of options, not from another pass"
    )
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "write a docstring"
    assert isinstance(cls.preserves, Invariant)


@every_pass
def test_passes_say_whether_they_refuse_a_quantized_program(step: Pass, captured: Captured) -> None:
    quantized = Quantize("int8-dynamic").run(captured("tiny-mlp"), Context()).program
    refuses = any(inner.needs_float for inner in flat([step]))
    if not refuses:
        Pipeline([step]).run(quantized)
        return
    batch = (quantized.forward.example[0],)
    context = Context(reference=quantized, calibration=[batch], training=_training(quantized))
    with pytest.raises(UnsupportedError, match="comes after 'quantize'"):
        Pipeline([step]).run(quantized, context)


@every_class
def test_options_are_documented_and_immutable(cls: type[Pass]) -> None:
    said = meanings(cls)
    for option in options(cls):
        assert said[option.name], f"say what {option.name} does"
        if option.default is not dataclasses.MISSING:
            hash(option.default)


@every_pass
def test_recipes_round_trip(step: Pass) -> None:
    assert loads(dump([step])) == [step]
    hash(step)


def _training(program: Program) -> Training:
    """The example inputs as the only batch, and a loss that any output has."""
    entry = program.forward
    batch = dict(zip(entry.input_names, entry.example, strict=True))
    return Training([batch], loss=lambda outputs, batch: logits_of(outputs).square().mean())


def _run(step: Pass, program: Program, *, verify: bool = True) -> Any:
    """The pass; None where it declines the model with a reason."""
    options: dict[str, Any] = {"devices": lambda file, threads, progress: Clock()}
    if step.needs_calibration:
        options["calibration"] = _batches(program)
    if step.needs_training:
        options["training"] = _training(program)
    try:
        return Pipeline([step], verify).run(program, Context(**options))
    except UnsupportedError:
        return None


def _batches(program: Program) -> list[dict[str, torch.Tensor]]:
    """Two batches like the example inputs: floats are drawn anew, the others shifted by one."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for shift in range(2):
        batch = {}
        for name, example in zip(program.forward.input_names, program.forward.example, strict=True):
            drawn = torch.randn(example.shape, generator=generator).to(example.dtype)
            batch[name] = drawn if example.is_floating_point() else example.roll(shift, -1)
        batches.append(batch)
    return batches


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MODELS]
)
@every_pass
def test_contract(step: Pass, model: str, captured: Captured) -> None:
    """Pure, honest, fresh, explained, and the same again: see `Pass`."""
    program = captured(model)
    before = fingerprint(program)
    values = {name: t.clone() for name, t in program.tensors.items()}
    result = _run(step, program)

    # Pure: also where `fingerprint` is blind, in writes through `.data`.
    assert fingerprint(program) == before
    assert all(t.equal(program.tensors[name]) for name, t in values.items())
    if result is None:
        return

    (finished,) = result.results
    json.dumps(finished.report)
    json.dumps(result.program.history)
    size = ModelSize(program.num_parameters(), 0, 0)
    report = Report("model", size, size, (PassReport.of(finished, step.name, None),))
    assert step.name in str(report)
    assert step.name in report_page(report, {})
    assert finished.modified is (result.program is not program)
    if not finished.modified:
        return
    assert len(result.program.history) == len(program.history) + 1

    if step.preserves & Invariant.NUMERICS:
        nodes = Invariant.NODES in step.preserves
        verify_rewrite(program, result.program, nodes=nodes)
    elif step.preserves & Invariant.SHAPES:
        shapes = {name: t.shape for name, t in program.tensors.items()}
        assert {name: t.shape for name, t in result.program.tensors.items()} == shapes
    else:
        assert "verification" in finished.report
    # What it made can be run and called like the model.
    outputs = result.program.run(program.forward.example)
    assert all(o.isfinite().all() for o in outputs if o.is_floating_point())

    again = _run(step, program, verify=False)
    assert again.program.tensors.keys() == result.program.tensors.keys()
    for name, tensor in result.program.tensors.items():
        assert tensor.equal(again.program.tensors[name]), "not deterministic"

    if type(step).idempotent:
        assert not Pipeline([step]).run(result.program).modified


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("step", [PruneHeads(0.5), PruneNeurons(0.5)], ids=lambda p: p.name)
def test_a_cut_can_be_seen(step: Pass, model: str, captured: Captured) -> None:
    """The verifier is not blind: the cut moves the output by far more than the tolerance."""
    program = captured(model)
    result = _run(step, program)
    if result is None:
        return
    (dense, *_), (cut, *_) = (p.run(program.forward.example) for p in (program, result.program))
    assert float((dense - cut).abs().max() / dense.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("model", "dtype"), [("tiny-llama", torch.bfloat16), ("tiny-cnn", torch.float16)], ids=str
)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.slow
def test_half_precision(name: str, model: str, dtype: torch.dtype, captured: Captured) -> None:
    program = captured(model).cast(torch.float32, dtype)
    result = _run(EXAMPLES[name][0], program)
    if result is not None:
        floats = {t.dtype for t in result.program.tensors.values() if t.is_floating_point()}
        assert dtype in floats
