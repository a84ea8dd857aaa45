"""Names of outputs, and which of several a model is used by."""

from __future__ import annotations

from collections.abc import Iterable

import torch.utils._pytree as pytree

# Before others that a model has, such as one vector a token.
ANSWERS = ("logits", "sentence_embedding")


def answer_of(names: Iterable[str]) -> str | None:
    """The output that losses, tasks and the drift of quantization go by; None: no name says it."""
    named = set(names)
    return next((name for name in ANSWERS if name in named), None)


def leaf_names(spec: pytree.TreeSpec) -> list[str]:
    """Name each leaf of nested inputs or outputs: its keys with dots between."""
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
