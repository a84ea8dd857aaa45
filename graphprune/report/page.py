"""Pages for people: the artifact's report and a sensitivity analysis, each one file, no network.

Text, tables and the picture of layers come from templates. Charts are drawn by pygal as inline SVG;
without it (it is the extra `report`) the same figures stay tables.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.pipeline.events import JSON
from graphprune.report.report import HEADER, Report, change_text, megabytes_text

if TYPE_CHECKING:
    from graphprune.report.sensitivity import Cost, Sensitivity

Rows = list[Sequence[str]]
Chart = dict[str, Any]

# Groups with at most so many units are drawn unit by unit; as a bar wider ones, and those of which
# it is not told what stayed.
_DRAWN = 64
_COLOURS = (
    *("#2f6fb3", "#d9822b", "#3f9b6c", "#8a5fb0", "#c04b5a"),
    *("#5c6f82", "#1f9bb0", "#b8a12c", "#d35fa0", "#6b4a2f"),
)
_TITLES = {"head": "Attention heads", "kv_group": "Key/value groups", "neuron": "Neurons"}


def report_page(report: Report, manifest: Mapping[str, Any]) -> str:
    """The artifact's report as one HTML page.

    Args:
        report: what the compilation did.
        manifest: the artifact's manifest, or as much of it as there is: sizes, measurements,
            parity, inputs and outputs, versions, and under "results" what was noted later:
            "timing", "quality", "dense_training".
    """
    measured, charts = _measured(manifest)
    errors = _output_errors(report)
    return _render(
        "report.html.j2",
        title=f"{report.model}: graphprune report",
        name=report.model,
        headline=report.headline(),
        sizes=[*report.size_rows(), *_file_rows(manifest)],
        measured=measured,
        measured_charts=charts,
        roles=_roles(report),
        errors=[(name, f"{error:.4f}") for name, error in errors.items()],
        error_charts=_error_charts(report, errors),
        matrices=_matrices(report),
        trainings=_trainings([*_trained_first(manifest), *report.steps()]),
        pass_header=HEADER,
        passes=report.rows(),
        skipped=report.skipped_lines(),
        frozen=report.frozen_lines(),
        warnings=list(
            dict.fromkeys(w for _, details in report.steps() for w in details.get("warnings") or ())
        ),
        recipe=_recipe(report),
        verification=[
            report.verification() + ".",
            *_parity_lines(manifest),
            *_low_bit_lines(manifest),
        ],
        inputs=_interface(manifest),
        limits=report.limits,
        footer=_footer(manifest),
    )


def sensitivity_page(found: Sensitivity, name: str) -> str:
    """A sensitivity analysis as one HTML page."""
    ratios = [f"{100 * ratio:g} %" for ratio in found.ratios]
    errors: dict[str, list[str]] = {}
    for cost in found.costs:
        errors.setdefault(cost.group, []).append(f"{cost.error:.4f}")
    return _render(
        "sensitivity.html.j2",
        title=f"Sensitivity of {name}",
        name=name,
        headline=(
            f"score {found.score}, compensation {found.compensation}, outputs compared on "
            f"{found.samples:,} samples"
        ),
        error_charts=_sensitivity_charts(found.costs),
        errors=[(group, *values) for group, values in errors.items()],
        error_header=["group", *(f"{ratio} removed" for ratio in ratios)],
        times=[
            (
                f"{t.role}, {100 * t.ratio:g} %",
                f"{t.ms:.2f}",
                f"{t.dense_ms:.2f}",
                f"{t.dense_ms / t.ms:.2f}x",
            )
            for t in found.times
        ],
        time_charts=_time_charts(found),
        skipped=[f"{group}: {reason}" for group, reason in found.skipped.items()],
        footer=_footer({}),
    )


def points_page(
    title: str,
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    line: str = "",
) -> str:
    """Points (x, y) of several series as one HTML page, a table under the picture.

    The series called `line` is drawn as one.
    """
    charts: list[Chart] = []
    if charts_available():
        size = {"width": 1000, "include_x_axis": False}
        chart = _pygal().XY(**{**_options(True, 480), **size}, stroke=False, dots_size=4)
        for name, points in series.items():
            chart.add(name, list(points), stroke=name == line, show_dots=name != line)
        charts = [_chart(chart, caption)]
    rows = [(name, f"{x:.4g}", f"{y:.4g}") for name, points in series.items() for x, y in points]
    return _render(
        "points.html.j2",
        title=title,
        name=title,
        charts=charts,
        rows=rows,
        footer=_footer({}),
    )


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


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphprune", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


# --- what was measured -------------------------------------------------------------------------


def _file_rows(manifest: Mapping[str, Any]) -> Rows:
    sizes = manifest.get("sizes") or {}
    pruned, dense = sizes.get("model.onnx"), sizes.get("baseline.onnx")
    if pruned is None:
        return []
    change = "" if dense is None else change_text(dense, pruned)
    left = "" if dense is None else megabytes_text(dense)
    return [("MB on disk (ONNX)", left, megabytes_text(pruned), change)]


def _measured(manifest: Mapping[str, Any]) -> tuple[Rows, list[Chart]]:
    """Rows and charts of time and quality, those that were measured."""
    rows: Rows = []
    charts: list[Chart] = []
    time = _timing(manifest)
    if time is not None:
        what, dense, pruned, speedup = time
        rows.append((what, f"{dense:.2f}", f"{pruned:.2f}", f"{speedup:.2f}x faster"))
        charts += _pair("Milliseconds, less is better", {"dense": dense, "pruned": pruned})
    quality = (manifest.get("results") or {}).get("quality") or {}
    if "pruned" in quality:
        ours, theirs = quality["pruned"], quality.get("dense")
        title = f"{ours['task']}: {ours['metric']}"
        value = ours["value"]
        pair = {"pruned": value}
        left = change = ""
        if theirs is not None:
            pair = {"dense": theirs["value"], **pair}
            left, change = f"{theirs['value']:.4f}", f"{value - theirs['value']:+.4f}"
        rows.append((title, left, f"{value:.4f}", change))
        better = "more" if ours.get("higher_is_better", True) else "less"
        charts += _pair(f"{title}, {better} is better", pair)
    return rows, charts


def _timing(manifest: Mapping[str, Any]) -> tuple[str, float, float, float] | None:
    """What was timed, dense and pruned milliseconds, their ratio; else the exporter's glance."""
    timing = (manifest.get("results") or {}).get("timing")
    if timing:
        what = f"ms, batch {timing['batch']}, {timing['threads']} thread(s)"
        return what, timing["dense_ms"], timing["pruned_ms"], timing["speedup"]
    for found in manifest.get("measurements") or ():
        what = f"ms on the example inputs, {found['threads']} thread(s)"
        return what, found["against"]["ms"], found["model"]["ms"], found["ratio"]
    return None


# --- layers ------------------------------------------------------------------------------------


def _roles(report: Report) -> list[dict[str, Any]]:
    """For each role: its groups with what stayed of them, through all passes."""
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for _, details in report.steps():
        for group in _entries(details.get("groups")):
            layer = layers.setdefault(str(group["role"]), {}).setdefault(
                str(group["id"]), _whole(int(group["before"]))
            )
            told = (details.get("kept") or {}).get(group["id"])
            layer["kept"] = _composed(layer["kept"], told, group)
            layer["left"], layer["cut"] = int(group["after"]), True
        for group in _entries(details.get("skipped")):
            if group.get("size"):
                layers.setdefault(str(group["role"]), {}).setdefault(
                    str(group["id"]), _whole(int(group["size"]))
                )
    # A role of which nothing was cut has nothing to show.
    return [
        {"title": _TITLES.get(role, role), "layers": _drawn(groups)}
        for role, groups in layers.items()
        if any(layer["cut"] for layer in groups.values())
    ]


def _whole(size: int) -> dict[str, Any]:
    return {"size": size, "left": size, "kept": list(range(size)), "cut": False}


def _entries(groups: JSON) -> list[Mapping[str, Any]]:
    return [g for g in groups or () if isinstance(g, Mapping) and "id" in g and "role" in g]


def _composed(before: list[int] | None, told: Any, group: Mapping[str, Any]) -> list[int] | None:
    """Original indices that are left, after a pass that kept these of those before it.

    None where no record says which ones: each head may have lost others.
    """
    if told is None:
        return before if group["after"] == group["before"] else None
    return None if before is None else [before[i] for i in told]


def _drawn(groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = short_names(list(groups))
    ordered = sorted(groups, key=lambda name: _natural(names[name]))
    rows = []
    for name in ordered:
        size, left, kept = (groups[name][key] for key in ("size", "left", "kept"))
        alive = set(kept or ())
        by_unit = kept is not None and size <= _DRAWN
        rows.append(
            {
                "id": name,
                "name": names[name],
                "units": [i in alive for i in range(size)] if by_unit else [],
                "percent": f"{100 * left / size:.1f}",
                "count": f"{left:,} of {size:,}",
            }
        )
    return rows


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, so that layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


# --- errors ------------------------------------------------------------------------------------


def _output_errors(report: Report) -> dict[str, float]:
    """Group id -> output error, of all passes; a group cut twice has its last."""
    found: dict[str, float] = {}
    for _, details in report.steps():
        errors = details.get("output_error")
        if isinstance(errors, Mapping):
            found |= {str(name): float(value) for name, value in errors.items()}
    return found


def _error_charts(report: Report, errors: Mapping[str, float]) -> list[Chart]:
    """One chart a pass."""
    charts: list[Chart] = []
    for title, details in report.steps():
        mine = details.get("output_error")
        if isinstance(mine, Mapping) and mine:
            names = short_names(list(mine))
            bars = {names[name]: errors[name] for name in sorted(mine, key=lambda n: _natural(n))}
            charts += _bars(title, list(bars), {"error": list(bars.values())})
        curves = details.get("score_curves")
        if isinstance(curves, Mapping) and curves:
            charts += _curves(f"{title}: cost of the units, in order of removal", curves)
    return charts


def _matrices(report: Report) -> list[dict[str, Any]]:
    """For each pass that zeroed weights: what was reached and lost in every matrix."""
    found = []
    for title, details in report.steps():
        sites = [s for s in details.get("sites") or () if "sparsity" in s]
        if not sites:
            continue
        rows = [
            (
                s["name"],
                " × ".join(map(str, s["shape"])),
                s["pattern"],
                f"{100 * s['sparsity']:.1f} %",
                *(f"{s[key]:.4f}" if key in s else "" for key in ("error_masked", "error")),
                f"{s['seconds']:.2f}",
            )
            for s in sites
        ]
        layers: dict[str, list[tuple[float, float]]] = {}
        for i, s in enumerate(sites):
            kind, layer = _without_number(s["name"])
            if "error" in s:
                layers.setdefault(kind, []).append((i if layer is None else layer, s["error"]))
        charts = _lines(f"{title}: output error of each matrix, by layer", layers)
        found.append({"title": title, "rows": rows, "charts": charts})
    return found


def _without_number(name: str) -> tuple[str, int | None]:
    """A dotted name without what is up to its first number, and that number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[i + 1 :]).removesuffix(".weight"), int(part)
    return name.removesuffix(".weight"), None


def _trained_first(manifest: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The training of the dense model, where it was no pass: before all of them."""
    told = (manifest.get("results") or {}).get("dense_training")
    return [("the dense model", told)] if told else []


def _trainings(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each step that trained: its epochs, and how connections are spread over units."""
    found = []
    for title, details in steps:
        epochs = details.get("epochs")
        if not isinstance(epochs, list | tuple) or not epochs:
            continue
        columns = list(dict.fromkeys(key for epoch in epochs for key in epoch))
        rows = [[_number(epoch.get(key)) for key in columns] for epoch in epochs]
        lines = {
            key: [(epoch["epoch"], epoch[key]) for epoch in epochs if key in epoch]
            for key in columns
            if key not in ("epoch", "seconds", "metric")
        }
        charts: list[Chart] = []
        if len(epochs) > 1:
            charts += _lines(f"{title}: loss by epoch", lines)
            metric = [(e["epoch"], e["metric"]) for e in epochs if "metric" in e]
            told = details.get("metric")
            charts += _lines(f"{title}: {told} by epoch", {str(told): metric} if metric else {})
        degrees = details.get("degrees") or {}
        wirings = _wirings(degrees)
        for name, (before, after) in wirings.items():
            charts += _degree_chart(f"{name}: units by living connections", before, after)
        spread = [
            (f"{name}, {when}", f"{told['units']:,}", f"{told['dead']:,}",
             f"{told['mean']:.1f}", f"{told['sd']:.2f}")
            for name, (before, after) in wirings.items()
            for when, told in (("before", before), ("after", after))
        ]  # fmt: skip
        found.append(
            {
                "title": title,
                "header": [_metric_word(key, details) for key in columns],
                "rows": rows,
                "charts": charts,
                "degrees": spread,
            }
        )
    return found


def _wirings(degrees: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Kind of weights -> topology before and after; one without a name has one kind only."""
    before, after = degrees.get("before") or {}, degrees.get("after") or {}
    if "histogram" in before and "histogram" in after:
        return {"weights into neurons": (before, after)}
    names = {"expanding": "weights into neurons", "contracting": "weights out of neurons"}
    return {
        names.get(kind, kind): (before[kind], after[kind])
        for kind in before
        if before[kind] and after.get(kind)
    }


def _degree_chart(caption: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Chart]:
    old, new = before["histogram"], after["histogram"]
    if (old["from"], old["to"]) != (new["from"], new["to"]):
        return []  # units have other widths by now
    bins = len(old["counts"])
    step = (old["to"] - old["from"]) / bins
    labels = [f"{old['from'] + i * step:.0f}" for i in range(bins)]
    return _bars(caption, labels, {"before": old["counts"], "after": new["counts"]})


def _metric_word(key: str, details: Mapping[str, Any]) -> str:
    return str(details.get("metric") or key) if key == "metric" else key


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _sensitivity_charts(costs: Sequence[Cost]) -> list[Chart]:
    charts: list[Chart] = []
    for role in dict.fromkeys(c.role for c in costs):
        mine = [c for c in costs if c.role == role]
        names = short_names(list(dict.fromkeys(c.group for c in mine)))
        series = {
            f"{100 * ratio:g} %": [c.error for c in mine if c.ratio == ratio]
            for ratio in dict.fromkeys(c.ratio for c in mine)
        }
        title = _TITLES.get(role, role)
        charts += _bars(f"{title}: output error", list(names.values()), series)
    return charts


def _time_charts(found: Sensitivity) -> list[Chart]:
    if not found.times:
        return []
    ratios = list(dict.fromkeys(t.ratio for t in found.times))
    series = {
        role: [t.dense_ms / t.ms for t in found.times if t.role == role]
        for role in dict.fromkeys(t.role for t in found.times)
    }
    return _bars("times faster than dense, by part removed", [f"{r:.0%}" for r in ratios], series)


# --- charts ------------------------------------------------------------------------------------


def charts_available() -> bool:
    """Whether pygal, which draws the charts, is installed."""
    return importlib.util.find_spec("pygal") is not None


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


def _pair(caption: str, values: Mapping[str, float]) -> list[Chart]:
    return _bars(caption, list(values), {"": list(values.values())}, print_values=True, height=220)


def _bars(
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


def _curves(caption: str, curves: Mapping[str, Sequence[float]]) -> list[Chart]:
    """One line a group."""
    names = short_names(list(curves))
    return _lines(
        caption,
        {
            names[group]: [(i / max(len(values) - 1, 1), v) for i, v in enumerate(values)]
            for group, values in curves.items()
        },
    )


def _lines(caption: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[Chart]:
    """Points (x, y) joined to a line each."""
    if not lines or not charts_available():
        return []
    chart = _pygal().XY(**_options(len(lines) > 1, 280), show_dots=False)
    for name, points in lines.items():
        chart.add(name, list(points))
    return [_chart(chart, caption)]


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
        value_colors=("#fff",) * len(_COLOURS),
        opacity=1,
        colors=_COLOURS,
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


# --- the rest ----------------------------------------------------------------------------------


def _recipe(report: Report) -> str:
    import yaml

    steps = [p.step for p in report.passes]
    return yaml.safe_dump({"passes": steps}, sort_keys=False, default_flow_style=None)


def _parity_lines(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for file, agreements in (manifest.get("parity") or {}).items():
        worst = max((a["error"] for a in agreements), default=None)
        if worst is not None:
            lines.append(
                f"{file}: ONNX Runtime agrees with the program on {len(agreements)} outputs, "
                f"largest difference {worst:.1e} of a row's scale."
            )
    return lines


def _low_bit_lines(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for file, notes in (manifest.get("quantization") or {}).items():
        drift = notes.get("drift") or ()
        worst, row = (max((d[key] for d in drift), default=0.0) for key in ("error", "largest"))
        drifted = f"; outputs drift by {worst:.1e} of the float ones, {row:.1e} of a row's scale"
        lines.append(
            f"{file}: {notes['scheme']}, {notes['products']} products and {notes['tables']} tables "
            f"quantised, {len(notes.get('float') or ())} left in float{drifted}."
        )
    return lines


def _interface(manifest: Mapping[str, Any]) -> Rows:
    return [
        (f"{kind} {v['name']}", str(v["type"]), " × ".join(map(str, v["shape"])) or "scalar")
        for kind, key in (("input", "inputs"), ("output", "outputs"))
        for v in manifest.get(key) or ()
    ]


def _footer(manifest: Mapping[str, Any]) -> str:
    from graphprune import __version__

    versions = manifest.get("versions") or {}
    told = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions]
    created = [str(manifest["created"])] if "created" in manifest else []
    missing = [] if charts_available() else ["charts: pip install 'graphprune[report]'"]
    return "; ".join([f"graphprune {__version__}", *told, *created, *missing])
