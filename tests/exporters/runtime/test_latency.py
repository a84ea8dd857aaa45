"""What programs cost on this machine: one measurement a signature, kept, and never trusted blindly."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphprune.axes import axis_groups
from graphprune.exporters.onnx.convert import to_onnx, to_onnx_together
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime import latency
from graphprune.exporters.runtime.costs import LASTS, Costs
from graphprune.exporters.runtime.latency import OnnxRuntimeDevice
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.probe import LEAST, MOST, cpu, until_stable
from graphprune.exporters.runtime.session import open_session
from graphprune.exporters.runtime.signature import signature
from graphprune.ir.graph import op_name
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.pipeline.device import Cost
from graphprune.rewrite.extract import extract
from graphprune.rewrite.shrink import shrink

Captured = Callable[[str], Program]
COST = Cost(1.5, 1000, 1.25, 1.75)


def feed_forward(program: Program, layer: int) -> Program:
    """From the first product of a layer's feed-forward part to the second."""
    calls = [n for n in program.forward.graph.nodes if n.op == "call_function"]
    products = [n for n in calls if op_name(n) == "linear"][6 * layer + 4 : 6 * layer + 6]
    first, last = (calls.index(n) for n in products)
    names = [n.name for n in calls[first : last + 1]]
    return extract(program, names, program.forward.example)


@pytest.fixture(scope="module")
def parts(captured: Captured) -> dict[str, Program]:
    """The feed-forward parts of an encoder's two layers, and one of half the neurons."""
    program = captured("tiny-bert")
    first, second = (feed_forward(program, layer) for layer in (0, 1))
    (group,) = axis_groups(first).with_role("neuron")
    return {"first": first, "second": second, "half": shrink(first, {group.id: range(32)})}


def test_equal_layers_have_one_signature(parts: Mapping[str, Program]) -> None:
    assert parts["first"].tensors.keys() != parts["second"].tensors.keys()
    assert signature(parts["first"]) == signature(parts["second"])


def test_other_sizes_types_and_schemes_have_other_signatures(
    parts: Mapping[str, Program], captured: Captured
) -> None:
    first = parts["first"]
    weight = next(name for name in first.tensors if name.endswith("weight"))
    longer = [torch.cat([t, t], 1) for t in captured("tiny-bert").forward.example]
    calls = [n.name for n in first.forward.graph.nodes if n.op == "call_function"]
    found = [
        signature(first),
        signature(parts["half"]),
        signature(first.cast(torch.float32, torch.float64)),
        signature(extract(captured("tiny-bert"), calls, longer)),
        signature(
            extract(captured("tiny-bert"), calls[:-1], captured("tiny-bert").forward.example)
        ),
        signature(first, Mark("int8-dynamic")),
        signature(first, Mark("int8-weights")),
        signature(first, Mark("int8-weights", block_size=64)),
        signature(first, Mark("int8-dynamic", ignored=(weight,))),
        signature(captured("tiny-bert")),
    ]
    assert len(set(found)) == len(found)
    assert signature(first, Mark("int8-dynamic", keep_error=0.1)) == signature(
        first, Mark("int8-dynamic")
    )


def device(cache: Path, **options: Any) -> OnnxRuntimeDevice:
    return OnnxRuntimeDevice(1, cache=cache, **options)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The signatures that were really measured, a list each time; it takes no time."""
    found: list[list[str]] = []

    def measured(self: OnnxRuntimeDevice, models: Mapping[str, Program]) -> dict[str, Cost]:
        found.append(list(models))
        return {key: replace(COST, ms=float(len(found))) for key in models}

    monkeypatch.setattr(OnnxRuntimeDevice, "_measured", measured)
    return found


def test_equal_layers_are_measured_once_and_kept(
    parts: Mapping[str, Program], timed: list[list[str]], tmp_path: Path
) -> None:
    first = device(tmp_path).measure(parts)
    assert [len(keys) for keys in timed] == [2]
    assert first["first"] == first["second"] != None  # noqa: E711
    assert device(tmp_path).measure(parts) == first
    assert len(timed) == 1
    again = device(tmp_path).measure(parts, fresh=True)
    assert [len(keys) for keys in timed] == [2, 2]
    assert device(tmp_path).measure(parts) == again != first
    # Another scheme is another measurement; so are other threads.
    device(tmp_path, mark=Mark("int8-dynamic")).measure(parts)
    OnnxRuntimeDevice(2, cache=tmp_path).measure(parts)
    assert len(timed) == 4
