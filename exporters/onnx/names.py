"""What the inputs, outputs and dynamic sizes of the ONNX file are called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.ir.graph import output_node, value_of
from graphprune.ir.program import Entry
from graphprune.ir.sizes import limits_to_json


def input_names(entry: Entry) -> list[str]:
    """The model's own argument names, in the order of the placeholders.

    A nested argument adds its keys: `past_key_values.0.1`.
    """
    names: dict[str, str] = {}
    for argument in entry.arguments:
        keys = _leaf_names(argument.spec)
        for leaf, key in zip(argument.leaves, keys, strict=True):
            if isinstance(leaf, str):
                names[leaf] = f"{argument.name}.{key}" if key else argument.name
    return [names.get(name, name) for name in entry.input_names]


def limits_by_input(entry: Entry, *, cache: bool = True) -> dict[str, Any]:
    """The limits of an entry's sizes as JSON, by the names of the ONNX file's inputs.

    Args:
        entry: whose sizes.
        cache: whether relations to the sizes of a cache are among them.
    """
    names = dict(zip(entry.input_names, input_names(entry), strict=True))
    return limits_to_json(
        entry.bounds,
        [
            relation.renamed(names)
            for relation in entry.relations
            if cache or not any(name in entry.cache for name, _ in relation.sizes.values())
        ],
        {names[name]: dims for name, dims in entry.fixed.items()},
    )


def output_names(entry: Entry) -> list[str]:
    """Names of the tensors among the outputs: keys of the model's output, or output_0, output_1, …

    A name that an input has too gets `_out` behind it, because ONNX has one namespace.
    """
    taken = set(input_names(entry))
    names = []
    for name, tensor in zip(_flat_names(entry), is_tensor_output(entry), strict=True):
        if tensor:
            while name in taken:
                name += "_out"
            taken.add(name)
            names.append(name)
    return names


def is_tensor_output(entry: Entry) -> list[bool]:
    """For each flat output: whether it is a tensor; None and plain numbers are not exported."""
    values = cast(tuple[Any, ...], output_node(entry.graph).args[0])
    return [isinstance(v, fx.Node) and isinstance(value_of(v), Tensor) for v in values]


def _flat_names(entry: Entry) -> Iterable[str]:
    keys = _leaf_names(entry.out_spec)
    return [f"output_{k or i}" if (k or "0")[0].isdigit() else k for i, k in enumerate(keys)]


def _leaf_names(spec: pytree.TreeSpec) -> list[str]:
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    try:
        paths, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # a class of output that is registered without names of its fields
        return [str(i) for i in range(spec.num_leaves)]
    return [".".join(_key(k) for k in path) for path, _ in paths]


def _key(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def rename_symbols(expression: str, names: dict[str, str]) -> str:
    """A size such as `2*s53` with its symbols replaced."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), expression)
