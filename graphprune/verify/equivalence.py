"""Verification: programs compute the same, node by node, on every batch of `error.batches`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, fx

from graphprune.errors import VerificationError, first_line
from graphprune.ir.batches import BEFORE_BOUNDS, batches, bounds_not_run
from graphprune.ir.graph import flat_outputs, op_name, output_node
from graphprune.ir.program import JSON, Entry, Program
from graphprune.rewrite.mask import MASK
from graphprune.verify.error import rounding_of, row_errors

TOLERANCE = 1e-5  # of a row's scale, in float32
TOLERANCE_FLOAT64 = 1e-9
# A difference in float64 may be so many times the rounding of float32, scaled to float64: a row
# that magnifies rounding can lose little of it in float32 by luck (150 times was seen).
_ROUNDING = 1000 * 2.0**-29
# An effect on the outputs that is smaller cannot tell a right cut from a wrong one.
_VISIBLE = 100


def verify_rewrite(
    reference: Program,
    candidate: Program,
    tolerance: float = TOLERANCE,
    *,
    exact: bool = True,
    nodes: bool = True,
    also: Sequence[Program] = (),
    dense: Program | None = None,
) -> dict[str, JSON]:
    """Run programs side by side and compare outputs and every node they share by name and shape.

    Errors are per row, relative to the row's own scale (`error.relative_error`), so nothing large
    in a tensor hides an error beside it. bfloat16 and float16 programs are compared in float32.
    Where float32 exceeds the tolerance, or the outputs show too little of the cut, the comparison
    is made in float64: an exact rewrite differs there by rounding alone (as float32 shows how much,
    in rows that cancel), a wrong one does not.

    Args:
        reference: what the candidate must compute (dense, or masked at the old shapes).
        candidate: the rewritten program.
        tolerance: largest error allowed in float32.
        exact: False reports the drift of the outputs without a limit: for normalized axes.
        nodes: whether nodes that keep their name keep their value; else outputs alone count.
        also: more references, which must agree too.
        dense: the program before the cut, to report by how much the cut moved the outputs.

    Returns:
        "max_error", "inputs" (number of batches), "dtype" (compared in); with `dense` also "moved"
        (largest change of an output by masking) and "observable": False where units that were not
        zero went, and no output moved. "bounds_not_run" names sizes that were too large to try,
        "refused" the batches that the reference itself fails on.

    Raises:
        VerificationError: they differ, the node is named; or an output is NaN everywhere.
    """
    programs = [p.in_float32() for p in (reference, *also, candidate)]
    before = None if dense is None else dense.in_float32()
    dtype = "float32"
    limit = tolerance if exact else math.inf
    found = _compare(programs, before, nodes=nodes and exact, limit=limit)
    if exact and not (found.error <= tolerance and found.visible(tolerance)):
        dtype, single = "float64", found.error
        wide = _widened([*programs, *([before] if before else [])])
        last = wide[-1] if before else None
        wide = wide[: len(programs)]
        found = _compare(wide, last, nodes=nodes, limit=TOLERANCE_FLOAT64)
        if not found.error <= TOLERANCE_FLOAT64:
            found = _compare(wide, last, nodes=nodes, noise=programs[0])
        if not found.error <= TOLERANCE_FLOAT64:
            raise VerificationError(
                f"{found.where} differs by {single:.1e} of its size, {found.error:.1e} in "
                f"float64 (allowed {tolerance:.0e}); the first node that differs is {found.first!r}"
            )
    report: dict[str, JSON] = {
        "max_error": _finite(found.error),
        "inputs": found.inputs,
        "dtype": dtype,
    }
    if found.moved is not None:
        report["moved"] = _finite(found.moved)
        report["observable"] = found.visible(TOLERANCE_FLOAT64)
    if found.refused:
        report["refused"] = found.refused
    if skipped := [line for e in reference.entries.values() for line in bounds_not_run(e)]:
        report["bounds_not_run"] = skipped
    return report


def combined(reports: Iterable[Mapping[str, JSON]]) -> dict[str, JSON]:
    """One verification of several rewrites: the largest error, and the least that one moved."""
    found = list(reports)
    errors = [r["max_error"] for r in found if "max_error" in r]
    moved = [r["moved"] for r in found if "moved" in r]
    result: dict[str, JSON] = {}
    if errors:
        result["max_error"] = max(errors)
    if moved:
        result |= {"moved": min(moved), "observable": all(r.get("observable", True) for r in found)}
    return result


@final
@dataclass(slots=True)
class _Found:
    """The result of a comparison.

    Attributes:
        error: the largest, of outputs and nodes.
        where: the output or node of it.
        first: the first node that differs by more than rounding in float64.
        moved: the largest change that masking made to an output; None without `dense`.
        live: whether masking changed any value at all.
        inputs: number of batches compared, of the entry with most.
        refused: batches that the reference fails on, with its messages.
    """

    error: float = 0.0
    where: str = ""
    first: str = ""
    moved: float | None = None
    live: bool = False
    inputs: int = 0
    refused: list[str] = field(default_factory=list)

    def visible(self, tolerance: float) -> bool:
        """Whether the outputs show the cut well enough for this tolerance to mean something."""
        return self.moved is None or not self.live or self.moved > _VISIBLE * tolerance

    def add(self, error: float, where: str, node: str) -> None:
        if not error <= TOLERANCE_FLOAT64 and not self.first:
            self.first = node
        if not error <= self.error:  # NaN is the worst of all
            self.error, self.where = error, where


def _compare(
    programs: Sequence[Program],
    dense: Program | None,
    *,
    nodes: bool,
    limit: float = math.inf,
    noise: Program | None = None,
) -> _Found:
    """Compare all but the last program with the last, entry by entry, batch by batch.

    Args:
        programs: references, and the candidate last.
        dense: to see by how much the first reference moved the outputs.
        nodes: compare inner nodes too.
        limit: a larger error ends the comparison at once.
        noise: the first reference in float32, to see the rounding of each row.
    """
    found = _Found(moved=None if dense is None else 0.0)
    *references, candidate = programs
    for name, entry in references[0].entries.items():
        number = len(flat_outputs(candidate.entries[name].graph))
        wanted = len(_outputs_left(entry, candidate.entries[name]))
        if number != wanted:
            raise VerificationError(f"entry {name!r} has {number} outputs, not {wanted}")
        step = _Step(found, references, candidate, name, dense=dense, noise=noise, nodes=nodes)
        compared = 0
        for i, (inputs, own) in enumerate(_inputs(entry, candidate.entries[name])):
            try:
                step.compare(inputs, own, limit, at_bound=i >= BEFORE_BOUNDS)
                compared += 1
            except Exception as e:
                _refuse(found, references[0], name, inputs, e)
            if not found.error <= limit:
                return found
        if not compared:
            raise VerificationError(f"entry {name!r} runs on no batch: {found.refused[0]}")
        found.inputs = max(found.inputs, compared)
        step.refuse_all_nan()
    return found


def _refuse(
    found: _Found, reference: Program, name: str, inputs: Sequence[Tensor], error: Exception
) -> None:
    """Leave out a batch that the reference fails on too; the rewrite is not the cause."""
    shapes = [tuple(t.shape) for t in inputs]
    try:
        reference.run(inputs, name)
    except Exception as e:
        found.refused.append(f"inputs of shapes {shapes}: {first_line(e)}")
        return
    raise VerificationError(
        f"the rewritten graph fails on inputs of shapes {shapes}, where it ran before: "
        f"{first_line(error)}"
    ) from error


@final
class _Step:
    """One entry of all programs, compared batch by batch."""

    def __init__(
        self,
        found: _Found,
        references: Sequence[Program],
        candidate: Program,
        name: str,
        *,
        dense: Program | None,
        noise: Program | None,
        nodes: bool,
    ) -> None:
        self.found, self.name, self.nodes = found, name, nodes
        self.candidate = candidate
        self.references, self.dense, self.noise = references, dense, noise
        self.single = [] if noise is None else [t.dtype for t in noise.entries[name].example]
        self.outputs = _outputs_left(references[0].entries[name], candidate.entries[name])
        self.numbers: set[int] = set()  # outputs that were not NaN alone on some batch

    def compare(
        self, inputs: Sequence[Tensor], own: Sequence[Tensor], limit: float, *, at_bound: bool
    ) -> None:
        """One batch, all programs in step, so that only values still needed are alive.

        At a bound, where batches are long, the outputs of two programs are enough.
        """
        candidate = _Run(self.candidate, self.name, own)
        references = self.references[:1] if at_bound else self.references
        runs = [_Run(program, self.name, inputs) for program in references]
        noise = None
        if self.noise is not None:
            narrow = [t.to(dtype) for t, dtype in zip(inputs, self.single, strict=True)]
            noise = _Run(self.noise, self.name, narrow)
        if self.nodes and not at_bound:
            self._compare_nodes(candidate, runs, noise, limit)
            if not self.found.error <= limit:
                return
        outputs = [run.outputs() for run in runs]
        self._compare_outputs(candidate, outputs, None if noise is None else noise.outputs())
        self.found.live |= runs[0].live
        if self.dense is not None and not at_bound:
            before = _Run(self.dense, self.name, inputs).outputs()
            for a, b in zip(before, outputs[0], strict=True):
                if _shape(a) == _shape(b):
                    self.found.moved = max(self.found.moved or 0.0, _error(a, b, None))

    def _compare_nodes(
        self, candidate: _Run, runs: Sequence[_Run], noise: _Run | None, limit: float
    ) -> None:
        shared = candidate.names.intersection(*(run.names for run in runs))
        for run in (candidate, *runs, *([noise] if noise else [])):
            run.wanted = shared
        for node, value in candidate.steps():
            rounded = None if noise is None else noise.value(node)
            for run in runs:
                expected = run.value(node)
                # Numbers are sizes, which may change; tuples are read one by one.
                if isinstance(value, Tensor) and _shape(expected) == value.shape:
                    self.found.add(_error(expected, value, rounded), f"node {node!r}", node)
            if not self.found.error <= limit:
                return

    def _compare_outputs(
        self, candidate: _Run, expected: Sequence[Sequence[Any]], rounded: Sequence[Any] | None
    ) -> None:
        cached = self.candidate.entries[self.name].cache.values()
        for i, b in enumerate(candidate.outputs()):
            for outputs in expected:
                a = outputs[self.outputs[i]]
                if _shape(a) != _shape(b) and i in cached:
                    continue  # lost units; what is made of them is compared
                error = _error(a, b, None if rounded is None else rounded[self.outputs[i]])
                where = f"output {i} of {self.name!r}"
                self.found.add(error, where, candidate.output_name(i))
            if not isinstance(b, Tensor) or not b.numel() or not bool(b.isnan().all()):
                self.numbers.add(i)

    def refuse_all_nan(self) -> None:
        """Raise VerificationError for an output that was NaN everywhere on all batches."""
        entry = self.candidate.entries[self.name]
        for i in range(len(flat_outputs(entry.graph))):
            if i not in self.numbers:
                raise VerificationError(
                    f"output {i} of {self.name!r} is NaN everywhere on the example inputs, which "
                    "verifies nothing; pass example_inputs on which the model computes numbers"
                )


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _error(expected: Any, actual: Any, rounded: Any) -> float:
    """The largest error of a row; below the tolerance when float32 shows that it is rounding."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = expected is actual or (type(expected) is type(actual) and expected == actual)
        return 0.0 if same else math.inf
    if expected.shape != actual.shape:
        return math.inf
    if expected.dtype is actual.dtype and torch.equal(expected, actual):
        return 0.0
    difference, scale = row_errors(expected, actual)
    if isinstance(rounded, Tensor) and rounded.shape == expected.shape:
        rounding = rounding_of(expected, rounded)
        scale = torch.maximum(scale, _ROUNDING / TOLERANCE_FLOAT64 * rounding)
    return float((difference / scale).max())


def _inputs(reference: Entry, candidate: Entry) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The batches for both; a candidate that lost heads has a cache of its own, without them."""
    result = []
    for ours, theirs in zip(batches(reference), batches(candidate), strict=True):
        given = dict(zip(reference.input_names, ours, strict=True))
        own = zip(candidate.input_names, theirs, strict=True)
        result.append((ours, [b if given[n].shape != b.shape else given[n] for n, b in own]))
    return result


def _outputs_left(reference: Entry, candidate: Entry) -> list[int]:
    """Numbers of the reference's outputs that a candidate has, which may have lost caches."""
    gone = {number for past, number in reference.cache.items() if past not in candidate.cache}
    return [n for n in range(len(flat_outputs(reference.graph))) if n not in gone]


def _widened(programs: Sequence[Program]) -> list[Program]:
    """The programs in float64, a tensor that several of them share widened once."""
    memo: dict[int, Tensor] = {}
    result = []
    for program in programs:
        wide = program.cast(torch.float32, torch.float64, refresh=False)
        shared = {
            name: memo.setdefault(id(program.tensors[name]), tensor)
            for name, tensor in wide.tensors.items()
        }
        result.append(wide.with_tensors(shared))
    return result


class _Interpreter(fx.Interpreter):
    """Runs a graph as it is: a GraphModule's code takes longer to write than a small batch."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.tensors = program.tensors

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self.tensors[target]


@final
class _Run:
    """One program on one batch, run node by node, as far as somebody asks.

    Attributes:
        wanted: names of the nodes whose values will be asked for, each once.
        names: of all nodes that compute something.
        live: whether a mask has changed a value so far.
    """

    def __init__(self, program: Program, entry: str, inputs: Sequence[Tensor]) -> None:
        graph = program.entries[entry].graph
        self.wanted: set[str] = set()
        self.names = {n.name for n in graph.nodes if n.op == "call_function"}
        self.live = False
        self._interpreter = _Interpreter(program, graph)
        self._interpreter.args_iter = iter(inputs)
        self._nodes = iter(list(graph.nodes))
        self._values: dict[str, Any] = {}
        self._output = output_node(graph)
        self._results: Any = None

    def steps(self) -> Iterator[tuple[str, Any]]:
        """Run to the end, handing out the values of the wanted nodes in order."""
        for node in self._nodes:
            value = self._run(node)
            if node.name in self.wanted:
                yield node.name, value

    def value(self, name: str) -> Any:
        """The value of a wanted node; the graph runs as far as it."""
        while name not in self._values:
            node = next(self._nodes)
            value = self._run(node)
            if node.name in self.wanted:
                self._values[node.name] = value
        return self._values.pop(name)

    def outputs(self) -> list[Any]:
        """Run to the end, to the flat outputs."""
        for node in self._nodes:
            self._run(node)
        return list(self._results)

    def output_name(self, number: int) -> str:
        """The name of the node that an output is."""
        values: Any = self._output.args[0]
        value = values[number]
        return value.name if isinstance(value, fx.Node) else repr(value)

    def _run(self, node: fx.Node) -> Any:
        env = self._interpreter.env
        with torch.no_grad():
            value = self._interpreter.run_node(node)
        if node.op == "output":
            self._results = value
        elif "empty" in op_name(node) and isinstance(value, Tensor):
            value.zero_()  # left as found, memory differs from run to run
        elif node.op == "call_function" and node.name.startswith(MASK) and not self.live:
            self.live = not torch.equal(value, env[node.all_input_nodes[0]])
        env[node] = value
        for used in self._interpreter.user_to_last_uses.get(node, ()):
            del env[used]
        return value


def _finite(error: float) -> float:
    """A number that JSON has: a difference from infinity is none."""
    return min(error, sys.float_info.max)
