"""What was measured of an artifact, read from its manifest: speed, size and quality.

A manifest is JSON that older versions wrote too; what is not in it was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

GOOD, FAIR, POOR, UNKNOWN = "good", "fair", "poor", "unknown"
# What a tile needs to be green or yellow: times faster, times smaller, fraction of quality kept.
_FASTER = (1.2, 1.0)
_SMALLER = (1.2, 1.0)
_KEPT = (0.99, 0.95)
THRESHOLDS = (
    f"Green: at least {_FASTER[0]:g} times faster, and faster in three of four rounds; at least "
    f"{_SMALLER[0]:g} times smaller; at least {100 * _KEPT[0]:g} % of the dense model's quality "
    f"kept, or as much agreement. Yellow: not slower, not larger, at least {100 * _KEPT[1]:g} % "
    "kept or agreed on. Red: worse than that. Gray: not measured."
)
_WIDE = 1.2  # upper quartile of the rounds' ratios by the lower one
_DEPLOYED, _BASELINE = "model.onnx", "baseline.onnx"


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """One of the figures at the top of a report.

    Attributes:
        title: what it is.
        value: the figure, with its unit.
        note: where it comes from.
        color: GOOD, FAIR, POOR or UNKNOWN.
    """

    title: str
    value: str
    note: str
    color: str


@final
@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a run.

    Attributes:
        what: the sizes and options, in words.
        dense_ms: of the dense model; `pruned_ms` of the pruned one.
        ratio: how many times faster the pruned model is; `low` and `high` are its quartiles.
        others: milliseconds of further models in the same rounds, by name.
    """

    what: str
    dense_ms: float
    pruned_ms: float
    ratio: float
    low: float
    high: float
    others: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements in a manifest, or in as much of one as there is."""

    manifest: Mapping[str, Any]

    @property
    def results(self) -> Mapping[str, Any]:
        """What was noted after the export."""
        found: Mapping[str, Any] = self.manifest.get("results") or {}
        return found

    # --- size ----------------------------------------------------------------------------------

    @property
    def file(self) -> str:
        """The name of the ONNX file that is deployed."""
        place: str = (self.manifest.get("files") or {}).get("model", _DEPLOYED)
        return place.rpartition("/")[2]

    @property
    def bytes(self) -> int | None:
        """Of the deployed ONNX file and the weights beside it; None where that is not known."""
        found: int | None = (self.manifest.get("sizes") or {}).get(self.file)
        return found

    @property
    def dense_bytes(self) -> int | None:
        """Of the dense model's ONNX file; None where it was not written."""
        found: int | None = (self.manifest.get("sizes") or {}).get(_BASELINE)
        return found

    @property
    def quantized_dense_bytes(self) -> int | None:
        """Of the dense model quantized; None where that was not written."""
        place = (self.manifest.get("files") or {}).get("baseline_quantized", "")
        found: int | None = (self.manifest.get("sizes") or {}).get(place.rpartition("/")[2])
        return found

    @property
    def smaller(self) -> float | None:
        """How many times smaller the deployed file is than the dense model's."""
        return self.dense_bytes / self.bytes if self.dense_bytes and self.bytes else None

    @property
    def weights(self) -> dict[str, Mapping[str, int]]:
        """Bytes by what they are for, of "dense" and "pruned"; empty where that was not noted."""
        noted = self.manifest.get("weights") or {}
        names = {"dense": _BASELINE, "pruned": self.file}
        return {which: noted[name] for which, name in names.items() if name in noted}

    # --- time ----------------------------------------------------------------------------------

    def times(self) -> list[Times]:
        """A benchmark's times, and those with default session options; else the export's look."""
        timing = self.results.get("timing")
        if timing:
            what = f"ms, batch {timing['batch']}, {plural(timing['threads'], 'thread')}"
            default = timing.get("default")
            rows = [_times(what, timing)]
            return rows + ([_times(f"{what}, default session options", default)] if default else [])
        return [
            Times(
                f"ms on the example inputs, {plural(found['threads'], 'thread')}",
                found["against"]["ms"],
                found["model"]["ms"],
                found["ratio"],
                found["ratio_low"],
                found["ratio_high"],
                {},
            )
            for found in (self.manifest.get("measurements") or ())[:1]
        ]

    @property
    def is_glance(self) -> bool:
        """Whether only the export looked at the time, for a few rounds."""
        return not self.results.get("timing")

    @property
    def machine(self) -> str:
        """What the times were measured on: "AMD EPYC, 1 thread, CPU time"; empty where unknown."""
        timing = self.results.get("timing") or next(
            iter(self.manifest.get("measurements") or ()), None
        )
        if timing is None:
            return ""
        cpu = timing.get("cpu") or "unknown CPU"
        clock = "CPU time" if timing["clock"] == "cpu" else "wall clock"
        return f"{cpu}, {plural(timing['threads'], 'thread')}, {clock}"

    @property
    def command(self) -> str:
        """The command that measures the times again, of the artifact's folder OUT."""
        timing = self.results.get("timing") or {}
        batch = str(timing.get("batch", "")).replace("x1 after ", "x")
        words = ["graphprune bench OUT"]
        words += [f"--batch {batch}"] if batch[:1].isdigit() else []
        words += [f"--threads {timing['threads']}"] if timing.get("threads", 1) != 1 else []
        names = [timing.get("against", "dense"), *(timing.get("others") or {})]
        words += [f"--against {','.join(names)}"] if len(names) > 1 else []
        return " ".join(words)

    def measured_on(self) -> str:
        """The machine, batch, spread and command of the times, in a sentence; empty without."""
        times = self.times()
        if not times:
            return ""
        timing = self.results.get("timing") or self.manifest["measurements"][0]
        batch = f"batch {timing['batch']}" if "batch" in timing else "the example inputs"
        runtime = (self.manifest.get("versions") or {}).get("onnxruntime")
        where = [self.machine, batch, *([f"ONNX Runtime {runtime}"] if runtime else [])]
        spread = f"{times[0].low:.2f}x to {times[0].high:.2f}x"
        wide = times[0].high > _WIDE * times[0].low
        noisy = ", a wide spread: measure again when the machine is idle" if wide else ""
        return (
            f"{', '.join(where)}; the median ratio of {timing['rounds']} interleaved rounds, the "
            f"middle half of them {spread}{noisy}"
        )

    @property
    def operators(self) -> dict[str, Mapping[str, float]]:
        """Milliseconds by operator type, of "dense" and "pruned"; empty where not profiled."""
        found = self.results.get("operators") or {}
        return {which: found[which] for which in ("dense", "pruned") if which in found}

    # --- quality -------------------------------------------------------------------------------

    @property
    def quality(self) -> Mapping[str, Any]:
        """Task results of "pruned" and "dense", as far as there are."""
        found: Mapping[str, Any] = self.results.get("quality") or {}
        return found

    @property
    def kept(self) -> float | None:
        """Fraction of the dense model's figure that is kept; None where that is not known.

        Of a figure that should be low, such as a perplexity, the inverse ratio.
        """
        dense, pruned = self.quality.get("dense"), self.quality.get("pruned")
        if dense is None or pruned is None:
            return None
        values = (dense["value"], pruned["value"])
        above, below = values[::-1] if pruned.get("higher_is_better", True) else values
        return above / below if below > 0 and math.isfinite(above / below) else None

    @property
    def items(self) -> str:
        """What quality was evaluated on: "1,379 sentence pairs"; empty where that was not noted."""
        pruned = self.quality.get("pruned") or {}
        return f"{pruned['count']:,} {pruned.get('items') or 'items'}" if "count" in pruned else ""

    def quality_title(self) -> str:
        """Task and metric, and which way is better."""
        pruned = self.quality["pruned"]
        lower = "" if pruned.get("higher_is_better", True) else ", lower is better"
        return f"{pruned['task']}: {pruned['metric']}{lower}"

    def quality_meaning(self) -> str:
        """What the figure says, and on how many items, in a sentence; empty without a figure."""
        pruned = self.quality.get("pruned")
        if pruned is None:
            return ""
        of = f" ({pruned['details']})" if pruned.get("details") else ""
        meaning = f": {pruned['meaning']}" if pruned.get("meaning") else ""
        evaluated = f" Evaluated on {self.items}{of}." if self.items else ""
        return f"{capital(pruned['metric'])}{meaning}.{evaluated}"

    def guessing(self) -> str:
        """That the dense model is no better than a guess, in a sentence; empty where it is."""
        dense = self.quality.get("dense")
        guess = None if dense is None else dense.get("guess")
        if dense is None or guess is None:
            return ""
        if dense["value"] - guess > (dense.get("standard_error") or 0.0):
            return ""
        by = "naming the most frequent label" if guess else "chance"
        return (
            f"The dense model learned no better than guessing: its {dense['metric']} is "
            f"{dense['value']:.3f}, and {by} gets {guess:.3f}. What pruning keeps of that says "
            "nothing: train the dense model first."
        )

    # --- quantization --------------------------------------------------------------------------

    @property
    def quantized(self) -> Mapping[str, Any]:
        """The notes of the deployed file's quantization; empty for a float file."""
        found: Mapping[str, Any] = (self.manifest.get("quantization") or {}).get(self.file) or {}
        return found

    @property
    def drift(self) -> float | None:
        """Largest ||quantized - float|| / ||float|| of an output; None for a float file."""
        drift = self.quantized.get("drift")
        return max((d["error"] for d in drift), default=0.0) if drift is not None else None

    def choices(self) -> list[tuple[str, ...]]:
        """Layers with zeros under `CHOICES_HEADER`: what was chosen of which times."""
        return [choice_row(record) for record in self.quantized.get("choices") or ()]

    # --- all of it -----------------------------------------------------------------------------

    def tiles(self) -> tuple[Tile, Tile, Tile]:
        """How much faster, how much smaller, and what is left of the quality."""
        return self._faster(), self._smaller(), self._kept()

    def _faster(self) -> Tile:
        times = self.times()
        if not times:
            return Tile("Speed", "not measured", f"{self.command} measures it", UNKNOWN)
        first = times[0]
        color = _color(first.ratio, _FASTER)
        if color == GOOD and first.low <= 1:
            color = FAIR
        note = f"{short(first.dense_ms)} → {short(first.pruned_ms)} ms a run"
        if self.is_glance:
            note += ", a first look at export"
        return Tile("Speed", times_text(first.ratio, "faster", "slower"), note, color)

    def _smaller(self) -> Tile:
        smaller = self.smaller
        if smaller is None or self.bytes is None or self.dense_bytes is None:
            known = "" if self.bytes is None else f"{self.file}: {megabytes_text(self.bytes)} MB, "
            return Tile("Size", "not compared", f"{known}no dense model was written", UNKNOWN)
        note = f"{megabytes_text(self.dense_bytes)} → {megabytes_text(self.bytes)} MB, {self.file}"
        color = _color(smaller, _SMALLER)
        return Tile("Size", times_text(smaller, "smaller", "larger"), note, color)

    def _kept(self) -> Tile:
        pruned, dense = self.quality.get("pruned"), self.quality.get("dense")
        if pruned is None:
            return Tile("Quality kept", "not measured", "no task evaluated this model", UNKNOWN)
        title = "Agreement with dense" if pruned.get("compares") else "Quality kept"
        on = f" on {self.items}" if self.items else ""
        if dense is None:
            return Tile(title, f"{pruned['value']:.3f}", f"{pruned['metric']}{on}", UNKNOWN)
        note = f"{pruned['metric']} {dense['value']:.3f} → {pruned['value']:.3f}{on}"
        if pruned.get("compares"):
            note = f"{pruned['metric']}{on}; no measure of quality"
        kept = self.kept
        if self.guessing():
            return Tile(title, "none to keep", f"the dense model guesses: {note}", POOR)
        if kept is None:
            return Tile(title, "none to keep", note, POOR)
        return Tile(title, f"{100 * kept:.1f} %", note, _color(kept, _KEPT))

    def header(self) -> tuple[str, ...]:
        """The columns of `rows`."""
        return ("", "dense", *self._others(), "pruned", "change")

    def rows(self, sizes: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, ...]]:
        """Sizes, times and quality under `header`.

        Args:
            sizes: (what, dense, pruned, change) of the program.
        """
        others = self._others()
        blank = ("",) * len(others)
        rows: list[tuple[str, ...]] = [(r[0], r[1], *blank, *r[2:]) for r in sizes]
        if self.bytes is not None:
            dense, quantized = self.dense_bytes, self.quantized_dense_bytes
            rows.append(
                (
                    f"MB on disk ({self.file})",
                    "" if dense is None else megabytes_text(dense),
                    *(
                        megabytes_text(quantized) if quantized and i == 0 and self.quantized else ""
                        for i in range(len(others))
                    ),
                    megabytes_text(self.bytes),
                    "" if dense is None else change_text(dense, self.bytes),
                )
            )
        for t in self.times():
            beside = (short(t.others[name]) if name in t.others else "" for name in self._names())
            change = times_text(t.ratio, "faster", "slower")
            rows.append((t.what, short(t.dense_ms), *beside, short(t.pruned_ms), change))
        return [*rows, *self._quality_rows(blank)]

    def _quality_rows(self, blank: tuple[str, ...]) -> list[tuple[str, ...]]:
        pruned, dense = self.quality.get("pruned"), self.quality.get("dense")
        if pruned is None:
            return []
        left = change = ""
        if dense is not None:
            left, change = value_text(dense), f"{pruned['value'] - dense['value']:+.4f}"
        return [(self.quality_title(), left, *blank, value_text(pruned), change)]

    def _names(self) -> list[str]:
        return [name for times in self.times()[:1] for name in times.others]

    def _others(self) -> tuple[str, ...]:
        return tuple(f"dense {name}" for name in self._names())


def _times(what: str, timing: Mapping[str, Any]) -> Times:
    return Times(
        what,
        timing["dense_ms"],
        timing["pruned_ms"],
        timing["speedup"],
        timing.get("speedup_low", timing["speedup"]),
        timing.get("speedup_high", timing["speedup"]),
        {name: row["dense_ms"] for name, row in (timing.get("others") or {}).items()},
    )


def _color(value: float, thresholds: tuple[float, float]) -> str:
    good, fair = thresholds
    return GOOD if value >= good else FAIR if value >= fair else POOR


def times_text(ratio: float, more: str, less: str) -> str:
    """A ratio and the word for it, such as "1.50x faster" or "1.20x slower"."""
    return f"{ratio:.2f}x {more}" if ratio >= 1 else f"{1 / ratio:.2f}x {less}"


def value_text(result: Mapping[str, Any]) -> str:
    """A task's figure, with one standard error where it has one."""
    error = result.get("standard_error")
    return f"{result['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def change_text(before: float, after: float) -> str:
    """The change in percent."""
    return f"{100 * (after - before) / before:+.1f} %" if before else "0 %"


def megabytes_text(count: float) -> str:
    """Bytes in megabytes."""
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.3f}"


def short(value: float) -> str:
    """Three significant digits, without an exponent: 0.0123, 12.3, 1,230."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def plural(count: int, noun: str) -> str:
    """A count and its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def capital(text: str) -> str:
    """A text with its first letter large."""
    return text[:1].upper() + text[1:]


CHOICES = (
    "What each product with zeros takes alone in milliseconds, products that read one value "
    'together. The fastest form was written; "pays from" is the part of zero blocks at which '
    "32x4 blocks are as fast as the faster of float and int8."
)
CHOICES_HEADER = ("layers", "tokens", "zero blocks", "float", "int8", "sparse", "form", "pays from")


def choice_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A choice among forms, as the manifest has it, under `CHOICES_HEADER`."""
    first, *more = record["layers"]
    ms = dict(record["ms"])
    stock = [short(ms.pop(name)) if name in ms else "" for name in ("float", "int8")]
    best = min(ms, key=lambda name: ms[name], default=None)
    form = str(record["form"])
    pattern = best or (form if form in record["zeros"] else next(iter(record["zeros"])))
    pays = record["pays_from"]
    from_on = "nowhere" if pays is None else f"{pays:.0%}"
    return (
        f"{first} and {len(more)} more" if more else str(first),
        str(record["rows"]),
        f"{record['zeros'][pattern]:.0%} of {pattern}",
        *stock,
        "" if best is None else short(ms[best]),
        form,
        from_on if record["ms"] else "",
    )
