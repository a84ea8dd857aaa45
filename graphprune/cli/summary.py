"""Before and after a compilation, as rows, JSON and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from graphprune.cli.app import print_json, stdout_console
from graphprune.cli.tables import comparison_table, levels_table, passes_table
from graphprune.pipeline.events import JSON
from graphprune.report.report import Report, change_text


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """Before and after.

    Attributes:
        model: what the user called it.
        path: the artifact's folder.
        upload: megabytes of its files without the baselines, which no runtime needs.
        report: what the passes did.
        megabytes: size on disk of "pruned" and, where written, "dense".
        timing: what the benchmark measured, or None.
        quality: task results of "pruned" and "dense", or none.
        calibration: "samples" and, for text, "tokens" of what calibrated it; None without.
        bundled: whether that was text that every Python has.
        trained: what the training of the dense model reports, where its head was fresh.
    """

    model: str
    path: Path
    upload: float
    report: Report
    megabytes: Mapping[str, float]
    timing: Mapping[str, JSON] | None
    quality: Mapping[str, JSON]
    calibration: Mapping[str, int] | None = None
    bundled: bool = False
    trained: Mapping[str, JSON] | None = None

    def to_json(self) -> JSON:
        """Plain data."""
        return {
            "model": self.model,
            "path": str(self.path),
            "report": self.report.to_json(),
            "upload_megabytes": self.upload,
            "megabytes": dict(self.megabytes),
            "timing": self.timing,
            "quality": dict(self.quality),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "trained": None if self.trained is None else dict(self.trained),
        }

    def calibrated_on(self) -> str:
        """The calibration in words, such as "64 samples, 32,768 tokens"; empty without."""
        counts = ", ".join(f"{count:,} {what}" for what, count in (self.calibration or {}).items())
        if not self.bundled:
            return counts
        return f"{counts} of Python's help topics: --calibration FILE of your own text does better"

    def trained_first(self) -> str:
        """The dense model's training in words: "2 epochs, accuracy 0.505 -> 0.855"; or nothing."""
        told = self.trained
        if told is None:
            return ""
        epochs = told["epochs"]
        name, figures = told["metric"], [told["metric_before"], told["metric_after"]]
        if told["metric_after"] is None:
            name = "loss"
            figures = [epochs[i]["loss"] for i in sorted({0, len(epochs) - 1})]
        words = " -> ".join(f"{figure:.3f}" for figure in figures)
        return f"{_plural(len(epochs), 'epoch')}, {name} {words}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, pruned, change) for a table."""
        parameters, _, flops = self.report.size_rows()
        pruned, dense = self.megabytes["pruned"], self.megabytes.get("dense")
        rows = [
            parameters,
            ("FLOPs on the example inputs", *flops[1:]),
            (
                "MB on disk (ONNX)",
                "" if dense is None else _megabytes_text(dense),
                _megabytes_text(pruned),
                "" if dense is None else change_text(dense, pruned),
            ),
        ]
        if self.timing is not None:
            rows += _timing_rows(self.timing)
        return rows + _quality_rows(self.quality)


def present(summary: Summary, as_json: bool) -> None:
    """Print a summary."""
    if as_json:
        print_json(summary.to_json())
        return
    console = stdout_console()
    if summary.trained_first():
        console.print(f"dense model trained first: {summary.trained_first()}", markup=False)
    if summary.report.passes:
        console.print(passes_table(summary.report))
    for _, found in summary.report.budgets():
        console.print(levels_table(found))
    for line in summary.report.skipped_lines():
        console.print(f"  skipped  {line}", style="dim", markup=False, soft_wrap=True)
    console.print(comparison_table(summary.rows()))
    if summary.calibrated_on():
        console.print(f"calibrated on {summary.calibrated_on()}")
    size = _megabytes_text(summary.upload)
    console.print(
        f"written to {summary.path}/ ({size} MB without the baseline)", soft_wrap=True, markup=False
    )


def _timing_rows(timing: Mapping[str, JSON]) -> list[tuple[str, str, str, str]]:
    what = f"ms, batch {timing['batch']}, {_plural(timing['threads'], 'thread')}"
    rows = ((what, timing), (f"{what}, default session options", timing.get("default")))
    return [
        (what, f"{r['dense_ms']:.2f}", f"{r['pruned_ms']:.2f}", f"{r['speedup']:.2f}x faster")
        for what, r in rows
        if r is not None
    ]


def _quality_rows(quality: Mapping[str, JSON]) -> list[tuple[str, str, str, str]]:
    pruned, dense = quality.get("pruned"), quality.get("dense")
    if pruned is None:
        return []
    change = "" if dense is None else f"{pruned['value'] - dense['value']:+.3f}"
    left = "" if dense is None else _value_text(dense)
    title = f"{pruned['task']}: {pruned['metric']}"
    if not pruned.get("higher_is_better", True):
        title += ", lower is better"
    return [(title, left, _value_text(pruned), change)]


def _value_text(result: Mapping[str, JSON]) -> str:
    """A task's figure, with one standard error where it has one."""
    error = result.get("standard_error")
    return f"{result['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _megabytes_text(megabytes: float) -> str:
    return f"{megabytes:.1f}" if megabytes >= 1 else f"{megabytes:.3f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
