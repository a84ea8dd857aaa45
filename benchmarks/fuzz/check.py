"""Try one graph: capture it, cut it at random, and compare what is left with two oracles."""

from __future__ import annotations

import contextlib
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.fuzz.absence import Evaluator, Run, op_name
from benchmarks.fuzz.drawing import write
from benchmarks.fuzz.source import Graph, Source, inputs_of, module_of, randomize
from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.axes.rules import RULES
from graphprune.capture.capture import capture
from graphprune.errors import CaptureError, ExportError, UnsupportedError
from graphprune.ir.module import graph_module
from graphprune.ir.program import Entry, Program
from graphprune.rewrite.shrink import shrink

TOLERANCE = 1e-8  # in float64, of a row's own size
SCALES = (1.0, 30.0)
SMALL = 1e-6  # rows below count as this large
Kept = dict[str, list[int]]


@dataclass(slots=True)
class Failure:
    """A wrong result, or an exception that is no refusal.

    Attributes:
        graph: what was tried.
        kind: "wrong" or "crash" with the stage, for instance "wrong: absence".
        detail: by how much, or the exception.
        kept: the cut.
    """

    graph: Graph
    kind: str
    detail: str
    kept: Kept = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """The result of one graph.

    Attributes:
        failures: empty when all is well.
        refused: why capture declined the model, else "".
        cuts: number of cuts compared.
        plain: how many of them by plain torch too, with parameter slices zeroed.
        unseen: how many moved no output.
        skipped: cuts that no oracle is defined for, with the reason.
        operators: with an axis rule, seen in the captured graph.
        exported: "" when ONNX was not tried, "ok", or why it could not be written.
    """

    failures: list[Failure] = field(default_factory=list)
    refused: str = ""
    cuts: int = 0
    plain: int = 0
    unseen: int = 0
    skipped: list[str] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    exported: str = ""


@dataclass(slots=True)
class _Case:
    """A captured graph with its batches."""

    graph: Graph
    source: Source
    model: nn.Module
    program: Program
    groups: AxisGroups
    batches: list[tuple[Tensor, ...]]
    dense: list[list[Any]]
    module: Callable[..., Any]

    @property
    def entry(self) -> Entry:
        return self.program.forward


# Most of a graph's time goes to fake tensors, and their cache costs more than it saves here.
torch._dynamo.config.fake_tensor_cache_enabled = False


class _Stop(Exception):
    """The graph cannot be tried further."""


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype while inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(graph: Graph, cuts: int = 2, *, onnx: bool = False, thorough: bool = False) -> Outcome:
    """Capture the graph, cut free axes at random and compare.

    Args:
        graph: what to try.
        cuts: number of random cuts.
        onnx: run the first cut in ONNX Runtime too.
        thorough: before those, take one unit out of every free axis, one after the other.
    """
    outcome = Outcome()
    with _default(torch.float64), warnings.catch_warnings(), contextlib.suppress(_Stop):
        warnings.simplefilter("ignore")
        case = _prepared(graph, outcome)
        _check_identity(case, outcome)
        for i, kept in enumerate(_cuts(case, cuts, thorough)):
            _check_cut(case, kept, outcome, onnx=onnx and i == 0)
    return outcome


def check_source(model: nn.Module, graph: Graph, kept: Kept) -> str:
    """Cut a printed module as it was cut when it failed; what is wrong, or "agrees"."""
    outcome = Outcome()
    with _default(torch.float64), contextlib.suppress(_Stop):
        case = _prepared(graph, outcome, type(model)().eval())
        _check_identity(case, outcome)
        if kept:
            _check_cut(case, kept, outcome, onnx=False)
    return "; ".join(f"{f.kind}: {f.detail}" for f in outcome.failures) or "agrees"


def _attempt(outcome: Outcome, graph: Graph, stage: str, kept: Kept, function: Any) -> Any:
    """The function's result; an exception that is no refusal is a failure, and the end."""
    try:
        return function()
    except (CaptureError, UnsupportedError) as e:
        if stage == "shrink":  # what is free can be cut
            outcome.failures.append(Failure(graph, f"crash: {stage}", _told(e), kept))
        else:
            outcome.refused = _told(e)
    except Exception as e:
        kind = f"crash: {stage} {type(e).__name__}"
        outcome.failures.append(Failure(graph, kind, _told(e), kept))
    raise _Stop


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _prepared(graph: Graph, outcome: Outcome, model: nn.Module | None = None) -> _Case:
    source = _attempt(outcome, graph, "writing", {}, lambda: write(graph))
    if model is None:
        model = _attempt(outcome, graph, "writing", {}, lambda: module_of(source.text()))
    assert model is not None
    randomize(model, graph.seed)
    example = inputs_of(source.inputs, _sizes(graph)[0], 1.0, graph.seed)
    _attempt(outcome, graph, "model", {}, lambda: _flat(model, example))
    program = _attempt(
        outcome, graph, "capture", {}, lambda: _captured(graph, model, source, example)
    )
    for node in program.forward.graph.nodes:
        if node.op == "call_function" and op_name(node) in RULES:
            outcome.operators.add(op_name(node))
    groups = _attempt(outcome, graph, "axes", {}, lambda: axis_groups(program))
    module = graph_module(program)
    batches, dense = [], []
    for inputs in _batches(graph, source, program.forward):
        try:
            expected = _flat(model, inputs)
        except Exception:
            continue  # the model itself needs other sizes
        actual = _attempt(outcome, graph, "captured graph", {}, lambda i=inputs: _run(module, i))
        if error := _error(expected, actual):
            outcome.failures.append(Failure(graph, "wrong: capture", f"{error} {_shapes(inputs)}"))
            raise _Stop
        batches.append(inputs)
        dense.append(expected)
    return _Case(graph, source, model, program, groups, batches, dense, module)


def _captured(
    graph: Graph, model: nn.Module, source: Source, example: tuple[Tensor, ...]
) -> Program:
    auto = torch.export.Dim.AUTO
    shapes = {}
    for name, (kind, sizes) in source.inputs.items():
        dims = sizes[1:] if kind == "ids" else sizes
        shapes[name] = {d: auto for d, size in enumerate(dims) if isinstance(size, str)}
    program = capture(
        model,
        dict(zip(source.inputs, (t.clone() for t in example), strict=True)),
        dynamic_shapes=shapes if graph.dynamic else None,
        check=False,
    )
    if source.cache and graph.dynamic:
        dynamic = {
            name: {d: "past" if d == 2 and name in source.cache else s for d, s in dims.items()}
            for name, dims in program.forward.dynamic.items()
        }
        second = {**program.forward.second, "past": 2}
        entry = replace(program.forward, cache=dict(source.cache), dynamic=dynamic, second=second)
        program = replace(program, entries={"forward": entry}).with_graphs({})
    elif source.cache:
        entry = replace(program.forward, cache=dict(source.cache))
        program = replace(program, entries={"forward": entry})
    return program


def _sizes(graph: Graph) -> list[dict[str, int]]:
    """Sizes at capture, and three others where they are dynamic."""
    b, n = graph.batch, graph.length
    sizes = [(b, n, 3)]
    if graph.dynamic:
        sizes += [(1, 1, 1), (b + 1, n + 3, 4), (1, 2, 5)]
    return [dict(zip("blp", s, strict=True)) for s in sizes]


def _batches(graph: Graph, source: Source, entry: Entry) -> Iterator[tuple[Tensor, ...]]:
    for scale in SCALES:
        for i, sizes in enumerate(_sizes(graph)):
            inputs = inputs_of(source.inputs, sizes, scale, graph.seed + i)
            if i == 0 or _is_allowed(entry, inputs):
                yield inputs


def _is_allowed(entry: Entry, inputs: Sequence[Tensor]) -> bool:
    """Whether the sizes are within what capture says that the graph is right for."""
    for name, tensor, example in zip(entry.input_names, inputs, entry.example, strict=True):
        symbols = entry.dynamic.get(name, {})
        for dim, size in enumerate(tensor.shape):
            if dim not in symbols:
                if size != example.shape[dim]:
                    return False
                continue
            least, most = entry.bounds.get(symbols[dim], (0, None))
            if size < least or (most is not None and size > most):
                return False
    return True


def _flat(model: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return pytree.tree_leaves(model(*(t.clone() for t in inputs)))


def _run(module: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return list(module(*(t.clone() for t in inputs)))


def _shapes(inputs: Sequence[Tensor]) -> str:
    return f"for inputs of shapes {[tuple(t.shape) for t in inputs]}"


def _error(expected: Sequence[Any], actual: Sequence[Any], tolerance: float = TOLERANCE) -> str:
    """Describe what differs, or ""."""
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has shape {tuple(b.shape)}, not {tuple(a.shape)}"
        error = difference(a, b)
        if not error <= tolerance:
            return f"output {i} differs by {error:.1e}"
    return ""


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference within a row, relative to the row's largest value.

    Infinite where one is infinite or NaN and the other something else.
    """
    a, b = (t.double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (expected, actual))
    if not a.numel():
        return 0.0
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    same = (a == b) | ~a.isfinite() & ((a == b) | (a.isnan() & b.isnan()))
    if bool((~same & ~a.isfinite()).any()):
        return float("inf")
    rows = a.abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True)
    scale = torch.maximum(rows, 1e-3 * rows.median()).clamp_min(SMALL)
    return float((torch.where(same, 0.0, (a - b).abs()) / scale).max())


def _check_identity(case: _Case, outcome: Outcome) -> None:
    """Keeping every unit gives the same graph over the same tensors."""
    kept = {g.id: list(range(g.size)) for g in case.groups}
    same = _attempt(outcome, case.graph, "identity", {}, lambda: shrink(case.program, kept))
    tensors = case.program.tensors
    equal = tensors.keys() == same.tensors.keys() and all(
        torch.equal(t, same.tensors[name]) or bool(t.isnan().any()) for name, t in tensors.items()
    )
    if not equal or _lines(same) != _lines(case.program):
        outcome.failures.append(
            Failure(case.graph, "wrong: identity", "keeping every unit changes the program")
        )
        raise _Stop


def _lines(program: Program) -> list[str]:
    return [f"{n.name} {n.target} {n.args} {n.kwargs}" for n in program.forward.graph.nodes]


def _cuts(case: _Case, number: int, thorough: bool) -> Iterator[Kept]:
    """Random cuts of free axes: several at once and one alone, alternately; the simplest first."""
    free = [g for g in case.groups if not g.frozen and not g.normalized]
    rng = random.Random(case.graph.seed)
    if not free:
        return
    if thorough:
        for group in free:
            gone = rng.randrange(group.size)
            yield {group.id: [unit for unit in range(group.size) if unit != gone]}
    for i in range(number):
        chosen = [g for g in free if rng.random() < 0.6] if i % 2 == 0 else []
        yield {g.id: _drawn(g, rng) for g in chosen or [rng.choice(free)]}


def _drawn(group: AxisGroup, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(group.size), rng.randrange(1, group.size)))


def _check_cut(case: _Case, kept: Kept, outcome: Outcome, *, onnx: bool) -> None:
    marks = _marks(case, kept)
    shrunk = _attempt(outcome, case.graph, "shrink", kept, lambda: shrink(case.program, kept))
    for name, tensor in shrunk.tensors.items():
        mark = marks.get(name)
        left = case.program.tensors[name].numel() - (0 if mark is None else int(mark.sum()))
        if tensor.numel() != left:
            detail = f"{name} has {tensor.numel()} elements left, not {left}"
            outcome.failures.append(Failure(case.graph, "wrong: tensors", detail, kept))
            raise _Stop
    module = graph_module(shrunk)
    evaluator = Evaluator(case.entry.graph, case.program.tensors, marks)
    zeroed = _zeroed(case, marks) if case.source.exact and not case.entry.cache else None
    moved = False
    whole = True
    for number, inputs in enumerate(case.batches):
        input_marks = [
            _input_mark(case, n, t, kept)
            for n, t in zip(case.entry.input_names, inputs, strict=True)
        ]
        run = evaluator.run(inputs, input_marks, whole)
        if number == 0 and run.weights_summed:
            # Weights alone are summed: whether to cut there depends on the axis.
            if len(kept) > 1:
                outcome.skipped.append("weights alone are summed, and several axes are cut")
                return
            whole = run.carried
            run = evaluator.run(inputs, input_marks, whole)
        given = [
            t if m is None else _without(t, m) for t, m in zip(inputs, input_marks, strict=True)
        ]
        actual = _attempt(outcome, case.graph, "run", kept, lambda g=given: _run(module, g))
        plain = None if zeroed is None else _flat(zeroed, inputs)
        wrong = _disagreement(case, run, plain, actual, TOLERANCE)
        if wrong is not None:
            wrong = _disagreement(case, run, plain, actual, _rounding(module, given, actual))
        if wrong is not None:
            oracle, reason = wrong
            _wrong(case, outcome, oracle, f"{reason} {_shapes(inputs)}", kept)
        moved |= _is_moved(case.dense[number], actual)
    outcome.cuts += 1
    outcome.plain += zeroed is not None
    outcome.unseen += not moved
    if onnx and not case.entry.cache:
        with _default(torch.float32), tempfile.TemporaryDirectory() as folder:
            _check_onnx(case, shrunk, kept, outcome, Path(folder) / "model.onnx")


def _wrong(case: _Case, outcome: Outcome, oracle: str, detail: str, kept: Kept) -> None:
    outcome.failures.append(Failure(case.graph, f"wrong: {oracle}", detail, kept))
    raise _Stop


def _marks(case: _Case, kept: Kept) -> dict[str, Tensor]:
    """For each tensor that loses units: true at the elements of those."""
    marks = {}
    for name, tensor in case.program.tensors.items():
        mark = torch.zeros(tensor.shape, dtype=torch.bool)
        for dim in range(tensor.dim()):
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[case.groups.indices(name, dim, kept)] = False
            mark |= gone.view(-1, *[1] * (tensor.dim() - dim - 1))
        if bool(mark.any()):
            marks[name] = mark
    return marks


def _input_mark(case: _Case, name: str, tensor: Tensor, kept: Kept) -> Tensor | None:
    """The same for a cache that comes in: heads and widths that are gone."""
    if name not in case.entry.cache:
        return None
    from graphprune.axes.algebra import expanded

    (node,) = (n for n in case.entry.graph.nodes if n.name == name)
    dims = case.groups.axes.facts["forward"].dims[node]
    mark = torch.zeros(tensor.shape, dtype=torch.bool)
    for dim in (1, 3):
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[expanded(dims[dim], case.groups.keep(kept))] = False
        mark |= gone.view(-1, *[1] * (tensor.dim() - dim - 1))
    return mark


def _without(tensor: Tensor, mark: Tensor) -> Tensor:
    """The tensor without slices that are marked throughout."""
    for dim in range(tensor.dim()):
        others = [d for d in range(tensor.dim()) if d != dim]
        stays = ~mark.all(others) if tensor.numel() else ~mark.any(others)
        tensor = tensor.index_select(dim, stays.nonzero().flatten())
        mark = mark.index_select(dim, stays.nonzero().flatten())
    return tensor


def _disagreement(
    case: _Case, run: Run, plain: Sequence[Any] | None, actual: Sequence[Any], tolerance: float
) -> tuple[str, str] | None:
    """The oracle that differs, and how; None where both agree."""
    if reason := _compared(case, run, actual, tolerance):
        return "absence", reason
    if plain is not None and (reason := _error(plain, actual, tolerance)):
        return "zeroed weights", reason
    return None


def _compared(case: _Case, run: Run, actual: Sequence[Any], tolerance: float) -> str:
    cached = set(case.entry.cache.values())
    wanted = []
    for i, (value, mark) in enumerate(zip(run.outputs, run.absent, strict=True)):
        if mark is not None and i in cached:
            value = _without(value, mark)
        elif mark is not None and bool(mark.any()):
            return f"output {i} depends on a removed unit"
        wanted.append(value)
    return _error(wanted, actual, tolerance)


def _rounding(
    module: Callable[..., Any], inputs: Sequence[Tensor], outputs: Sequence[Any]
) -> float:
    """What is left to float64 itself: sums that nearly cancel make its last bit large.

    Twenty times the outputs' move for inputs that move by one rounding, at most 1e-4: what lies
    between rounds too.
    """
    generator = torch.Generator().manual_seed(0)
    moved = TOLERANCE
    for _ in range(8):
        nudged = [
            t + torch.randint(-1, 2, t.shape, generator=generator) * (2**-52 * t)
            if t.is_floating_point()
            else t
            for t in inputs
        ]
        pairs = zip(outputs, _run(module, nudged), strict=True)
        moved = max([moved, *(20 * difference(a, b) for a, b in pairs)])
    return min(moved, 1e-4)


def _is_moved(dense: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    return any(
        a.shape != b.shape or difference(a, b) > 1e-6 for a, b in zip(dense, actual, strict=True)
    )


def _zeroed(case: _Case, marks: Mapping[str, Tensor]) -> nn.Module | None:
    """The plain module with every slice of a removed unit zero; variances stay.

    None where a removed unit goes into a constant that the module computes.
    """
    model = module_of(case.source.text())
    model.load_state_dict(case.model.state_dict())
    aliases = case.program.aliases
    with torch.no_grad():
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        known = {aliases.get(name, name) for name, _ in named}
        if any(mark.any() for name, mark in marks.items() if name not in known):
            return None
        for name, tensor in named:
            mark = marks.get(aliases.get(name, name))
            if mark is not None and not name.endswith("running_var"):
                tensor[mark] = 0
    return model


def _check_onnx(case: _Case, shrunk: Program, kept: Kept, outcome: Outcome, path: Path) -> None:
    """ONNX Runtime against float64, allowed what torch itself errs in float32."""
    from graphprune.exporters.onnx.convert import to_onnx
    from graphprune.exporters.onnx.files import save_onnx
    from graphprune.exporters.runtime.session import open_session

    single = shrunk.cast(torch.float64, torch.float32)
    try:
        save_onnx(to_onnx(single), path)
        session = open_session(path, 1)
    except ExportError as e:
        outcome.exported = _told(e)
        return
    except Exception as e:
        _wrong(case, outcome, "ONNX", _told(e), kept)
    names = [i.name for i in session.get_inputs()]
    module, wide = graph_module(single), graph_module(shrunk)
    for inputs in case.batches[: len(case.batches) // 2]:
        given = [t.float() if t.is_floating_point() else t for t in inputs]
        exact = _run(wide, [t.double() if t.is_floating_point() else t for t in given])
        own = _run(module, given)
        feeds = dict(zip(case.entry.input_names, (t.numpy() for t in given), strict=True))
        try:
            found = session.run(None, {n: feeds[n] for n in names})
        except Exception as e:
            _wrong(case, outcome, "ONNX run", f"{_told(e)} {_shapes(inputs)}", kept)
        for a, b, c in zip(exact, own, found, strict=True):
            limit = max(1e-4, 20 * difference(a, b))
            error = difference(a, torch.from_numpy(c))
            if not error <= limit:
                detail = f"{error:.1e}, allowed {limit:.1e} {_shapes(inputs)}"
                _wrong(case, outcome, "ONNX", detail, kept)
    outcome.exported = "ok"
