"""Pages for people: the artifact's report and a sensitivity analysis, each one file, no network.

Text, tables and the picture of layers come from templates. Without charts the same figures stay
tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.pipeline.events import JSON
from graphprune.report import charts
from graphprune.report.budget import CANDIDATES, FRONT, BudgetReport, Front
from graphprune.report.charts import Chart
from graphprune.report.report import HEADER, Report, change_text, megabytes_text

if TYPE_CHECKING:
    from graphprune.report.sensitivity import Sensitivity

Rows = list[Sequence[str]]

# Groups with at most so many units are drawn unit by unit; as a bar wider ones, and those of which
# it is not told what stayed.
_DRAWN = 64


def report_page(report: Report, manifest: Mapping[str, Any]) -> str:
    """The artifact's report as one HTML page.

    Args:
        report: what the compilation did.
        manifest: the artifact's manifest, or as much of it as there is: sizes, measurements,
            parity, inputs and outputs, versions, and under "results" what was noted later:
            "timing", "quality", "dense_training".
    """
    measured, drawn = _measured(manifest)
    errors = _output_errors(report)
    return _render(
        "report.html.j2",
        title=f"{report.model}: graphprune report",
        name=report.model,
        headline=report.headline(),
        sizes=[*report.size_rows(), *_file_rows(manifest)],
        measured=measured,
        measured_charts=drawn,
        budgets=[_budget(title, found) for title, found in report.budgets()],
        roles=_roles(report),
        errors=[(name, f"{error:.4f}") for name, error in errors.items()],
        error_charts=charts.error_charts(report, errors),
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


def front_page(front: Front) -> str:
    """Speed against quality of a family as one HTML page, a table under the picture."""
    return _render(
        "front.html.j2",
        title=f"{front.model}: speed against quality",
        front=front,
        charts=charts.front_charts(front),
        rows=front.rows(),
        header=[*FRONT, front.metric],
        footer=_footer({}),
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
        error_charts=charts.sensitivity_charts(found.costs),
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
        time_charts=charts.time_charts(found),
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
    rows = [(name, f"{x:.4g}", f"{y:.4g}") for name, points in series.items() for x, y in points]
    return _render(
        "points.html.j2",
        title=title,
        name=title,
        charts=charts.points(caption, series, line),
        rows=rows,
        footer=_footer({}),
    )


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphprune.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


# --- what was measured -------------------------------------------------------------------------


def _file_rows(manifest: Mapping[str, Any]) -> Rows:
    sizes = manifest.get("sizes") or {}
    deployed = (manifest.get("files") or {}).get("model", "model.onnx").rpartition("/")[2]
    pruned, dense = sizes.get(deployed), sizes.get("baseline.onnx")
    if pruned is None:
        return []
    change = "" if dense is None else change_text(dense, pruned)
    left = "" if dense is None else megabytes_text(dense)
    return [("MB on disk (ONNX)", left, megabytes_text(pruned), change)]


def _measured(manifest: Mapping[str, Any]) -> tuple[Rows, list[Chart]]:
    """Rows and charts of time and quality, those that were measured."""
    rows: Rows = []
    drawn: list[Chart] = []
    times = _timings(manifest)
    for what, dense, pruned, speedup in times:
        rows.append((what, f"{dense:.2f}", f"{pruned:.2f}", f"{speedup:.2f}x faster"))
    for _, dense, pruned, _ in times[:1]:
        drawn += charts.pair("Milliseconds, less is better", {"dense": dense, "pruned": pruned})
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
        drawn += charts.pair(f"{title}, {better} is better", pair)
    return rows, drawn


def _timings(manifest: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """What was timed, dense and pruned milliseconds, their ratio; else the exporter's glance."""
    timing = (manifest.get("results") or {}).get("timing")
    if timing:
        what = f"ms, batch {timing['batch']}, {timing['threads']} thread(s)"
        rows = ((what, timing), (f"{what}, default session options", timing.get("default")))
        return [(what, r["dense_ms"], r["pruned_ms"], r["speedup"]) for what, r in rows if r]
    return [
        (
            f"ms on the example inputs, {found['threads']} thread(s)",
            found["against"]["ms"],
            found["model"]["ms"],
            found["ratio"],
        )
        for found in (manifest.get("measurements") or ())[:1]
    ]


# --- budgets ------------------------------------------------------------------------------------


def _budget(title: str, found: BudgetReport) -> dict[str, Any]:
    """A run to a budget: its figures, the levels of sublayers, the search."""
    best = {"": list(enumerate(found.losses, 1))} if len(found.losses) > 1 else {}
    return {
        "title": title,
        "summary": found.summary,
        "facts": found.fact_rows(),
        "levels": [
            {
                "id": c.id,
                "name": name,
                "percent": f"{100 * c.kept:.1f}",
                "dropped": c.dropped,
                "count": c.count,
                "ms": f"{c.ms:.3g} of {c.dense_ms:.3g} ms",
            }
            for name, c in zip(found.names(), found.choices, strict=True)
        ],
        "candidate_header": CANDIDATES,
        "candidates": found.candidate_rows(),
        "charts": charts.lines(f"{title}: lowest loss so far, by evaluation", best),
        "progress": found.progress_rows(),
        "notes": found.notes(),
    }


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
        {"title": charts.TITLES.get(role, role), "layers": _drawn(groups)}
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
    names = charts.short_names(list(groups))
    ordered = sorted(groups, key=lambda name: charts.natural(names[name]))
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


# --- errors ------------------------------------------------------------------------------------


def _output_errors(report: Report) -> dict[str, float]:
    """Group id -> output error, of all passes; a group cut twice has its last."""
    found: dict[str, float] = {}
    for _, details in report.steps():
        errors = details.get("output_error")
        if isinstance(errors, Mapping):
            found |= {str(name): float(value) for name, value in errors.items()}
    return found


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
        drawn = charts.lines(f"{title}: output error of each matrix, by layer", layers)
        found.append({"title": title, "rows": rows, "charts": drawn})
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
        drawn: list[Chart] = []
        if len(epochs) > 1:
            drawn += charts.lines(f"{title}: loss by epoch", lines)
            metric = [(e["epoch"], e["metric"]) for e in epochs if "metric" in e]
            told = details.get("metric")
            drawn += charts.lines(
                f"{title}: {told} by epoch", {str(told): metric} if metric else {}
            )
        degrees = details.get("degrees") or {}
        wirings = _wirings(degrees)
        for name, (before, after) in wirings.items():
            drawn += charts.degree_chart(f"{name}: units by living connections", before, after)
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
                "charts": drawn,
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


def _metric_word(key: str, details: Mapping[str, Any]) -> str:
    return str(details.get("metric") or key) if key == "metric" else key


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


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
            f"quantized, {len(notes.get('float') or ())} left in float{drifted}."
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
    missing = [] if charts.charts_available() else ["charts: pip install 'graphprune[report]'"]
    return "; ".join([f"graphprune {__version__}", *told, *created, *missing])
