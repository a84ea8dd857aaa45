"""Invariants that a pass claims to preserve, and the checks of these claims."""

from __future__ import annotations

import enum
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import VerificationError
from graphprune.ir.graph import copy_graph, output_node, value_of
from graphprune.ir.program import JSON, Entry, Program
from graphprune.ir.propagate import propagate
from graphprune.verify.equivalence import verify_rewrite


class Invariant(enum.Flag):
    """Properties that hold across a pass, beyond the program being well formed."""

    NONE = 0
    INTERFACE = enum.auto()
    """Names, ranks, dtypes and dynamic dimensions of inputs and outputs."""
    SHAPES = enum.auto()
    """Name and shape of every tensor."""
    NUMERICS = enum.auto()
    """The outputs on the example inputs, within the verifier's tolerance."""
    NODES = enum.auto()
    """Likewise what every node computes that keeps its name."""
    ALL = INTERFACE | SHAPES | NUMERICS | NODES


def verify_change(
    program: Program,
    after: Program,
    *,
    was: Hashable,
    modified: bool,
    preserves: Invariant,
    report: Mapping[str, JSON],
) -> dict[str, JSON]:
    """Check what a pass claims of its result, cheapest first.

    1. The pass wrote neither to the graphs nor to the tensors of its input.
    2. `modified` agrees with object identity.
    3. Every graph is well formed (`graph.lint`).
    4. Shapes recomputed from the tensors agree with the stored metadata.
    5. INTERFACE and SHAPES, where preserved.
    6. NUMERICS where preserved; a pass that resized tensors has verified masked == shrunk instead.

    Args:
        program: what the pass was given.
        after: what it returned.
        was: `fingerprint(program)` before the pass ran.
        modified: what it reports of its result.
        preserves: what it claims to leave unchanged.
        report: what it reports, with "verification" where it removed units.

    Returns:
        The report, with the numeric comparison under "verification" where one was made here.

    Raises:
        VerificationError: a claim is not true.
    """
    found = dict(report)
    if fingerprint(program) != was:
        raise VerificationError(
            "it wrote to its input program; a pass edits copies (Program.fork_graphs) and replaces "
            "tensors (Program.with_tensors)"
        )
    if modified is (after is program):
        claim = (
            "a modified program but returned its input"
            if modified
            else ("nothing modified but returned another program")
        )
        raise VerificationError(f"it reports {claim}; return the very object when nothing changed")
    if not modified:
        return found
    for name, entry in after.entries.items():
        check_graph(after, entry, name)
    if Invariant.INTERFACE in preserves:
        _check_interface(program, after)
    if Invariant.SHAPES in preserves:
        _check_shapes(program, after)
    if Invariant.NUMERICS in preserves:
        start = time.perf_counter()
        numbers = dict(verify_rewrite(program, after, nodes=Invariant.NODES in preserves))
        numbers["seconds"] = time.perf_counter() - start
        found.setdefault("verification", numbers)
    elif "verification" not in found and _resized(program, after):
        raise VerificationError(
            "it resized tensors without verification; remove units with ctx.shrink and put its "
            "report under 'verification'"
        )
    return found


def fingerprint(program: Program) -> Hashable:
    """Everything about a program that a pass could write to by mistake, cheap to compare.

    A write through `tensor.data` does not raise a tensor's version and stays unseen here.
    """
    tensors = tuple(
        (name, id(t), _version(t), tuple(t.shape)) for name, t in program.tensors.items()
    )
    entries = tuple(
        (name, tuple(_node_content(node) for node in entry.graph.nodes))
        for name, entry in program.entries.items()
    )
    return tensors, entries, program.parameters, tuple(sorted(program.aliases.items()))


def _version(tensor: Tensor) -> int:
    # Tensors made under torch.inference_mode have no version counter, and cannot be written to.
    return -1 if tensor.is_inference() else tensor._version


def describe(value: Any) -> Hashable:
    """Shape and type of what a node computes; symbolic sizes by their example value."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(_size(size) for size in value.shape)
    if isinstance(value, torch.SymInt):
        return _size(value)
    if isinstance(value, tuple | list):
        return tuple(describe(v) for v in value)
    return value if isinstance(value, int | float | bool | str) else type(value).__name__


def _size(size: Any) -> Hashable:
    if not isinstance(size, torch.SymInt):
        return int(size)
    return "symbolic", size.node.hint


def _node_content(node: fx.Node) -> Hashable:
    return (
        node.name,
        node.op,
        str(node.target),
        str(node.args),
        str(node.kwargs),
        describe(node.meta.get("val")),
    )


def _at_example(value: Any) -> Hashable:
    """Like `describe`, with symbolic sizes as the plain numbers that they are for the examples."""

    def plain(what: Any) -> Any:
        if isinstance(what, tuple):
            return what[1] if what[:1] == ("symbolic",) else tuple(plain(w) for w in what)
        return what

    result: Hashable = plain(describe(value))
    return result


def check_graph(program: Program, entry: Entry, name: str = "forward") -> None:
    """Check that a graph is well formed, fits the tensors, and that its metadata is fresh.

    Raises:
        VerificationError: naming the first node that is wrong.
    """
    try:
        entry.graph.lint()
    except RuntimeError as e:
        raise VerificationError(f"entry {name!r} is not well formed: {e}") from e
    for node in entry.graph.nodes:
        if node.op == "get_attr" and node.target not in program.tensors:
            raise VerificationError(f"entry {name!r} reads tensor {node.target!r}, which is gone")
    computed = copy_graph(entry.graph)
    # At the examples' sizes: ten times faster than symbolic ones, and enough to see a stale shape.
    propagate(computed, program.tensors, entry.example, {})
    for stored, actual in zip(entry.graph.nodes, computed.nodes, strict=True):
        if stored.op == "output":
            continue
        was, now = _at_example(stored.meta.get("val")), _at_example(value_of(actual))
        if was != now:
            raise VerificationError(
                f"entry {name!r}, node {stored.name!r} stores {was} but computes {now}; return "
                "graphs through Program.with_graphs, which refreshes metadata"
            )


def _check_interface(before: Program, after: Program) -> None:
    if before.entries.keys() != after.entries.keys():
        raise VerificationError(
            f"it preserves the interface but entries {sorted(before.entries)} became "
            f"{sorted(after.entries)}"
        )
    for name, entry in before.entries.items():
        other = after.entries[name]
        for what, was, now in (
            ("input names", entry.input_names, other.input_names),
            ("arguments", entry.arguments, other.arguments),
            ("output structure", entry.out_spec, other.out_spec),
            ("dynamic dimensions", _plain_dynamic(entry), _plain_dynamic(other)),
            ("inputs", _kinds(entry.example), _kinds(other.example)),
            ("outputs", _kinds(_outputs(entry)), _kinds(_outputs(other))),
        ):
            if was != now:
                raise VerificationError(
                    f"it preserves the interface but the {what} of entry {name!r} changed from "
                    f"{was!r} to {now!r}"
                )


def _plain_dynamic(entry: Entry) -> dict[str, dict[int, str]]:
    return {name: dict(dims) for name, dims in entry.dynamic.items() if dims}


def _outputs(entry: Entry) -> Sequence[Any]:
    results: Any = output_node(entry.graph).args[0]
    return [value_of(r) if isinstance(r, fx.Node) else r for r in results]


def _kinds(values: Sequence[Any]) -> list[Hashable]:
    """Type, rank and which dimensions are dynamic: what a caller relies on."""
    return [
        (str(v.dtype), tuple(isinstance(s, torch.SymInt) for s in v.shape))
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in values
    ]


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in program.tensors.items()}


def _check_shapes(before: Program, after: Program) -> None:
    was, now = _shapes(before), _shapes(after)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise VerificationError(
                f"it preserves shapes but tensor {name!r} went from {was.get(name)} to "
                f"{now.get(name)}"
            )


def _resized(before: Program, after: Program) -> bool:
    was, now = _shapes(before), _shapes(after)
    return any(now[name] != shape for name, shape in was.items() if name in now)
