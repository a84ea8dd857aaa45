"""Program -> ONNX model: torch.export once more, torch.onnx, then clean-up."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from graphprune.errors import ExportError, first_line
from graphprune.exporters.onnx import opset20
from graphprune.exporters.onnx.attention import lower_attention
from graphprune.exporters.onnx.cleanup import clean_up
from graphprune.exporters.onnx.grouped import to_grouped
from graphprune.exporters.onnx.last_logits import keep_last_logits
from graphprune.exporters.onnx.names import (
    input_names,
    is_tensor_output,
    limits_by_input,
    name_nodes,
    output_names,
    rename_symbols,
    size_name,
)
from graphprune.exporters.onnx.optional import make_optional
from graphprune.exporters.onnx.recurrent import lower_recurrent
from graphprune.exporters.onnx.side_by_side import part_name, side_by_side
from graphprune.exporters.onnx.simplify import simplify
from graphprune.exporters.onnx.translations import OPSET, translations
from graphprune.ir.graph import is_op, output_node, value_of
from graphprune.ir.module import graph_module
from graphprune.ir.program import Entry, Program

if TYPE_CHECKING:
    import onnx_ir as ir


def to_onnx(
    program: Program,
    entry: str = "forward",
    *,
    opset: int | None = OPSET,
    optional: Collection[str] = (),
    grouped: bool = False,
) -> ir.Model:
    """The entry as an ONNX model in float32, with the model's own input and output names.

    Args:
        program: what to convert.
        entry: one of its graphs.
        opset: 23; 20, which older runtimes read too, for graphs that need no more (`opset20`); or
            None: 20 for those, 23 for others.
        optional: inputs that need not be fed; they are zero then.
        grouped: a decode graph whose past and present may share a buffer (`grouped`).

    A decode graph gives all logits, or those of the last positions (`last_logits`).

    ONNX cannot say that sizes have bounds: they are JSON in the file's metadata, graphprune.bounds,
    graphprune.relations and graphprune.fixed.

    Raises:
        ExportError: torch.export or torch.onnx refuses the graph, or it needs a higher opset; the
            reason is quoted.
    """
    check_opset(opset)
    program = program.in_float32()
    spec = program.entries[entry]
    model = _converted(lower(program, entry), spec.example, _dynamic(spec))
    return _finished(model, spec, opset, optional, grouped)


def to_onnx_together(programs: Sequence[Program]) -> list[ir.Model]:
    """The deployed entries as `to_onnx(program, program.deployed, opset=None)` gives each of them.

    Those without dynamic sizes are converted as one graph, which is cut apart again: most of what
    a conversion takes does not depend on the graph's size.

    Raises:
        ExportError: torch.export or torch.onnx refuses a graph; the reason is quoted.
    """
    import onnx_ir as ir

    programs = [program.in_float32() for program in programs]
    entries = [program.entries[program.deployed] for program in programs]
    fixed = [i for i, entry in enumerate(entries) if not any(entry.dynamic.values())]
    models = {
        i: to_onnx(program, program.deployed, opset=None)
        for i, program in enumerate(programs)
        if i not in fixed
    }
    if fixed:
        modules = [lower(programs[i], programs[i].deployed) for i in fixed]
        # torch.export takes one tensor given twice for one input.
        example = tuple(tensor.clone() for i in fixed for tensor in entries[i].example)
        whole = _converted(side_by_side(modules), example, None)
        inputs, outputs = iter(whole.graph.inputs), iter(whole.graph.outputs)
        for number, i in enumerate(fixed):
            wanted = len(entries[i].example), sum(is_tensor_output(entries[i]))
            ends = [list(islice(v, n)) for v, n in zip((inputs, outputs), wanted, strict=True)]
            graph = ir.convenience.extract(whole.graph, *ends)
            for weight in list(graph.initializers.values()):
                weight.name = str(weight.name).removeprefix(f"{part_name(number)}.")
            model = ir.Model(graph, ir_version=whole.ir_version)
            models[i] = _finished(model, entries[i], None, (), False)
    return [models[i] for i in range(len(programs))]


def _converted(
    module: fx.GraphModule, example: tuple[Tensor, ...], dynamic: tuple[Any, ...] | None
) -> ir.Model:
    """Convert a lowered graph by torch.onnx."""
    with _quiet():
        try:
            exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations(),
                optimize=False,
                verbose=False,
            )
        except Exception as e:
            raise ExportError(f"the program cannot be written as ONNX: {_reason(e)}") from e
    assert converted is not None
    return converted.model


def _finished(
    model: ir.Model, spec: Entry, opset: int | None, optional: Collection[str], grouped: bool
) -> ir.Model:
    """Clean up and name a converted model; see `to_onnx`."""
    with _quiet():
        _name_sizes(model, spec)
        clean_up(model)
        _name_interface(model, input_names(spec), output_names(spec))
    for key, limits in limits_by_input(spec, cache=not grouped).items():
        if limits:
            model.metadata_props[f"graphprune.{key}"] = json.dumps(limits)
    if opset != OPSET:
        reason = opset20.obstacle(model)
        if reason and opset is not None:
            raise ExportError(f"the model cannot be written in opset {opset}: {reason}; omit opset")
        if not reason:
            opset20.to_opset20(model)
    if grouped:
        to_grouped(model)
    if spec.cache:
        keep_last_logits(model)
    make_optional(model, optional)
    name_nodes(model)
    return model


def check_opset(opset: int | None, *, cached: bool = False) -> None:
    """Refuse, before any work, an opset that is not written, or not with a key/value cache.

    Raises:
        ExportError: one of these.
    """
    if opset is None:
        return
    if opset not in (known := (opset20.OPSET, OPSET)):
        raise ExportError(f"opset is one of {list(known)}, got {opset!r}")
    if cached and opset != OPSET:
        raise ExportError(
            f"opset {opset} has no attention with a key/value cache: omit opset, or compile "
            "without cache"
        )


def lower(program: Program, entry: str = "forward") -> fx.GraphModule:
    """The entry as a flat module that torch.onnx turns into operators fast in ONNX Runtime."""
    module = graph_module(program, entry)
    output = output_node(module.graph)
    flags = is_tensor_output(program.entries[entry])
    values = cast(tuple[Any, ...], output.args[0])
    output.args = (tuple(n for n, keep in zip(values, flags, strict=True) if keep),)
    simplify(module.graph)
    lower_attention(module.graph)
    lower_recurrent(module)
    _write_sizes(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _write_sizes(graph: fx.Graph) -> None:
    """Write the sizes that views leave open (-1) where they are known, in place.

    OpenVINO does not infer how many heads there are beside two dynamic sizes, and needs it where
    query heads share key heads.
    """
    for node in graph.nodes:
        if is_op(node, "view", "reshape") and -1 in (sizes := node.args[1]):
            shape = value_of(node).shape
            known = [s if isinstance(s, int) else -1 for s in shape]
            node.update_arg(1, [k if s == -1 else s for s, k in zip(sizes, known, strict=True)])


def _dynamic(entry: Entry) -> tuple[Any, ...]:
    # DYNAMIC rather than a named Dim: upper bounds (a position table's length) are then inferred.
    dims = torch.export.Dim.DYNAMIC
    return tuple({d: dims for d in entry.dynamic.get(n, {})} or None for n in entry.input_names)


def _name_interface(model: ir.Model, inputs: list[str], names: list[str]) -> None:
    """Name inputs and outputs; an output that is an input, a weight or another output is copied.

    Two outputs that compute the same have become one value by now.
    """
    import onnx_ir as ir

    graph = model.graph
    inner = [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    for value in (v for v in inner if v.name in {*inputs, *names}):
        value.name = f"{value.name}_value"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    seen = {id(v) for v in graph.inputs}
    for i, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if id(value) in seen or value.is_initializer():
            copy = ir.node("Identity", [value])
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
            graph.outputs[i].shape, graph.outputs[i].type = value.shape, value.type
        seen.add(id(graph.outputs[i]))
        graph.outputs[i].name = name


def _name_sizes(model: ir.Model, entry: Entry) -> None:
    """Call dynamic sizes by their names in ONNX files instead of s53."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, placeholder in zip(model.graph.inputs, entry.input_names, strict=True):
        for dim, name in entry.dynamic.get(placeholder, {}).items():
            assert value.shape is not None
            names[str(value.shape[dim])] = size_name(name)
    values = [*model.graph.inputs, *model.graph.outputs]
    for node in model.graph:
        values += node.outputs
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [s if isinstance(s, int) else rename_symbols(str(s), names) for s in value.shape]
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's remarks about packages that are not installed from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: torch.onnx wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
