"""The nesting of a model's inputs and outputs as JSON.

Lists, tuples and dicts are known. Other containers (a library's output classes) are saved by the
name under which they are registered with torch's pytree; where that name is not registered when
the file is read, their place is taken by `Output`, an ordered dict whose items are attributes too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch.utils._pytree as pytree

from graphprune.errors import ArtifactError, UnsupportedError

JSON = Any


class Output(OrderedDict[str, Any]):
    """Outputs by name; by attribute too; and by position, as library output classes have it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


def _flatten(output: Output) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: Output) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(k), v) for k, v in output.items()], list(output)


def _unflatten(values: Iterable[Any], context: Any) -> Output:
    return Output(zip(context, values, strict=True))


pytree.register_pytree_node(
    Output,
    _flatten,
    _unflatten,
    serialized_type_name="graphprune.Output",
    flatten_with_keys_fn=_flatten_with_keys,
)

_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple}
_MAPPINGS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict}
# Where a library registers its containers: imported when a saved name begins so, if installed.
_HOMES = ("transformers.modeling_outputs",)


def encode_spec(spec: pytree.TreeSpec) -> JSON:
    """A pytree spec as JSON; a leaf is null.

    Raises:
        UnsupportedError: a container of a kind that cannot be saved.
    """
    if spec.is_leaf():
        return None
    children = [encode_spec(c) for c in spec.children()]
    for name, known in _SEQUENCES.items():
        if spec.type is known:
            return {name: children}
    keys = _keys(spec)
    for name, known in _MAPPINGS.items():
        if spec.type is known:
            return {name: [list(x) for x in zip(keys, children, strict=True)]}
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    plain = f"{spec.type.__module__}.{spec.type.__name__}"
    name = getattr(registered, "serialized_type_name", plain)
    return {"type": name, "context": _plain(spec.context), "keys": keys, "children": children}


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    """Names of a container's children, from torch's key paths, or positions."""
    filled = pytree.tree_unflatten(range(spec.num_leaves), spec)
    try:
        one_level = pytree.tree_flatten_with_path(filled, is_leaf=lambda x: x is not filled)[0]
    except ValueError:  # registered without names of its children
        return list(range(len(spec.children())))
    keys: list[Any] = []
    for position, (path, _) in enumerate(one_level):
        key = path[0]
        keys.append(getattr(key, "key", getattr(key, "name", position)))
    if not all(isinstance(k, str | int) for k in keys):
        raise UnsupportedError(f"a container with the keys {keys!r} cannot be saved")
    return keys


def _plain(context: Any) -> JSON:
    """The context as lists of plain values, or None where it is something else."""
    if context is None or isinstance(context, bool | int | float | str):
        return context
    if isinstance(context, list | tuple):
        return [_plain(c) for c in context]
    return None


def decode_spec(data: JSON) -> pytree.TreeSpec:
    """The spec that `encode_spec` wrote.

    Raises:
        ArtifactError: not something that `encode_spec` writes.
    """
    if data is None:
        return pytree.tree_flatten(0)[1]
    if not isinstance(data, dict):
        raise ArtifactError(f"{data!r} is not a nesting that graphprune writes")
    if "type" in data:
        return _registered(data)
    ((name, inner),) = data.items()
    if name in _SEQUENCES:
        return pytree.TreeSpec(_SEQUENCES[name], None, [decode_spec(c) for c in inner])
    if name in _MAPPINGS:
        children = [decode_spec(c) for _, c in inner]
        return pytree.TreeSpec(_MAPPINGS[name], [k for k, _ in inner], children)
    raise ArtifactError(f"{name!r} is not a container that graphprune writes")


def _registered(data: JSON) -> pytree.TreeSpec:
    children = [decode_spec(c) for c in data["children"]]
    for home in _HOMES:
        package = home.partition(".")[0]
        if str(data["type"]).startswith(package + ".") and importlib.util.find_spec(package):
            importlib.import_module(home)
    found = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(data["type"])
    if found is not None and data["context"] is not None:
        spec = pytree.TreeSpec(found, data["context"], children)
        try:
            pytree.tree_unflatten(range(spec.num_leaves), spec)
        except (TypeError, ValueError, KeyError, AttributeError):
            pass  # registered otherwise in this process than where the file was written
        else:
            return spec
    return pytree.TreeSpec(Output, [str(k) for k in data["keys"]], children)
