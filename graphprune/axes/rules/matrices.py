"""What is computed of whole matrices: every entry depends on all others, batches pass."""

from __future__ import annotations

from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RuleContext
from graphprune.axes.rules.registry import rule

_SIDE = "a side of a matrix in"


@rule("inverse", "linalg_inv", "cholesky", "linalg_cholesky", "matrix_exp", "linalg_matrix_exp",
      "pinverse", "linalg_pinv")  # fmt: skip
def matrix(c: RuleContext) -> Dims:
    """A matrix of a matrix."""
    dims, fresh = c.dims(c.node.args[0]), c.fresh()
    c.freeze((*dims[-2:], *fresh[-2:]), _SIDE)
    return (*dims[:-2], *fresh[-2:])


@rule("det", "linalg_det", "logdet", "trace")
def number(c: RuleContext) -> Dims:
    """A number of a matrix."""
    dims = c.dims(c.node.args[0])
    c.freeze(dims[-2:], _SIDE)
    return dims[:-2]
