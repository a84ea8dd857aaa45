"""The README's picture: speed against quality of families that `graphprune front` made.

    graphprune front minilm ... -o family --json > float.json
    graphprune front minilm --quantize int8-dynamic ... -o family-int8 --json > int8.json
    python -m benchmarks.picture float=float.json int8=int8.json -o docs/front.svg

A line a family; the dense model in float and in int8, from the first file, are points of their own.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

STYLE = {
    "background": "white",
    "plot_background": "white",
    "colors": ("#2f6fb3", "#d9822b", "#5c6f82", "#c04b5a"),
    "font_family": "sans-serif",
    "label_font_size": 13,
    "major_label_font_size": 13,
    "legend_font_size": 14,
    "title_font_size": 15,
    "guide_stroke_color": "#dddddd",
    "major_guide_stroke_color": "#dddddd",
    "guide_stroke_dasharray": "1,0",
    "major_guide_stroke_dasharray": "1,0",
}


def draw(fronts: dict[str, dict[str, Any]]) -> str:
    """The picture of fronts by name, as SVG."""
    import pygal
    from pygal.style import Style

    first = next(iter(fronts.values()))
    chart = pygal.XY(
        style=Style(**STYLE),
        width=760,
        height=420,
        margin_bottom=45,
        x_title="times faster than the dense float model",
        y_title=first["metric"],
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        dots_size=5,
        show_x_guides=True,
        js=[],
    )
    for name, front in fronts.items():
        points = [(point["faster"], point["quality"]) for point in front["family"]]
        chart.add(f"pruned, {name}", sorted(points))
    for point in sorted(first["others"], key=lambda point: float(point["faster"])):
        chart.add(point["name"], [(point["faster"], point["quality"])], stroke=False, dots_size=8)
    # A picture needs no script.
    return re.sub(r"<script.*?</script>", "", chart.render(is_unicode=True), flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture")
    parser.add_argument("front", nargs="+", metavar="NAME=FILE")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    pairs = (item.partition("=") for item in options.front)
    found = {name: json.loads(Path(file).read_text(encoding="utf-8")) for name, _, file in pairs}
    options.out.write_text(draw(found), encoding="utf-8")
