"""A captured graph against the model itself: on another batch, and on single ones."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.capture.quiet import state_kept
from graphprune.errors import CaptureError, GraphPruneError, first_line
from graphprune.ir.batches import resized, second_inputs, second_sizes
from graphprune.ir.graph import terms
from graphprune.ir.program import Constant, Entry, Program
from graphprune.verify.error import relative_error

_log = logging.getLogger(__name__)

_AGREEMENT = 1e-4  # captured against eager: the same kernels, of the output's size
_AGREEMENT_HALF = 2e-2


def with_second_batch(model: nn.Module, program: Program, name: str, check: bool) -> Entry:
    """The entry with sizes of a second batch chosen, and program and model compared on it.

    Raises:
        CaptureError: they disagree, or the graph fails where the model runs.
    """
    entry = program.entries[name]
    failures: list[str] = []
    refusal = ""
    for sizes in second_sizes(entry.input_names, entry.example, entry.dynamic, entry.bounds):
        entry = replace(entry, second=sizes)
        flat = second_inputs(entry)
        if not _allowed(entry, flat):
            continue
        try:
            expected = model_outputs(model, entry, flat)
        except Exception as e:
            refusal = first_line(e)
            continue
        try:
            _check_run(model, program, name, flat, expected, check)
        except _GraphFailure as e:
            failures.append(str(e))
            continue
        break
    else:
        if failures:
            raise CaptureError(failures[0])
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs: {refusal}; check that "
            "model(*example_inputs) runs"
        )
    if failures:
        entry = _held(model, entry, failures[0])
    return _with_least(model, program, name, entry) if check else entry


class _GraphFailure(CaptureError):
    """The graph raises where the model runs."""


def _allowed(entry: Entry, flat: Sequence[Tensor]) -> bool:
    try:
        entry.check_sizes(flat)
    except GraphPruneError:
        return False
    return True


def model_outputs(model: nn.Module, entry: Entry, flat: Sequence[Tensor]) -> list[Any]:
    """Run the model itself on flat inputs; its state stays as it is."""
    args, kwargs = model_call(model, entry, [t.clone() for t in flat])
    with state_kept(model), contextlib.redirect_stderr(io.StringIO()):  # fx prints tracebacks there
        return pytree.tree_leaves(model(*args, **kwargs))


def _check_run(
    model: nn.Module,
    program: Program,
    name: str,
    flat: Sequence[Tensor],
    expected: Sequence[Any],
    check: bool,
) -> None:
    """Run the graph; compare it with the model.

    Raises:
        CaptureError: they disagree, or the graph fails.
    """
    names = program.entries[name].input_names
    shapes = {n: tuple(t.shape) for n, t in zip(names, flat, strict=True)}
    try:
        actual = program.run([t.clone() for t in flat], name)
    except Exception as e:
        raise _GraphFailure(
            f"the captured graph of {type(model).__name__} fails on inputs of shapes {shapes}, "
            f"where the model runs: {e}"
        ) from e
    if check:
        _check_agreement(model, expected, actual, shapes)


def _held(model: nn.Module, entry: Entry, failure: str) -> Entry:
    """The entry with bounds on the sizes that did not change, as the graph fails at others."""
    own = second_sizes(entry.input_names, entry.example, entry.dynamic)[-1]
    held = {symbol: (n, n) for symbol, n in entry.second.items() if n == own[symbol]}
    _log.warning("%s; so it is kept to %s", failure, {s: n for s, (n, _) in held.items()})
    return replace(entry, bounds={**entry.bounds, **held})


def _with_least(model: nn.Module, program: Program, name: str, entry: Entry) -> Entry:
    """The entry with a lower bound of two on every size at which one is something else.

    torch.export takes sizes for larger than one: a branch such as `x.shape[0] == 1` is never seen.
    """
    bounds = dict(entry.bounds)
    symbols = {
        symbol
        for place, dims in entry.dynamic.items()
        if place not in entry.cache
        for symbol in dims.values()
        if len(terms(symbol)) == 1
    }
    for symbol in sorted(symbols):
        flat = resized(entry, {symbol: 1})
        if not _allowed(entry, flat):
            continue
        try:
            expected = model_outputs(model, entry, flat)
        except Exception:
            continue  # the model takes no single one
        try:
            _check_run(model, program, name, flat, expected, check=True)
        except CaptureError:
            bounds[symbol] = (2, bounds.get(symbol, (1, None))[1])
    return replace(entry, bounds=bounds)


def model_call(
    model: nn.Module, entry: Entry, flat: Sequence[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """Flat inputs as a call of the original model."""
    values = dict(zip(entry.input_names, flat, strict=True))
    given = {
        a.name: pytree.tree_unflatten(
            [leaf.value if isinstance(leaf, Constant) else values[leaf] for leaf in a.leaves],
            a.spec,
        )
        for a in entry.arguments
    }
    signature = inspect.signature(model.forward).parameters
    if any(name not in signature for name in given) and any(
        p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.values()
    ):
        keyword = {n for n, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        args = [value for name, value in given.items() if name not in keyword]
        return args, {name: given[name] for name in keyword if name in given}
    only = {n for n, p in signature.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY}
    args = [value for name, value in given.items() if name in only]
    return args, {name: value for name, value in given.items() if name not in only}


def tolerance(output: Any) -> float:
    """The relative error allowed between two ways to compute an output."""
    half = isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16)
    return _AGREEMENT_HALF if half else _AGREEMENT


def _check_agreement(
    model: nn.Module, expected: Sequence[Any], actual: Sequence[Any], shapes: Mapping[str, Any]
) -> None:
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        error = relative_error(a, b)
        if isinstance(a, Tensor) and a.dtype is not b.dtype:
            error = float("inf")
        if not error <= tolerance(a):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} disagrees with the model on output "
                f"{i} for inputs of shapes {shapes}: forward is random, or depends on values, "
                "sizes or state in a way that torch.export fixed; pass example_inputs of the size "
                "you deploy and dynamic_shapes=None"
            )
