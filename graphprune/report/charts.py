"""Charts as inline SVG, drawn by pygal; without it (it is the extra `report`) there are none."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.report.budget import Front
    from graphprune.report.report import Report
    from graphprune.report.sensitivity import Cost, Sensitivity

Chart = dict[str, Any]

_COLORS = (
    *("#2f6fb3", "#d9822b", "#3f9b6c", "#8a5fb0", "#c04b5a"),
    *("#5c6f82", "#1f9bb0", "#b8a12c", "#d35fa0", "#6b4a2f"),
)
TITLES = {"head": "Attention heads", "kv_group": "Key/value groups", "neuron": "Neurons"}


def charts_available() -> bool:
    """Whether pygal, which draws the charts, is installed."""
    return importlib.util.find_spec("pygal") is not None


def short_names(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Ids by their layer's number alone, "layer 0" for "encoder.layer.0.output.weight[1]".

    Where that does not tell them apart, they stay whole.
    """
    split = {name: name.split(".") for name in names}
    numbered = {
        name: next(
            (f"{parts[i - 1]} {part}" for i, part in enumerate(parts) if i and part.isdigit()), name
        )
        for name, parts in split.items()
    }
    if len(set(numbered.values())) == len(numbered):
        return numbered
    return {name: name for name in names}


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, so that layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def error_charts(report: Report, errors: Mapping[str, float]) -> list[Chart]:
    """Output error of each group, and cost of its units, a chart a pass."""
    charts: list[Chart] = []
    for title, details in report.steps():
        mine = details.get("output_error")
        if isinstance(mine, Mapping) and mine:
            names = short_names(list(mine))
            ordered = sorted(mine, key=lambda name: natural(name))
            values = {"error": [errors[name] for name in ordered]}
            charts += bars(title, [names[name] for name in ordered], values)
        costs = details.get("score_curves")
        if isinstance(costs, Mapping) and costs:
            charts += curves(f"{title}: cost of the units, in order of removal", costs)
    return charts


def degree_chart(caption: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Chart]:
    """How many units have how many connections, before and after; nothing where widths differ."""
    old, new = before["histogram"], after["histogram"]
    if (old["from"], old["to"]) != (new["from"], new["to"]):
        return []  # units have other widths by now
    bins = len(old["counts"])
    step = (old["to"] - old["from"]) / bins
    labels = [f"{old['from'] + i * step:.0f}" for i in range(bins)]
    return bars(caption, labels, {"before": old["counts"], "after": new["counts"]})


def sensitivity_charts(costs: Sequence[Cost]) -> list[Chart]:
    """Output error of each group by ratio, a chart a role."""
    charts: list[Chart] = []
    for role in dict.fromkeys(c.role for c in costs):
        mine = [c for c in costs if c.role == role]
        names = short_names(list(dict.fromkeys(c.group for c in mine)))
        series = {
            f"{100 * ratio:g} %": [c.error for c in mine if c.ratio == ratio]
            for ratio in dict.fromkeys(c.ratio for c in mine)
        }
        title = TITLES.get(role, role)
        charts += bars(f"{title}: output error", list(names.values()), series)
    return charts


def time_charts(found: Sensitivity) -> list[Chart]:
    """Speed-up of each role by ratio, where times were measured."""
    if not found.times:
        return []
    ratios = list(dict.fromkeys(t.ratio for t in found.times))
    series = {
        role: [t.dense_ms / t.ms for t in found.times if t.role == role]
        for role in dict.fromkeys(t.role for t in found.times)
    }
    return bars("times faster than dense, by part removed", [f"{r:.0%}" for r in ratios], series)


def pair(caption: str, values: Mapping[str, float]) -> list[Chart]:
    """A few values to compare, with their figures."""
    return bars(caption, list(values), {"": list(values.values())}, print_values=True, height=220)


def bars(
    caption: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    print_values: bool = False,
    height: int = 280,
) -> list[Chart]:
    """A bar chart, or nothing where it cannot be drawn."""
    if not charts_available():
        return []
    chart = _pygal().Bar(
        **_options(len(series) > 1, height),
        print_values=print_values,
        x_label_rotation=0 if len(labels) <= 6 else 30,
    )
    chart.x_labels = list(labels)
    for name, values in series.items():
        chart.add(name, list(values))
    return [_chart(chart, caption)]


def curves(caption: str, curves: Mapping[str, Sequence[float]]) -> list[Chart]:
    """One line a group."""
    names = short_names(list(curves))
    return lines(
        caption,
        {
            names[group]: [(i / max(len(values) - 1, 1), v) for i, v in enumerate(values)]
            for group, values in curves.items()
        },
    )


def lines(caption: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> list[Chart]:
    """Points (x, y) joined to a line each."""
    if not series or not charts_available():
        return []
    chart = _pygal().XY(**_options(len(series) > 1, 280), show_dots=False)
    for name, values in series.items():
        chart.add(name, list(values))
    return [_chart(chart, caption)]


def points(
    caption: str, series: Mapping[str, Sequence[tuple[float, float]]], line: str
) -> list[Chart]:
    """Points (x, y) of several series; the one called `line` is drawn as a line."""
    if not charts_available():
        return []
    size = {"width": 1000, "include_x_axis": False}
    chart = _pygal().XY(**{**_options(True, 480), **size}, stroke=False, dots_size=4)
    for name, values in series.items():
        chart.add(name, list(values), stroke=name == line, show_dots=name != line)
    return [_chart(chart, caption)]


def front_charts(front: Front) -> list[Chart]:
    """Speed against quality: the family as a curve with a dot a model, the others as dots."""
    if not charts_available():
        return []
    size = {"width": 1000, "include_x_axis": False}
    axes = {"x_title": "times faster than dense", "y_title": front.metric}
    chart = _pygal().XY(**{**_options(True, 480), **size, **axes}, dots_size=5)
    family = sorted((p.faster, p.quality) for p in front.family)
    chart.add(front.model, family)
    for point in front.others:
        chart.add(point.name, [(point.faster, point.quality)], stroke=False)
    better = "higher" if front.higher_is_better else "lower"
    return [_chart(chart, f"{front.metric}, {better} is better, by speed on {front.where}")]


def _pygal() -> Any:
    """The library, without the import hook that it leaves behind.

    The hook is for its map plug-ins and of a kind that Python 3.12 no longer knows; while it is
    there, every later import in the process warns.
    """
    import pygal
    import pygal.style

    hooks = [hook for hook in sys.meta_path if type(hook).__module__ == "pygal"]
    for hook in hooks:
        sys.meta_path.remove(hook)
    return pygal


def _options(legend: bool, height: int) -> dict[str, Any]:
    style = _pygal().style.Style(
        background="transparent",
        plot_background="transparent",
        foreground="#687585",
        foreground_strong="#1d2733",
        foreground_subtle="#dde3ea",
        font_family="system-ui, sans-serif",
        guide_stroke_color="#dde3ea",
        major_guide_stroke_color="#c9d2dc",
        guide_stroke_dasharray="none",
        major_guide_stroke_dasharray="none",
        label_font_size=12,
        major_label_font_size=12,
        legend_font_size=12,
        value_font_size=13,
        value_colors=("#fff",) * len(_COLORS),
        opacity=1,
        colors=_COLORS,
    )
    return {
        # Its tooltips are a script from a server; the page must do without any.
        "js": (),
        "disable_xml_declaration": True,
        "width": 560,
        "height": height,
        "margin": 8,
        "style": style,
        "show_legend": legend,
        "truncate_label": -1,
        "truncate_legend": -1,
        "legend_box_size": 11,
        "include_x_axis": True,
        "value_formatter": lambda value: f"{value:.4g}",
    }


def _chart(chart: Any, caption: str) -> Chart:
    import markupsafe

    svg = str(chart.render(is_unicode=True))
    # Script and comments of the library: the page works without, and names no server.
    svg = re.sub(r"<script.*?</script>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return {"svg": markupsafe.Markup(svg), "caption": caption}
