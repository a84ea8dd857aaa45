"""The README's picture: speed against quality of families that `graphprune front` made.

    graphprune front minilm ... -o family
    graphprune front minilm --quantize int8-dynamic ... -o family-int8
    python -m benchmarks.picture float=family int8=family-int8 -o docs/front.svg

A line a family, through the artifacts in its folder; the dense model in float and in int8 (the
artifact "dense-int8" of the first family) are points of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphprune as gp

Point = tuple[float, float]


def measured(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and results of the artifacts in a family's folder."""
    for path in sorted(folder.iterdir()):
        if (path / "graphprune").is_dir():
            yield path.name, gp.open(path).manifest["results"]


def point(results: dict[str, Any], which: str = "pruned") -> Point:
    """(times faster, quality)."""
    faster = results["timing"]["speedup"] if which == "pruned" else 1.0
    return faster, results["quality"][which]["value"]


def draw(families: dict[str, Path]) -> bytes:
    """The picture as SVG."""
    import pygal
    from pygal.style import Style

    style = Style(
        background="white",
        plot_background="white",
        colors=("#2f6fb3", "#d9822b", "#5c6f82", "#c04b5a"),
        font_family="sans-serif",
        label_font_size=13,
        legend_font_size=14,
        title_font_size=15,
    )
    first = dict(measured(next(iter(families.values()))))
    int8 = first.pop("dense-int8")
    metric = int8["quality"]["pruned"]["metric"]
    chart = pygal.XY(
        style=style,
        width=760,
        height=400,
        x_title="times faster than the dense float model",
        y_title=metric,
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        dots_size=5,
        show_x_guides=True,
        js=[],
    )
    dense = point(int8, "dense")
    for name, folder in families.items():
        found = [point(r) for n, r in measured(folder) if n != "dense-int8"]
        chart.add(f"pruned, {name}", sorted(found))
    chart.add("dense", [dense], stroke=False, dots_size=8)
    chart.add("dense int8", [point(int8)], stroke=False, dots_size=8)
    svg: bytes = chart.render()
    return svg


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture")
    parser.add_argument("family", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    pairs = (item.partition("=") for item in options.family)
    options.out.write_bytes(draw({name: Path(folder) for name, _, folder in pairs}))
