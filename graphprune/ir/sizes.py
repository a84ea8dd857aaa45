"""Which sizes of inputs a captured graph is right for, and one sentence about those it is not."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.errors import GraphPruneError

Shape = Sequence[int | str]  # of an input; a dynamic size is its symbol's name
Bounds = Mapping[str, tuple[int, int | None]]
Fixed = Mapping[str, Mapping[int, str]]

_AGAIN = "compile again with example inputs of that size"
_LARGEST_POWER = 8

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "int": int,
    "float": float,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "sqrt": math.sqrt,
}
_SYNTAX = (
    *_BINARY, *_COMPARISONS, ast.Expression, ast.Compare, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Call, ast.Name, ast.Load, ast.Constant, ast.USub, ast.Not, ast.And, ast.Or,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Relation:
    """A condition on sizes that bounds cannot express, such as `a % 4 == 0` or `a == b`.

    Attributes:
        text: the condition in Python, over names: arithmetic, comparisons, and, or, not, min, max.
        sizes: name in `text` -> the input and the dimension whose size it is.

    Raises:
        ValueError, SyntaxError: `text` holds anything else, as one from a file may.
    """

    text: str
    sizes: Mapping[str, tuple[str, int]]

    def __post_init__(self) -> None:
        nodes = list(ast.walk(ast.parse(self.text, mode="eval")))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        if not all(isinstance(n, _SYNTAX) for n in nodes) or names - {*self.sizes, *_FUNCTIONS}:
            raise ValueError(f"{self.text!r} is no condition on {sorted(self.sizes)}")

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether the sizes of these shapes, by input, fulfil it."""
        values = {name: shapes[place][dim] for name, (place, dim) in self.sizes.items()}
        try:
            return bool(_evaluate(ast.parse(self.text, mode="eval").body, values))
        except (ArithmeticError, ValueError, TypeError):
            return False  # a division by zero, a root of something negative

    def renamed(self, names: Mapping[str, str]) -> Relation:
        """The same over inputs of other names."""
        places = {name: (names[place], dim) for name, (place, dim) in self.sizes.items()}
        return Relation(self.text, places)

    def __str__(self) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda m: self._spelled(m.group()), self.text)

    def _spelled(self, name: str) -> str:
        if name not in self.sizes:
            return name
        place, dim = self.sizes[name]
        return f"{place}.shape[{dim}]"


def check_sizes(
    inputs: Mapping[str, Shape],
    given: Mapping[str, Sequence[int]],
    *,
    bounds: Bounds,
    relations: Sequence[Relation],
    fixed: Fixed,
) -> None:
    """Refuse sizes that the graph was not captured for.

    Args:
        inputs: the shape of every input, a symbol's name where the size is dynamic.
        given: the shapes of a call.
        bounds: see `Entry`.
        relations: likewise.
        fixed: likewise.

    Raises:
        GraphPruneError: the input, its dimension, what it may be and the way out.
    """
    for name, shape in inputs.items():
        if len(given[name]) != len(shape):
            raise GraphPruneError(
                f"input {name!r} has {len(given[name])} dimensions, and the model was captured "
                f"with {len(shape)}"
            )
        for dim, (size, wanted) in enumerate(zip(given[name], shape, strict=True)):
            if isinstance(wanted, str):
                _check_bounds(name, dim, size, wanted, bounds)
            elif size != wanted:
                why = fixed.get(name, {}).get(dim, "")
                raise GraphPruneError(
                    f"input {name!r} has size {size} in dimension {dim}, and the model was "
                    f"captured for {wanted} alone{why and f', because {why}'}; {_AGAIN}"
                )
    for relation in relations:
        if not relation.holds(given):
            sizes = ", ".join(
                f"{place}.shape[{dim}] is {given[place][dim]}"
                for place, dim in relation.sizes.values()
            )
            raise GraphPruneError(
                f"{sizes}, and the captured graph is right only where {relation}; compile again "
                "with example inputs of these sizes"
            )


def _check_bounds(name: str, dim: int, size: int, symbol: str, bounds: Bounds) -> None:
    low, high = bounds.get(symbol, (0, None))
    if (low > 1 and size < low) or (high is not None and size > high):
        raise GraphPruneError(
            f"input {name!r} has size {size} in dimension {dim} ({symbol}), and the captured graph "
            f"is right only for sizes of {range_text((low, high))}; {_AGAIN}"
        )


def range_text(bounds: tuple[int, int | None]) -> str:
    """Bounds in words; a lower one of one is none."""
    low, high = bounds
    if high is None:
        return f"{low} and more"
    if low == high:
        return f"{low}"
    return f"{low} to {high}" if low > 1 else f"up to {high}"


def limit_lines(bounds: Bounds, relations: Sequence[Relation], fixed: Fixed) -> Iterator[str]:
    """Describe the limits of the sizes of inputs, a line each."""
    for symbol, limits in bounds.items():
        yield f"{symbol}: {range_text(limits)} only"
    for relation in relations:
        yield f"only where {relation}"
    for name, dims in fixed.items():
        for why in dict.fromkeys(dims.values()):
            places = " and ".join(f"{name}.shape[{dim}]" for dim in dims if dims[dim] == why)
            yield f"{places} cannot change: {why}"


def limits_to_json(bounds: Bounds, relations: Sequence[Relation], fixed: Fixed) -> dict[str, Any]:
    """Bounds, relations and fixed dimensions as JSON, under these three keys."""
    return {
        "bounds": {symbol: list(limits) for symbol, limits in bounds.items()},
        "relations": [
            {"text": r.text, "sizes": {n: list(place) for n, place in r.sizes.items()}}
            for r in relations
        ],
        "fixed": {name: {str(d): why for d, why in dims.items()} for name, dims in fixed.items()},
    }


def limits_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read what `limits_to_json` wrote, by keyword; a missing key means no limits.

    Raises:
        ValueError, TypeError: it is something else.
    """
    return {
        "bounds": {
            str(symbol): (int(low), None if high is None else int(high))
            for symbol, (low, high) in data.get("bounds", {}).items()
        },
        "relations": tuple(
            Relation(r["text"], {str(n): (str(p), int(d)) for n, (p, d) in r["sizes"].items()})
            for r in data.get("relations", ())
        ),
        "fixed": {
            str(name): {int(d): str(why) for d, why in dims.items()}
            for name, dims in data.get("fixed", {}).items()
        },
    }


def _evaluate(node: ast.AST, values: Mapping[str, int]) -> Any:
    """The value of an expression that `Relation` has checked."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return values[node.id]
        case ast.UnaryOp():
            value = _evaluate(node.operand, values)
            return -value if isinstance(node.op, ast.USub) else not value
        case ast.BinOp():
            left, right = _evaluate(node.left, values), _evaluate(node.right, values)
            if isinstance(node.op, ast.Pow) and not 0 <= right <= _LARGEST_POWER:
                raise ValueError(f"{ast.unparse(node)} is too large a power")
            return _BINARY[type(node.op)](left, right)
        case ast.BoolOp():
            found = [_evaluate(value, values) for value in node.values]
            return all(found) if isinstance(node.op, ast.And) else any(found)
        case ast.Compare():
            terms = [_evaluate(value, values) for value in (node.left, *node.comparators)]
            pairs = zip(node.ops, terms, terms[1:], strict=False)
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        case ast.Call(func=ast.Name(id=name)):
            return _FUNCTIONS[name](*(_evaluate(value, values) for value in node.args))
    raise ValueError(f"{ast.unparse(node)!r} is no condition on sizes")
