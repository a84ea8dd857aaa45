"""Sparse products wherever blocks are zero: what a budget measures, before there is a choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphprune.exporters.kernels.library import find_library
from graphprune.exporters.kernels.lower import SOME, of_pattern, own_products
from graphprune.exporters.kernels.packing import density
from graphprune.exporters.quantize.layers import Layer
from graphprune.exporters.quantize.quantize import Choice
from graphprune.ir.quantization import Mark

if TYPE_CHECKING:
    import onnx


def every_sparse(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    mark: Mark,
    *,
    pattern: str,
    bits: int | None = None,
) -> Choice:
    """Choose the sparse form for each product with zero blocks.

    Args:
        model: in float; stays as it is.
        layers: of the model, those that may be quantized.
        mark: how the others are quantized.
        pattern: of the blocks.
        bits: of the codes; by default those that are exact on this machine.

    Raises:
        GraphPruneError: there is such a product, and graphprune-kernels is not installed.
    """
    height = of_pattern(pattern, 7).height
    _, weights = own_products(model, layers)
    some = [layer for layer, weight in weights.items() if density(weight, height) <= 1 - SOME]
    if not some:
        return Choice()
    form = of_pattern(pattern, find_library().bits if bits is None else bits)
    return Choice(sparse=dict.fromkeys(some, form))
