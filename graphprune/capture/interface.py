"""The inputs of a captured program: the example call, and its arguments as placeholders."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphprune.capture.dynamic import asked_dims
from graphprune.errors import CaptureError, UnsupportedError
from graphprune.ir.program import Argument, Constant
from graphprune.storage.arguments import encode

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def example_call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy example inputs into positional and keyword arguments of forward.

    Raises:
        CaptureError: there are none, or they do not fit forward.
    """
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
    # torch.export takes one tensor object in two places for one input, and views for one memory.
    cloned: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)
    )
    return cloned


def enlarge_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: torch.export would make its size a constant."""
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.dim() == 0 or x.shape[0] != 1 for x in leaves):
        return args, kwargs
    enlarged: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, (args, kwargs)
    )
    return enlarged


def specs_of(module: fx.GraphModule) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """Read off an exported module how its inputs and its outputs nest."""
    info = cast(Any, module.graph._codegen).pytree_info
    return info.in_spec, info.out_spec


def interface(
    model: nn.Module,
    graph: fx.Graph,
    in_spec: pytree.TreeSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    asked: Sequence[str],
) -> tuple[tuple[Argument, ...], tuple[Tensor, ...], dict[str, dict[int, str]]]:
    """Map the model's arguments to placeholders, drop those of constants, name dynamic sizes."""
    positional, keyword = in_spec.children()
    signature = inspect.signature(model.forward).parameters
    plain = [p.name for p in signature.values() if p.kind in _POSITIONAL]
    rest = next((n for n, p in signature.items() if p.kind is inspect.Parameter.VAR_POSITIONAL), "")
    names = [*plain[: len(args)], *(f"{rest}_{i}" for i in range(len(args) - len(plain)))]
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
        default = _other_default(signature.get(name), value, leaves)
        arguments.append(Argument(name, spec, tuple(leaves), default))
    given = {a.name for a in arguments}
    arguments += [
        Argument(p.name, pytree.tree_structure(p.default), (Constant(p.default),))
        for p in signature.values()
        if p.name not in given and (p.default is None or isinstance(p.default, int | float | str))
    ]
    order = {name: i for i, name in enumerate(signature)}
    arguments.sort(key=lambda a: order.get(a.name, order.get(rest, len(order))))
    return tuple(arguments), tuple(example), _symbols(tensors, asked)


def _other_default(
    parameter: inspect.Parameter | None, value: Any, leaves: Sequence[str | Constant]
) -> Constant | None:
    """Forward's default of an argument that was captured as a constant of another value."""
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    if not all(isinstance(leaf, Constant) for leaf in leaves):
        return None
    default = parameter.default
    if type(default) is type(value) and bool(default == value):
        return None
    if isinstance(default, int | float | str | None) and default == value:
        return None
    try:
        encode(default)
    except UnsupportedError:
        return Constant(repr(default))
    return Constant(default)


def _symbols(
    placeholders: Sequence[fx.Node], asked: Sequence[str] = ()
) -> dict[str, dict[int, str]]:
    """Name every symbolic size: "batch", "sequence", then after the input it first occurs in.

    The sides of an image are called "height" and "width" where these are asked for.

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
                for side in ("height", "width"):
                    if side in asked and dim in asked_dims(side, "", node.meta["val"]):
                        wanted = side
                names[key] = wanted if wanted not in names.values() else f"{node.name}_{dim}"
            dynamic.setdefault(node.name, {})[dim] = names[key]
    return dynamic
