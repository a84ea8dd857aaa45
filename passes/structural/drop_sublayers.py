"""DropSublayers: remove whole residual branches."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.axes.branches import Branch, branches
from graphprune.calibration.stream import Stream, flat_batch
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.name_patterns import TensorNames, check_names, check_patterns
from graphprune.passes.solvers.output_loss import output_loss
from graphprune.passes.structural.records import DroppedSublayers, Sublayer
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.rewrite.drop import closed, gated
from graphprune.suggest import suggest
from graphprune.validate import check_number, check_whole

KINDS = ("attention", "ffn", "any", "block")
SCORES = ("similarity", "loss")


@register
@final
@dataclass(frozen=True, slots=True)
class DropSublayers(Pass):
    """Remove whole sublayers: of x + f(x) only x is left, and the addition goes too.

    Needs calibration batches, no labels. A norm after the sum (post-LN) stays, one before it that
    nothing else reads goes. A decoder's layer without attention has no cache: its keys and values
    are no inputs or outputs any more, and the layers after it move up.

    1. A sublayer is a residual branch that the graph shows: attention ("attention"), products with
       matrices without attention ("ffn"), convolutions (with kind "any" alone).
    2. A block is an attention sublayer with the feed-forward ones up to the next attention.
    3. One sublayer, or block, of those asked for always stays, and one attention.
    4. Layers that share their weights are dropped one by one; the weights go with the last.

    Attributes:
        ratio: fraction of the sublayers to remove, in [0, 1); 0.5 of one rounds up.
        count: how many to remove, instead of ratio.
        kind: "attention", "ffn", "any" or "block".
        score: which go. "similarity": those that turn the residual stream least, by the mean of
            1 - cos(x, x + f(x)) over all tokens but padding. "loss": one after another, the one
            without which the model's output changes least (KL of logits, 1 - cos of embeddings),
            all scored again each time.
        targets: name patterns; only sublayers with such a tensor. Globs for a name or a module, or
            "re:" and a regular expression.
        ignore: name patterns of tensors whose sublayers stay.
    """

    name: ClassVar[str] = "drop-sublayers"
    # Caches of layers that are gone are no inputs any more.
    preserves: ClassVar[Invariant] = Invariant.NONE
    needs_float: ClassVar[bool] = True

    ratio: float | None = None
    count: int | None = None
    kind: str = "any"
    score: str = "similarity"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            raise RecipeError("give either ratio, a fraction of the sublayers, or count, a number")
        if self.ratio is not None:
            check_number("ratio", self.ratio, "the fraction to remove, at least 0 and below 1",
                         low=0, high=1, open_high=True)  # fmt: skip
        if self.count is not None:
            check_whole("count", self.count, "how many to remove, at least 1, and whole")
        for option, value, known in (("kind", self.kind, KINDS), ("score", self.score, SCORES)):
            if value not in known:
                raise RecipeError(f"{option} is one of {list(known)}, got {value!r}; "
                                  f"{suggest(str(value), known)}")  # fmt: skip
        check_patterns("targets", self.targets)
        check_patterns("ignore", self.ignore)

    @property
    def needs_calibration(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Remove the sublayers that score lowest.

        Raises:
            RecipeError: more are asked for than there are, or a pattern matches nothing.
            UnsupportedError: the model has no such residual branch, or is marked for quantization.
        """
        refuse_quantized(program, ctx.running)
        check_names(self, program)
        choice = self._choice(program, ctx)
        wanted = self._wanted(choice)
        if not wanted:
            size = program.num_parameters()
            skipped = {unit.id: f"ratio {self.ratio} keeps all" for unit in choice.units}
            report = DroppedSublayers((), (), {**choice.skipped, **skipped}, "nothing", size, size)
            return PassResult(program, False, report.to_json())
        search = _by_similarity if self.score == "similarity" else _by_loss
        scores, gone = search(program, choice, wanted, ctx)
        dropped, verification = ctx.drop(program, [b for unit in gone for b in unit.branches])
        left = [unit for unit in choice.units if unit not in gone]
        report = DroppedSublayers(
            tuple(unit.record(scores) for unit in gone),
            tuple(unit.record(scores) for unit in left),
            choice.skipped,
            f"{len(gone)} of {_counted(self.kind, choice.total)}: {_listed(gone)}",
            program.num_parameters(),
            dropped.num_parameters(),
            verification,
        )
        return PassResult(dropped, True, report.to_json())

    def _choice(self, program: Program, ctx: Context) -> _Choice:
        found = ctx.get(branches, program)
        if not found:
            raise UnsupportedError(
                "the model has no residual branch x + f(x), so there is no sublayer to drop"
            )
        units = _units(found, self.kind)
        if not units:
            there = sorted({_counted(branch.kind, 2)[2:] for branch in found})
            raise UnsupportedError(
                f"the model has no {_counted(self.kind, 1)[2:]}, only {' and '.join(there)}"
            )
        names = TensorNames(program)
        skipped = {
            unit.id: "ignored on request" for unit in units if unit.matches(names, self.ignore)
        }
        taken = [
            unit
            for unit in units
            if unit.id not in skipped and (not self.targets or unit.matches(names, self.targets))
        ]
        if not taken:
            raise UnsupportedError(
                f"targets and ignore leave none of {_counted(self.kind, len(units))} to drop"
            )
        guarded = [unit for unit in units if unit.branches[0].kind == "attention"] or units
        return _Choice(tuple(taken), tuple(guarded), len(units), skipped)

    def _wanted(self, choice: _Choice) -> int:
        """How many units to drop."""
        available = len(choice.units)
        wanted = self.count
        if wanted is None:
            assert self.ratio is not None
            wanted = math.floor(self.ratio * available + 0.5)
        stays = 0 if set(choice.guarded) - set(choice.units) else 1
        if wanted > available - stays:
            option = f"count {self.count}" if self.ratio is None else f"ratio {self.ratio}"
            raise UnsupportedError(
                f"{option} would drop {wanted} of {_counted(self.kind, available)}, of which "
                f"{available - stays} can go{' (one always stays)' if stays else ''}: ask for less"
            )
        return wanted


@final
@dataclass(frozen=True, slots=True)
class _Unit:
    """A residual branch that goes as a whole, or a block of them in execution order."""

    branches: tuple[Branch, ...]

    @property
    def id(self) -> str:
        return self.branches[0].id

    def matches(self, names: TensorNames, patterns: Sequence[str]) -> bool:
        """Whether a pattern covers a tensor of it; layers that share weights go by their id."""
        return any(
            names.match(name, patterns)
            for branch in self.branches
            for name in (branch.id.partition("#")[0], *branch.tensors)
        )

    def record(self, scores: Mapping[str, float]) -> Sublayer:
        """Its record for the report."""
        ids = tuple(branch.id for branch in self.branches)
        return Sublayer(self.id, ids, self.branches[0].kind, scores.get(self.id))


@final
@dataclass(frozen=True, slots=True)
class _Choice:
    """The sublayers that may go.

    Attributes:
        units: those that targets and ignore leave, in execution order.
        guarded: of the model's, those of which one has to stay.
        total: number of the model's.
        skipped: id -> why it stays.
    """

    units: tuple[_Unit, ...]
    guarded: tuple[_Unit, ...]
    total: int
    skipped: Mapping[str, str]

    def free(self, gone: Sequence[_Unit]) -> list[_Unit]:
        """Units that may go after these, in execution order."""
        last = set(self.guarded) - set(gone)
        return [u for u in self.units if u not in gone and (len(last) > 1 or u not in last)]


def _units(found: Sequence[Branch], kind: str) -> list[_Unit]:
    if kind != "block":
        return [_Unit((branch,)) for branch in found if kind in ("any", branch.kind)]
    blocks: list[list[Branch]] = []
    for branch in found:
        if branch.kind == "attention":
            blocks.append([branch])
        elif branch.kind == "ffn" and blocks:
            blocks[-1].append(branch)
    return [_Unit(tuple(block)) for block in blocks]


def _by_similarity(
    program: Program, choice: _Choice, wanted: int, ctx: Context
) -> tuple[dict[str, float], list[_Unit]]:
    """Mean of 1 - cos(x, x + f(x)) by unit, and those that go: the lowest."""
    stream = Stream(program, ctx.batches())
    of = {node.name: node for node in stream.nodes}
    begins = {of[unit.branches[0].places["forward"].add]: unit for unit in choice.units}
    ends = {of[unit.branches[-1].places["forward"].add]: unit for unit in choice.units}
    turned = {unit.id: 0.0 for unit in choice.units}
    rows = dict.fromkeys(turned, 0)
    before: dict[str, Tensor] = {}
    for i, node, values in stream.before(program, {*begins, *ends}):
        ctx.progress(i, len(stream.states), "batches")
        if (unit := begins.get(node)) is not None:
            x = of[unit.branches[0].places["forward"].stream]
            before[unit.id] = _rows(stream, i, node, unit.branches[0], values[x])
        if (unit := ends.get(node)) is not None:
            parts = fx.node.map_arg(node.args, values.__getitem__)
            after = node.target(*parts)  # type: ignore[operator]
            after = _rows(stream, i, node, unit.branches[-1], after)
            _check_finite(after, i)
            turned[unit.id] += float((1 - F.cosine_similarity(before.pop(unit.id), after)).sum())
            rows[unit.id] += len(after)
    ctx.progress(len(stream.states), len(stream.states), "batches")
    scores = {name: total / max(rows[name], 1) for name, total in turned.items()}
    gone: list[_Unit] = []
    while len(gone) < wanted:
        gone.append(min(choice.free(gone), key=lambda unit: scores[unit.id]))
    return scores, gone


def _rows(stream: Stream, batch: int, add: fx.Node, branch: Branch, value: Tensor) -> Tensor:
    """The vectors of features of a residual stream, [rows, features], padding left out; float64."""
    dim = branch.places["forward"].dim
    if dim == value.dim() - 1:
        return stream.rows[batch](add, value).double()
    return value.movedim(dim, -1).flatten(0, -2).double()


def _by_loss(
    program: Program, choice: _Choice, wanted: int, ctx: Context
) -> tuple[dict[str, float], list[_Unit]]:
    """Drop the unit that costs least, score all again, and so on; scores of the last round."""
    batches = list(ctx.batches())
    inputs = [flat_batch(program.forward, batch, i) for i, batch in enumerate(batches)]
    loss = output_loss(program)
    results = Stream(program, batches).results(program)
    dense = [loss.answer(outputs, flat) for outputs, flat in zip(results, inputs, strict=True)]
    for i, answer in enumerate(dense):
        _check_finite(answer, i)
    current, gates = gated(program, [branch for unit in choice.units for branch in unit.branches])
    scores: dict[str, float] = {}
    gone: list[_Unit] = []
    total = sum(len(choice.units) - i for i in range(wanted))
    done = 0
    while len(gone) < wanted:
        stream = Stream(current, batches)
        places = {node.name: i for i, node in enumerate(stream.nodes)}
        free = {places[f"{gates[unit.id]}_of"]: unit for unit in choice.free(gone)}
        for place, unit in sorted(free.items(), key=lambda pair: pair[0]):
            ctx.progress(done, total, "candidates")
            done += 1
            stream.advance(current, place)  # nothing changes before the first gate
            candidate = closed(current, [gates[branch.id] for branch in unit.branches])
            found = [
                loss.distance(a, loss.answer(outputs, flat))
                for a, outputs, flat in zip(dense, stream.results(candidate), inputs, strict=True)
            ]
            mean = float(torch.cat(found).double().mean())
            scores[unit.id] = mean if math.isfinite(mean) else sys.float_info.max
        gone.append(min(free.values(), key=lambda unit: scores[unit.id]))
        current = closed(current, [gates[branch.id] for branch in gone[-1].branches])
    ctx.progress(total, total, "candidates")
    return scores, gone


def _check_finite(value: Tensor, batch: int) -> None:
    if not bool(value.isfinite().all()):
        raise GraphPruneError(
            f"calibration batch {batch} gives NaN or infinity: check the batch and the weights"
        )


def _counted(kind: str, count: int) -> str:
    noun = {"attention": "attention sublayer", "ffn": "feed-forward sublayer", "block": "block"}
    return f"{count} {noun.get(kind, 'sublayer')}{'' if count == 1 else 's'}"


def _listed(units: Sequence[_Unit], at_most: int = 3) -> str:
    more = f" and {len(units) - at_most} more" if len(units) > at_most else ""
    return ", ".join(unit.id for unit in units[:at_most]) + more
