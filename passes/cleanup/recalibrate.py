"""RecalibrateBatchNorm: give inference batch norms the statistics of what they read now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphprune.calibration.stream import Stream
from graphprune.errors import UnsupportedError
from graphprune.ir.graph import bound_arguments, is_op, tensor_nodes
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class RecalibrateBatchNorm(Pass):
    """Set running means and variances to those of the calibration inputs.

    Removed channels move what later batch norms read. Norm after norm, each on what the new ones
    before it make, gets the exact mean and variance of its input over all batches, summed in
    float64; no weight changes. Use it before FoldBatchNorm, which leaves no norm to correct.

    1. A batch norm that computes its own statistics is left alone.
    2. One whose statistics are read at several places is left alone, and reported.
    """

    name: ClassVar[str] = "recalibrate-batch-norm"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Set the statistics.

        Raises:
            UnsupportedError: a batch norm reads NaN or infinity.
        """
        refuse_quantized(program, ctx.running)
        stream = Stream(program, ctx.batches())
        reads: Counter[Any] = Counter()
        for entry in program.entries.values():
            for node in tensor_nodes(entry.graph):
                reads[node.target] += len(node.users)
        done: list[str] = []
        skipped: list[dict[str, str]] = []
        norms = [node for node in stream.nodes if is_op(node, "batch_norm")]
        for i, norm in enumerate(norms):
            ctx.progress(i, len(norms), "batch norms")
            bound = bound_arguments(norm)
            statistics = [bound["running_mean"], bound["running_var"]]
            if bound["training"] or any(s is None or s.op != "get_attr" for s in statistics):
                continue
            if any(reads[s.target] > 1 for s in statistics):
                skipped.append(
                    {"node": norm.name, "reason": "its statistics are read elsewhere too"}
                )
                continue
            names = [str(s.target) for s in statistics]
            found = _moments(stream, program, norm)
            changed = {
                name: new.to(program.tensors[name]) for name, new in zip(names, found, strict=True)
            }
            program = program.with_tensors(changed)
            done.append(norm.name)
        ctx.progress(len(norms), len(norms), "batch norms")
        return PassResult(program, bool(done), {"recalibrated": done, "skipped": skipped})


def _moments(stream: Stream, program: Program, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel that a batch norm reads; float64 [channels].

    The variance divides by the number of values, as training mode does when it normalizes.
    """
    bound = bound_arguments(norm)
    # Sums are of the distance to the former mean, which keeps the difference of squares exact.
    center = program.tensors[str(bound["running_mean"].target)].double()
    total, squares, count = torch.zeros_like(center), torch.zeros_like(center), 0
    for _, _, values in stream.before(program, {norm}):
        value = values[bound["input"]].double().movedim(1, -1).flatten(0, -2) - center
        total += value.sum(0)
        squares += value.square().sum(0)
        count += len(value)
    mean = total / max(count, 1)
    variance = (squares / max(count, 1) - mean.square()).clamp_min(0)
    if not bool(mean.isfinite().all() & variance.isfinite().all()):
        raise UnsupportedError(
            f"the input of batch norm {norm.name!r} holds NaN or infinity: check the calibration "
            "batches and the weights before it"
        )
    return center + mean, variance
