"""Capture: an nn.Module and example inputs become a Program, through torch.export."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphprune.errors import CaptureError
from graphprune.functional import functionalize, inline_regions
from graphprune.graph import op_name, output_node, propagate
from graphprune.program import Argument, Constant, Entry, Program

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
_AGREEMENT = 1e-4  # captured against eager: the same kernels, other batch size


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
        dynamic_shapes: "auto" makes batch and sequence symbolic where the model allows it; None
            keeps every size; anything else goes to torch.export as it is.
        check: run the captured program on another batch size and length against the model.

    Raises:
        CaptureError: no inputs, a model that torch.export refuses, or one whose graph computes
            something else on another batch.
    """
    args, kwargs = _call(model, example_inputs)
    args, kwargs = _enlarge_batch(args, kwargs)
    shapes = _auto_shapes(model, args, kwargs) if dynamic_shapes == "auto" else dynamic_shapes
    with _quiet(model):
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as e:
            raise CaptureError(_explain(model, e)) from e
        program = _program(model, exported, args, kwargs)
        if check:
            _check_agreement(model, program)
    return program


def second_inputs(entry: Entry) -> list[Tensor]:
    """Other flat inputs for an entry: one more sample, a shorter sequence, and padding.

    Made from the examples: samples are repeated, every other dynamic dimension is cropped to two
    thirds, and in tensors of zeros and ones (masks) the last sample's tail becomes zero.
    """
    sizes: dict[str, int] = {}
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        for dim, symbol in entry.dynamic.get(name, {}).items():
            old = tensor.shape[dim]
            sizes[symbol] = (
                old + 1 if dim == 0 or sizes.get(symbol, 0) > old else max(2, old * 2 // 3)
            )
    result = []
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        dims = entry.dynamic.get(name, {})
        for dim, symbol in dims.items():
            repeats = -(-sizes[symbol] // tensor.shape[dim])
            tensor = torch.cat([tensor] * repeats, dim).narrow(dim, 0, sizes[symbol])
        result.append(_pad(tensor, dims))
    return result


def _pad(tensor: Tensor, dims: Mapping[int, str]) -> Tensor:
    last = tensor.dim() - 1
    if last < 1 or last not in dims or 0 not in dims or tensor.is_floating_point():
        return tensor
    if bool(((tensor != 0) & (tensor != 1)).any()):
        return tensor
    padded = tensor.clone()
    padded[-1, ..., padded.shape[-1] * 2 // 3 :] = 0
    return padded


def _call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        # Some libraries let a model propose inputs of its own.
        with contextlib.suppress(Exception):
            example_inputs = cast(Any, model).dummy_inputs
    if example_inputs is None:
        raise CaptureError(
            f"no example inputs for {type(model).__name__}, and it proposes none: "
            "pass example_inputs, a dict of keyword arguments or a tuple of tensors"
        )
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise CaptureError(
            f"example_inputs must be a dict or a tuple, got {type(example_inputs).__name__}"
        )
    if not any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs))):
        raise CaptureError("example_inputs holds no tensor")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise CaptureError(f"example_inputs do not fit {type(model).__name__}.forward: {e}") from e
    return args, kwargs


def _enlarge_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.dim() == 0 or x.shape[0] != 1 for x in leaves):
        return args, kwargs
    enlarged: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, (args, kwargs)
    )
    return enlarged


def _auto_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask torch.export to decide for the first two dimensions, but not for an image's sides."""
    lengths = {
        x.shape[1]
        for x in pytree.tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and x.dim() == 2
    }

    def dims(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        return {
            d: torch.export.Dim.AUTO
            for d in range(x.dim())
            if x.shape[d] > 1
            and (d == 0 or (x.dim() <= 3 and d == 1) or (x.dim() > 3 and x.shape[d] in lengths))
        }

    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    parameters = inspect.signature(model.forward).parameters
    shapes: dict[str, Any] = {}
    for name, value in arguments.items():
        mapped = pytree.tree_map(dims, value)
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            shapes.update(mapped)
        else:
            shapes[name] = mapped
    return shapes


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key/value cache and no fused fast path, while inside."""
    modes = {module: module.training for module in model.modules()}
    cached = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True and config not in cached:
            cached.append(config)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for config in cached:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in cached:
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode


def _explain(model: nn.Module, error: Exception) -> str:
    """One sentence with the model's own line, and the usual remedy."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename.replace("\\", "/") and not f.filename.startswith("<")
    ]
    frames = [f for f in frames if f.filename != __file__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    fact = lines[0].strip() if lines else type(error).__name__
    text = str(error).lower()
    if "data-dependent" in text or "guard on" in text or "unbacked" in text:
        remedy = (
            "its Python control flow depends on tensor values: replace the branch by torch.where "
            "or torch.cond, or move it out of forward"
        )
    elif "constraint" in text or "dynamic" in text:
        remedy = "a size cannot be dynamic: pass dynamic_shapes=None, or name the sizes that can"
    else:
        remedy = "check that model(*example_inputs) runs, and that forward is traceable"
    return f"torch.export cannot capture {type(model).__name__}{where}: {fact}; {remedy}"


def _program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Program:
    module = exported.module()
    in_spec, out_spec = _specs(module)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    inline_regions(module, graph)
    for node in reversed(list(graph.nodes)):
        if (node.op == "call_module" and "_guards" in str(node.target)) or (
            node.op == "call_function" and op_name(node) in _CHECKS
        ):
            graph.erase_node(node)
    functionalize(graph)
    _own_operators(graph)
    graph.eliminate_dead_code()
    tensors, parameters, aliases, overlaps = _tensors(model, module, graph)
    arguments, example, dynamic = _interface(model, graph, in_spec, args, kwargs)
    output = output_node(graph)
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    propagate(graph, tensors, example, dynamic)
    entry = Entry(graph, arguments, out_spec, example, dynamic)
    return Program(
        tensors=tensors,
        parameters=parameters,
        aliases=aliases,
        entries={"forward": entry},
        metadata={"model": type(model).__name__, "overlapping": sorted(overlaps)},
    )


def _specs(module: fx.GraphModule) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    info = cast(Any, module.graph._codegen).pytree_info
    return info.in_spec, info.out_spec


def _own_operators(graph: fx.Graph) -> None:
    """Replace operators that only one library registers by ours of the same meaning."""
    import graphprune.ops  # noqa: F401  (registers graphprune::grouped_mm)

    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in {"grouped_mm_fallback", "_grouped_mm"}:
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
    canonical: dict[Any, str] = {}
    storages: dict[int, set[Any]] = {}
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
        elif tensor.numel():
            storages.setdefault(storage, set()).add(name)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names[node.target]
    overlaps = {n for group in storages.values() if len(group) > 1 for n in group}
    kept = [name for name in found if name not in aliases]
    return (
        {name: found[name].detach().clone() for name in kept},
        frozenset(name for name in kept if isinstance(found[name], nn.Parameter)),
        aliases,
        overlaps,
    )


def _attribute(module: nn.Module, target: str) -> Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return cast(Tensor, value)


def _interface(
    model: nn.Module,
    graph: fx.Graph,
    in_spec: pytree.TreeSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Argument, ...], tuple[Tensor, ...], dict[str, dict[int, str]]]:
    """Map the model's arguments to placeholders, drop those of constants, name dynamic sizes."""
    positional, keyword = in_spec.children()
    parameters = inspect.signature(model.forward).parameters.values()
    order = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    names = [
        *itertools.islice(
            itertools.chain(order, (f"args_{i}" for i in itertools.count())), len(args)
        )
    ]
    specs = [*zip(names, positional.children(), args, strict=True)]
    specs += [
        (name, spec, kwargs[name])
        for name, spec in zip(keyword.context, keyword.children(), strict=True)
    ]
    placeholders = iter([n for n in graph.nodes if n.op == "placeholder"])
    arguments: list[Argument] = []
    example: list[Tensor] = []
    tensors: list[fx.Node] = []
    for name, spec, value in specs:
        leaves: list[str | Constant] = []
        for leaf in pytree.tree_leaves(value):
            node = next(placeholders)
            if isinstance(leaf, Tensor):
                leaves.append(node.name)
                example.append(leaf.detach().clone())
                tensors.append(node)
            else:
                leaves.append(Constant(leaf))
                graph.erase_node(node)
        arguments.append(Argument(name, spec, tuple(leaves)))
    return tuple(arguments), tuple(example), _symbols(tensors)


def _symbols(placeholders: Sequence[fx.Node]) -> dict[str, dict[int, str]]:
    """Name every symbolic size: "batch", "sequence", then after the input it first occurs in.

    torch.export may give the first dimension of two inputs two symbols of equal value, where the
    model never compares them; it is one batch all the same.
    """
    names: dict[Any, str] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for node in placeholders:
        for dim, size in enumerate(node.meta["val"].shape):
            expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if expression.is_number:
                continue
            key = (expression,) if dim else ("batch", int(size.node.hint))
            if key not in names:
                wanted = "batch" if dim == 0 else "sequence" if dim == 1 else f"{node.name}_{dim}"
                names[key] = wanted if wanted not in names.values() else f"{node.name}_{dim}"
            dynamic.setdefault(node.name, {})[dim] = names[key]
    return dynamic


def _check_agreement(model: nn.Module, program: Program) -> None:
    """Run model and program on another batch; they must agree, or the graph is no capture of it."""
    entry = program.forward
    flat = dict(zip(entry.input_names, second_inputs(entry), strict=True))
    kwargs = {
        a.name: pytree.tree_unflatten(
            [leaf.value if isinstance(leaf, Constant) else flat[leaf] for leaf in a.leaves], a.spec
        )
        for a in entry.arguments
    }
    try:
        args = [kwargs.pop(a.name) for a in entry.arguments if a.name.startswith("args_")]
        expected = pytree.tree_leaves(model(*args, **kwargs))
    except Exception as e:
        log.info("the model itself refuses another batch and length (%s); not compared", e)
        return
    try:
        actual = program.run(flat.values())
    except Exception as e:
        raise CaptureError(
            f"the captured graph of {type(model).__name__} fails on inputs of other sizes "
            f"{ {k: tuple(v.shape) for k, v in flat.items()} } where the model runs: {e}"
        ) from e
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(a, Tensor):
            continue
        a, b = a.double(), b.double()
        scale = max(float(a.abs().max()), 1e-30) if a.numel() else 1.0
        tolerance = _AGREEMENT if expected[i].dtype is torch.float32 else 2e-2
        if a.shape != b.shape or not float((a - b).abs().nan_to_num().max()) <= tolerance * scale:
            raise CaptureError(
                f"the captured graph of {type(model).__name__} disagrees with the model on output "
                f"{i} for inputs of other sizes: forward depends on values or sizes in a way "
                "that torch.export fixed; pass example_inputs of the size you deploy and "
                "dynamic_shapes=None"
            )
