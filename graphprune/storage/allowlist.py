"""Which functions a saved graph may call: an allow-list, because a file must not choose freely."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from graphprune.axes.ruleless import SPELLINGS, WITHOUT_RULE
from graphprune.axes.rules import RULES
from graphprune.errors import ArtifactError, UnsupportedError

_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "abs", "getitem",
            "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_",
        )
    },
    **{f"math.{n}": getattr(math, n) for n in ("floor", "ceil", "trunc", "sqrt", "pow", "log2")},
    **{
        f"torch.{n}": getattr(torch, n)
        for n in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
    },
}  # fmt: skip
_NAMES = {function: name for name, function in _PYTHON.items()}

_OWN = {"grouped_mm"}
_NAMESPACES = ("aten", "graphprune")
# They read past the end of a weight that is too short; capture writes them as others.
_UNCHECKED = {"native_batch_norm", "_native_batch_norm_legit_no_training", "_weight_norm"}


def is_arithmetic(target: Any) -> bool:
    """Whether a call computes sizes, by a Python function that a saved graph may call."""
    return target in _NAMES


def on_tensors(target: torch._ops.OpOverload) -> bool:
    """Whether an operator takes or returns tensors; some overloads are for numbers and strings."""
    touched = [a.type for a in (*target._schema.arguments, *target._schema.returns)]
    return any("Tensor" in str(kind) for kind in touched)


def target_name(target: Any) -> str:
    """The name under which a call's target is saved.

    Raises:
        UnsupportedError: the target may not be in a saved graph.
    """
    if isinstance(target, torch._ops.OpOverload):
        if allowed(target):
            return f"{target._schema.name}.{target._overloadname}"
    elif target in _NAMES:
        return _NAMES[target]
    raise UnsupportedError(
        f"operator {target} cannot be saved: a saved graph may call the ATen operators that "
        "graphprune knows, integer arithmetic, and graphprune's own operators"
    )


def resolve(name: Any) -> Any:
    """The function that a saved name stands for.

    Raises:
        ArtifactError: the name is not on the allow-list.
    """
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    target = _overload(name) if isinstance(name, str) else None
    if target is None or not allowed(target):
        raise ArtifactError(f"operator {name!r} is not one that a saved graph may call")
    return target


def _overload(name: str) -> torch._ops.OpOverload | None:
    import graphprune.ir.operators  # noqa: F401  (registers graphprune::*)

    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if namespace not in _NAMESPACES or not (base.isidentifier() and overload.isidentifier()):
        return None
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    found = getattr(packet, overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def allowed(target: torch._ops.OpOverload) -> bool:
    """Whether a program may call an operator: one on the list that writes to no argument."""
    name = target._schema.name.partition("::")[2]
    if target.namespace == "graphprune":
        return name in _OWN
    known = name in RULES or name in SPELLINGS or name in WITHOUT_RULE
    return (
        target.namespace == "aten"
        and known
        and name not in _UNCHECKED
        and not target._schema.is_mutable
        and on_tensors(target)
    )
