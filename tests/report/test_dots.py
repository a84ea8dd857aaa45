"""Names beside dots: none covers another one, a dot, or leaves the plot while there is room."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.report import charts
from graphprune.report.dots import Box, Dot, named, placed, ringed

WIDTH, HEIGHT = 480.0, 300.0
PLACES = st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT))
NAMES = st.text("abcdefghijx0123456789-/", min_size=1, max_size=20)


def _box(dot: Dot) -> Box:
    return Box(dot.x - dot.reach, dot.y - dot.reach, dot.x + dot.reach, dot.y + dot.reach)


@given(st.lists(st.tuples(PLACES, NAMES), min_size=1, max_size=5))
def test_no_name_covers_another_or_a_dot(found: list[tuple[tuple[float, float], str]]) -> None:
    dots = ringed([place for place, _ in found])
    names = placed(dots, [text for _, text in found], WIDTH, HEIGHT)
    boxes = [name.box for name in names]
    assert not any(a.hits(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.hits(_box(dot)) for box in boxes for dot in dots)
    assert all(Box(0, 0, WIDTH, HEIGHT).holds(box) for box in boxes)
    assert [(name.text, name.dot) for name in names] == [
        (text, dot) for (_, text), dot in zip(found, dots, strict=True)
    ]


def test_equal_points_are_rings_with_a_name_each() -> None:
    dots = ringed([(100, 100), (100, 100), (102, 100), (200, 100)])
    assert [(dot.rings, dot.reach) for dot in dots] == [(0, 13), (1, 13), (2, 13), (0, 5)]
    names = placed(dots, ["a", "b", "c", "d"], WIDTH, HEIGHT)
    assert len({name.box for name in names}) == 4
    assert not any(name.is_apart for name in names)


def test_a_name_far_from_its_dot_has_a_line() -> None:
    many = [(240.0, 150.0)] * 12
    names = placed(ringed(many), ["a long name"] * 12, WIDTH, HEIGHT)
    assert not names[0].is_apart
    assert names[-1].is_apart


def test_a_full_plot_keeps_names_inside() -> None:
    names = placed(ringed([(10, 20)] * 5), ["name"] * 5, 100, 40)
    assert all(Box(0, 0, 100, 40).holds(name.box) for name in names)


def test_a_drawing_has_its_names_as_text() -> None:
    if not charts.charts_available():
        pytest.skip("pygal is not installed")
    series: dict[str, list[tuple[float, float, str]]] = {
        "a<b": [(2.0, 0.9, "a<b")],
        "c": [(2.0, 0.9, "c")],
        "f": [(1, 0.8, "1x"), (3, 1, "3x")],
    }
    (chart,) = charts.scatter("quality", series, x_title="speed", y_title="quality")
    texts = re.findall(r"<text [^>]*paint-order[^>]*>([^<]*)</text>", chart["svg"])
    assert texts == ["a&lt;b", "c", "1x", "3x"]
    radii = re.findall(r'<circle [^>]*\br="([\d.]+)"', chart["svg"])
    assert radii == ["5", "8", "5", "5"]
    assert named("<svg></svg>", ["a"]) == "<svg></svg>"
