"""The tables that commands show. Nothing here prints by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from graphprune.pipeline.events import JSON
from graphprune.report.measured import CHOICES_HEADER, choice_row, plural, short

if TYPE_CHECKING:
    from graphprune.axes import AxisGroup, AxisGroups
    from graphprune.report.budget import BudgetReport
    from graphprune.report.measured import Measured
    from graphprune.report.report import Report
    from graphprune.report.sensitivity import Cost, Sensitivity


def groups_table(groups: AxisGroups, everything: bool) -> Table:
    """Axis groups: those that can be cut first, then the frozen ones with the reason.

    Like groups of several layers share a row, the layer's number a star, unless `everything`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("role", no_wrap=True)
    for title in ("groups", "units", "cost"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("axis", overflow="fold", ratio=1)
    rows = [(g.id, [g]) for g in groups] if everything else groups.alike()
    for frozen in (False, True):
        if frozen:
            table.add_section()
        for name, members in rows:
            first = members[0]
            if bool(first.frozen) == frozen:
                table.add_row(
                    Text(first.role, style="dim" if frozen else "green"),
                    str(len(members)),
                    f"{first.size:,}",
                    f"{first.cost:,}",
                    Text(name) + _state(first),
                )
    return table


def groups_footer(groups: AxisGroups) -> str:
    """How many groups there are, how many of them can be cut, and what a column means."""
    return f"{groups.summary()}. cost: parameters that go with one unit"


def _state(group: AxisGroup) -> Text:
    """What is written after a group's name: nothing where it is free."""
    from graphprune.axes.groups import starred_numbers

    if group.frozen:
        more = f" (and {len(group.frozen) - 1} more)" if len(group.frozen) > 1 else ""
        return Text(f"\n  frozen: {starred_numbers(group.frozen[0])}{more}", style="yellow")
    if group.normalized:
        return Text("\n  normalized: cutting it is not exact", style="cyan")
    return Text()


def passes_table(report: Report, found: Measured | None = None) -> Table:
    """One row a pass: what it did, and by how much masked and shrunk, or float and int8, differ."""
    from graphprune.report.report import HEADER

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(HEADER):
        if i < 2:
            table.add_column(title, no_wrap=i == 0)
        else:
            table.add_column(title, justify="right")
    for row in report.rows(found):
        table.add_row(*map(Text, row))
    return table


def levels_table(found: BudgetReport) -> Table:
    """What each sublayer kept in a run to a budget, as a bar and in figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("sublayer", overflow="fold")
    table.add_column("", no_wrap=True)
    for title in ("kept", "ms", "dense ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for choice, (name, *cells) in zip(found.choices, found.level_rows(), strict=True):
        full = round(_BAR * choice.kept)
        bar = Text("█" * full + "░" * (_BAR - full), style="red" if choice.dropped else "")
        table.add_row(Text(name), bar, *cells)
    return table


_BAR = 16  # characters of all units


def comparison_table(found: Measured, report: Report) -> Table:
    """Before and after: sizes, times and quality, a row each."""
    return texts_table(found.header(), found.rows(report.size_rows(found)))


def texts_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows of texts, the first column to the left and figures to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def operators_table(operators: Mapping[str, Mapping[str, float]], most: int = 8) -> Table:
    """Milliseconds of a run by operator type, the largest first, the small ones together."""
    from graphprune.report.charts import largest_first

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator, wall time")
    for which in operators:
        table.add_column(f"{which}, ms", justify="right")
    for name, values in largest_first(operators, most):
        table.add_row(Text(name), *("" if v is None else short(v) for v in values))
    return table


def choices_table(choices: Sequence[Mapping[str, JSON]]) -> Table:
    """What each product with zeros takes in which form, and the form that was written."""
    return texts_table(CHOICES_HEADER, [choice_row(record) for record in choices])


def timing_table(timing: Mapping[str, JSON]) -> Table:
    """A benchmark: milliseconds of each model, and their ratio, each with its quartiles.

    Below, where measured, the same with ONNX Runtime's default session options.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    clock = "CPU" if timing["clock"] == "cpu" else "wall"
    threads = plural(timing["threads"], "thread")
    table.add_column(f"batch {timing['batch']}, {threads} of {timing['cpu']}, {clock} time")
    for title in ("median", "quartiles"):
        table.add_column(title, justify="right")
    _add_times(table, timing, "")
    if "default" in timing:
        table.add_section()
        _add_times(table, timing["default"], ", default session options")
    return table


def _add_times(table: Table, timing: Mapping[str, JSON], options: str) -> None:
    against = str(timing.get("against", "dense"))
    others = timing.get("others") or {}
    rows = [
        (timing, "dense_ms", against),
        *((row, "dense_ms", name) for name, row in others.items()),
    ]
    rows += [(timing, "pruned_ms", "pruned"), (timing, "speedup", f"faster than {against}")]
    rows += [(row, "speedup", f"faster than {name}") for name, row in others.items()]
    for row, key, title in rows:
        if key in row:
            stem = key.removesuffix("_ms")
            low, high = (row[key.replace(stem, f"{stem}_{q}")] for q in ("low", "high"))
            unit = "x" if key == "speedup" else " ms"
            table.add_row(
                title + options, f"{short(row[key])}{unit}", f"{short(low)} to {short(high)}"
            )


def memory_table(memory: Mapping[str, Mapping[str, JSON]]) -> Table:
    """Load time and memory of each model, in a process of its own; no figure where unknown."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("in a process of its own")
    for title in ("load", "peak memory", "private memory"):
        table.add_column(title, justify="right")
    for name, found in memory.items():
        sizes = (found["peak_bytes"], found["private_bytes"])
        texts = ("" if size is None else f"{short(size / 1e6)} MB" for size in sizes)
        table.add_row(name, f"{short(found['load_ms'])} ms", *texts)
    return table


def sensitivity_tables(found: Sensitivity) -> list[tuple[str, Table]]:
    """Output error by group and ratio; time by role and ratio; each with its title."""
    errors = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    errors.add_column("role", no_wrap=True)
    errors.add_column("units", justify="right")
    for ratio in found.ratios:
        errors.add_column(f"{100 * ratio:g} % removed", justify="right")
    errors.add_column("group", overflow="fold")
    groups: dict[str, list[Cost]] = {}
    for cost in found.costs:
        groups.setdefault(cost.group, []).append(cost)
    for name, costs in groups.items():
        cells = [f"{c.error:.4f}" for c in costs]
        errors.add_row(costs[0].role, f"{costs[0].size:,}", *cells, Text(name))
    times = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    times.add_column("role")
    for title in ("removed", "ms", "dense ms", "faster"):
        times.add_column(title, justify="right")
    for t in found.times:
        faster = f"{t.dense_ms / t.ms:.2f}x"
        times.add_row(t.role, f"{100 * t.ratio:g} %", short(t.ms), short(t.dense_ms), faster)
    titled = [
        (
            f"output error of each group cut alone; score {found.score}, compensation "
            f"{found.compensation}, {found.samples:,} samples",
            errors,
        ),
        ("time with all groups of a role cut; one export a row, which units go is the same", times),
    ]
    return titled if found.times else titled[:1]


def quality_table(results: Mapping[str, JSON]) -> Table:
    """Task results, one row a model and figure; ± is one standard error."""
    rows = []
    for which, r in results.items():
        error = r.get("standard_error")
        lower = "" if r.get("higher_is_better", True) else ", lower is better"
        first = {
            "": which,
            "task": r["task"],
            "metric": r["metric"] + lower,
            "value": f"{r['value']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            "items": f"{r['count']:,}",
            "of": r.get("details", ""),
        }
        more = r.get("more") or {}
        rows += [first, *({"metric": m, "value": f"{value:.4f}"} for m, value in more.items())]
    columns = ["", "task", "metric", "value", "items"]
    return plain_table([*columns, "of"] if any(r.get("of") for r in rows) else columns, rows)


def plain_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    """A table of texts, columns in the order given."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row.get(column, "")) for column in columns))
    return table
