"""Capture: an nn.Module and example inputs become a Program, through torch.export."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from graphprune.capture.agreement import with_second_batch
from graphprune.capture.dynamic import asked_names, auto_shapes
from graphprune.capture.fixed import with_fixed
from graphprune.capture.fold import fold, number_masks, spell_indices
from graphprune.capture.functionalize import functionalize, inline_regions, spell_out
from graphprune.capture.guards import assumptions
from graphprune.capture.interface import enlarge_batch, example_call, interface, specs_of
from graphprune.capture.quiet import attributes_kept, quiet
from graphprune.capture.spelling import respell
from graphprune.errors import (
    CaptureError,
    GraphPruneError,
    VerificationError,
    first_line,
)
from graphprune.ir.batches import second_sizes
from graphprune.ir.graph import erase_dead, is_op, location, op_name, output_node, tensor_nodes
from graphprune.ir.program import Entry, Program
from graphprune.ir.propagate import propagate
from graphprune.ir.recurrent import any_length
from graphprune.storage.allowlist import allowed

log = logging.getLogger(__name__)

# Checks that torch.export leaves in the graph; they would pin the old sizes.
_CHECKS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_check",
    "_check_is_size",
}
_REGIONS = {"flex_attention": "use scaled_dot_product_attention instead, with its mask"}


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = "auto",
    check: bool = True,
) -> Program:
    """Capture a model as a Program of one entry, `forward`.

    The model is put in eval mode and its key/value cache switched off while it is traced; both
    are restored. Its tensors are copied, so later changes of the model do not reach the Program.

    Args:
        model: any module that torch.export can trace.
        example_inputs: dict of keyword arguments, or tuple of positional ones; a batch of one is
            enlarged to two, because torch.export would make it a constant.
        dynamic_shapes: "auto" makes batch and sequence symbolic where the model allows it; a list
            of names does so too and demands these: "batch", "sequence", "height", "width" (of
            images), or "INPUT:DIMENSION"; None keeps every size, a batch of one included; anything
            else goes to torch.export as it is.
        check: run the captured program on another batch size and length against the model.

    Raises:
        CaptureError: no inputs, a model that torch.export refuses, a size that cannot be dynamic
            as asked, or a graph that computes something else on another batch.
    """
    _check_module(model)
    asked = asked_names(dynamic_shapes)
    given = example_call(model, example_inputs)
    args, kwargs = given if dynamic_shapes is None else enlarge_batch(*given)
    with quiet(model), _spelled_signature(model, kwargs):
        shapes = dynamic_shapes
        if asked is not None:
            shapes = auto_shapes(model, args, kwargs, asked)
        exported = exported_program(model, args, kwargs, shapes)
        program = program_of(
            model, exported, args, kwargs, asked=asked or (), declared=asked is None
        )
        if dynamic_shapes is not None:
            program = _entry_replaced(program, with_fixed(model, program, asked or ()))
        program = _entry_replaced(program, with_second_batch(model, program, "forward", check))
    _check_own_batch(model, program.forward, *given)
    return program


def _entry_replaced(program: Program, entry: Entry) -> Program:
    return replace(program, entries={"forward": entry})


def _check_module(model: nn.Module) -> None:
    """Refuse modules that other tools made of the user's own."""
    for path, module in model.named_modules():
        name = f"{path!r} in {type(model).__name__}" if path else type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is a torch.jit module, whose Python code is gone; compile the nn.Module "
                "that it was made from"
            )
        if isinstance(module, fx.GraphModule) and hasattr(module, "_guards_fn"):
            raise CaptureError(
                f"{name} is the module of an ExportedProgram, which is bound to its sizes; compile "
                "the nn.Module that was exported"
            )


def exported_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    """Trace forward as it is now, in `quiet`.

    Raises:
        CaptureError: torch.export refuses; the model's own line and a remedy are named.
    """
    try:
        # torch logs graphs and tracebacks beside what it raises; the error is one sentence.
        logging.disable(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            attributes_kept(model),
            any_length(),
        ):
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as e:
        raise CaptureError(_explain(model, e)) from e
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _spelled_signature(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give forward the parameters that come in through its **kwargs, while inside.

    torch.export cannot match dynamic shapes with arguments inside **kwargs.
    """
    forward, signature = model.forward, inspect.signature(model.forward)
    plain = [
        p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    extra = [name for name in kwargs if name not in signature.parameters]
    if not extra:
        yield
        return
    own = "forward" in model.__dict__

    def spelled(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    plain += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    cast(Any, spelled).__signature__ = signature.replace(parameters=plain)
    try:
        model.__dict__["forward"] = spelled
        yield
    finally:
        if own:
            model.__dict__["forward"] = forward
        else:
            del model.__dict__["forward"]


def _explain(model: nn.Module, error: Exception) -> str:
    """One sentence with the model's own line, and the usual remedy."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename.replace("\\", "/") and not f.filename.startswith("<")
    ]
    frames = [f for f in frames if f.filename != __file__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    fact = first_line(error).partition(" (unhinted")[0].rstrip(".")
    text = str(error).lower()
    if _is_packed(error):
        fact = "the sizes of a packed sequence are the values of its lengths"
        remedy = (
            "give the layer the padded batch, [batch, steps, features], and leave padding out by a "
            "mask after it, or by picking each row's last step"
        )
    elif "specialized integer" in text or "unbacked" in text:
        remedy = (
            "a size depends on tensor values: work on all positions with a mask, or move that line "
            "out of forward"
        )
    elif "data-dependent" in text or "guard on" in text:
        remedy = (
            "its Python control flow depends on tensor values: replace the branch by torch.where, "
            "or move it out of forward"
        )
    elif "constraint" in text or "dynamic" in text:
        remedy = "a size cannot be dynamic: pass dynamic_shapes=None, or name the sizes that can"
    else:
        remedy = "check that model(*example_inputs) runs, and that forward is traceable"
    return f"torch.export cannot capture {type(model).__name__}{where}: {fact}; {remedy}"


def _is_packed(error: Exception) -> bool:
    """Whether it was raised in packing a sequence, or in a recurrent layer that reads one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename.replace("\\", "/")
        packed = frame.f_locals.get("batch_sizes") is not None
        if file.endswith("/torch/nn/utils/rnn.py") or (
            packed and file.endswith("/torch/nn/modules/rnn.py")
        ):
            return True
    return False


def program_of(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    *,
    asked: Sequence[str] = (),
    declared: bool = False,
) -> Program:
    """Turn an export into a Program of the entry `forward`; its second batch is not tried.

    Dimensions that torch.export was asked to keep dynamic and made constant are `fixed` in it.

    Args:
        model: the traced model, whose forward still has the traced signature.
        exported: what torch.export made of it.
        args: what it was traced with.
        kwargs: likewise.
        dynamic: names of the dynamic sizes; by default derived from the inputs.
        asked: names of sizes that must be dynamic, which they are called by then.
        declared: the dynamic shapes that torch.export was given have ranges of their own.

    Raises:
        CaptureError: the graph holds something that a Program cannot.
    """
    module = exported.module()
    in_spec, out_spec = specs_of(module)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    inline_regions(module, graph)
    _check_operators(model, graph)
    for node in reversed(list(graph.nodes)):
        if (node.op == "call_module" and "_guards" in str(node.target)) or (
            node.op == "call_function" and op_name(node) in _CHECKS
        ):
            graph.erase_node(node)
    written = functionalize(graph)
    if written:
        log.warning(
            "forward of %s writes to %s: the captured program keeps no state between calls",
            type(model).__name__,
            ", ".join(sorted(written)),
        )
    respell(graph)
    spell_out(graph)
    _own_operators(graph)
    graph.eliminate_dead_code()
    _check_known(model, graph)
    tensors, parameters, aliases, overlaps = _tensors(model, module, graph)
    arguments, example, symbols = interface(model, graph, in_spec, args, kwargs, asked)
    dynamic = symbols if dynamic is None else dynamic
    output = output_node(graph)
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    try:
        propagate(graph, tensors, example, dynamic)
    except VerificationError as e:
        raise CaptureError(
            f"the captured graph of {type(model).__name__} does not run for every size: {e}; pass "
            "dynamic_shapes=None, or write that operation in other operators"
        ) from e
    graph.owning_module = None  # the exported module, which has none of the new constants
    if _folded(graph, tensors, parameters, aliases):
        propagate(graph, tensors, example, dynamic)
    names = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    found = assumptions(
        exported, dict(zip(names, example, strict=True)), dynamic, declared=declared
    )
    fixed: dict[str, dict[int, str]] = {}
    for (place, dim), line in found.static.items():
        fixed.setdefault(place, {})[dim] = line
    entry = Entry(
        graph,
        arguments,
        out_spec,
        example,
        dynamic,
        second_sizes(names, example, dynamic, found.bounds)[0],
        bounds=found.bounds,
        fixed=fixed,
        relations=found.relations,
    )
    return Program(
        tensors=tensors,
        parameters=parameters,
        aliases=aliases,
        entries={"forward": entry},
        model=type(model).__name__,
        overlapping=frozenset(overlaps),
        frozen=frozenset(
            name
            for name, parameter in model.named_parameters()
            if name in parameters and not parameter.requires_grad
        ),
    )


def _folded(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    parameters: Collection[str],
    aliases: dict[str, str],
) -> bool:
    """Compute constants, in place; buffers that nothing reads any more go.

    Parameters are none: training would change them.

    Returns:
        Whether sizes are known now that were not, and metadata must be propagated again.
    """
    read = {str(node.target) for node in tensor_nodes(graph)}
    number_masks(graph, _buffers(tensors, parameters))
    folding = fold(graph, _buffers(tensors, parameters), {*tensors, *aliases})
    tensors.update(folding.tensors)
    spell_indices(graph, _buffers(tensors, parameters))
    erase_dead(graph)
    for name in (read | folding.tensors.keys()) - {str(n.target) for n in tensor_nodes(graph)}:
        del tensors[name]
    for alias, name in list(aliases.items()):
        if name not in tensors:
            del aliases[alias]
    return folding.resized


def _buffers(tensors: Mapping[str, Tensor], parameters: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in parameters}


def _check_operators(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse regions of Python that torch.export keeps beside the graph."""
    name = type(model).__name__
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"forward of {name} calls {op_name(node)!r}, a branch or loop of its own, which "
                "graphprune does not rewrite; "
                + _REGIONS.get(op_name(node), "use torch.where instead")
            )
    if any(is_op(node, "_add_batch_dim", "_remove_batch_dim") for node in graph.nodes):
        raise CaptureError(
            f"forward of {name} calls torch.vmap, which torch.export does not resolve; write that "
            "line with a batch dimension"
        )


def _check_known(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse ATen operators that no saved program may call; those of other libraries only freeze.

    They are kernels of public operators, and operators on sparse, nested or quantized tensors.
    """
    for node in graph.nodes:
        target = node.target
        if isinstance(target, OpOverload) and target.namespace == "aten" and not allowed(target):
            raise CaptureError(
                f"forward of {type(model).__name__} calls {op_name(node)!r} at {location(node)}, "
                "an operator that no saved program may call; write that line in other operators"
            )


def _own_operators(graph: fx.Graph) -> None:
    """Replace operators that only one library registers by graphprune's of the same meaning."""
    import graphprune.ir.operators  # noqa: F401  (registers graphprune::grouped_mm)

    for node in graph.nodes:
        if is_op(node, "grouped_mm_fallback", "_grouped_mm"):
            node.target = torch.ops.graphprune.grouped_mm.default


def _tensors(
    model: nn.Module, module: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, Tensor], frozenset[str], dict[str, str], set[str]]:
    """Every tensor once, copied; which are parameters; tied names; names that overlap otherwise."""
    found: dict[str, Tensor] = {}
    for owner in (model, module):
        for name, tensor in itertools.chain(
            owner.named_parameters(remove_duplicate=False),
            owner.named_buffers(remove_duplicate=False),
        ):
            found.setdefault(name, tensor)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            found[node.target] = _attribute(module, node.target)
    for name, tensor in found.items():
        if isinstance(tensor, FakeTensor):
            raise CaptureError(
                f"forward of {type(model).__name__} registers the buffer {name!r}; run the model "
                "once before compiling it, so that the buffer is there"
            )
    canonical: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, tensor in found.items():
        storage = tensor.untyped_storage().data_ptr()
        key: tuple[Any, ...] = (name,)
        if tensor.numel() and storage:
            place = storage, tensor.storage_offset(), tensor.shape, tensor.stride()
            key = (*place, tensor.dtype)
        names[name] = canonical.setdefault(key, name)
        if names[name] != name:
            aliases[name] = names[name]
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names[node.target]
    overlaps = _overlapping({n: t for n, t in found.items() if n not in aliases})
    kept = [name for name in found if name not in aliases]
    return (
        {name: found[name].detach().clone() for name in kept},
        frozenset(name for name in kept if isinstance(found[name], nn.Parameter)),
        aliases,
        overlaps,
    )


def _overlapping(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors whose bytes are a part of another one's."""
    extents: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            storage = tensor.untyped_storage().data_ptr()
            extents.setdefault(storage, []).append((start, end, name))
    found: set[str] = set()
    for group in extents.values():
        for (_, end, name), (start, _, other) in itertools.pairwise(sorted(group)):
            if start < end:
                found |= {name, other}
    return found


def _attribute(module: nn.Module, target: str) -> Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"the captured graph calls {target!r}, a branch or loop of its own (torch.cond or its "
            "like), which graphprune does not rewrite; use torch.where instead"
        )
    return value


def _check_own_batch(
    model: nn.Module, entry: Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse a model whose graph is not right for the inputs that it was given.

    Raises:
        CaptureError: a batch of one was enlarged, and the graph holds for the larger one alone.
    """
    try:
        entry.flatten(args, kwargs)
    except GraphPruneError as e:
        raise CaptureError(
            f"{type(model).__name__} was captured with a batch of two, not one, and is not right "
            f"for one: {e}; or pass dynamic_shapes=None to keep the batch of one"
        ) from e
