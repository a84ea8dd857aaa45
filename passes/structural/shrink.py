"""Shrink: turn zeros into structure, exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups, algebra, axis_groups
from graphprune.axes.dependence import PRODUCTS, Known, dependence
from graphprune.axes.facts import Contraction
from graphprune.axes.sites import LinearSite, contractions, linear_sites, sites_of
from graphprune.ir.graph import bound_arguments, is_op, op_name, tensor_nodes
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.structural.records import Skipped, Unread
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.events import JSON
from graphprune.pipeline.registry import register
from graphprune.rewrite.shrink import removed_since

_ROUNDING = 1e-5  # of a constant; attention's weights do not sum to one exactly


@register
@final
@dataclass(frozen=True, slots=True)
class Shrink(Pass):
    """Remove the units that zeros in the weights have made needless; the outputs stay.

    y = W φ(U x + b) + c,  row j of U zero    ->    c += W[:, j] φ(b[j]), neuron j goes

    1. A unit that nothing reads goes: its column is zero in every weight that reads it.
    2. A unit that is zero whatever the inputs are goes: a head whose values are zero, a gated
       neuron whose gate or product is, a query and key dimension where either is.
    3. A unit that is another constant is folded into the bias of what reads it, and goes. Without
       a bias there, or with one in half precision that would round the sum, it stays.
    4. At least one unit of each axis stays. Zeros count where they are in whole rows or columns;
       others stay as they are.
    5. Features of frozen and normalized axes stay, and so do those that only some readers need;
       the report counts them.

    What is constant is found by following zeros through the graph, not by looking at activations.
    """

    name: ClassVar[str] = "shrink"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS
    idempotent: ClassVar[bool] = True
    needs_float: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        refuse_quantized(program, ctx.running)
        current = program
        checks: list[dict[str, JSON]] = []
        folded: Counter[str] = Counter()
        while True:  # every round removes a unit, or is the last
            ctx.progress(len(checks), len(checks) + 1, "rounds")
            groups = ctx.get(axis_groups, current)
            found = _Findings(current, groups)
            keep = {g.id: found.kept(g) for g in groups if g.id in found.needless}
            if not keep:
                break
            folded.update({name: int(found.folds[name].sum()) for name in keep})
            current, check = ctx.shrink(current, keep, found.folded(keep))
            checks.append(check)
        ctx.progress(len(checks) + 1, len(checks) + 1, "rounds")
        report: dict[str, JSON] = {
            **removed_since(program, current),
            "folded": dict(+folded),
            "skipped": [skipped.to_json() for skipped in found.skipped],
            "unread": [asdict(unread) for unread in found.unread()],
            "parameters_before": program.num_parameters(),
            "parameters_after": current.num_parameters(),
        }
        if not checks:
            return PassResult(program, False, report)
        # What goes has no effect, so outputs that do not move when it is masked are no warning.
        last = {k: v for k, v in checks[-1].items() if k not in ("moved", "observable")}
        errors = [check["max_error"] for check in checks if "max_error" in check]
        report["verification"] = {**last, **({"max_error": max(errors)} if errors else {})}
        return PassResult(current, True, report)


class _Findings:
    """The needless units of a program.

    Attributes:
        needless: group id -> units that can go, bool [size]; only groups with some.
        folds: group id -> those of them that are a constant other than zero, bool [size].
        skipped: units that would go but for their axis.
    """

    def __init__(self, program: Program, groups: AxisGroups) -> None:
        self.program, self.groups = program, groups
        self.readers = _bias_readers(program)
        self.places = {g.id: contractions(groups, g) for g in groups}
        self.known: dict[tuple[str, str], Known] = {}
        self.folding: set[tuple[str, str]] = set()
        wide = program.in_float32()  # constants are to be exact
        for entry in program.entries:
            here = [c for places in self.places.values() for e, c in places if e == entry]
            # The weights of linear sites are read where they are.
            opaque = [c for c in here if not _products(entry, c, program)]
            others = [other[0] for c in opaque if (other := _other_factor(c)) is not None]
            nodes = {*(c.operand for c in here), *others}
            found = dependence(wide, entry, {node.name for node in nodes})
            self.known |= {(entry, name): known for name, known in found.items()}
        self.shifts: dict[str, dict[str, Tensor]] = {}
        self.needless: dict[str, Tensor] = {}
        self.folds: dict[str, Tensor] = {}
        self.skipped: list[Skipped] = []
        for group in groups:
            self._look_at(group)

    def kept(self, group: AxisGroup) -> Tensor:
        """The units that stay, at least one."""
        return (~self.needless[group.id]).nonzero().flatten()

    def folded(self, keep: Mapping[str, Tensor]) -> Program:
        """The program with the constants of what goes in the biases."""
        biases: dict[str, Tensor] = {}
        for name in keep:
            for bias, shift in self.shifts.get(name, {}).items():
                old = biases.get(bias, self.program.tensors[bias])
                biases[bias] = (old.double() + shift.to(old.device)).to(old.dtype)
        return self.program.with_tensors(biases)

    def unread(self) -> list[Unread]:
        """Input features that none of the weights of one value reads, but others do."""
        at_value: dict[tuple[str, str], list[LinearSite]] = {}
        for entry in self.program.entries:
            for site in linear_sites(self.groups, entry):
                if site.expert is None and site.window is None:
                    at_value.setdefault((entry, site.operand.name), []).append(site)
        found = []
        for sites in at_value.values():
            dead = torch.stack([_is_zero(s.matrix(self.program)) for s in sites]).all(0)
            if bool(dead.any()):
                names = [site.name for site in sites]
                found.append(Unread(names, int(dead.sum()), len(dead)))
        return found

    def _look_at(self, group: AxisGroup) -> None:
        places = self.places[group.id]
        if not places:
            return
        silent = torch.ones(group.size, dtype=torch.bool)
        free, constant = silent.clone(), silent.clone()
        for entry, contraction in places:
            adds_nothing, is_constant, is_taken = self._at(group, entry, contraction)
            silent &= adds_nothing
            constant &= adds_nothing | is_constant
            free &= adds_nothing | (is_constant & is_taken)
        if not bool(constant.any()):
            return
        if group.frozen or group.normalized:
            why = group.frozen[0] if group.frozen else "a normalization counts its units"
            self._skip(group, free, why)
            return
        self._skip(group, constant & ~free, "constants, and what reads them has no bias for them")
        if bool(free.all()):
            free[0] = False
        folds = free & ~silent
        if bool(folds.any()) and (why := self._shift(group, folds)):
            self._skip(group, folds, why)
            free &= ~folds
            folds &= free
        if bool(free.any()):
            self.needless[group.id], self.folds[group.id] = free, folds

    def _skip(self, group: AxisGroup, units: Tensor, why: str) -> None:
        if bool(units.any()):
            self.skipped.append(Skipped.of(group, why, int(units.sum())))

    def _at(
        self, group: AxisGroup, entry: str, contraction: Contraction
    ) -> tuple[Tensor, Tensor, bool]:
        """Units that add nothing at a node, those that are constant, and whether a bias is there.

        Both bool [size].
        """
        sites = _products(entry, contraction, self.program)
        zero, constant = self._constants(entry, contraction.operand.name, contraction.dim)
        if sites:
            columns = [_is_zero(site.matrix(self.program)).cpu() for site in sites]
            zero = zero | torch.stack(columns).all(0)
        elif (other := _other_factor(contraction)) is not None:
            zero = zero | self._constants(entry, other[0].name, other[1])[0]
        positions = algebra.unit_labels(contraction.axis, algebra.find(group.axis))
        takes = len(sites) == 1 and sites[0].bias is not None and sites[0].expert is None
        return (
            _units(zero, positions, group.size),
            _units(zero | constant, positions, group.size),
            takes,
        )

    def _constants(self, entry: str, name: str, dim: int) -> tuple[Tensor, Tensor]:
        """Positions along a dimension of a value that are zero, and that are some constant."""
        known = self.known[entry, name]
        value = known.value.movedim(dim, -1)[None].flatten(0, -2)  # of a vector too
        varies = known.varies.movedim(dim, -1)[None].flatten(0, -2).any(0)
        if not len(value):
            return torch.zeros_like(varies), torch.zeros_like(varies)
        same = (value - value[:1]).abs().amax(0) <= _ROUNDING * value[0].abs()
        zero = ~varies & (value == 0).all(0)
        return zero.cpu(), (~varies & same).cpu()

    def _shift(self, group: AxisGroup, folds: Tensor) -> str:
        """Work out what biases gain when units are folded; if that cannot be, why.

        1. A bias that is added at several places must gain the same at each of them.
        2. A sum that half precision would round is not the same any more.
        3. A feature may belong to two groups; what two groups fold is folded one after the other.
        """
        gains: dict[str, list[Tensor]] = {}
        nodes = set()
        for entry, contraction in self.places[group.id]:
            for site in _products(entry, contraction, self.program):
                if site.bias is None or site.expert is not None:
                    continue
                units = algebra.unit_labels(contraction.axis, algebra.find(group.axis))
                chosen = (units >= 0) & folds[units.clamp_min(0)]
                known = self.known[entry, site.operand.name].value
                constants = known.reshape(-1, known.shape[-1])[0].double().cpu()
                matrix = site.matrix(self.program).double().cpu()
                gain = matrix[:, chosen] @ constants[chosen]
                gains.setdefault(site.bias, []).append(gain)
                nodes.add((entry, site.node.name))
        gaining = {b: found for b, found in gains.items() if any(bool(f.any()) for f in found)}
        for bias, found in gaining.items():
            alike = all(torch.allclose(found[0], f, _ROUNDING, 0) for f in found)
            if not alike or len(found) != self.readers[bias]:
                return f"constants, and their bias {bias!r} is added in other places too"
            whole = self.program.tensors[bias].double().cpu() + found[0]
            rounded = whole.to(self.program.tensors[bias].dtype).double()
            if bool(((rounded - whole).abs() > _ROUNDING * whole.abs()).any()):
                return f"constants, and the bias {bias!r} is too coarse for them"
        if self.folding & nodes:
            return "constants, and so are others at the same place: they go first"
        self.folding |= nodes
        self.shifts[group.id] = {bias: found[0] for bias, found in gaining.items()}
        return ""


def _products(entry: str, contraction: Contraction, program: Program) -> list[LinearSite]:
    """The linear sites whose columns are positions of the operand: convolutions are none."""
    return [site for site in sites_of(entry, contraction, program) if site.window is None]


def _other_factor(contraction: Contraction) -> tuple[fx.Node, int] | None:
    """The other factor of a summed dimension, and that factor's dimension; None for none."""
    node, bound = contraction.node, bound_arguments(contraction.node)
    if is_op(node, "scaled_dot_product_attention"):
        other, from_end = bound["key"], 1
    elif op_name(node) in PRODUCTS and contraction.slot == PRODUCTS[op_name(node)][0]:
        if bound.get("groups", 1) != 1:
            return None
        other = bound[PRODUCTS[op_name(node)][1]]
        rank = other.meta["val"].dim()
        weighs = op_name(node) == "linear" or op_name(node).startswith("conv")
        from_end = rank - 1 if weighs else min(rank, 2)
    else:
        return None
    return other, other.meta["val"].dim() - from_end


def _units(positions: Tensor, labels: Tensor, size: int) -> Tensor:
    """Units all of whose positions are true; those without a position too; bool [size]."""
    result = torch.ones(size, dtype=torch.bool)
    result[labels[(labels >= 0) & ~positions]] = False
    return result


def _is_zero(matrix: Tensor) -> Tensor:
    """Columns of a matrix that are zero."""
    return (matrix == 0).all(0)


def _bias_readers(program: Program) -> Counter[str]:
    """How many operators read each tensor."""
    return Counter(
        str(node.target)
        for entry in program.entries.values()
        for node in tensor_nodes(entry.graph)
        for _ in node.users
    )
