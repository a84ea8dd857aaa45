"""Drift between a quantized file's outputs and the float file's, by formulas written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import ExportError
from graphprune.exporters.runtime.drift import Drift, drifts, run_all, worst


def test_drift_is_the_worst_of_all_inputs() -> None:
    a, b = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    (found,) = drifts(["y"], [[a], [a]], [[a], [b]])
    assert found.error == pytest.approx(0.1)
    assert found.largest == pytest.approx(0.5 / 3)  # of the row's scale, its lower value here
    assert found.cosine < 1
    (same,) = drifts(["y"], [[np.array([np.inf, 1.0])]], [[np.array([np.inf, 1.0])]])
    assert (same.cosine, same.error) == (1.0, 0.0)
    with pytest.raises(ExportError, match="'y' of the quantized model is not finite"):
        drifts(["y"], [[a]], [[a * np.nan]])


VECTORS = st.lists(st.integers(-9, 9).map(float), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None)
@given(VECTORS, VECTORS)
def test_error_and_cosine_are_their_formulas(a: list[float], b: list[float]) -> None:
    (found,) = drifts(["y"], [[np.array(a).reshape(2, 3)]], [[np.array(b).reshape(2, 3)]])
    norm, other = math.hypot(*a), math.hypot(*b)
    if norm and other:
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / norm / other
        assert found.cosine == pytest.approx(cosine)
        assert found.cosine <= 1
        distance = math.hypot(*(x - y for x, y in zip(a, b, strict=True)))
        assert found.error == pytest.approx(distance / norm)
        assert (found.largest == 0) == (a == b)
    else:
        same = norm == other
        assert found == Drift("y", float(same), float(not same), float(not same))


def test_outputs_that_are_no_floats_are_left_out() -> None:
    both = [np.array([1.0, 2.0], np.float32), np.array([1, 2])]
    found = drifts(["y", "ids"], [both], [both])
    assert [d.output for d in found] == ["y"]
    assert worst(found) == 0
    assert worst([]) == 0
    assert worst([Drift("a", 1, 0.25, 9), Drift("b", 0, 0.125, 9)]) == 0.25


class Session:
    """Doubles x, as an onnxruntime session would."""

    def get_inputs(self) -> list[Any]:
        class Named:
            name = "x"

        return [Named()]

    def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
        assert set(feeds) == {"x"}
        return [feeds["x"] * 2]


def test_all_feeds_are_run_with_the_inputs_that_there_are() -> None:
    x = np.array([2.0, 3.0])
    (once,), (twice,) = run_all(Session(), [{"x": x, "other": x}, {"x": x * 2}])
    assert (once.tolist(), twice.tolist()) == ([4, 6], [8, 12])
    with pytest.raises(ExportError, match="ONNX Runtime fails on the quantized model"):
        run_all(Session(), [{"y": x}])
