"""Candidates of a search: models stitched together from snapshots, and what they lose.

A candidate is a choice of tensors for one graph, and nothing is rewritten to try it: branches go by
a gate; units by narrower weights where no operator of the graph has their number in its arguments,
else by weights with zeros.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, final

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, Occurrence
from graphprune.axes.sites import LinearSite, consumers
from graphprune.calibration.gram import Remarks
from graphprune.calibration.stream import Stream, flat_batch
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.budget.blocks import Blocks
from graphprune.passes.budget.items import EACH, Item, Kept, Level
from graphprune.passes.solvers.obs import greedy, loss
from graphprune.passes.solvers.output_loss import OutputLoss, output_loss
from graphprune.passes.solvers.snapshots import Snapshots
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.scores import Evidence, finite, score_named
from graphprune.passes.structural.statistics import gather
from graphprune.pipeline.base import Context
from graphprune.rewrite.drop import closed, gated
from graphprune.rewrite.shrink import shrink, take

KIND = 2  # of statistics: another number where the same calibration gives others


@final
@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Calibration statistics of a group, on the activations of the dense model.

    Attributes:
        order: the units in the order in which they go, all but one.
        errors: relative output error when so many have gone; [size], the first 0.
        weights: of each product that reads the units; empty where one is none with a weight.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]
    weights: Mapping[LinearSite, Snapshots]


def statistics(
    program: Program,
    groups: AxisGroups,
    order: Sequence[AxisGroup],
    ctx: Context,
    damping: float,
    few: Remarks,
) -> dict[str, GroupStatistics]:
    """Order of removal, errors and snapshots of every group, by id.

    Each group's are kept as soon as they are there, so that a run that is interrupted, or one with
    another budget, does not compute them again.
    """
    batches = list(ctx.batches())
    stream = Stream(program, batches)
    name = _digest(program, batches, damping)
    found = {}
    for i, group in enumerate(order):
        ctx.progress(i, len(order), "groups")
        seen = partial(_of_group, stream, program, groups, group, ctx, damping, few)
        part = hashlib.sha256(group.id.encode()).hexdigest()[:16]
        kept = seen() if ctx.kept is None else ctx.kept.get(name, part, seen)
        found[group.id] = _from_tensors(kept, groups, group)
    ctx.progress(len(order), len(order), "groups")
    return found


def _digest(program: Program, batches: Sequence[Any], damping: float) -> str:
    """A hash of everything that statistics depend on."""
    digest = hashlib.sha256(f"{version('graphprune')} {KIND} {damping}".encode())
    for i, batch in enumerate(batches):
        for tensor in flat_batch(program.forward, batch, i):
            digest.update(_bytes(tensor))
    for tensor_name, tensor in program.tensors.items():
        digest.update(f"{tensor_name} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    digest.update(str(program.forward.graph).encode())
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _of_group(
    stream: Stream,
    program: Program,
    groups: AxisGroups,
    group: AxisGroup,
    ctx: Context,
    damping: float,
    few: Remarks,
) -> dict[str, Tensor]:
    """Statistics of a group as tensors: "order", "errors", and those of snapshots by weight."""
    try:
        parts = gather(stream, program, groups, group, ctx, held=True)
    except UnsupportedError:  # what reads the units is no product with a weight
        few.add(group.id, "its units go by the size of their weights and are not compensated")
        return _by_size(program, group, ctx)
    for part in parts:
        few.add_shortage(part.site.name, part.gram)
    problems = [part.problem(program, group.size, damping) for part in parts]
    gone, costs = greedy(problems, group.size - 1)
    energy = sum(loss(p.used, torch.zeros_like(p.weight), p.gram) for p in problems)
    (last,) = set(range(group.size)) - set(gone)
    tensors = {
        "order": torch.tensor(gone, dtype=torch.int64),
        "errors": torch.tensor([0.0, *costs]).double().cumsum(0) / max(energy, 1e-300),
    }
    for part in parts:
        # All levels have one damping: what fits best where half of the units stay.
        half = torch.tensor([*gone[len(gone) // 2 :], last])
        level = part.damping(program, half, damping)
        problem = part.problem(program, group.size, level)
        for key, tensor in Snapshots.of(problem, [*gone, last]).tensors().items():
            tensors[f"{part.site.name}/{key}"] = tensor
    return tensors


def _from_tensors(
    tensors: Mapping[str, Tensor], groups: AxisGroups, group: AxisGroup
) -> GroupStatistics:
    weights = {}
    for site, units in consumers(groups, group):
        mine = {
            k.rpartition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{site.name}/")
        }
        if mine:
            snapshots = Snapshots.from_tensors(mine)
            # One weight used with several biases was fitted without any of them.
            with_bias = snapshots.whole.shape[1] > len(units)
            own = site if with_bias else replace(site, bias=None)
            weights[site.name] = (own, snapshots)
    return GroupStatistics(
        tuple(tensors["order"].tolist()),
        tuple(tensors["errors"].tolist()),
        dict(weights.values()),
    )


def _by_size(program: Program, group: AxisGroup, ctx: Context) -> dict[str, Tensor]:
    """Of a group that something reads which is no product with a weight: by magnitude."""
    scores = finite(score_named("magnitude"), Evidence(program, group, ctx))
    order = scores.argsort(stable=True)
    squares = scores[order].square()
    sums = torch.cat([squares.new_zeros(1), squares.cumsum(0)[:-1]])
    return {"order": order[:-1], "errors": sums / squares.sum().clamp_min(1e-300)}


def level_errors(
    item: Item, seen: Mapping[str, GroupStatistics], zeros: Mapping[float, float]
) -> list[float]:
    """The error of each level of an item: what its groups add up to; 1 where the branch is gone.

    Args:
        item: whose levels.
        seen: statistics by group id.
        zeros: what fractions of zero blocks add (`errors_and_sensitivities`).
    """
    found = []
    for level in item.levels:
        if level is None:
            found.append(1.0)
            continue
        parts = [
            seen[group.id].errors[group.size - kept]
            for group, kept in zip(item.groups, level.units, strict=True)
        ]
        if level.zeros:
            parts.append(zeros[level.zeros])
        found.append(min(1.0, sum(parts)))
    return found


@final
@dataclass(slots=True)
class Candidates:
    """Candidates on some calibration batches.

    Args:
        program: the dense one.
        groups: its axis groups.
        items: what there is to choose.
        seen: statistics by group id.
        batches: to evaluate on; the dense model's answers are held, which a language model's
            vocabulary makes large.
        blocks: what levels with zero blocks are made of; None where there are none.
    """

    program: Program
    groups: AxisGroups
    items: Sequence[Item]
    seen: Mapping[str, GroupStatistics]
    batches: Sequence[Any]
    blocks: Blocks | None = None
    _gates: Mapping[str, str] = field(init=False)
    _stream: Stream = field(init=False)
    _loss: OutputLoss = field(init=False)
    _inputs: list[list[Tensor]] = field(init=False)
    _answers: list[Tensor] = field(init=False)
    _losses: dict[tuple[int, ...], float] = field(init=False, default_factory=dict)
    _held: dict[tuple[str, Kept, bool], Mapping[str, Tensor]] = field(
        init=False, default_factory=dict
    )
    _dense: Program = field(init=False)
    _owners: Counter[str] = field(init=False)
    _plain: dict[tuple[str, int, int, int], bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._dense = self.program
        # Of a tensor that another item zeroes blocks of, no units may go alone.
        self._owners = Counter()
        for item in self.items:
            own = [name for group in item.groups for name in group.tensors]
            self._owners.update([*own, *(set(item.sparse) - set(own))])
        branches = [item.branch for item in self.items if item.branch and item.levels[0] is None]
        self._loss = output_loss(self.program)
        entry = self.program.forward
        self._inputs = [flat_batch(entry, batch, i) for i, batch in enumerate(self.batches)]
        self.program, self._gates = gated(self.program, branches)
        self._stream = Stream(self.program, self.batches)
        self._answers = [
            self._loss.answer(outputs, flat)
            for outputs, flat in zip(self._stream.results(self.program), self._inputs, strict=True)
        ]

    @property
    def samples(self) -> int:
        """How many samples each candidate is evaluated on."""
        return sum(len(flat[0]) for flat in self._inputs)

    def loss(self, levels: Sequence[int]) -> float:
        """How far the model at these levels is from the dense one."""
        key = tuple(levels)
        if key not in self._losses:
            self._losses[key] = self._mean(self._stream.results(self.at(levels, narrow=True)))
        return self._losses[key]

    def difference(self, program: Program) -> float:
        """How far another program with the same inputs is from the dense one."""
        return self._mean(Stream(program, self.batches).results(program))

    def _mean(self, results: Iterable[Sequence[Any]]) -> float:
        """Mean loss over the rows of all batches; infinite where one is no number."""
        losses = [
            self._loss.distance(answer, self._loss.answer(outputs, flat))
            for answer, outputs, flat in zip(self._answers, results, self._inputs, strict=True)
        ]
        mean = float(torch.cat(losses).double().mean())
        return mean if math.isfinite(mean) else math.inf

    def at(self, levels: Sequence[int], *, narrow: bool = False) -> Program:
        """The model at these levels.

        Args:
            levels: of each item.
            narrow: whether weights may lack what has gone; else all shapes are the old ones.
        """
        program = self.program
        for item, j in zip(self.items, levels, strict=True):
            level = item.levels[j]
            if level is None:
                assert item.branch is not None
                program = closed(program, [self._gates[item.branch.id]])
                continue
            if level.zeros:
                program = self._with_blocks(program, item, level, narrow)
            else:
                program = self._cut(program, item, level, narrow)
        return program

    def _cut(self, program: Program, item: Item, level: Kept, narrow: bool) -> Program:
        for group, kept in zip(item.groups, level.units, strict=True):
            if kept == group.size:
                continue
            thin = narrow and self._is_plain(group)
            key = group.id, Kept((kept,)), thin
            if key not in self._held:
                self._held[key] = self._weights(group, kept, thin)
            program = self._merged(program, self._held[key])
        return program

    def _with_blocks(self, program: Program, item: Item, level: Kept, narrow: bool) -> Program:
        """An item's units go, then blocks of what stays are zero."""
        thin = narrow and all(self._is_plain(group) for group in item.groups)
        key = item.id, level, thin
        if key not in self._held:
            self._held[key] = self._block_weights(item, level, thin)
        return self._merged(program, self._held[key])

    def _block_weights(self, item: Item, level: Kept, narrow: bool) -> Mapping[str, Tensor]:
        assert self.blocks is not None
        wide = self._cut(self.program, item, level, narrow=False)
        kept = {
            group.id: self._kept(group, count)
            for group, count in zip(item.groups, level.units, strict=True)
            if count < group.size
        }
        groups = [group for group in item.groups if group.id in kept]
        stays: dict[str, Tensor] = {}
        for group in groups:
            for place in group.occurrences:
                tensor = self.program.tensors[place.tensor]
                mask = stays.get(place.tensor, torch.ones_like(tensor, dtype=torch.bool)).clone()
                mask.movedim(place.dim, 0)[self._gone(group, place, kept[group.id])] = False
                stays[place.tensor] = mask
        sparse = self.blocks.zeroed(wide, item.id, level.zeros, stays)
        changed = {
            name: tensor
            for name, tensor in sparse.tensors.items()
            if tensor is not self.program.tensors[name]
        }
        if not narrow or not kept:
            return changed
        every = {n: sparse.tensors[n] for group in groups for n in group.tensors}
        return changed | take(self._dense, kept, every)

    def _merged(self, program: Program, held: Mapping[str, Tensor]) -> Program:
        """The program with these tensors; of one that others have changed too, with both."""
        changed = dict(held)
        for name, new in changed.items():
            before, dense = program.tensors[name], self.program.tensors[name]
            if before is not dense:  # of another group too
                gone = (before == 0) | (new == 0)
                changed[name] = (before + new - dense).masked_fill(gone, 0)
        return program.with_tensors(changed)

    def _is_plain(self, group: AxisGroup) -> bool:
        """Whether units may go from tensors alone: the graph of a smaller model is the same one.

        It is tried once for groups of one role, size and cost.
        """
        key = group.role, group.size, group.cost, len(group.occurrences)
        if key not in self._plain:
            own = all(self._owners[name] == 1 for name in group.tensors)
            plain = own and group.size > EACH and bool(self.seen[group.id].weights)
            if plain:
                smaller = shrink(self._dense, {group.id: range(group.size // 2)})
                plain = _calls(smaller) == _calls(self._dense)
            self._plain[key] = plain
        return self._plain[key]

    def _weights(self, group: AxisGroup, kept: int, narrow: bool) -> Mapping[str, Tensor]:
        """The tensors that change when so many units of a group stay."""
        seen, program = self.seen[group.id], self.program
        keep = self._kept(group, kept)
        if not seen.weights:
            return self._zeroed(group, keep)
        changed: dict[str, Tensor] = {}
        for site, snapshots in seen.weights.items():
            whole = snapshots.weight(kept)
            bias = None if site.bias is None else whole[:, -1]
            matrix = whole if bias is None else whole[:, :-1]
            new = site.with_matrix(program, matrix, bias)
            for name in (site.tensor, *([site.bias] if site.bias else [])):
                changed[name] = new.tensors[name]
            program = new
        if not narrow:
            return changed
        every = {name: program.tensors[name] for name in group.tensors}
        return changed | take(self._dense, {group.id: keep}, every)

    def _kept(self, group: AxisGroup, count: int) -> Tensor:
        """The units of a group that stay."""
        gone = self.seen[group.id].order[: group.size - count]
        return others(group.size, torch.tensor(gone, dtype=torch.int64))

    def _gone(self, group: AxisGroup, place: Occurrence, keep: Tensor) -> Tensor:
        """The indices of a tensor's dimension that are of units which do not stay; bool."""
        units = self.groups.units(group, place.tensor, place.dim)
        return (units >= 0) & ~torch.isin(units, keep)

    def _zeroed(self, group: AxisGroup, keep: Tensor) -> Mapping[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for place in group.occurrences:
            if place.tensor in self.program.parameters:
                gone = self._gone(group, place, keep)
                tensor = changed.get(place.tensor, self.program.tensors[place.tensor]).clone()
                tensor.movedim(place.dim, 0)[gone] = 0
                changed[place.tensor] = tensor
        return changed


def _calls(program: Program) -> list[tuple[object, ...]]:
    """The calls of a forward graph, whatever the shapes of its tensors are."""
    return [
        (node.name, node.target, str(node.args), str(node.kwargs))
        for node in program.forward.graph.nodes
    ]


def errors_and_sensitivities(
    candidates: Candidates, ctx: Context
) -> tuple[list[list[float]], list[float]]:
    """The errors of all levels, and how much the model's loss moves with them.

    Each item alone at a level in the middle of what it has: its sensitivity, a first guess, is the
    loss there over the error there. Zero blocks have the error that would cost the same loss as
    they do in the whole item, so that both kinds of removal compare.
    """
    dense = [item.dense for item in candidates.items]
    errors, found = [], []
    for i, item in enumerate(candidates.items):
        ctx.progress(i, len(dense), "items")

        def alone(j: int, i: int = i) -> float:
            return candidates.loss([*dense[:i], j, *dense[i + 1 :]])

        nothing: Mapping[float, float] = defaultdict(float)
        plain = level_errors(item, candidates.seen, nothing)
        middle = _middle(item)
        error = plain[middle]
        if middle == item.dense:  # only zero blocks to choose: the most of them count as all
            middle, error = 0, 1.0
        found.append(alone(middle) / max(error, 1e-12))
        zeros = {
            level.zeros: alone(j) / max(found[-1], 1e-300)
            for j, level in enumerate(item.levels)
            if level is not None and level.zeros and level.units == _units(item.levels[item.dense])
        }
        errors.append(level_errors(item, candidates.seen, zeros))
    top = max(found)
    return errors, [max(value / top, 1e-6) if top > 0 else 1.0 for value in found]


def _middle(item: Item) -> int:
    """A level in the middle, without zero blocks; the branch's own where it has no other."""
    levels = [*([0] if item.levels[0] is None else []), *item.whole]
    return levels[(len(levels) - 1) // 2]


def _units(level: Level) -> tuple[int, ...]:
    assert level is not None
    return level.units
