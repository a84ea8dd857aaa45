"""How much each unit of an axis group matters: the higher, the longer it stays.

A new score goes here. One that reads weights alone is a function `(program, group, ctx)` that
returns float64 [size], and a line in SCORES; one that looks at data is a subclass of Score.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.axes.sites import consumers, contractions
from graphprune.calibration.stream import flat_batch
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.passes.solvers.obs import greedy, loss
from graphprune.passes.structural.statistics import Consumer
from graphprune.pipeline.base import Context
from graphprune.suggest import suggest

_PROJECTIONS = 2  # random directions of the output a batch


class Needs(enum.Enum):
    """The data that a score needs."""

    WEIGHTS = enum.auto()
    MOMENTS = enum.auto()
    """Second moments of what reads the units, taken group by group."""
    GRADIENTS = enum.auto()
    """Gradients on the calibration batches, taken of all groups at once."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence that the units of one group are scored by.

    Attributes:
        program: the program, in which groups before this one may have been compensated already.
        group: whose units.
        ctx: the randomness and the analyses.
        parts: the weights that read the units, with moments; empty where nothing needs them.
        damping: fraction of the mean squared input added to a Gram matrix's diagonal.
    """

    program: Program
    group: AxisGroup
    ctx: Context
    parts: Sequence[Consumer] = ()
    damping: float = 0.01


class Score(abc.ABC):
    """A measure of how much units matter.

    Attributes:
        name: its name in recipes.
        needs: what it looks at; all but weights needs calibration.
    """

    name: str
    needs: Needs

    def begin(
        self, program: Program, groups: AxisGroups, chosen: Sequence[AxisGroup], ctx: Context
    ) -> Score:
        """The score after a look at the whole program, before any of the chosen groups is cut."""
        return self

    @abc.abstractmethod
    def score(self, seen: Evidence) -> Tensor:
        """Score each unit, comparable between groups; float64 [size]."""

    def order(self, seen: Evidence, count: int) -> tuple[Tensor, Tensor]:
        """The units in the order in which they go, at least `count` of them, and their scores.

        Of equal ones the last goes first.
        """
        scores = finite(self, seen)
        order = scores.argsort(descending=True, stable=True).flip(0)
        return order, scores[order]


def finite(score: Score, seen: Evidence) -> Tensor:
    """The scores of a group's units; float64 [size].

    Raises:
        UnsupportedError: some are not finite.
    """
    scores = score.score(seen)
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UnsupportedError(
            f"score {score.name!r} of {seen.group.id!r} is not finite for units {bad[:5]}: its "
            "tensors hold NaN or infinity; repair the weights first"
        )
    return scores


# --- of weights ----------------------------------------------------------------------------------

OfWeights = Callable[[Program, AxisGroup, Context], Tensor]


@dataclass(frozen=True, slots=True)
class WeightScore(Score):
    """A score that is a function of the program alone."""

    name: str
    function: OfWeights
    needs: Needs = Needs.WEIGHTS

    def score(self, seen: Evidence) -> Tensor:
        return self.function(seen.program, seen.group, seen.ctx)


def magnitude(program: Program, group: AxisGroup, ctx: Context) -> Tensor:
    """L2 norm of everything that would go with a unit: its slices of all parameters.

    Returns:
        float64 [size]. A parameter that carries the group on two dimensions counts on both.
    """
    groups: AxisGroups = ctx.get(axis_groups, program)
    # Units are looked up by the axes of one analysis; the group may come from another run of it.
    group = groups[group.id]
    squares = torch.zeros(group.size, dtype=torch.float64)
    for tensor, dim in sorted({(o.tensor, o.dim) for o in group.occurrences}):
        if tensor not in program.parameters:
            continue
        units = groups.units(group, tensor, dim)
        slices = _slice_norms(program.tensors[tensor], dim).double().square()
        mine = units >= 0
        squares.index_add_(0, units[mine], slices[mine])
    return squares.sqrt()


def _slice_norms(tensor: Tensor, dim: int) -> Tensor:
    """L2 norm of each slice along `dim`, at least in float32."""
    wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
    others = [d for d in range(wide.dim()) if d != dim % wide.dim()]
    # vector_norm over an empty list of dimensions would reduce all of them.
    return torch.linalg.vector_norm(wide, dim=others) if others else wide.abs()


def random(program: Program, group: AxisGroup, ctx: Context) -> Tensor:
    """Uniform random numbers from the context's seed: the baseline that any score must beat."""
    return torch.rand(group.size, generator=ctx.generator, dtype=torch.float64)


# --- of second moments ---------------------------------------------------------------------------


class Fluctuation(Score):
    """FLAP (arXiv 2312.11983): Σ over a unit's columns of variance · |column|²."""

    name = "fluctuation"
    needs = Needs.MOMENTS

    def score(self, seen: Evidence) -> Tensor:
        return _summed(seen, lambda c, w: c.gram.variance * c.gram.count * w.square().sum(0))


class Activation(Score):
    """L2 norm of a unit's activations over all calibration rows."""

    name = "activation"
    needs = Needs.MOMENTS

    def score(self, seen: Evidence) -> Tensor:
        return _summed(seen, lambda c, w: c.gram.norm.square()).sqrt()


def _summed(seen: Evidence, of: Callable[[Consumer, Tensor], Tensor]) -> Tensor:
    """Sum a quantity of each input feature over the features of each unit; float64 [size]."""
    total = torch.zeros(seen.group.size, dtype=torch.float64)
    for part in seen.parts:
        values = of(part, part.site.matrix(seen.program).to("cpu", torch.float64))
        mine = part.units >= 0
        total.index_add_(0, part.units[mine], values[mine])
    return total


class Obs(Score):
    """Structured OBS: the rise of the output error of what reads a unit, after compensation.

    Units are chosen jointly, each after those that went before it (`solvers.obs`).
    """

    name = "obs"
    needs = Needs.MOMENTS

    def order(self, seen: Evidence, count: int) -> tuple[Tensor, Tensor]:
        size = seen.group.size
        order, costs = greedy(
            [p.problem(seen.program, size, seen.damping) for p in seen.parts], count
        )
        return torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)

    def score(self, seen: Evidence) -> Tensor:
        """Cost of each unit when OBS removes it, as a fraction of the consumers' output; [size].

        How much that layer matters to the model's output is not in it.

        Costs only rise along the order of removal: a unit that gets cheaper once another is gone
        would otherwise be counted before it. The last unit, which always stays, costs as much as
        the one before it.
        """
        size = seen.group.size
        order, costs = self.order(seen, size - 1)
        rising = costs.cummax(0).values
        energy = sum(
            loss(p.used, torch.zeros_like(p.weight), p.gram)
            for p in (part.problem(seen.program, size, seen.damping) for part in seen.parts)
        )
        result = torch.full((size,), float(rising[-1]), dtype=torch.float64)
        result[order] = rising
        return result / max(energy, 1e-300)


# --- of gradients --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taylor(Score):
    """First order: what the output loses when a unit's gate closes, see `taylor_scores`.

    Attributes:
        found: scores by group id, from `begin` on.
    """

    name: str = "taylor"
    needs: Needs = Needs.GRADIENTS
    found: Mapping[str, Tensor] = field(default_factory=dict)

    def begin(
        self, program: Program, groups: AxisGroups, chosen: Sequence[AxisGroup], ctx: Context
    ) -> Score:
        return replace(self, found=taylor_scores(program, groups, chosen, ctx))

    def score(self, seen: Evidence) -> Tensor:
        return self.found[seen.group.id]


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
    module = graph_module(program)
    weights = dict(module.named_parameters(remove_duplicate=False))
    reads = {g.id: _reads(groups, g) for g in chosen}
    names = sorted({name for tensors in reads.values() for name in tensors})
    loss = _loss_output(program)
    totals = {g.id: torch.zeros(g.size, dtype=torch.float64) for g in chosen}
    batches = list(ctx.batches())
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


def _reads(groups: AxisGroups, group: AxisGroup) -> dict[str, set[int]]:
    """The weights that read a group, and their dimensions that it is in.

    Of a recurrent layer's weights only the columns: a row is what makes the unit.
    """
    found: dict[str, set[int]] = {}
    for site, _ in consumers(groups, group):
        dims = {o.dim for o in groups[group.id].occurrences if o.tensor == site.tensor}
        found.setdefault(site.tensor, set()).update(dims)
    for _, contraction in contractions(groups, group):
        if contraction.operand.op == "get_attr":
            found.setdefault(str(contraction.operand.target), set()).add(contraction.dim)
    return dict(sorted(found.items()))


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
    tensors: Mapping[str, set[int]],
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
        for dim in sorted(tensors[name]):
            units = groups.units(group, name, dim)
            sums = product.sum([d for d in range(product.dim()) if d != dim])
            result.index_add_(0, units[units >= 0], sums[units >= 0])
    return result


# --- by name -------------------------------------------------------------------------------------

SCORES: dict[str, Score | OfWeights] = {
    "magnitude": magnitude,
    "random": random,
    "fluctuation": Fluctuation(),
    "activation": Activation(),
    "obs": Obs(),
    "taylor": Taylor(),
}


def score_named(name: str) -> Score:
    """The score of this name.

    Raises:
        RecipeError: there is none; near matches are named.
    """
    if name not in SCORES:
        raise RecipeError(f"there is no score {name!r}; {suggest(name, SCORES)}")
    found = SCORES[name]
    return found if isinstance(found, Score) else WeightScore(name, found)
