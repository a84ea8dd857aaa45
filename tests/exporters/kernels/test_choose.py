"""Choosing forms: the fastest is taken, layers of one value together, and times are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphprune.exporters.kernels.choose import Chooser, Group, Variant, groups_of, pays_from
from graphprune.exporters.kernels.library import Library
from graphprune.exporters.kernels.lower import Form
from graphprune.exporters.quantize.layers import find_layers
from graphprune.exporters.quantize.quantize import Choice
from graphprune.ir.quantization import Mark
from graphprune.pipeline.device import Cost
from tests.exporters.kernels.networks import FLOAT, blocky, network, run

LIBRARY = Library("/nowhere/libkernels.so", "1.0", "scalar", 8)
MARK = Mark("int8-dynamic")
TIMES = {"float": 4.0, "int8": 2.0, "32x4": 1.0, "16x4": 1.5}


class Timed:
    """Answers with times by form instead of measuring, and writes down what it was asked."""

    def __init__(self, times: Mapping[str, float]) -> None:
        self.times, self.asked = dict(times), 0

    def __call__(
        self, chooser: Chooser, wanted: Mapping[str, tuple[Group, Variant]], bits: int, mark: Mark
    ) -> dict[str, Cost]:
        self.asked += len(wanted)
        found = {}
        for key, (_, variant) in wanted.items():
            ms = self.times[variant.name]
            if variant.zeros is not None:
                ms = 3 - 2 * variant.zeros
            found[key] = Cost(ms, 100, ms, ms)
        return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    found = Timed(TIMES)
    monkeypatch.setattr(Chooser, "_measured", lambda self, *given: found(self, *given))
    return found


def siblings(zeros: float) -> onnx.ModelProto:
    """Three products of one value, and one more of the first's output, without a zero."""
    rng = np.random.default_rng(0)
    nodes, constants = [], []
    for name in "abc":
        weight = blocky(rng, 64, 16, 32, zeros)
        constants.append(numpy_helper.from_array(weight.T.copy(), f"w{name}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [name]))
    last = rng.standard_normal((64, 8)).astype(np.float32)
    constants.append(numpy_helper.from_array(last, "wd"))
    nodes.append(helper.make_node("MatMul", ["a", "wd"], ["d"]))
    dims = ["batch", "length"]
    graph = helper.make_graph(
        nodes,
        "siblings",
        [helper.make_tensor_value_info("x", FLOAT, [*dims, 16])],
        [
            helper.make_tensor_value_info(name, FLOAT, [*dims, 8 if name == "d" else 64])
            for name in "abcd"
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_group_is_what_reads_one_value_with_its_rows() -> None:
    model = siblings(0.5)
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    (group,) = groups_of(model, find_layers(model), feeds)
    assert [layer.weight for layer in group.layers] == ["wa", "wb", "wc"]
    assert group.rows == 10
    assert 0 < group.zeros["32x4"] <= group.zeros["16x4"] < 1
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    parts = run(group.part, x=x.reshape(10, 16))
    for part, whole in zip(parts, run(model, x=x), strict=False):
        np.testing.assert_allclose(part.reshape(whole.shape), whole, rtol=1e-5, atol=1e-6)


def test_rows_of_inner_values_are_those_of_a_run() -> None:
    rng = np.random.default_rng(0)
    weights = [blocky(rng, 32, 8, 32, 0.5), blocky(rng, 8, 32, 32, 0.5)]
    model = network(weights, ["relu", "none"], [None, None])
    feeds = {"x": np.zeros((3, 7, 8), np.float32)}
    assert [group.rows for group in groups_of(model, find_layers(model), feeds)] == [21, 21]


@pytest.mark.parametrize("fastest", ["float", "int8", "32x4"])
def test_the_fastest_form_is_taken(fastest: str, timed: Timed, tmp_path: Path) -> None:
    timed.times[fastest] = 0.5
    model = siblings(0.5)
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    choice = Chooser(LIBRARY, feeds, cache=tmp_path)(model, find_layers(model), MARK)
    (record,) = choice.records
    assert record["form"] == fastest
    group = ["wa", "wb", "wc"]
    sparse = {layer.weight: form for layer, form in choice.sparse.items()}
    assert sparse == (dict.fromkeys(group, Form(32, 8)) if fastest == "32x4" else {})
    assert [layer.weight for layer in choice.floats] == (group if fastest == "float" else [])


def test_seven_bits_where_the_mark_or_the_cpu_wants_them(timed: Timed, tmp_path: Path) -> None:
    model = siblings(0.5)
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    narrow = Library("/nowhere", "1.0", "avx2", 7)
    for library, mark in ((LIBRARY, Mark("int8-dynamic", reduce_range=True)), (narrow, MARK)):
        choice = Chooser(library, feeds, cache=tmp_path)(model, find_layers(model), mark)
        assert {form.bits for form in choice.sparse.values()} == {7}


def test_what_was_measured_is_not_measured_again(timed: Timed, tmp_path: Path) -> None:
    model = siblings(0.5)
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    first = Chooser(LIBRARY, feeds, cache=tmp_path)(model, find_layers(model), MARK)
    asked = timed.asked
    assert asked
    again = Chooser(LIBRARY, feeds, cache=tmp_path)(model, find_layers(model), MARK)
    assert timed.asked == asked
    assert again == first
    longer = {"x": np.zeros((2, 6, 16), np.float32)}
    Chooser(LIBRARY, longer, cache=tmp_path)(model, find_layers(model), MARK)
    assert timed.asked == 2 * asked


def test_other_zeros_are_measured_apart(timed: Timed, tmp_path: Path) -> None:
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    for zeros, expected in ((0.5, 5), (0.9, 10)):
        model = siblings(zeros)
        Chooser(LIBRARY, feeds, cache=tmp_path)(model, find_layers(model), MARK)
        # A group's times come from one run: stock, its own zeros, and two that tell the trend.
        assert timed.asked == expected


def test_layers_without_zeros_are_left_to_the_scheme(timed: Timed, tmp_path: Path) -> None:
    model = siblings(0.0)
    feeds = {"x": np.zeros((2, 5, 16), np.float32)}
    choice = Chooser(LIBRARY, feeds, cache=tmp_path)(model, find_layers(model), MARK)
    assert choice == Choice()
    assert not timed.asked


@given(
    fixed=st.floats(0.01, 1),
    slope=st.floats(0.1, 5),
    stock=st.floats(0.01, 6),
    low=st.floats(0, 0.5),
    gap=st.floats(0.1, 0.5),
)
def test_pays_from_is_where_the_line_meets_stock(
    fixed: float, slope: float, stock: float, low: float, gap: float
) -> None:
    def took(zeros: float) -> float:
        return fixed + slope * (1 - zeros)

    found = pays_from({low: took(low), low + gap: took(low + gap)}, stock)
    if found is None:
        assert took(1) >= stock * (1 - 1e-6)
    elif found > 0:
        assert took(found) == pytest.approx(stock, rel=1e-6)
    else:
        assert took(0) <= stock * (1 + 1e-6)


def test_pays_from_of_times_that_do_not_fall() -> None:
    assert pays_from({0.5: 1.0, 0.8: 1.1}, 2.0) == 0.0
    assert pays_from({0.5: 1.0, 0.8: 1.1}, 0.9) is None
