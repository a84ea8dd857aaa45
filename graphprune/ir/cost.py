"""Floating point operations of a program, from torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphprune.ir.operators  # noqa: F401  (registers the cost of graphprune::grouped_mm)
from graphprune.ir.graph import bound_arguments, is_op
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def flops(program: Program, entry: str = "forward") -> int:
    """Floating point operations of one run on the example inputs, a multiply-add counted as two.

    Matrix products, convolutions, attention and recurrent layers count; elementwise work does not.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention},
    )
    example = program.entries[entry].example
    mode = FakeTensorMode()
    fake = program.with_tensors({k: mode.from_tensor(t) for k, t in program.tensors.items()})
    try:
        with mode, torch.no_grad(), counter:
            graph_module(fake, entry)(*(mode.from_tensor(t) for t in example))
    except (DataDependentOutputException, DynamicOutputShapeException):
        # Sizes that depend on values need values: run it.
        with torch.no_grad(), counter:
            graph_module(program, entry)(*example)
    return int(counter.get_total_flops()) + _recurrent(program, entry)


def _recurrent(program: Program, entry: str) -> int:
    """Count what torch's counter does not: two for each weight of an LSTM and time step."""
    total = 0
    for node in program.entries[entry].graph.nodes:
        if is_op(node, "lstm"):
            arguments = bound_arguments(node)
            # The example's sizes: asking a symbol for its number would make a constant of it.
            steps = [
                s.node.hint if isinstance(s, torch.SymInt) else s
                for s in node.args[0].meta["val"].shape[:2]
            ]
            weights = [program.tensors[str(p.target)] for p in arguments["params"]]
            total += 2 * steps[0] * steps[1] * sum(w.numel() for w in weights if w.dim() == 2)
    return total
