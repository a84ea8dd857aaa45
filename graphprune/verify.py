"""Verification: two programs compute the same, on the examples and on a padded second batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.compare import batches, relative_error
from graphprune.errors import VerificationError
from graphprune.program import JSON, Entry, Program, graph_module

TOLERANCE = 1e-5  # of the output's largest magnitude, in float32
TOLERANCE_FLOAT64 = 1e-9


def verify_rewrite(
    reference: Program, candidate: Program, tolerance: float = TOLERANCE, *, exact: bool = True
) -> dict[str, JSON]:
    """Run both programs on two batches and compare every output.

    bfloat16 and float16 programs are compared in float32. When float32 exceeds the tolerance, the
    comparison is made again in float64, where rounding cannot hide behind depth: an exact rewrite
    passes it, a wrong one does not.

    Args:
        reference: what the candidate must compute (dense, or masked at the old shapes).
        candidate: the rewritten program.
        tolerance: largest allowed max|a - b| / max|a|, per output.
        exact: False reports the drift without a limit: for normalised axes.

    Returns:
        {"max_error": relative, "inputs": number of batches, "dtype": compared in}.

    Raises:
        VerificationError: they differ; the output and the first differing node are named.
    """
    reference, candidate = reference.in_float32(), candidate.in_float32()
    error, where = _largest_error(reference, candidate)
    report = {"max_error": error, "inputs": 2, "dtype": "float32"}
    if not exact or error <= tolerance:
        return report
    wide = (
        reference.cast(torch.float32, torch.float64),
        candidate.cast(torch.float32, torch.float64),
    )
    error64, where = _largest_error(*wide)
    if error64 <= TOLERANCE_FLOAT64:
        return report | {"max_error": error64, "dtype": "float64"}
    raise VerificationError(
        f"{where} differs by {error:.1e} of its size, {error64:.1e} in float64 (allowed "
        f"{tolerance:.0e}); {_first_difference(*wide)}"
    )


def _largest_error(reference: Program, candidate: Program) -> tuple[float, str]:
    worst, where = 0.0, ""
    for name, entry in reference.entries.items():
        for inputs, own in _inputs(entry, candidate.entries[name]):
            expected = reference.run(inputs, name)
            actual = candidate.run(own, name)
            if len(expected) != len(actual):
                raise VerificationError(
                    f"entry {name!r} has {len(actual)} outputs, not {len(expected)}"
                )
            for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
                if a.shape != b.shape and i in entry.cache.values():
                    continue  # lost units; what is made of them is compared
                error = relative_error(a, b)
                if not error <= worst:  # NaN is the worst of all
                    worst, where = error, f"output {i} of {name!r}"
    return worst, where


def _inputs(reference: Entry, candidate: Entry) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The batches for both; a candidate that lost heads has a cache of its own, without them."""
    names = reference.input_names
    return [
        (
            ours,
            [b if n in candidate.cache else a for n, a, b in zip(names, ours, theirs, strict=True)],
        )
        for ours, theirs in zip(batches(reference), batches(candidate), strict=True)
    ]


def _first_difference(reference: Program, candidate: Program) -> str:
    """The first node of equal shape in both graphs whose values differ."""
    for name, entry in reference.entries.items():
        for inputs, own in _inputs(entry, candidate.entries[name]):
            expected = _values(reference, name, inputs)
            actual = _values(candidate, name, own)
            for node, value in actual.items():
                other = expected.get(node)
                if (
                    isinstance(other, Tensor)
                    and isinstance(value, Tensor)
                    and other.shape == value.shape
                    and relative_error(other, value) > TOLERANCE_FLOAT64
                ):
                    return f"the first node that differs is {node!r}"
    return "no inner node of equal shape differs"


def _values(program: Program, entry: str, inputs: Sequence[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function":
                found[n.name] = value
            return value

    with torch.no_grad():
        Recorder(graph_module(program, entry)).run(*inputs)
    return found
