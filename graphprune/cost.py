"""What a program costs to run: floating point operations, from torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphprune.ops  # noqa: F401  (registers the cost of graphprune::grouped_mm)
from graphprune.program import Program, graph_module


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def flops(program: Program, entry: str = "forward") -> int:
    """Floating point operations of one run on the example inputs, a multiply-add counted as two.

    Matrix products, convolutions and attention count; elementwise work does not.
    """
    mode = FakeTensorMode()
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention},
    )
    fake = program.with_tensors({k: mode.from_tensor(t) for k, t in program.tensors.items()})
    inputs = [mode.from_tensor(t) for t in program.entries[entry].example]
    with mode, torch.no_grad(), counter:
        graph_module(fake, entry)(*inputs)
    return int(counter.get_total_flops())
