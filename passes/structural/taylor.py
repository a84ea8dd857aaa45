"""First-order scores: what the output loses when a unit's gate closes, from gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.sites import consumers
from graphprune.calibration.stream import flat_batch
from graphprune.errors import GraphPruneError
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context

_PROJECTIONS = 2  # random directions of the output a batch


def taylor_scores(
    program: Program, groups: AxisGroups, chosen: Sequence[AxisGroup], ctx: Context
) -> dict[str, Tensor]:
    """|Σ g·w| of each unit over the weights that read it; float64 [size] by group id.

    Summed over a unit's columns, weight times gradient is the derivative of the loss by a gate on
    the unit (Michel et al., arXiv 1905.10650).

    1. A model that was captured with labels and returns its `loss`: the mean of |Σ g·w| over the
       batches, which bring labels too.
    2. Without labels the loss is the distance to the dense outputs, whose gradient vanishes at the
       dense weights; what is left of it is the Gauss-Newton term, the mean square of that
       derivative for the output seen from a random direction.
    """
    assert ctx.calibration is not None
    module = graph_module(program)
    weights = dict(module.named_parameters(remove_duplicate=False))
    reads = {g.id: sorted({s.tensor for s, _ in consumers(groups, g)}) for g in chosen}
    names = sorted({name for tensors in reads.values() for name in tensors})
    loss = _loss_output(program)
    totals = {g.id: torch.zeros(g.size, dtype=torch.float64) for g in chosen}
    batches = list(ctx.calibration)
    for i, batch in enumerate(batches):
        ctx.progress(i, len(batches), "batches")
        flat = flat_batch(program.forward, batch, i)
        with torch.inference_mode(False), torch.enable_grad():
            results = module(*flat)
        outputs = [o for o in results if isinstance(o, Tensor) and o.requires_grad]
        if not outputs:
            raise GraphPruneError("no output depends on the weights: there is nothing to score by")
        projections = _PROJECTIONS if loss is None else 1
        for k in range(projections):
            if loss is None:
                seen = torch.stack([(o * _direction(o, ctx)).sum() for o in outputs]).sum()
            else:
                seen = results[loss]
            gradients = torch.autograd.grad(
                seen,
                [weights[n] for n in names],
                retain_graph=k + 1 < projections,
                allow_unused=True,
            )
            found = dict(zip(names, gradients, strict=True))
            for group in chosen:
                gates = _gates(groups, group, reads[group.id], weights, found)
                totals[group.id] += gates.square() if loss is None else gates.abs()
    count = len(batches)
    return {n: (t / count).sqrt() if loss is None else t / count for n, t in totals.items()}


def _loss_output(program: Program) -> int | None:
    """Which flat output is the model's own `loss`, where it has one."""
    spec = program.forward.out_spec
    if not isinstance(spec.context, list) or "loss" not in spec.context:
        return None
    before = spec.children()[: spec.context.index("loss")]
    return sum(child.num_leaves for child in before)


def _direction(output: Tensor, ctx: Context) -> Tensor:
    """A random direction of unit length in expectation, of the output's shape."""
    noise = torch.randn(output.shape, generator=ctx.generator)
    return noise.to(output) / output.numel() ** 0.5


def _gates(
    groups: AxisGroups,
    group: AxisGroup,
    tensors: Sequence[str],
    weights: Mapping[str, torch.nn.Parameter],
    gradients: Mapping[str, Tensor | None],
) -> Tensor:
    """Σ g·w over each unit's slices of the weights that read it; float64 [size]."""
    result = torch.zeros(group.size, dtype=torch.float64)
    for name in tensors:
        gradient = gradients[name]
        if gradient is None:
            continue
        product = (gradient * weights[name].detach()).double()
        for dim in sorted({o.dim for o in group.occurrences if o.tensor == name}):
            units = groups.units(group, name, dim)
            sums = product.sum([d for d in range(product.dim()) if d != dim])
            result.index_add_(0, units[units >= 0], sums[units >= 0])
    return result
