"""Streaming calibration: batches go through a graph region by region, and weights change between.

A layer-wise method must see what the already pruned layers before it produce. So the batches are
held where few values are alive (between two blocks: the hidden state and the mask), run from there
to the site in question to collect, and, once the pass has changed the weights, run on to the next
such place. Peak memory is what is alive at a cut, times the batches, plus one region of one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.axes.sites import LinearSite
from graphprune.calibration.gram import Gram
from graphprune.calibration.lagged import LaggedGram, best_side
from graphprune.calibration.padding import rows_without_padding
from graphprune.errors import GraphPruneError
from graphprune.ir.graph import is_op
from graphprune.ir.program import Entry, Program

Observe = Callable[[LinearSite, Tensor], None]

# A cut between two sites: at most this times the fewest bytes alive among so many pairs around.
_HARDLY_MORE = 1.25
_NEAR = 8
# Every so many batches one is held out, to evaluate fits on: what they learn by chance shows.
HELD_OUT = 4


class Stream:
    """Calibration batches on their way through an entry graph.

    Args:
        program: where the graph comes from; its tensors may be replaced from call to call.
        batches: each like the example inputs: a dict of keyword arguments, a tuple, or a tensor.
        entry: the entry graph.

    Raises:
        GraphPruneError: there is no batch, or one does not fit the model's inputs.
    """

    def __init__(self, program: Program, batches: Iterable[Any], entry: str = "forward") -> None:
        self.entry = program.entries[entry]
        self.nodes = list(self.entry.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {
            node: max((self.number[user] for user in node.users), default=-1) for node in self.nodes
        }
        self.alive = self._alive()
        self.position = 0
        self.done = 0  # what lies before has been collected, and need not run twice
        self.states: list[dict[fx.Node, Any]] = []
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.rows = []
        for i, batch in enumerate(batches):
            flat = flat_batch(self.entry, batch, i)
            self.rows.append(rows_without_padding(self.entry, flat))
            self.states.append(dict(zip(placeholders, flat, strict=True)))
        if not self.states:
            raise GraphPruneError("calibration yields no batch; pass an iterable of input batches")

    def collect(
        self,
        program: Program,
        sites: Sequence[LinearSite],
        observe: Observe,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Run every batch up to the last of these sites, and show each site its input rows.

        Afterwards the weights of these sites, and of anything later, may change; what lies before
        the first of them has been passed. Sites must be visited in execution order.

        Args:
            program: the tensors to run with.
            sites: of this entry, none of them before a place that was passed.
            observe: called with a site and its input rows [n, in], padding dropped; several times
                a batch for a convolution, whose patches come in pieces.

        Raises:
            GraphPruneError: an input is NaN or infinite; site and batch are named.
        """
        before = -1
        for i, site, rows in self.visit(program, sites):
            if i > before:
                progress(i, len(self.states))
                before = i
            observe(site, rows)
        progress(len(self.states), len(self.states))

    def visit(
        self, program: Program, sites: Sequence[LinearSite]
    ) -> Iterator[tuple[int, LinearSite, Tensor]]:
        """The same one by one: number of the batch, site, input rows. To be read to the end.

        For two streams that go side by side.
        """
        wanted: dict[fx.Node, list[LinearSite]] = {}
        for site in sites:
            wanted.setdefault(site.node, []).append(site)
        for i, node, values in self.before(program, wanted):
            for site in wanted[node]:
                for rows in self.inputs(site, values, i):
                    yield i, site, rows

    def moments(
        self,
        program: Program,
        sites: Sequence[LinearSite],
        progress: Callable[[int, int], None] = lambda done, total: None,
        observe: Observe | None = None,
        *,
        held: bool = False,
    ) -> list[Gram]:
        """Collect the second moments of each site's input rows; one for all that read the same.

        Args:
            program: the tensors to run with.
            sites: as `collect` takes them.
            progress: called with the number of batches that are done, and of all.
            observe: called with a site and its rows, but for convolutions.
            held: whether those of the batches that are held out (`is_held`) are collected apart
                as well.
        """
        found: dict[tuple[object, ...], Gram | LaggedGram] = {}
        apart: dict[tuple[object, ...], Gram | LaggedGram] = {}
        owner: dict[tuple[object, ...], LinearSite] = {}
        wanted: dict[fx.Node, list[LinearSite]] = {}
        for site in sites:
            wanted.setdefault(site.node, []).append(site)
            owner.setdefault(site.reads, site)
        before = -1
        for i, node, values in self.before(program, wanted):
            if i > before:
                progress(i, len(self.states))
                before = i
            for site in wanted[node]:
                if site is owner[site.reads]:
                    if site.reads not in found:
                        features = site.matrix(program).shape[1]
                        found[site.reads] = self.accumulator(site, features)
                    self._add(found[site.reads], site, values, i)
                    if held and self.is_held(i):
                        if site.reads not in apart:
                            features = site.matrix(program).shape[1]
                            apart[site.reads] = self.accumulator(site, features)
                        self._add(apart[site.reads], site, values, i)
                if observe is not None and site.window is None:
                    for rows in self.inputs(site, values, i):
                        observe(site, rows)
        progress(len(self.states), len(self.states))
        grams = {reads: _finished(gram) for reads, gram in found.items()}
        for reads, gram in apart.items():
            grams[reads].held = _finished(gram)
        return [grams[site.reads] for site in sites]

    def is_held(self, batch: int) -> bool:
        """Whether a batch is one of those that a fit is evaluated on: every fourth."""
        return batch % HELD_OUT == HELD_OUT - 1

    def accumulator(self, site: LinearSite, features: int) -> Gram | LaggedGram:
        """Nothing seen yet of so many of a site's features; of a patch, those of whole channels."""
        masked = any(rows.kept_positions(site.node) is not None for rows in self.rows)
        if site.window is not None and not masked:
            sizes = site.node.meta["val"].shape[-len(site.window.kernel) :]
            side = best_side(site.window, tuple(map(size_hint, sizes)))
            if side is not None:
                return LaggedGram(site.window, features // site.window.taps, side)
        return Gram.empty(features)

    def _add(
        self,
        gram: Gram | LaggedGram,
        site: LinearSite,
        values: Mapping[fx.Node, Any],
        batch: int,
    ) -> None:
        if isinstance(gram, LaggedGram):
            gram.add(site.channels(self._checked(site, values, batch)))
            return
        for rows in self.inputs(site, values, batch):
            gram.add(rows)

    def before(
        self, program: Program, nodes: Collection[fx.Node]
    ) -> Iterator[tuple[int, fx.Node, dict[fx.Node, Any]]]:
        """Number of the batch, one of these nodes, and what is alive when it is about to run.

        Batch by batch, each in execution order. To be read to the end.
        """
        first = min(self.number[node] for node in nodes)
        last = max(self.number[node] for node in nodes)
        self.advance(program, self._cheapest(min(max(self.position, self.done), first), first))
        for i, state in enumerate(self.states):
            values = dict(state)
            for j in range(self.position, last + 1):
                if self.nodes[j] in nodes:
                    yield i, self.nodes[j], values
                if j < last:
                    self._step(program, values, j)
        self.done = last

    def inputs(
        self, site: LinearSite, values: Mapping[fx.Node, Any], batch: int
    ) -> Iterator[Tensor]:
        """The input rows of a site, given what it reads; in pieces for a convolution.

        Raises:
            GraphPruneError: an input is NaN or infinite; site and batch are named.
        """
        value = self._checked(site, values, batch)
        if site.offsets is not None:
            ends = values[site.offsets]
            assert site.expert is not None
            start = int(ends[site.expert - 1]) if site.expert else 0
            yield value[start : int(ends[site.expert])]
        elif site.window is not None:
            yield from self._patches(site, value, batch)
        else:
            yield self.rows[batch](site.operand, value)

    def results_at(self, site: LinearSite, node: fx.Node, value: Tensor, batch: int) -> Tensor:
        """A value as rows that belong to a site's input rows: [n, features]."""
        if site.window is None:
            return self.rows[batch](node, value)
        rank = len(site.window.kernel)
        rows = value.movedim(-1 - rank, -1).flatten(0, -2)
        kept = self.rows[batch].kept_positions(site.node)
        return rows if kept is None else rows[kept.to(rows.device)]

    def advance(self, program: Program, position: int) -> None:
        """Run every batch on to a node's place in the graph and keep only what is alive there."""
        for state in self.states:
            for j in range(self.position, position):
                self._step(program, state, j)
        self.position = max(self.position, position)

    def outputs(self, program: Program) -> list[list[Any]]:
        """Run every batch to the end from where it is: flat outputs of each."""
        return list(self.results(program))

    def results(self, program: Program) -> Iterator[list[Any]]:
        """The same, one batch after another."""
        for state in self.states:
            values = dict(state)
            for j in range(self.position, len(self.nodes) - 1):
                self._step(program, values, j)
            yield [values[n] if isinstance(n, fx.Node) else n for n in self.nodes[-1].args[0]]

    def regions(self, sites: Sequence[LinearSite]) -> list[list[LinearSite]]:
        """The sites in runs between which few values are alive: the parts of a model's blocks.

        Read off the bytes alive, not off names: where hardly more is alive between two sites than
        anywhere near before them, or after them, one region ends and the next begins.

        Args:
            sites: of this entry, in execution order.
        """
        nodes = list(dict.fromkeys(site.node for site in sites))
        alive = self._alive(made_of_weights(self.entry.graph))
        between = [
            min(alive[self.number[a] + 1 : self.number[b] + 1])
            for a, b in itertools.pairwise(nodes)
        ]
        starts = {node for i, node in enumerate(nodes[1:]) if _is_cut(between, i)}
        regions: list[list[LinearSite]] = []
        for i, site in enumerate(sites):
            if i == 0 or (site.node in starts and site.node is not sites[i - 1].node):
                regions.append([])
            regions[-1].append(site)
        return regions

    def _step(self, program: Program, values: dict[fx.Node, Any], j: int) -> None:
        node = self.nodes[j]

        def value(source: fx.Node) -> Any:
            # Tensors are read again each time: the pass may have replaced them since.
            return (
                program.tensors[str(source.target)] if source.op == "get_attr" else values[source]
            )

        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
        for source in node.all_input_nodes:
            if self.last_use[source] <= j:
                values.pop(source, None)

    def _checked(self, site: LinearSite, values: Mapping[fx.Node, Any], batch: int) -> Tensor:
        value: Tensor = values[site.operand]
        if not bool(value.isfinite().all()):
            raise GraphPruneError(
                f"calibration batch {batch} gives NaN or infinity at {site.operand.name!r}, the "
                f"input of {site.name!r}: check the batch and the weights before it"
            )
        return value

    def _patches(self, site: LinearSite, value: Tensor, batch: int) -> Iterator[Tensor]:
        """The patches of a convolution, those at padded positions left out."""
        window, done = site.window, 0
        assert window is not None
        kept = self.rows[batch].kept_positions(site.operand if window.apart else site.node)
        for rows in window.patches(site.channels(value)):
            if kept is None:
                yield rows
            else:
                yield rows[kept[done : done + len(rows)].to(rows.device)]
            done += len(rows)

    def _cheapest(self, start: int, stop: int) -> int:
        """The place in [start, stop] where the fewest bytes are alive, the latest of equals."""
        return min(range(start, stop + 1), key=lambda j: (self.alive[j], -j))

    def _alive(self, counted: Container[fx.Node] | None = None) -> list[int]:
        """Bytes alive before each node, of all values or of some, at the example's sizes."""
        alive = 0
        ending: dict[int, int] = {}
        result = []
        for j, node in enumerate(self.nodes):
            result.append(alive)
            mine = node.op != "get_attr" and (counted is None or node in counted)
            size = _bytes(node) if mine else 0
            if self.last_use[node] > j:
                alive += size
                ending[self.last_use[node]] = ending.get(self.last_use[node], 0) + size
            alive -= ending.pop(j, 0)
        return result


def _finished(gram: Gram | LaggedGram) -> Gram:
    return gram.gram() if isinstance(gram, LaggedGram) else gram


def made_of_weights(graph: fx.Graph) -> set[fx.Node]:
    """Values that depend on a weight matrix: no masks, no tables of positions."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        matrix = node.op == "get_attr" and node.meta["val"].dim() > 1
        if matrix or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_cut(between: Sequence[int], i: int) -> bool:
    """Whether hardly more is alive at pair i than at the best of the pairs before it, or after it.

    Both sides are asked, because a decoder beside its encoder's output has more alive throughout,
    and a pooled output less.
    """
    before, after = between[max(i - _NEAR, 0) : i], between[i + 1 : i + 1 + _NEAR]
    full = [side for side in (before, after) if len(side) == _NEAR]
    least = max(map(min, full)) if full else min(between)
    return between[i] <= _HARDLY_MORE * least


def check_not_empty(batch: Any, number: int) -> None:
    """Refuse a batch without a single value; this needs no captured model.

    Raises:
        GraphPruneError: every tensor of the batch is empty; its number is named.
    """
    leaves = pytree.tree_leaves(dict(batch) if hasattr(batch, "keys") else batch)
    if all(isinstance(leaf, Tensor) and not leaf.numel() for leaf in leaves):
        raise GraphPruneError(f"calibration batch {number} holds nothing; leave empty batches out")


def flat_batch(entry: Entry, batch: Any, number: int) -> list[Tensor]:
    """One batch as flat inputs, checked against the capture.

    Raises:
        GraphPruneError: other inputs, other types, or sizes that the graph does not take.
    """
    try:
        if isinstance(batch, Tensor):
            flat = entry.flatten((batch,), {})
        elif hasattr(batch, "keys"):
            flat = entry.flatten((), dict(batch))
        else:
            flat = entry.flatten(tuple(batch), {})
    except (GraphPruneError, TypeError) as e:
        raise GraphPruneError(f"calibration batch {number}: {e}") from e
    found: dict[str, int] = {}
    for name, tensor, example in zip(entry.input_names, flat, entry.example, strict=True):
        dims = entry.dynamic.get(name, {})
        fits = tensor.dim() == example.dim() and all(
            d in dims or tensor.shape[d] == example.shape[d] for d in range(example.dim())
        )
        if not fits:
            wanted = [dims.get(d, s) for d, s in enumerate(example.shape)]
            raise GraphPruneError(
                f"calibration batch {number}: input {name!r} has shape {list(tensor.shape)}, "
                f"the model takes {wanted}"
            )
        if tensor.dtype is not example.dtype:
            raise GraphPruneError(
                f"calibration batch {number}: input {name!r} is {tensor.dtype}, the model was "
                f"captured with {example.dtype}"
            )
        if not tensor.numel() and example.numel():
            raise GraphPruneError(
                f"calibration batch {number}: input {name!r} has shape {list(tensor.shape)}, which "
                "holds nothing; leave empty batches out"
            )
        _check_ids(entry, name, tensor, number)
        for d, symbol in dims.items():
            if found.setdefault(symbol, tensor.shape[d]) != tensor.shape[d]:
                raise GraphPruneError(
                    f"calibration batch {number}: input {name!r} has {tensor.shape[d]} for "
                    f"{symbol}, another input {found[symbol]}"
                )
    return flat


def _check_ids(entry: Entry, name: str, tensor: Tensor, number: int) -> None:
    """Refuse ids that a table has no row for: another model's tokenizer makes other ids."""
    if tensor.is_floating_point() or not tensor.numel():
        return
    (node,) = (n for n in entry.graph.nodes if n.op == "placeholder" and n.name == name)
    for user in node.users:
        if is_op(user, "embedding") and user.args[1] is node:
            table = user.args[0]
            assert isinstance(table, fx.Node)
            rows = int(table.meta["val"].shape[0])
            if not 0 <= int(tensor.min()) <= int(tensor.max()) < rows:
                raise GraphPruneError(
                    f"calibration batch {number}: {name!r} holds ids from {int(tensor.min())} to "
                    f"{int(tensor.max())}, the model has a table of {rows}: the tokenizer is not "
                    "the model's"
                )


def size_hint(size: int | torch.SymInt) -> int:
    """A size at the example's sizes."""
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)


def _bytes(node: fx.Node) -> int:
    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return math.prod(map(size_hint, value.shape)) * value.element_size()
        return sum(map(size, value)) if isinstance(value, (tuple, list)) else 0

    return size(node.meta.get("val"))
