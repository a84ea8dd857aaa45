"""Assumptions of torch.export about sizes: bounds, relations, and fixed dimensions.

torch.export follows one path through forward. Where the path depends on a size, it notes a guard:
`s27 <= 16` for `if x.shape[1] > 16`, `Eq(Mod(s27, 4), 0)` for a length that must be padded. The
graph is right where all guards hold. Most guards do not come from the model, though, but from torch
working out strides and layouts. These say nothing that the operators of the graph do not check
themselves, and forbid sizes at random (a length of 3 beside a slice of 3), so they are left out.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._guards import ShapeGuard
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.solve import try_solve

from graphprune.ir.graph import op_name, terms
from graphprune.ir.program import Entry, Program
from graphprune.ir.propagate import symbol_inputs
from graphprune.ir.sizes import Bounds, Relation

Place = tuple[str, int]  # a placeholder and one of its dimensions

_TORCH = Path(torch.__file__).parent
# Parts of torch whose comparisons of sizes decide what is computed, not how it lies in memory.
_DECISIVE = (
    "_decomp/decompositions.py:split",  # the number of pieces
    "_export/non_strict_utils.py",
    "_ops.py",  # operators made of others, in C++
    # x[:, :3] of a shorter x is shorter, and forward may have computed with the 3.
    "_subclasses/fake_impls.py:_compute_slice_index",
)
_SAMPLES = (*range(1, 513), *(2**k + d for k in range(10, 21) for d in (-1, 0, 1)))


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumptions of a graph about the sizes of its inputs.

    Attributes:
        bounds: symbol name -> smallest and largest size.
        relations: what bounds cannot express.
        static: places that torch.export was asked to keep dynamic and could not -> the line that
            fixed them, "" where that is inside torch.
    """

    bounds: Bounds
    relations: tuple[Relation, ...]
    static: Mapping[Place, str]


def assumptions(
    exported: torch.export.ExportedProgram,
    example: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    *,
    declared: bool = False,
) -> Assumptions:
    """Read the guards of an export.

    Args:
        exported: what torch.export made.
        example: the tensor inputs by placeholder, in order.
        dynamic: the names of their dynamic sizes.
        declared: dynamic shapes were given with ranges of their own, which count too.
    """
    env = _environment(exported)
    if env is None or env.tracked_fakes is None:
        return Assumptions({}, (), {})
    places: dict[sympy.Symbol, list[Place]] = {}
    for name, tracked in zip(example, env.tracked_fakes, strict=True):
        for dim in range(tracked.fake.dim()):
            symbol = env.source_to_var.get(f"{tracked.source.name}.size()[{dim}]")
            if symbol is not None:
                places.setdefault(symbol, []).append((name, dim))
    static = {
        place: _line_of(env, symbol)
        for symbol, found in places.items()
        for place in found
        if env.replace(symbol).is_number
    }
    bounds: dict[str, tuple[int, int | None]] = {}
    # One symbol for two sizes: the user asked for equal ones.
    relations = {
        f"{first} {other}": Relation("a == b", {"a": first, "b": other})
        for first, *others in places.values()
        for other in others
    }
    known = [g for g in env.guards if g.expr.free_symbols <= places.keys()]
    conditions = [g.expr for g in known if not _from_torch(g)]
    if declared:
        conditions += _declared(exported, places)
    # Those of the model come first: most of torch's follow from them.
    inner = [g.expr for g in known if _from_torch(g) and _decides(g)]
    for condition in (*conditions, *inner):
        if all(place in static for s in condition.free_symbols for place in places[s]):
            continue
        limit = _limit(condition, places, dynamic)
        if limit is None:
            for relation in _relations(condition, places, example):
                if condition in inner:
                    limit = _as_limit(relation, bounds, [*relations.values()], dynamic)
                if limit is None:
                    relations.setdefault(str(relation), relation)
        if limit is not None:
            symbol_name, low, high = limit
            bounds[symbol_name] = _narrowed(bounds.get(symbol_name, (1, None)), low, high)
    # torch.export takes no size of zero or one for dynamic: bounds up to two are its own.
    bounds = {s: (low if low > 2 else 1, high) for s, (low, high) in bounds.items()}
    limited = {s: b for s, b in bounds.items() if b != (1, None)}
    return Assumptions(limited, tuple(relations.values()), static)


def culprit(program: Program, entry: Entry, place: Place) -> str:
    """The operator at which a fixed dimension becomes a constant, with the model's line, or "".

    The graph is run over a symbol there, until an operator takes it for a number, or refuses it
    because tracing left that number in the graph.
    """
    name, dim = place
    asked = {**entry.dynamic, name: {**entry.dynamic.get(name, {}), dim: "wanted"}}
    mode, fakes = symbol_inputs(entry.example, entry.input_names, asked)
    env: Any = mode.shape_env
    size: Any = fakes[entry.input_names.index(name)].shape[dim]
    ran: list[fx.Node] = []

    class Watch(fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return mode.from_tensor(program.tensors[target], static_shapes=True)

        def run_node(self, n: fx.Node) -> Any:
            if env.replace(size.node.expr).is_number:
                raise StopIteration
            ran.append(n)
            return super().run_node(n)

    # Any exception comes from the operator that is sought.
    with contextlib.suppress(Exception), mode, torch.no_grad():
        Watch(torch.nn.Module(), garbage_collect_values=False, graph=entry.graph).run(*fakes)
    return _operator_text(ran[-1]) if ran[-1].op == "call_function" else ""


def _environment(exported: torch.export.ExportedProgram) -> ShapeEnv | None:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None


def _declared(
    exported: torch.export.ExportedProgram, places: Mapping[sympy.Symbol, list[Place]]
) -> Iterator[sympy.Basic]:
    """The ranges of symbols as conditions."""
    for symbol, limits in exported.range_constraints.items():
        if symbol in places:
            yield sympy.Ge(symbol, limits.lower)
            if isinstance(limits.upper, sympy.Integer):
                yield sympy.Le(symbol, limits.upper)


def _from_torch(guard: ShapeGuard) -> bool:
    """Whether torch compares the sizes to work out an operator, rather than the model."""
    frame = guard.sloc.framework_loc
    return (
        isinstance(frame, traceback.FrameSummary)
        and _inside_torch(frame.filename)
        and not Path(frame.filename).is_relative_to(_TORCH / "nn")
    )


def _decides(guard: ShapeGuard) -> bool:
    """Whether a comparison of torch's own chooses what is computed.

    Sizes that differ, and sizes of several inputs, are about broadcasting, which is part of each
    call.
    """
    frame: Any = guard.sloc.framework_loc
    place = f"{Path(frame.filename).relative_to(_TORCH).as_posix()}:{frame.name}"
    return (
        place.startswith(_DECISIVE)
        and isinstance(guard.expr, sympy.core.relational.Relational)
        and not isinstance(guard.expr, sympy.Ne)
        and len(guard.expr.free_symbols) == 1
    )


def _inside_torch(file: str) -> bool:
    return Path(file).is_relative_to(_TORCH)


def _limit(
    condition: sympy.Basic,
    places: Mapping[sympy.Symbol, list[Place]],
    dynamic: Mapping[str, Mapping[int, str]],
) -> tuple[str, int | None, int | None] | None:
    """A condition as (symbol name, smallest, largest), or None where it is something else."""
    if len(condition.free_symbols) != 1 or not isinstance(
        condition, sympy.Lt | sympy.Le | sympy.Gt | sympy.Ge
    ):
        return None
    (symbol,) = condition.free_symbols
    name, dim = places[symbol][0]
    called = dynamic.get(name, {}).get(dim)
    solved = try_solve(condition, symbol, floordiv_inequality=False)
    if called is None or len(terms(called)) > 1 or solved is None or solved[0].lhs != symbol:
        return None
    relation, limit = solved
    if not limit.is_number:
        return None
    if isinstance(relation, sympy.Lt | sympy.Le):
        largest = sympy.floor(limit)
        return called, None, int(largest) - (isinstance(relation, sympy.Lt) and largest == limit)
    smallest = sympy.ceiling(limit)
    return called, int(smallest) + (isinstance(relation, sympy.Gt) and smallest == limit), None


def _as_limit(
    relation: Relation,
    bounds: Bounds,
    relations: Sequence[Relation],
    dynamic: Mapping[str, Mapping[int, str]],
) -> tuple[str, int | None, int | None] | None:
    """Express a relation of one size as a limit, given known bounds; None where it is no limit.

    Nothing, or a smallest size, for nearly all that torch compares: found by trying sizes.
    """
    ((name, dim),) = relation.sizes.values()
    called = dynamic.get(name, {}).get(dim)
    if called is None or len(terms(called)) > 1:
        return None
    like = [r for r in relations if set(r.sizes.values()) == {(name, dim)}]
    low, high = bounds.get(called, (1, None))
    sizes = [n for n in _SAMPLES if n >= low and (high is None or n <= high)]
    shapes = {n: {name: [n] * (dim + 1)} for n in sizes}
    allowed = [n for n in sizes if all(r.holds(shapes[n]) for r in like)]
    holding = [n for n in allowed if relation.holds(shapes[n])]
    if not holding or holding != allowed[-len(holding) :]:
        return None
    return called, None if holding == allowed else holding[0], None


def _narrowed(
    bounds: tuple[int, int | None], low: int | None, high: int | None
) -> tuple[int, int | None]:
    highs = [x for x in (bounds[1], high) if x is not None]
    return max(bounds[0], low or 1), min(highs, default=None)


def _relations(
    condition: sympy.Basic,
    places: Mapping[sympy.Symbol, list[Place]],
    example: Mapping[str, Tensor],
) -> list[Relation]:
    """A condition over names; one that cannot be written so holds the sizes of the examples."""
    symbols = sorted(condition.free_symbols, key=str)
    names = {symbol: sympy.Symbol(chr(ord("a") + i)) for i, symbol in enumerate(symbols)}
    sizes = {str(name): places[symbol][0] for symbol, name in names.items()}
    try:
        text = PythonPrinter().doprint(condition.xreplace(names)).replace("math.", "")
        return [Relation(" ".join(text.split()), sizes)]
    except (ValueError, SyntaxError):
        return [
            Relation(f"a == {example[name].shape[dim]}", {"a": (name, dim)})
            for name, dim in sizes.values()
        ]


def _line_of(env: ShapeEnv, symbol: sympy.Symbol) -> str:
    """The line of the model, or of a library that it uses, that made a size constant."""
    for guard in env.guards:
        frame = guard.sloc.framework_loc
        if (
            isinstance(guard.expr, sympy.Eq)
            and guard.expr.free_symbols == {symbol}
            and isinstance(frame, traceback.FrameSummary)
            and not _inside_torch(frame.filename)
        ):
            return _line_text(frame.filename, frame.lineno)
    return ""


def _line_text(file: str, number: int | None) -> str:
    code = linecache.getline(file, number or 0).strip()
    return f"{file}:{number}" + (f" ({code})" if code else "")


def _operator_text(node: fx.Node) -> str:
    """An operator with the model's line that calls it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in frames if not _inside_torch(file)]
    where = f" at {_line_text(*own[-1])}" if own else ""
    return f"operator {op_name(node)}{where}"
