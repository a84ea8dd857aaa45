"""FoldBatchNorm: multiply an inference batch norm into the weights before it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphprune.ir.graph import (
    bound_arguments,
    erase_dead,
    is_op,
    set_bound,
    tensor_nodes,
    value_of,
)
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@register
@final
@dataclass(frozen=True, slots=True)
class FoldBatchNorm(Pass):
    """Fold an inference batch norm into the convolution or linear layer before it.

    conv(w, b) -> batch_norm(g, h, m, v)   becomes   conv(w * s, (b - m) * s + h)
    with s = g / sqrt(v + eps)

    1. The convolution's only user is the batch norm, and its weights are read nowhere else;
       otherwise both are left alone and reported.
    2. A convolution without bias gets one, named after its weight.
    3. A linear layer counts where its output is [batch, features], so that channels are its rows.
    4. A batch norm in training mode computes its own statistics and stays.
    5. In half precision both stay: the folded weights would be rounded once more, visibly.
    """

    name: ClassVar[str] = "fold-batch-norm"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS
    idempotent: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        reads: Counter[Any] = Counter()
        for graph in graphs.values():
            for node in tensor_nodes(graph):
                reads[node.target] += len(node.users)
        tensors, parameters = dict(program.tensors), set(program.parameters)
        folded: list[str] = []
        skipped: list[dict[str, str]] = []
        for graph in graphs.values():
            for norm in [n for n in graph.nodes if is_op(n, "batch_norm")]:
                if reason := _obstacle(norm, reads):
                    skipped.append({"node": norm.name, "reason": reason})
                    continue
                tensors, bias = _fold(graph, norm, tensors)
                parameters.add(bias)
                folded.append(norm.name)
            erase_dead(graph)
        report = {"folded": folded, "skipped": skipped}
        if not folded:
            return PassResult(program, False, report)
        changed = dataclasses.replace(program, parameters=frozenset(parameters))
        changed = changed.with_graphs(graphs, tensors)
        read = {n.target for graph in graphs.values() for n in tensor_nodes(graph)}
        unread = [name for name in reads if name not in read]
        return PassResult(changed.without_tensors(unread), True, report)


def _obstacle(norm: fx.Node, reads: Counter[Any]) -> str:
    """Why a batch norm cannot be folded, or an empty string."""
    bound = bound_arguments(norm)
    layer = bound["input"]
    if bound["training"] or bound["running_mean"] is None:
        return "it computes its own statistics"
    if not is_op(layer, *_CONVOLUTIONS, "linear"):
        return f"what comes before it ({layer.name}) is neither a convolution nor linear"
    if is_op(layer, "linear") and value_of(layer).dim() != 2:
        return f"{layer.name} has its features last, and the batch norm counts dimension 1"
    if len(layer.users) > 1:
        return f"{layer.name} is read by others too"
    mine = bound_arguments(layer)
    for tensor in (mine["weight"], mine["bias"]):
        if tensor is None:
            continue
        if tensor.op != "get_attr":
            return f"the weight or bias of {layer.name} is computed"
        if reads[tensor.target] > 1:
            return f"{tensor.target} is read elsewhere too"
        if value_of(tensor).dtype not in (torch.float32, torch.float64):
            return f"{tensor.target} is {value_of(tensor).dtype}, and folding would round it again"
    if any(
        n is not None and n.op != "get_attr"
        for n in (bound["weight"], bound["bias"], bound["running_mean"], bound["running_var"])
    ):
        return "its own parameters are computed"
    return ""


def _fold(
    graph: fx.Graph, norm: fx.Node, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Rewire `norm` to its layer, in place; return the new tensors and the name of the bias."""
    bound = bound_arguments(norm)
    layer = bound["input"]
    mine = bound_arguments(layer)

    def wide(node: fx.Node | None, default: float) -> Tensor:
        # Float64: the product is rounded once, to the weight's own type, at the end.
        mean = tensors[bound["running_mean"].target].double()
        return (
            torch.full_like(mean, default) if node is None else tensors[str(node.target)].double()
        )

    scale = wide(bound["weight"], 1.0) / (wide(bound["running_var"], 1.0) + bound["eps"]).sqrt()
    weight_name = mine["weight"].target
    weight = tensors[weight_name]
    shift = (wide(mine["bias"], 0.0) - wide(bound["running_mean"], 0.0)) * scale
    bias = (shift + wide(bound["bias"], 0.0)).to(weight.dtype)
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    changed = {**tensors, weight_name: scaled.to(weight.dtype)}
    if mine["bias"] is not None:
        bias_name = mine["bias"].target
    else:
        bias_name = _bias_name(weight_name, tensors)
        with graph.inserting_before(layer):
            set_bound(layer, {"bias": graph.get_attr(bias_name)})
    norm.replace_all_uses_with(layer)
    graph.erase_node(norm)
    return {**changed, bias_name: bias}, bias_name


def _bias_name(weight: str, taken: dict[str, Tensor]) -> str:
    name = weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}_bias"
    while name in taken:
        name += "_"
    return name
