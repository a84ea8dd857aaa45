"""Pages for people: the artifact's report and a sensitivity analysis, each one file, no network.

Text, tables and the picture of layers come from templates. Without charts the same figures stay
tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.pipeline.events import JSON
from graphprune.report import charts
from graphprune.report.advice import PLACES, next_steps
from graphprune.report.budget import CANDIDATES, FRONT, BudgetReport, Front
from graphprune.report.charts import Chart
from graphprune.report.measured import (
    CHOICES,
    CHOICES_HEADER,
    THRESHOLDS,
    Measured,
    short,
    times_text,
)
from graphprune.report.report import ERRORS, HEADER, Report, quantized_text

if TYPE_CHECKING:
    from graphprune.report.compare import Overview
    from graphprune.report.sensitivity import Sensitivity

Rows = list[Sequence[str]]

# Groups with at most so many units are drawn unit by unit; as a bar wider ones, and those of which
# nothing says what stayed.
_DRAWN = 64
_ALL = 1000  # rows of a table of operators


def report_page(report: Report, manifest: Mapping[str, Any]) -> str:
    """The artifact's report as one HTML page.

    Args:
        report: what the compilation did.
        manifest: the artifact's manifest, or as much of it as there is: sizes, measurements,
            parity, inputs and outputs, versions, and under "results" what was noted later:
            "timing", "operators", "quality", "dense_training".
    """
    found = Measured(manifest)
    errors = _output_errors(report)
    matrices = _matrices(report)
    return _render(
        "report.html.j2",
        title=f"{report.model}: graphprune report",
        name=report.model,
        headline=report.headline(found),
        tiles=found.tiles(),
        thresholds=THRESHOLDS,
        measured_on=found.measured_on(),
        command=found.command,
        is_glance=found.is_glance,
        guessing=found.guessing(),
        header=found.header(),
        rows=found.rows(report.size_rows(found)),
        meaning=found.quality_meaning(),
        measured_charts=_measured_charts(found),
        against_int8=_against_int8(found),
        operators=_operator_rows(found),
        operator_header=_sides(found.operators, "ms"),
        operator_charts=charts.operator_charts(found.operators) if found.operators else [],
        choices=found.choices(),
        choices_header=CHOICES_HEADER,
        choices_meaning=CHOICES,
        weights=_weight_rows(found),
        weight_header=_sides(found.weights, "MB"),
        weight_charts=charts.weight_charts(found.weights) if found.weights else [],
        advice=next_steps(report, found),
        places=PLACES,
        runs=_run_lines(report, found, bool(matrices)),
        budgets=[_budget(title, budget) for title, budget in report.budgets()],
        roles=_roles(report),
        errors=[(name, f"{error:.4f}") for name, error in errors.items()],
        error_charts=charts.error_charts(report, errors),
        matrices=matrices,
        trainings=_trainings([*_trained_first(manifest), *report.steps()]),
        pass_header=HEADER,
        passes=report.rows(found),
        errors_meaning=ERRORS,
        skipped=report.skipped_lines(),
        frozen=report.frozen_lines(),
        warnings=list(
            dict.fromkeys(w for _, details in report.steps() for w in details.get("warnings") or ())
        ),
        recipe=_recipe(report),
        verification=[
            report.verification() + ".",
            *_parity_lines(manifest),
            *_low_bit_lines(manifest, found),
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


def compare_page(found: Overview) -> str:
    """Several artifacts side by side as one HTML page."""
    return _render(
        "compare.html.j2",
        title="Artifacts compared",
        metric=found.metric,
        header=found.header(),
        rows=found.rows(),
        places=found.places,
        notes=found.notes,
        charts=charts.compare_charts(found),
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
        conclusion=found.conclusion(),
        recipe=sensitivity_recipe(found),
        expected=found.recipe()[1],
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


def sensitivity_recipe(found: Sensitivity) -> str:
    """The recipe that an analysis suggests, as YAML."""
    import yaml

    return yaml.safe_dump({"passes": found.recipe()[0]}, sort_keys=False, default_flow_style=None)


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


def _measured_charts(found: Measured) -> list[Chart]:
    """Time and quality of each model that was measured, as bars with their figures."""
    drawn: list[Chart] = []
    for times in found.times()[:1]:
        others = {f"dense {name}": ms for name, ms in times.others.items()}
        values = {"dense": times.dense_ms, **others, "pruned": times.pruned_ms}
        drawn += charts.pair(f"{times.what}, less is better", values, "ms a run")
    if (pruned := found.quality.get("pruned")) is not None:
        dense = found.quality.get("dense")
        values = {} if dense is None else {"dense": dense["value"]}
        values["pruned"] = pruned["value"]
        better = "more" if pruned.get("higher_is_better", True) else "less"
        title = f"{pruned['task']}: {pruned['metric']}, {better} is better"
        drawn += charts.pair(title, values, pruned["metric"])
    return drawn


def _against_int8(found: Measured) -> str:
    """How the dense model in few bits compares, in a sentence; empty where it was not measured."""
    times = found.times()
    beside = times[0].others if times else {}
    if not beside:
        return ""
    name, ms = next(iter(beside.items()))
    in_float = times_text(times[0].dense_ms / ms, "faster", "slower")
    return (
        f"The dense model in {name} takes {short(ms)} ms, {in_float} than in float; the pruned "
        f"model is {times_text(ms / times[0].pruned_ms, 'faster', 'slower')} than that."
    )


def _sides(values: Mapping[str, Any], unit: str) -> list[str]:
    """The columns of `_side_rows`."""
    return ["", *(f"{which}, {what}" for which in values for what in (unit, "share"))]


def _side_rows(values: Mapping[str, Mapping[str, float]]) -> Rows:
    """One row a key, the largest first: each side's value and its share in percent."""
    totals = [sum(side.values()) for side in values.values()]
    rows: Rows = []
    for key, sides in charts.largest_first(values, _ALL):
        pairs = (
            ("", "") if v is None else (short(v), f"{100 * v / (total or 1.0):.1f} %")
            for v, total in zip(sides, totals, strict=True)
        )
        rows.append((key, *(text for pair in pairs for text in pair)))
    return [*rows, ("all", *(text for total in totals for text in (short(total), "100 %")))]


def _operator_rows(found: Measured) -> Rows:
    return _side_rows(found.operators) if found.operators else []


def _weight_rows(found: Measured) -> Rows:
    sizes = {
        which: {role: size / 1e6 for role, size in roles.items()}
        for which, roles in found.weights.items()
    }
    return _side_rows(sizes) if sizes else []


def _run_lines(report: Report, found: Measured, zeroed: bool) -> list[str]:
    """What runs the file, and what zeros are worth, in sentences."""
    lines = []
    if any(p.resized for p in report.passes):
        lines.append(
            "The units are gone from the weights themselves, so that no runtime can drop the "
            "speed-up. The file is plain ONNX: onnxruntime alone runs it, without a special "
            "runtime and without optimum (Hugging Face's export package)."
        )
    elif found.manifest.get("files"):
        lines.append(
            "The file is plain ONNX: onnxruntime alone runs it, without a special runtime and "
            "without optimum (Hugging Face's export package)."
        )
    if zeroed:
        lines.append(
            "Weights that were set to zero are stored and multiplied like others: ONNX Runtime "
            "gains no time by them, and the file no space."
        )
    return lines


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
        "charts": charts.lines(
            f"{title}: lowest loss so far, by evaluation",
            best,
            x_title="evaluation",
            y_title="loss",
        ),
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
            kept = (details.get("kept") or {}).get(group["id"])
            layer["kept"] = _composed(layer["kept"], kept, group)
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


def _composed(before: list[int] | None, kept: Any, group: Mapping[str, Any]) -> list[int] | None:
    """Original indices that are left, after a pass that kept these of those before it.

    None where no record says which ones: each head may have lost others.
    """
    if kept is None:
        return before if group["after"] == group["before"] else None
    return None if before is None else [before[i] for i in kept]


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
        drawn = charts.lines(
            f"{title}: output error of each matrix, by layer",
            layers,
            x_title="layer",
            y_title="output error",
        )
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
    trained = (manifest.get("results") or {}).get("dense_training")
    return [("the dense model", trained)] if trained else []


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
            drawn += charts.lines(f"{title}: loss by epoch", lines, x_title="epoch", y_title="loss")
            metric = [(e["epoch"], e["metric"]) for e in epochs if "metric" in e]
            metric_name = str(details.get("metric"))
            drawn += charts.lines(
                f"{title}: {metric_name} by epoch",
                {metric_name: metric} if metric else {},
                x_title="epoch",
                y_title=metric_name,
            )
        degrees = details.get("degrees") or {}
        wirings = _wirings(degrees)
        for name, (before, after) in wirings.items():
            drawn += charts.degree_chart(f"{name}: units by living connections", before, after)
        spread = [
            (f"{name}, {when}", f"{wired['units']:,}", f"{wired['dead']:,}",
             f"{wired['mean']:.1f}", f"{wired['sd']:.2f}")
            for name, (before, after) in wirings.items()
            for when, wired in (("before", before), ("after", after))
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


def _low_bit_lines(manifest: Mapping[str, Any], found: Measured) -> list[str]:
    """What was quantized in each file, the deployed one first, and how far it drifts."""
    lines = []
    files = manifest.get("quantization") or {}
    for file in sorted(files, key=lambda name: name != found.file):
        drift = files[file].get("drift") or ()
        worst, row = (max((d[key] for d in drift), default=0.0) for key in ("error", "largest"))
        lines.append(
            f"{file}: {quantized_text(files[file])}; outputs drift by {worst:.1e} of the float "
            f"ones, {row:.1e} of a row's scale."
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
    known = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions]
    created = [str(manifest["created"])] if "created" in manifest else []
    missing = [] if charts.charts_available() else ["charts: pip install 'graphprune[report]'"]
    return "; ".join([f"graphprune {__version__}", *known, *created, *missing])
