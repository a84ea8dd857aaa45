"""Several artifacts side by side, from what each recorded: speed, size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from graphprune.pipeline.events import JSON
from graphprune.report.measured import Measured, megabytes_text, short

COMPARED = ("model", "faster", "ms", "measured", "MB", "smaller")


@final
@dataclass(frozen=True, slots=True)
class Entrant:
    """One model of a comparison: an artifact, or the dense model of one.

    Attributes:
        name: the artifact's folder, or "dense".
        faster: times faster than its own dense model; None where it was not timed.
        ms: milliseconds a run.
        mb: megabytes of the ONNX file.
        smaller: times smaller than its own dense model's file.
        quality: the task's figure; None where it was not evaluated.
        evaluated_by: task, metric and items of the figure, in words.
        higher_is_better: whether more of it is better.
        where: what the time was measured on; empty where it was not timed.
    """

    name: str
    faster: float | None
    ms: float | None
    mb: float | None
    smaller: float | None
    quality: float | None
    evaluated_by: str
    higher_is_better: bool
    where: str

    def beats(self, other: Entrant) -> bool:
        """Whether it is at least as fast, small and good as another, and more in one of them.

        Only of models whose three figures are known and of the same task; speed is that against
        the own dense model, which machines share.
        """
        mine, theirs = self._figures(), other._figures()
        if mine is None or theirs is None or self.evaluated_by != other.evaluated_by:
            return False
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))

    def _figures(self) -> tuple[float, float, float] | None:
        """Speed, smallness and quality, more is better."""
        if self.faster is None or self.mb is None or self.quality is None:
            return None
        return self.faster, -self.mb, self.quality if self.higher_is_better else -self.quality


def entrant(name: str, found: Measured) -> Entrant:
    """The pruned model of an artifact."""
    times, pruned = found.times(), found.quality.get("pruned")
    return Entrant(
        name,
        times[0].ratio if times else None,
        times[0].pruned_ms if times else None,
        None if found.bytes is None else found.bytes / 1e6,
        found.smaller,
        None if pruned is None else pruned["value"],
        _evaluated_by(found),
        pruned is None or pruned.get("higher_is_better", True),
        _where(found),
    )


def dense_entrant(found: Measured) -> Entrant | None:
    """The dense model of an artifact; None where none was written."""
    if found.dense_bytes is None:
        return None
    times, dense = found.times(), found.quality.get("dense")
    return Entrant(
        "dense",
        1.0 if times else None,
        times[0].dense_ms if times else None,
        found.dense_bytes / 1e6,
        1.0,
        None if dense is None else dense["value"],
        _evaluated_by(found),
        dense is None or dense.get("higher_is_better", True),
        _where(found),
    )


@final
@dataclass(frozen=True, slots=True)
class Overview:
    """Artifacts, the slowest first, after the dense models that they come from.

    Attributes:
        entrants: dense models, and then artifacts.
        notes: which figures do not compare, and how to get those that are missing; sentences.
    """

    entrants: tuple[Entrant, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, artifacts: Sequence[tuple[str, Measured]]) -> Overview:
        """Compare artifacts by name."""
        dense: dict[tuple[float | None, float | None, str, str], Entrant] = {}
        for name, found in artifacts:
            if (model := dense_entrant(found)) is not None:
                key = (model.mb, model.quality, model.where, model.evaluated_by)
                # One is enough of those that differ in the noise of a time alone.
                named = replace(model, name=f"dense of {name}") if dense else model
                dense.setdefault(key, named)
        ordered = sorted(
            (entrant(name, found) for name, found in artifacts), key=lambda e: e.faster or 0.0
        )
        return cls((*dense.values(), *ordered), tuple(_notes(artifacts, ordered)))

    @property
    def places(self) -> dict[str, str]:
        """A letter for each machine, with the sizes and versions, that times were measured on."""
        found = dict.fromkeys(e.where for e in self.entrants if e.where)
        return {where: chr(ord("A") + i) for i, where in enumerate(found)}

    @property
    def metric(self) -> str:
        """What most figures of quality are; empty without any."""
        by = [e.evaluated_by for e in self.entrants if e.quality is not None]
        return max(dict.fromkeys(by), key=by.count, default="")

    def front(self) -> list[Entrant]:
        """Those that no other beats in speed, size and quality at once."""
        return [
            e
            for e in self.entrants
            if e._figures() is not None and not any(o.beats(e) for o in self.entrants)
        ]

    def header(self) -> tuple[str, ...]:
        """The columns of `rows`."""
        return (*COMPARED, self.metric.rpartition(", ")[0] or "quality", "on the front")

    def rows(self) -> list[tuple[str, ...]]:
        """One a model, as texts."""
        front, places = self.front(), self.places
        return [
            (
                e.name,
                "" if e.faster is None else f"{e.faster:.2f}x",
                "" if e.ms is None else short(e.ms),
                places.get(e.where, ""),
                "" if e.mb is None else megabytes_text(1e6 * e.mb),
                "" if e.smaller is None else f"{e.smaller:.2f}x",
                self._quality(e),
                "yes" if e in front else "",
            )
            for e in self.entrants
        ]

    def _quality(self, entrant: Entrant) -> str:
        """The figure, with its task where that is another one than most have."""
        if entrant.quality is None:
            return ""
        other = "" if entrant.evaluated_by == self.metric else f" ({entrant.evaluated_by})"
        return f"{entrant.quality:.4f}{other}"

    def to_json(self) -> dict[str, JSON]:
        """Plain data."""
        front = self.front()
        names = Entrant.__dataclass_fields__
        return {
            "models": [
                {**{n: getattr(e, n) for n in names}, "front": e in front} for e in self.entrants
            ],
            "notes": list(self.notes),
        }


def _evaluated_by(found: Measured) -> str:
    """Task, metric and items of a figure, in words; empty without one."""
    if "pruned" not in found.quality:
        return ""
    return f"{found.quality_title()}, {found.items or 'items not noted'}"


def _where(found: Measured) -> str:
    """Machine, sizes and version of a time; empty without one."""
    times = found.times()
    if not times:
        return ""
    timing = found.results.get("timing") or {}
    batch = f"batch {timing['batch']}" if timing else "the example inputs, a first look"
    runtime = (found.manifest.get("versions") or {}).get("onnxruntime", "unknown")
    return f"{found.machine}, {batch}, ONNX Runtime {runtime}"


def _notes(artifacts: Sequence[tuple[str, Measured]], ordered: Sequence[Entrant]) -> list[str]:
    notes = []
    machines = dict.fromkeys(e.where for e in ordered if e.where)
    if len(machines) > 1:
        notes.append(
            "The times come from different machines or settings: compare how many times faster "
            "each model is than its own dense model, not the milliseconds."
        )
    if any("unknown CPU" in where for where in machines):
        notes.append(
            "Of some times no machine was recorded: graphprune bench OUT --note measures again."
        )
    figures = dict.fromkeys(e.evaluated_by for e in ordered if e.evaluated_by)
    if len(figures) > 1:
        notes.append(
            "Quality was evaluated by different tasks or data, and such figures do not compare: "
            f"{'; '.join(figures)}."
        )
    if len({found.dense_bytes for _, found in artifacts}) > 1:
        notes.append("The artifacts come from different dense models.")
    for name, found in artifacts:
        if found.is_glance:
            notes.append(f"{name} was not benchmarked: graphprune bench {name} --note")
        if found.quality.get("pruned") is None:
            notes.append(f"{name} was not evaluated by a task when it was compiled.")
        if guessing := found.guessing():
            notes.append(f"{name}: {guessing}")
    return notes
