"""How far an answer is from the dense model's: what a search over candidates minimizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites, outputs_of
from graphprune.calibration.padding import rows_without_padding
from graphprune.calibration.stream import size_hint
from graphprune.errors import UnsupportedError
from graphprune.ir.graph import flat_outputs
from graphprune.ir.outputs import answer_of, leaf_names
from graphprune.ir.program import Entry, Program


@final
@dataclass(frozen=True, slots=True)
class OutputLoss:
    """A loss over the flat outputs of the forward entry, dense and candidate, a number a row.

    Attributes:
        number: of the flat output that counts.
        kind: "kl" (KL divergence of the candidate's softmax from the dense one), "cosine"
            (1 - cos over the last dimension), or "squared" (squared difference of one number).
    """

    number: int
    kind: str
    _entry: Entry = field(repr=False)

    def __call__(
        self, dense: Sequence[Any], candidate: Sequence[Any], inputs: Sequence[Tensor]
    ) -> Tensor:
        """The loss of each row that is no padding, [rows], from flat outputs on flat inputs."""
        return self.distance(self.answer(dense, inputs), self.answer(candidate, inputs))

    def answer(self, outputs: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor:
        """Of flat outputs the one that counts, rows of padding left out: [rows, features]."""
        node, value = flat_outputs(self._entry.graph)[self.number], outputs[self.number]
        if value.dim() < 2:
            return value.reshape(-1, 1)
        return rows_without_padding(self._entry, inputs)(node, value)

    def nbytes(self, inputs: Sequence[Tensor]) -> int:
        """About how many bytes an answer on these inputs has."""
        value = flat_outputs(self._entry.graph)[self.number].meta["val"]
        size = math.prod(map(size_hint, value.shape)) * value.element_size()
        return size * inputs[0].numel() // max(self._entry.example[0].numel(), 1)

    def distance(self, dense: Tensor, candidate: Tensor) -> Tensor:
        """The loss of each row of two answers; NaN where the candidate's is no number."""
        a, b = dense.float(), candidate.float()
        if self.kind == "kl":
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        if self.kind == "cosine":
            return 1 - F.cosine_similarity(a, b, dim=-1)
        return (a - b).square().sum(-1)


def output_loss(program: Program) -> OutputLoss:
    """The loss that fits what the model answers.

    KL where that is called logits, or is a product with a weight, so that each of its numbers is a
    token's or a class's; the squared difference where it is one number alone; else 1 - cos.

    Raises:
        UnsupportedError: no output is a tensor of floats.
    """
    entry = program.forward
    results = flat_outputs(entry.graph)
    names = leaf_names(entry.out_spec)
    floats = [i for i, result in enumerate(results) if _is_float(result)]
    if not floats:
        raise UnsupportedError("the model has no floating-point output to compare")
    name = answer_of(names[i] for i in floats)
    number = floats[0] if name is None else names.index(name)
    shape = results[number].meta["val"].shape
    if len(shape) < 2 or shape[-1] == 1:
        kind = "squared"
    elif name == "logits" or (name is None and _is_product(program, number)):
        kind = "kl"
    else:
        kind = "cosine"
    return OutputLoss(number, kind, entry)


def _is_float(result: Any) -> bool:
    value = result.meta["val"] if isinstance(result, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() > 0


def _is_product(program: Program, number: int) -> bool:
    # A convolution's answers are its channels, which are not last.
    sites = [site for site in linear_sites(axis_groups(program)) if site.window is None]
    return any(number in outputs_of(site.node) for site in sites)
