"""Records of a run to a budget: what was asked, what each sublayer kept, what else came close."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from graphprune.pipeline.events import JSON
from graphprune.report.charts import short_names
from graphprune.training.outcome import Drop

KINDS = {"ffn": "feed-forward"}

_ASKED = {
    "speedup": "{:g}x",
    "ms": "{:g} ms",
    "size_mb": "{:g} MB",
    "flops": "{:g} of the FLOPs",
    "max_drop": "a drop of at most {:g}",
}


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What was kept of one sublayer.

    Attributes:
        id: dotted name of its module.
        kind: "attention", "ffn" or "other".
        level: units kept: heads, key/value groups, neurons or channels.
        of: units that the dense model has there.
        dropped: whether the whole branch is gone, its sum included.
        ms: predicted time.
        dense_ms: time of the dense sublayer.
        zeros: fraction of zero blocks in the products of what was kept.
    """

    id: str
    kind: str
    level: int
    of: int
    dropped: bool
    ms: float
    dense_ms: float
    zeros: float = 0.0

    @property
    def kept(self) -> float:
        """Fraction of the units that were kept."""
        return 0.0 if self.dropped else self.level / self.of

    @property
    def count(self) -> str:
        """As words: "8 of 12", "8 of 12, 50% zero blocks" or "removed"."""
        if self.dropped:
            return "removed"
        units = f"{self.level:,} of {self.of:,}"
        return f"{units}, {self.zeros:.0%} zero blocks" if self.zeros else units


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """Another choice that meets the budget.

    Attributes:
        loss: of the whole model, on the samples of the search.
        ms: predicted.
        choices: level of each sublayer, in the order of the report's choices; 0 where it is gone.
        zeros: of each sublayer, the fraction of zero blocks.
    """

    loss: float
    ms: float
    choices: tuple[int, ...]
    zeros: tuple[float, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReport:
    """What a run to a budget found. `ms` are milliseconds a run, `mb` megabytes on disk.

    Attributes:
        asked: what was asked by option: "speedup", "ms", "size_mb", "flops", "max_drop".
        dense_ms: of the dense model.
        predicted_ms: of the result, by the table of times.
        measured_ms: of the result; None where it could not be measured.
        dense_mb: of the dense model.
        mb: of the result.
        device: name of the CPU.
        threads: that the times are for.
        batch: sizes that the times are for, such as "1x128".
        scheme: quantization of the exported model; None for float32.
        choices: one a sublayer, in order of execution.
        runners_up: the next best candidates, the best first.
        evaluations: how many candidates were evaluated on the whole model.
        samples: how many calibration samples each of them was evaluated on.
        losses: the lowest loss so far, after each evaluation of the last search.
        fresh_loss: of the result on samples that neither calibration nor the search used; None
            without any.
        corrections: how often the table was corrected by a measurement and solved again.
        checks: of every choice that was measured, how many times faster it was predicted to be
            and was; the last is the result's.
        drop: what the result loses on a task; None where none was given.
        warnings: what a user should know.
    """

    asked: Mapping[str, float]
    dense_ms: float
    predicted_ms: float
    measured_ms: float | None
    dense_mb: float
    mb: float
    device: str
    threads: int
    batch: str
    scheme: str | None
    choices: tuple[Choice, ...]
    runners_up: tuple[Candidate, ...] = ()
    evaluations: int = 0
    samples: int = 0
    losses: tuple[float, ...] = ()
    fresh_loss: float | None = None
    corrections: int = 0
    checks: tuple[tuple[float, float], ...] = ()
    drop: Drop | None = None
    warnings: tuple[str, ...] = ()

    @property
    def asked_text(self) -> str:
        """What was asked, in words: "3x, 20 MB"."""
        return ", ".join(_ASKED.get(key, key + " {:g}").format(v) for key, v in self.asked.items())

    @property
    def predicted(self) -> float:
        """How many times faster than dense the table said that the result is."""
        return self.checks[-1][0] if self.checks else self.dense_ms / self.predicted_ms

    @property
    def measured(self) -> float | None:
        """How many times faster than dense the result was; None where it was not measured."""
        return None if self.measured_ms is None else self.dense_ms / self.measured_ms

    @property
    def where(self) -> str:
        """What the times are for: "AMD EPYC, 1 thread, 1x128, int8-dynamic"."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return ", ".join(p for p in (self.device, threads, self.batch, self.scheme) if p)

    @property
    def summary(self) -> str:
        """A sentence for the table of passes."""
        measured = self.measured
        if measured is None:
            words = f"predicted {self.predicted:.2f}x faster than dense (asked {self.asked_text})"
        else:
            words = (
                f"{measured:.2f}x faster than dense "
                f"(asked {self.asked_text}, predicted {self.predicted:.2f}x)"
            )
        ms = self.predicted_ms if self.measured_ms is None else self.measured_ms
        words += f": {_short(ms)} of {_short(self.dense_ms)} ms on {self.where}"
        if "size_mb" in self.asked:
            words += f"; {_short(self.mb)} of {_short(self.dense_mb)} MB"
        return words if self.drop is None else f"{words}; {self.drop.summary}"

    def names(self) -> list[str]:
        """A short name for each sublayer: "layer 3 attention", or its id."""
        found: dict[str, str] = {}
        for kind in {c.kind for c in self.choices}:
            ids = [c.id for c in self.choices if c.kind == kind]
            found |= {
                id: name if name == id else f"{name} {KINDS.get(kind, kind)}"
                for id, name in short_names(ids).items()
            }
        return [found[c.id] for c in self.choices]

    def fact_rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, result, change) of times and sizes, with how each is known."""
        rows = [("ms, predicted", self.predicted_ms, f"{self.predicted:.2f}x faster")]
        if self.measured is not None and self.measured_ms is not None:
            faster = f"{self.measured:.2f}x faster"
            rows.append(("ms, measured when chosen", self.measured_ms, faster))
        found = [(what, _short(self.dense_ms), _short(ms), ratio) for what, ms, ratio in rows]
        smaller = f"{self.dense_mb / self.mb:.2f}x smaller"
        return [*found, ("MB", _short(self.dense_mb), _short(self.mb), smaller)]

    def level_rows(self) -> list[tuple[str, str, str, str]]:
        """(sublayer, kept, predicted ms, dense ms), under LEVELS."""
        return [
            (name, c.count, _short(c.ms), _short(c.dense_ms))
            for name, c in zip(self.names(), self.choices, strict=True)
        ]

    def candidate_rows(self) -> list[tuple[str, str, str, str]]:
        """(which, predicted ms, loss, levels) of the result and the runners-up, under CANDIDATES.

        Without runners-up there is nothing to compare and no row.
        """
        if not self.runners_up:
            return []
        loss = f"{self.losses[-1]:.4g}" if self.losses else ""
        levels = [0 if c.dropped else c.level for c in self.choices]
        zeros = [c.zeros for c in self.choices]
        text = self._levels_text(levels, zeros)
        chosen = ("chosen", _short(self.predicted_ms), loss, text)
        return [
            chosen,
            *(
                (str(place), _short(c.ms), f"{c.loss:.4g}", self._levels_text(c.choices, c.zeros))
                for place, c in enumerate(self.runners_up, 2)
            ),
        ]

    def progress_rows(self) -> list[tuple[str, str]]:
        """(evaluation, loss) wherever the search found a better candidate."""
        return [
            (f"{number:,}", f"{loss:.4g}")
            for number, loss in enumerate(self.losses, 1)
            if number == 1 or loss < self.losses[number - 2]
        ]

    def notes(self) -> list[str]:
        """How the result was found and checked, in sentences."""
        lines = []
        if self.evaluations:
            on = f" on {self.samples:,} samples" if self.samples else ""
            lines.append(f"{self.evaluations:,} candidates were evaluated on the whole model{on}.")
        if self.fresh_loss is not None and self.losses:
            lines.append(
                f"Loss on samples that neither calibration nor the search used: "
                f"{self.fresh_loss:.4g}; on those of the search {self.losses[-1]:.4g}."
            )
        if self.corrections:
            times = "once" if self.corrections == 1 else f"{self.corrections} times"
            lines.append(f"The table of costs was corrected {times} by a measurement.")
        if len(self.checks) > 1:
            found = ", then ".join(f"{p:.2f}x and {m:.2f}x" for p, m in self.checks)
            lines.append(f"Choices were predicted and measured to be faster by {found}.")
        lines += self._ahead()
        if self.drop is not None:
            lines.append(f"Task: {self.drop.summary}.")
        return lines

    def _ahead(self) -> list[str]:
        """A sentence where time is all that was asked, and less was measured."""
        asked = dict(self.asked)
        limit = self.dense_ms / asked.pop("speedup") if "speedup" in asked else asked.pop("ms", 0.0)
        if asked or not self.evaluations or (self.measured_ms or limit) >= 0.95 * limit:
            return []
        return [
            "It is more than 5% faster than asked: its levels are far apart, or savings of layers "
            "in a row do not add up. Ask for less to keep more."
        ]

    def _levels_text(self, levels: Sequence[int], zeros: Sequence[float]) -> str:
        """Levels by kind, in order of execution, a removed sublayer as "-"; zero blocks beside."""
        kinds: dict[str, list[str]] = {}
        for choice, level, part in zip(
            self.choices, levels, zeros or [0.0] * len(levels), strict=True
        ):
            text = f"{level} ({part:.0%} zero)" if part else str(level)
            kinds.setdefault(choice.kind, []).append(text if level else "-")
        return "; ".join(f"{KINDS.get(kind, kind)} {' '.join(v)}" for kind, v in kinds.items())

    def to_json(self) -> dict[str, JSON]:
        """The report of a pass: its summary and warnings, and under "budget" what `of` reads."""
        data: dict[str, JSON] = asdict(self)
        return {"summary": self.summary, "warnings": list(self.warnings), "budget": data}

    @classmethod
    def of(cls, details: Mapping[str, JSON]) -> BudgetReport | None:
        """The record in a pass's report; None where it has no key "budget"."""
        if "budget" not in details:
            return None
        data: dict[str, Any] = dict(details["budget"])
        runners_up = (
            Candidate(c["loss"], c["ms"], tuple(c["choices"]), tuple(c.get("zeros", ())))
            for c in data["runners_up"]
        )
        drop = data["drop"]
        return cls(
            **{
                **data,
                "choices": tuple(Choice(**c) for c in data["choices"]),
                "runners_up": tuple(runners_up),
                "losses": tuple(data["losses"]),
                "checks": tuple((p, m) for p, m in data.get("checks", ())),
                "warnings": tuple(data["warnings"]),
                "drop": None if drop is None else Drop(**drop),
            }
        )


LEVELS = ("sublayer", "kept", "ms", "dense ms")
CANDIDATES = ("candidate", "ms", "loss", "units kept, in order of execution")


def budgets(
    steps: Iterable[tuple[str, Mapping[str, JSON]]],
) -> Iterator[tuple[str, BudgetReport]]:
    """Title and record of each step (`Report.steps`) that ran to a budget."""
    for title, details in steps:
        found = BudgetReport.of(details)
        if found is not None:
            yield title, found


@final
@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One model of a family, or one to compare it with.

    Attributes:
        name: "3x", "dense int8".
        faster: how many times faster than the dense model, measured.
        predicted: the same by the table of times; None for a model that was not chosen by it.
        ms: milliseconds a run.
        mb: megabytes on disk.
        quality: what the vertical axis shows.
    """

    name: str
    faster: float
    predicted: float | None
    ms: float
    mb: float
    quality: float


@final
@dataclass(frozen=True, slots=True)
class Front:
    """Speed against quality of a family of models.

    Attributes:
        model: whose family it is.
        metric: what `quality` is, such as "Spearman" or "loss on the calibration data".
        higher_is_better: whether more of it is better.
        where: what the times are for, such as "AMD EPYC, 1 thread, 1x128".
        family: models by budget, joined by a line.
        others: models to compare with, such as "dense" and "dense int8".
    """

    model: str
    metric: str
    higher_is_better: bool
    where: str
    family: tuple[FrontPoint, ...]
    others: tuple[FrontPoint, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """One a model, the slowest first, under FRONT and the metric."""
        ordered = sorted((*self.others, *self.family), key=lambda point: point.faster)
        return [
            (
                p.name,
                f"{p.faster:.2f}x",
                "" if p.predicted is None else f"{p.predicted:.2f}x",
                _short(p.ms),
                _short(p.mb),
                f"{p.quality:.4f}",
            )
            for p in ordered
        ]

    def to_json(self) -> dict[str, JSON]:
        """Plain data, the fields by name."""
        return asdict(self)


FRONT = ("model", "faster, measured", "predicted", "ms", "MB")


def _short(value: float) -> str:
    """Three significant digits, but all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
