"""Before and after a compilation, as rows, JSON and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from graphprune.cli.app import print_json, stdout_console
from graphprune.cli.tables import comparison_table, levels_table, passes_table
from graphprune.pipeline.events import JSON
from graphprune.report.measured import Measured, megabytes_text, plural
from graphprune.report.report import Report


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
        manifest: the artifact's, with what was measured of it.
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
    manifest: Mapping[str, Any] = field(default_factory=dict)

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
        trained = self.trained
        if trained is None:
            return ""
        epochs = trained["epochs"]
        name, figures = trained["metric"], [trained["metric_before"], trained["metric_after"]]
        if trained["metric_after"] is None:
            name = "loss"
            figures = [epochs[i]["loss"] for i in sorted({0, len(epochs) - 1})]
        words = " -> ".join(f"{figure:.3f}" for figure in figures)
        return f"{plural(len(epochs), 'epoch')}, {name} {words}"

    @property
    def measured(self) -> Measured:
        """What the artifact's manifest says of time, size and quality."""
        return Measured(self.manifest)

    def warnings(self) -> list[str]:
        """What should be known before a figure is believed."""
        return [line for line in (self.measured.guessing(),) if line]

    def written(self) -> str:
        """Where it is, and how large what is shipped is."""
        found, size = self.measured, f"{megabytes_text(1e6 * self.upload)} MB"
        if not found.quantized or found.bytes is None:
            return f"written to {self.path}/ ({size} without the baseline)"
        deployed = self.manifest["files"]["model"]
        return (
            f"written to {self.path}/; {deployed} is what to run ({megabytes_text(found.bytes)} MB)"
        )


def present(summary: Summary, as_json: bool) -> None:
    """Print a summary."""
    if as_json:
        print_json(summary.to_json())
        return
    console = stdout_console()
    if summary.trained_first():
        console.print(f"dense model trained first: {summary.trained_first()}", markup=False)
    found = summary.measured
    if summary.report.passes:
        console.print(passes_table(summary.report, found))
    for _, budget in summary.report.budgets():
        console.print(levels_table(budget))
    for word, lines in (
        ("skipped", summary.report.skipped_lines()),
        ("frozen", summary.report.frozen_lines()),
    ):
        for line in lines:
            console.print(f"  {word}  {line}", style="dim", markup=False, soft_wrap=True)
    console.print(comparison_table(found, summary.report))
    if where := found.measured_on():
        console.print(f"measured on {where}", style="dim", markup=False, soft_wrap=True)
    for line in summary.warnings():
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    if summary.calibrated_on():
        console.print(f"calibrated on {summary.calibrated_on()}")
    console.print(summary.written(), soft_wrap=True, markup=False)
