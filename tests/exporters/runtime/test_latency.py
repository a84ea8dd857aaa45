"""Latency: one measurement a signature, kept, and never trusted blindly."""

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
from graphprune.exporters.runtime import probe
from graphprune.exporters.runtime.costs import LASTS, Costs
from graphprune.exporters.runtime.latency import OnnxRuntimeDevice, write_files
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
    whole = captured("tiny-bert")
    example = whole.forward.example
    longer = [torch.cat([t, t], 1) for t in example]
    calls = [n.name for n in first.forward.graph.nodes if n.op == "call_function"]
    found = [
        signature(first),
        signature(parts["half"]),
        signature(first.cast(torch.float32, torch.float64)),
        signature(extract(captured("tiny-bert"), calls, longer)),
        signature(
            extract(captured("tiny-bert"), calls[:-1], captured("tiny-bert").forward.example)
        ),
        signature(replace(first, quantization=Mark("int8-dynamic"))),
        signature(replace(first, quantization=Mark("int8-weights"))),
        signature(replace(first, quantization=Mark("int8-weights", block_size=64))),
        signature(replace(first, quantization=Mark("int8-dynamic", ignored=(weight,)))),
        signature(whole),
    ]
    assert len(set(found)) == len(found)
    alike = [Mark("int8-dynamic", keep_error=limit) for limit in (None, 0.1)]
    assert len({signature(replace(first, quantization=mark)) for mark in alike}) == 1


def test_zeros_count_where_a_kernel_skips_blocks_of_them(parts: Mapping[str, Program]) -> None:
    first = parts["first"]
    (name, *_) = (n for n, t in first.tensors.items() if t.dim() == 2)
    half = first.tensors[name].clone()
    half[: len(half) // 2] = 0
    thin = first.with_tensors({name: half})
    stock, sparse = (Mark("int8-dynamic", blocks=blocks) for blocks in ("", "32x4"))
    assert signature(replace(first, quantization=stock)) == signature(
        replace(first, quantization=sparse)
    )
    assert signature(replace(first, quantization=stock)) == signature(
        replace(thin, quantization=stock)
    )
    found = {signature(replace(p, quantization=sparse)) for p in (first, thin)}
    found.add(signature(replace(thin, quantization=replace(sparse, blocks="16x4"))))
    # As many zeros, and no zero block: nothing is skipped.
    scattered = first.tensors[name].clone()
    scattered[::2] = 0
    other = first.with_tensors({name: scattered})
    assert signature(replace(other, quantization=sparse)) in found
    found.add(signature(replace(thin, quantization=replace(sparse, ignored=(name,)))))
    assert len(found) == 4


def device(cache: Path, **options: Any) -> OnnxRuntimeDevice:
    return OnnxRuntimeDevice(1, cache=cache, **options)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The signatures that were really measured, a list each time; it takes no time."""
    found: list[list[str]] = []

    def measured(self: OnnxRuntimeDevice, models: Mapping[str, Any]) -> dict[str, Cost]:
        found.append(list(models))
        return {key: replace(COST, ms=float(len(found))) for key in models}

    monkeypatch.setattr(OnnxRuntimeDevice, "_measured", measured)
    return found


def test_equal_layers_are_measured_once_and_kept(
    parts: Mapping[str, Program], timed: list[list[str]], tmp_path: Path
) -> None:
    first = device(tmp_path).measure(parts)
    assert [len(keys) for keys in timed] == [2]
    assert first["first"] == first["second"] == replace(COST, ms=1.0)
    assert device(tmp_path).measure(parts) == first
    assert len(timed) == 1
    again = device(tmp_path).measure(parts, fresh=True)
    assert [len(keys) for keys in timed] == [2, 2]
    assert device(tmp_path).measure(parts) == again != first
    # Another scheme is another measurement; so are other threads.
    mark = Mark("int8-dynamic")
    device(tmp_path).measure({n: replace(p, quantization=mark) for n, p in parts.items()})
    OnnxRuntimeDevice(2, cache=tmp_path).measure(parts)
    assert len(timed) == 4


def test_what_is_new_is_in_milliseconds_of_what_is_known(
    parts: Mapping[str, Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slower = 1.0

    def measured(self: OnnxRuntimeDevice, models: Mapping[str, Any]) -> dict[str, Cost]:
        return {k: replace(COST, ms=slower * run[0].num_parameters()) for k, run in models.items()}

    monkeypatch.setattr(OnnxRuntimeDevice, "_measured", measured)
    known = device(tmp_path).measure({"first": parts["first"]})
    slower = 3.0  # the machine is busy
    found = device(tmp_path).measure(parts)
    assert found["first"] == known["first"]
    for name, program in parts.items():
        assert found[name].ms == pytest.approx(program.num_parameters())


ENVIRONMENT = {"cpu": "X", "threads": 1}


def test_a_cost_is_kept_until_it_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Costs(tmp_path, ENVIRONMENT).write({"a": COST})
    assert Costs(tmp_path, ENVIRONMENT).read(["a", "b"]) == {"a": COST}
    assert Costs(tmp_path, {**ENVIRONMENT, "threads": 2}).read(["a"]) == {}
    now = time.time()
    for later, known in ((LASTS - 60, {"a": COST}), (LASTS + 60, {}), (-60, {})):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        assert Costs(tmp_path, ENVIRONMENT).read(["a"]) == known


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"cost": {"ms": 1}}', "null"],
)
def test_a_damaged_file_is_measured_again_with_one_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Costs(tmp_path, ENVIRONMENT).write({"a": COST, "b": COST})
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]
    for path in tmp_path.iterdir():
        path.write_text(text)
    costs = Costs(tmp_path, ENVIRONMENT)
    with caplog.at_level(logging.WARNING):
        assert costs.read(["a", "b"]) == {}
        assert costs.read(["a"]) == {}
    (record,) = caplog.records
    assert "are not used: 2 files cannot be read" in record.getMessage()
    costs.write({"a": COST})
    assert costs.read(["a"]) == {"a": COST}


@pytest.mark.parametrize(
    ("field", "value"), [("ms", -1.0), ("ms", "1"), ("bytes", 0), ("high", float("nan"))]
)
def test_numbers_that_are_no_costs_are_not_used(field: str, value: Any, tmp_path: Path) -> None:
    Costs(tmp_path, ENVIRONMENT).write({"a": COST})
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    data["cost"][field] = value
    path.write_text(json.dumps(data))
    assert Costs(tmp_path, ENVIRONMENT).read(["a"]) == {}


def test_a_folder_that_cannot_be_written_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    costs = Costs(tmp_path / "file" / "folder", ENVIRONMENT)
    costs.write({"a": COST})
    assert costs.read(["a"]) == {}
    (record,) = caplog.records
    assert "it cannot be written" in record.getMessage()


def test_rounds_end_when_medians_are_known() -> None:
    steady = until_stable(lambda: [1.0, 2.0])
    assert [len(times) for times in steady] == [LEAST, LEAST]
    noise = iter(np.random.default_rng(0).uniform(1.0, 2.0, MOST))
    assert len(until_stable(lambda: [1.0, next(noise)])[0]) == MOST
    assert len(until_stable(lambda: [1.0, time.perf_counter() % 1], seconds=0.0)[0]) == LEAST


def test_the_cpu_has_a_name() -> None:
    assert cpu()["name"]
    assert isinstance(cpu()["instructions"], list)


def test_cpus_of_one_name_share_no_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"model name": "AMD EPYC", "cpu family": "25", "model": "1", "flags": "avx2"}
    known = {"avx2": True, "avx512_f": True, "num_sockets": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(probe, "_cpu_fields", lambda: fields)

    def costs() -> Costs:
        return Costs(tmp_path, OnnxRuntimeDevice().environment())

    def found() -> bool:
        return bool(costs().read(["a"]))

    costs().write({"a": COST})
    assert found()
    for other in ({"model": "17"}, {"cpu family": "26"}, {"stepping": "2"}, {"flags": "fma"}):
        with monkeypatch.context() as patch:
            patch.setattr(probe, "_cpu_fields", lambda other=other: {**fields, **other})
            assert not found()
    with monkeypatch.context() as patch:  # what CPUID hides from this process
        patch.setitem(known, "avx512_f", False)
        assert not found()
    assert found()


@pytest.mark.slow
def test_models_converted_together_are_those_converted_alone(
    parts: Mapping[str, Program], captured: Captured, tmp_path: Path
) -> None:
    programs = [parts["first"], captured("tiny-mlp"), parts["half"]]
    for number, (program, model) in enumerate(
        zip(programs, to_onnx_together(programs), strict=True)
    ):
        alone = to_onnx(program, opset=None)
        for one, other in zip(alone.graph, model.graph, strict=True):
            assert (one.name, one.op_type) == (other.name, other.op_type)
            assert [str(v.shape) for v in one.outputs] == [str(v.shape) for v in other.outputs]
        assert set(alone.graph.initializers) >= set(program.parameters)
        assert set(model.graph.initializers) >= set(program.parameters)
        save_onnx(model, tmp_path / f"{number}.onnx")
        check_parity(program, open_session(tmp_path / f"{number}.onnx"))


@pytest.mark.parametrize("scheme", [None, "int8-dynamic", "int8-static"])
def test_programs_are_timed_as_they_are_exported(
    parts: Mapping[str, Program], scheme: str | None, tmp_path: Path
) -> None:
    mark = None if scheme is None else Mark(scheme)
    calls = [n.name for n in parts["first"].forward.graph.nodes if n.op == "call_function"]
    (gelu,) = (name for name in calls if "gelu" in name)
    # There is nothing to quantize in it.
    plain = extract(parts["first"], [gelu], parts["first"].forward.example)
    seen: list[tuple[int, int, str]] = []
    measuring = OnnxRuntimeDevice(1, tmp_path, lambda *step: seen.append(step))
    models = {**parts, "plain": plain}
    costs = measuring.measure({n: replace(p, quantization=mark) for n, p in models.items()})
    assert all(0 < cost.low <= cost.ms <= cost.high for cost in costs.values())
    # 2 x 64 x 32 weights, of a byte or of four; the file has names and scales beside them.
    weights = 2 * 64 * 32 * (4 if scheme is None else 1)
    assert weights < costs["first"].bytes < weights + 8000
    assert costs["first"] == costs["second"]
    assert costs["half"].bytes < costs["first"].bytes
    assert {unit for _, _, unit in seen} == {"models", "rounds"}
    assert measuring.can_measure
    assert measuring.name == cpu()["name"]


def test_a_dynamic_program_is_fed_a_single_sample(captured: Captured, tmp_path: Path) -> None:
    program = captured("tiny-mlp")
    single = replace(program.forward, example=tuple(t[:1] for t in program.forward.example))
    one = replace(program, entries={"forward": single})
    run = (one, single.example)
    (file,) = write_files({"one": run}, tmp_path, lambda done, total, unit: None)
    assert {array.shape[0] for array in file.feeds.values()} == {1}
    shapes = [i.shape for i in open_session(file.path).get_inputs()]
    assert {shape[0] for shape in shapes} == {"batch_size"}
    assert signature(one) != signature(program)
