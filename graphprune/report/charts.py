"""Charts as inline SVG, drawn by pygal; without it (it is the extra `report`) there are none."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.report.dots import named

if TYPE_CHECKING:
    from graphprune.report.budget import Front
    from graphprune.report.compare import Overview
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
            charts += bars(title, [names[name] for name in ordered], values, y_title="output error")
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
    return bars(
        caption,
        labels,
        {"before": old["counts"], "after": new["counts"]},
        x_title="living connections of a unit",
        y_title="units",
    )


def sensitivity_charts(costs: Sequence[Cost]) -> list[Chart]:
    """Output error of each group by ratio, a chart a role; all of them have one scale."""
    charts: list[Chart] = []
    largest = max((c.error for c in costs), default=0.0)
    for role in dict.fromkeys(c.role for c in costs):
        mine = [c for c in costs if c.role == role]
        names = short_names(list(dict.fromkeys(c.group for c in mine)))
        series = {
            f"{100 * ratio:g} % removed": [c.error for c in mine if c.ratio == ratio]
            for ratio in dict.fromkeys(c.ratio for c in mine)
        }
        charts += bars(
            f"{TITLES.get(role, role)}: output error, each group cut alone",
            list(names.values()),
            series,
            y_title="output error",
            top=largest,
        )
    return charts


def time_charts(found: Sensitivity) -> list[Chart]:
    """Speed-up of each role by ratio, where times were measured."""
    if not found.times:
        return []
    ratios = list(dict.fromkeys(t.ratio for t in found.times))
    series = {
        TITLES.get(role, role): [t.dense_ms / t.ms for t in found.times if t.role == role]
        for role in dict.fromkeys(t.role for t in found.times)
    }
    return bars(
        "Times faster than dense, all groups of a role cut",
        [f"{r:.0%}" for r in ratios],
        series,
        x_title="units removed",
        y_title="times faster",
    )


def largest_first(
    values: Mapping[str, Mapping[str, float]], most: int
) -> list[tuple[str, list[float | None]]]:
    """(key, value of each side or None), the largest first, and all but `most` keys as "others"."""
    keys = list(dict.fromkeys(key for side in values.values() for key in side))
    keys.sort(key=lambda key: -max(side.get(key, 0.0) for side in values.values()))
    rows = [(key, [side.get(key) for side in values.values()]) for key in keys[:most]]
    if rest := keys[most:]:
        sums: list[float | None] = [sum(s.get(k, 0.0) for k in rest) for s in values.values()]
        rows.append(("others", sums))
    return rows


def operator_charts(operators: Mapping[str, Mapping[str, float]], most: int = 8) -> list[Chart]:
    """Milliseconds by operator type, dense beside pruned."""
    rows = largest_first(operators, most)
    series = {which: [values[i] or 0.0 for _, values in rows] for i, which in enumerate(operators)}
    labels = [name for name, _ in rows]
    return bars("Milliseconds of a run by operator", labels, series, y_title="ms a run")


def weight_charts(weights: Mapping[str, Mapping[str, int]]) -> list[Chart]:
    """Megabytes of the file by what they are for, dense beside pruned."""
    roles = list(dict.fromkeys(role for sizes in weights.values() for role in sizes))
    series = {which: [sizes.get(r, 0) / 1e6 for r in roles] for which, sizes in weights.items()}
    return bars("Megabytes of the file by what they are for", roles, series, y_title="MB")


def pair(caption: str, values: Mapping[str, float], unit: str) -> list[Chart]:
    """A few values to compare, with their figures."""
    series = {"": list(values.values())}
    return bars(caption, list(values), series, print_values=True, height=220, y_title=unit)


def bars(
    caption: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    print_values: bool = False,
    height: int = 300,
    x_title: str = "",
    y_title: str = "",
    top: float | None = None,
) -> list[Chart]:
    """A bar chart, or nothing where it cannot be drawn.

    Args:
        caption: what stands below.
        labels: of the places on the x axis.
        series: heights of the bars by the name of what they are of.
        print_values: whether the figures stand on the bars.
        height: pixels, of a width of 560.
        x_title, y_title: names of the axes, with units.
        top: end of the y axis, for charts that are to be compared; by default the data's.
    """
    if not charts_available():
        return []
    upright = len(labels) <= 6 and max(map(len, labels), default=0) <= 12
    chart = _pygal().Bar(
        **_options(height),
        print_values=print_values,
        x_label_rotation=0 if upright else 30,
        x_title=x_title or None,
        y_title=y_title or None,
        **({} if top is None else {"range": (0, top)}),
    )
    chart.x_labels = list(labels)
    for name, values in series.items():
        chart.add(
            name,
            [
                {"value": value, "label": f"{' '.join((label, name)).strip()}: {value:.4g}"}
                for label, value in zip(labels, values, strict=True)
            ],
        )
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
        x_title="fraction of the units removed",
        y_title="cost",
    )


def lines(
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str = "",
    y_title: str = "",
) -> list[Chart]:
    """Points (x, y) joined to a line each."""
    if not series or not charts_available():
        return []
    chart = _pygal().XY(
        **_options(300),
        dots_size=2,
        x_title=x_title or None,
        y_title=y_title or None,
    )
    for name, values in series.items():
        chart.add(name, list(values))
    return [_chart(chart, caption)]


def points(
    caption: str, series: Mapping[str, Sequence[tuple[float, float]]], line: str
) -> list[Chart]:
    """Points (x, y) of several series; the one called `line` is drawn as a line."""
    if not charts_available():
        return []
    chart = _pygal().XY(**{**_options(460), **_WIDE}, stroke=False, dots_size=4)
    for name, values in series.items():
        chart.add(name, list(values), stroke=name == line, show_dots=name != line)
    return [_chart(chart, caption)]


def front_charts(front: Front) -> list[Chart]:
    """Speed against quality: the family as a curve with a dot a model, the others as dots."""
    better = "higher" if front.higher_is_better else "lower"
    return scatter(
        f"{front.metric}, {better} is better, by speed on {front.where}",
        {
            front.model: sorted((p.faster, p.quality, p.name) for p in front.family),
            **{p.name: [(p.faster, p.quality, p.name)] for p in front.others},
        },
        x_title="times faster than dense",
        y_title=front.metric,
        wide=True,
    )


def compare_charts(found: Overview) -> list[Chart]:
    """Quality by speed and by size, of the models that were evaluated alike; else size by speed."""
    alike = [e for e in found.entrants if e.quality is not None and e.evaluated_by == found.metric]
    by_speed = {
        e.name: [(e.faster, e.quality, e.name)]
        for e in alike
        if e.faster is not None and e.quality is not None
    }
    by_size = {
        e.name: [(e.mb, e.quality, e.name)]
        for e in alike
        if e.mb is not None and e.quality is not None
    }
    quality = found.metric.partition(", ")[0]
    if alike:
        speed = "times faster than dense"
        return [
            *scatter(f"{quality} by speed", by_speed, x_title=speed, y_title=quality),
            *scatter(f"{quality} by size", by_size, x_title="MB", y_title=quality),
        ]
    sizes = {
        e.name: [(e.faster, e.mb, e.name)]
        for e in found.entrants
        if e.faster is not None and e.mb is not None
    }
    return scatter("Size by speed", sizes, x_title="times faster than dense", y_title="MB")


def scatter(
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    x_title: str,
    y_title: str,
    wide: bool = False,
) -> list[Chart]:
    """Points (x, y, name) of several series with their names, those of one joined by a line."""
    if not series or not charts_available():
        return []
    options = {**_options(460), **_WIDE} if wide else {**_options(360), "include_x_axis": False}
    chart = _pygal().XY(**options, x_title=x_title, y_title=y_title, dots_size=5)
    for name, marks in series.items():
        dots = [
            {"value": (x, y), "label": f"{label}: {x_title} {x:.4g}, {y_title} {y:.4g}"}
            for x, y, label in marks
        ]
        chart.add(name, dots, stroke=len(dots) > 1)
    texts = [label for marks in series.values() for _, _, label in marks]
    return [_chart(chart, caption, texts)]


_WIDE = {"width": 760, "include_x_axis": False}


def _pygal() -> Any:
    """The library, without the import hook that it installs.

    The hook is for its map plug-ins and of a kind that Python 3.12 no longer knows; while it is
    there, every later import in the process warns.
    """
    import pygal
    import pygal.style

    hooks = [hook for hook in sys.meta_path if type(hook).__module__ == "pygal"]
    for hook in hooks:
        sys.meta_path.remove(hook)
    return pygal


def _options(height: int) -> dict[str, Any]:
    style = _pygal().style.Style(
        background="transparent",
        plot_background="transparent",
        # The page's own colors, which are others in the dark.
        foreground="var(--dim)",
        foreground_strong="var(--ink)",
        foreground_subtle="var(--line)",
        font_family="system-ui, sans-serif",
        guide_stroke_color="var(--line)",
        major_guide_stroke_color="var(--line)",
        guide_stroke_dasharray="none",
        major_guide_stroke_dasharray="none",
        label_font_size=12,
        major_label_font_size=12,
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
        # The page has one of its own, which wraps where it is narrow.
        "show_legend": False,
        "truncate_label": -1,
        "include_x_axis": True,
        "value_formatter": lambda value: f"{value:.4g}",
    }


def _chart(chart: Any, caption: str, texts: Sequence[str] = ()) -> Chart:
    """A drawing for the page; `texts` are the names of its dots, where they are written out."""
    import markupsafe

    svg = str(chart.render(is_unicode=True))
    # Script and comments of the library: the page works without, and names no server.
    svg = re.sub(r"<script.*?</script>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _titled(svg)
    if texts:
        svg = named(svg, texts)
    names = [str(more["title"]) for _, more in chart.raw_series]
    legend = [(name, _COLORS[i % len(_COLORS)]) for i, name in enumerate(names) if len(names) > 1]
    return {"svg": markupsafe.Markup(svg), "caption": caption, "legend": legend}


def _titled(svg: str) -> str:
    """Values that browsers show where the mouse is: a mark's label, else its value.

    The library has them as descriptions, for its script, and beside them where to put its tooltip.
    """
    svg = re.sub(r'<title>Pygal</title>|<desc class="(x|y)[^"]*">.*?</desc>', "", svg)
    described = r'<desc class="label">(.*?)</desc>(?:<desc class="value">.*?</desc>)?'
    svg = re.sub(described, r"<title>\1</title>", svg)
    return re.sub(r'<desc class="value">(.*?)</desc>', r"<title>\1</title>", svg)
