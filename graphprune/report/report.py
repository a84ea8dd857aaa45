"""Report: what a compilation did, as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from graphprune import notebook
from graphprune.ir.program import Program
from graphprune.pipeline.events import JSON, PassFinished
from graphprune.report.budget import CANDIDATES, LEVELS, BudgetReport, budgets
from graphprune.report.measured import (
    CHOICES,
    CHOICES_HEADER,
    THRESHOLDS,
    Measured,
    change_text,
    megabytes_text,
    plural,
)


@final
@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a program is: parameters, bytes of all tensors, FLOPs on the example inputs."""

    parameters: int
    bytes: int
    flops: int

    @classmethod
    def of(cls, program: Program) -> ModelSize:
        """Measure a program."""
        from graphprune.ir.cost import flops

        return cls(program.num_parameters(), program.nbytes(), flops(program))


@final
@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        step: the pass and its options, as a recipe writes them.
        removed: in words, what went away.
        parameters: before and after, or None where the pass changed nothing.
        max_error: the largest difference that verification saw in a row, relative to the row's
            scale (`verify.error.relative_error`); None where nothing was compared.
        seconds: the pass with all of its verification.
        skipped: what it declined to do, with the reason.
        details: the pass's own report.
    """

    name: str
    step: JSON
    modified: bool
    removed: str
    parameters: tuple[int, int] | None
    max_error: float | None
    seconds: float
    skipped: tuple[str, ...]
    details: Mapping[str, JSON]

    @classmethod
    def of(
        cls, finished: PassFinished, step: JSON, record: Mapping[str, JSON] | None
    ) -> PassReport:
        """From what the pipeline says of a pass, and its line of history if it has one."""
        details = dict(finished.report)
        check = details.get("verification")
        error = check.get("max_error") if isinstance(check, Mapping) else None
        counted = details if "parameters_before" in details else record or {}
        sizes = None
        if finished.modified and "parameters_before" in counted:
            sizes = (int(counted["parameters_before"]), int(counted["parameters_after"]))
        return cls(
            name=finished.name,
            step=step,
            modified=finished.modified,
            removed=_removed(details, finished.modified),
            parameters=sizes,
            max_error=None if error is None else float(error),
            seconds=finished.seconds + finished.verify_seconds,
            skipped=_all_skipped(details),
            details=details,
        )

    def __repr__(self) -> str:
        return f"PassReport({self.name}: {self.removed})"

    def steps(self) -> Iterator[tuple[str, Mapping[str, JSON]]]:
        """Title and report of this pass, and of each that it ran inside: "round 2: finetune"."""
        yield self.name, self.details
        yield from _inner(self.details)

    @property
    def check(self) -> Mapping[str, JSON]:
        """What verification saw; empty where nothing was compared."""
        check = self.details.get("verification")
        return check if isinstance(check, Mapping) else {}

    @property
    def resized(self) -> bool:
        """Whether parameters went or came."""
        return self.parameters is not None and self.parameters[0] != self.parameters[1]


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What a compilation did.

    Attributes:
        model: the class of the model.
        before: the size of the dense program.
        after: the size now.
        passes: every pass since the dense program, in order.
        capture_seconds: how long capture took; 0 where the compilation began with a program.
        seconds: everything, verification included.
        limits: the sizes of inputs that the model is for, where these are not all, in words.
    """

    model: str
    before: ModelSize
    after: ModelSize
    passes: tuple[PassReport, ...] = ()
    capture_seconds: float = 0.0
    seconds: float = 0.0
    limits: tuple[str, ...] = ()

    def extended(self, after: ModelSize, passes: Sequence[PassReport], seconds: float) -> Report:
        """This report with more passes after its own."""
        return replace(
            self, after=after, passes=(*self.passes, *passes), seconds=self.seconds + seconds
        )

    def steps(self) -> Iterator[tuple[str, Mapping[str, JSON]]]:
        """Title and report of every pass, and of those that ran inside one, in order."""
        for done in self.passes:
            yield from done.steps()

    @property
    def max_error(self) -> float | None:
        """The largest verification error of all passes; None where nothing was compared."""
        return max((p.max_error for p in self.passes if p.max_error is not None), default=None)

    def to_json(self) -> dict[str, JSON]:
        """Plain data that json.dumps takes and `from_json` reads back."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote."""
        passes = tuple(
            PassReport(
                **{
                    **p,
                    "parameters": None if p["parameters"] is None else tuple(p["parameters"]),
                    "skipped": tuple(p["skipped"]),
                }
            )
            for p in data["passes"]
        )
        sizes = {key: ModelSize(**data[key]) for key in ("before", "after")}
        limits = tuple(data.get("limits", ()))
        return cls(**{**data, **sizes, "passes": passes, "limits": limits})

    def __repr__(self) -> str:
        a, b = self.before.parameters, self.after.parameters
        passes = ", ".join(p.name for p in self.passes) or "no passes"
        return f"Report({self.model}: {passes}; {a:,} -> {b:,} parameters, {change_text(a, b)})"

    def _repr_html_(self) -> str:
        return notebook.block(
            self.model,
            notebook.table(("", "before", "after", "change"), self.size_rows()),
            notebook.table(HEADER, self.rows()) if self.passes else "",
            notebook.paragraph(f"Verification: {self.verification()}."),
            notebook.folded("skipped", self.skipped_lines()),
            notebook.folded("frozen", self.frozen_lines()),
        )

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.headline()}", f"verification: {self.verification()}"]
        lines.append(
            f"seconds: {self.seconds:.1f}, of these {self.capture_seconds:.1f} for capture"
        )
        if self.limits:
            lines += ["sizes of inputs:", *(f"  {line}" for line in self.limits)]
        if self.passes:
            lines += ["", *_aligned([HEADER, *self.rows()])]
        for title, found in self.budgets():
            lines += ["", f"{title}: {found.summary}", *_aligned([LEVELS, *found.level_rows()])]
        skipped = self.skipped_lines()
        if skipped:
            lines += ["", "skipped:", *(f"  {line}" for line in skipped)]
        frozen = self.frozen_lines()
        if frozen:
            lines += ["", "frozen:", *(f"  {line}" for line in frozen)]
        return "\n".join(lines)

    def to_markdown(self, manifest: Mapping[str, Any] | None = None) -> str:
        """The report as a Markdown page.

        Args:
            manifest: the artifact's, whose measurements of time, size and quality are on it too.
        """
        found = Measured(manifest or {})
        table = _markdown(found.header(), found.rows(self.size_rows(found)), left=1)
        lines = [f"# {self.model}, pruned", "", *_tile_lines(found), *table, ""]
        lines += [f"- {note}" for note in _measurement_notes(found)]
        lines += [
            "",
            f"Verification: {self.verification()}.",
            f"Compiled in {self.seconds:.1f} s, of these {self.capture_seconds:.1f} s for capture.",
        ]
        if self.passes:
            lines += ["", *_markdown(HEADER, self.rows(found), left=2)]
        if choices := found.choices():
            lines += ["", "## Sparse products", "", CHOICES, ""]
            lines += _markdown(CHOICES_HEADER, choices, left=1)
        for title, budget in self.budgets():
            lines += ["", *_budget_markdown(title, budget)]
        sections = {
            "Sizes of inputs": self.limits,
            "Skipped": self.skipped_lines(),
            "Frozen": self.frozen_lines(),
        }
        for title, items in sections.items():
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)] if items else []
        return "\n".join(lines) + "\n"

    def budgets(self) -> list[tuple[str, BudgetReport]]:
        """Title and record of every pass that ran to a budget."""
        return list(budgets(self.steps()))

    def headline(self, found: Measured | None = None) -> str:
        """Parameters, FLOPs and megabytes of weights, before and after, in one line.

        Megabytes only of a float model whose file `found` does not know.
        """
        a, b = self.before, self.after
        size = f", {megabytes_text(a.bytes)} -> {megabytes_text(b.bytes)} MB of weights"
        if self.quantized or (found is not None and found.bytes is not None):
            size = ""
        return (
            f"{a.parameters:,} -> {b.parameters:,} parameters"
            f" ({change_text(a.parameters, b.parameters)})"
            f"{size}"
            f", {count_text(a.flops)} -> {count_text(b.flops)} FLOPs"
            f" ({a.flops / max(b.flops, 1):.2f}x fewer)"
        )

    @property
    def quantized(self) -> bool:
        """Whether a pass marked the program, whose file is smaller then than its weights."""
        return any("scheme" in details for _, details in self.steps())

    def size_rows(self, found: Measured | None = None) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change) for a table.

        Megabytes are those of the weights in float, and among the rows only where `found` knows no
        file and no pass quantizes: what is shipped has one size.
        """
        a, b = self.before, self.after
        rows = [
            (
                "parameters",
                f"{a.parameters:,}",
                f"{b.parameters:,}",
                change_text(a.parameters, b.parameters),
            ),
            (
                "FLOPs on the example inputs",
                count_text(a.flops),
                count_text(b.flops),
                change_text(a.flops, b.flops),
            ),
        ]
        if self.quantized or (found is not None and found.bytes is not None):
            return rows
        sizes = (megabytes_text(a.bytes), megabytes_text(b.bytes))
        return [*rows, ("MB of weights", *sizes, change_text(a.bytes, b.bytes))]

    def rows(self, found: Measured | None = None) -> list[tuple[str, ...]]:
        """One row a pass, under HEADER.

        Args:
            found: measurements of an artifact; of what was quantized there the row says how much,
                and how far the outputs drift.
        """
        return [_pass_row(p, Measured({}) if found is None else found) for p in self.passes]

    def verification(self) -> str:
        """What was verified, in words."""
        error = self.max_error
        if error is not None:
            unverified = [p.name for p in self.passes if p.modified and p.max_error is None]
            but = f"; not compared: {', '.join(unverified)}" if unverified else ""
            size = f"largest difference {error:.1e} of a row's scale{but}"
            if blind := [p.name for p in self.passes if p.check.get("observable") is False]:
                return (
                    "not observable on these inputs: masking what "
                    f"{', '.join(blind)} removed moves no output, as before a last layer of zeros; "
                    f"{size}"
                )
            moved = [p.check["moved"] for p in self.passes if "moved" in p.check]
            by = f"masking moved the outputs by {min(moved):.1e}, " if moved else ""
            return f"removing the units equals masking them; {by}{size}"
        if not any(p.modified for p in self.passes):
            return "nothing was changed"
        changed = [p for p in self.passes if p.modified]
        reports = [
            details
            for p in changed
            for _, details in p.steps()
            if "rounds" not in details and details.get("modified", True)
        ]
        if not any(p.resized for p in changed) and all(
            {"sites", "epochs", "budget"} & details.keys() for details in reports
        ):
            return "no shape was changed, only values: nothing to verify"
        drifts = [
            check["drift"] for d in reports if "drift" in (check := d.get("verification", {}))
        ]
        if drifts:
            return (
                "a norm is over units that went, which equals no masking; largest drift "
                f"{max(drifts):.1e} of a row's scale"
            )
        return "not done (verify=False)"

    def skipped_lines(self) -> list[str]:
        """What passes declined to do, and why; like reasons of one pass in one line."""
        return [f"{p.name}: {reason}" for p in self.passes for reason in p.skipped]

    def frozen_lines(self) -> list[str]:
        """What operators keep passes from, the most parameters first, as the first pass found it.

        Later passes find the same, only smaller.
        """
        found: dict[str, Mapping[str, JSON]] = {}
        for _, details in self.steps():
            for frozen in details.get("frozen") or ():
                found.setdefault(str(frozen["reason"]), frozen)
        ordered = sorted(found.values(), key=lambda frozen: -float(frozen["share"]))
        lines = [str(frozen["text"]) for frozen in ordered]
        more = len(lines) - _FROZEN_LINES
        return lines if more <= 0 else [*lines[:_FROZEN_LINES], f"and {more} more"]


_FROZEN_LINES = 8  # in words; all of them are in each pass's own report

HEADER = ("pass", "what it did", "parameters", "error", "seconds")
ERRORS = (
    "Error: how far removing units is from masking them, as a fraction of an output row's scale. "
    "Drift: how far the quantized outputs are from the float ones, ||quantized - float|| / "
    "||float||, on the inputs that the export tried."
)


def _pass_row(done: PassReport, found: Measured) -> tuple[str, ...]:
    removed, error = done.removed, "" if done.max_error is None else f"{done.max_error:.1e}"
    if "scheme" in done.details:
        # The pass only marks the program; what came of it is known after the export.
        error = "" if found.drift is None else f"drift {found.drift:.1e}"
        removed = quantized_text(found.quantized) or removed
    return (
        done.name,
        removed,
        change_text(*done.parameters) if done.resized and done.parameters else "",
        error,
        f"{done.seconds:.1f}",
    )


def quantized_text(notes: Mapping[str, Any]) -> str:
    """What was quantized by which scheme, in words; empty without notes."""
    if not notes:
        return ""
    left = len(notes.get("float") or ())
    sparse = f", {notes['sparse']} of them sparse" if notes.get("sparse") else ""
    lstms = f", {plural(notes['recurrent'], 'LSTM')}" if notes.get("recurrent") else ""
    tables = plural(notes["tables"], "table")
    return (
        f"{plural(notes['products'], 'product')}{sparse}{lstms} and {tables} in "
        f"{notes['scheme']}, {left} left in float"
    )


def _tile_lines(found: Measured) -> list[str]:
    """The three figures of the page as a table and the colors in words; nothing without any."""
    if not found.manifest:
        return []
    rows = [(t.title, t.value, t.note, t.color) for t in found.tiles()]
    return [*_markdown(("", "", "", ""), rows, left=4), "", THRESHOLDS, ""]


def _measurement_notes(found: Measured) -> list[str]:
    """What times were measured on, how to measure again, and what the quality means."""
    where = found.measured_on()
    lines = [f"Times: {where}. Again: `{found.command}`"] if where else []
    return [line for line in (*lines, found.quality_meaning(), found.guessing()) if line]


def _removed(details: Mapping[str, JSON], modified: bool) -> str:
    """What a pass removed, in words: its own summary, or units counted by role."""
    if not modified:
        return "nothing"
    summary = details.get("summary")
    if isinstance(summary, str):
        return summary
    counted = _count_by_role(details.get("groups"))
    units = [
        f"{gone:,} of {total:,} {_UNITS.get(role, f'{role} units')} in {_counted(groups, 'group')}"
        for role, (gone, total, groups) in counted.items()
    ]
    cleaned = [
        _counted(_length(details[key]), key.removesuffix("s"))
        for key in ("nodes", "tensors")
        if key in details and _length(details[key])
    ]
    marked = [f"to be exported in {details['scheme']}"] if "scheme" in details else []
    return ", ".join(units or cleaned or marked) or "see its report"


_UNITS = {
    "head": "heads",
    "kv_group": "key/value groups",
    "queries_per_group": "queries per group",
    "qk_dim": "query/key dimensions",
    "v_dim": "value dimensions",
    "neuron": "neurons",
    "rank": "ranks of adapters",
    "expert": "experts",
}


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _length(value: JSON) -> int:
    """Items in a list, or in all lists of a mapping (one list an entry graph)."""
    if isinstance(value, Mapping):
        return sum(_length(v) for v in value.values())
    return len(value) if isinstance(value, list | tuple) else int(bool(value))


def _count_by_role(groups: JSON) -> dict[str, tuple[int, int, int]]:
    """role -> (units removed, units before, groups), from a pass's list of groups.

    Of a group that is a factor of some channels these are counted, once for all of their factors.
    """
    counted: dict[str, tuple[int, int, int]] = {}
    seen: set[tuple[str, str]] = set()
    entries = groups.values() if isinstance(groups, Mapping) else groups or ()
    for group in entries:
        if not isinstance(group, Mapping) or "before" not in group or "after" not in group:
            continue
        role = str(group.get("role", ""))
        for channels in group.get("channels") or ():
            if (role, channels["id"]) not in seen:
                counted[role] = _with(counted.get(role), channels)
                seen.add((role, channels["id"]))
        if not group.get("channels"):
            counted[role] = _with(counted.get(role), group)
    return counted


def _with(counts: tuple[int, int, int] | None, group: Mapping[str, JSON]) -> tuple[int, int, int]:
    """Units removed, units before and groups, with one more."""
    gone, total, number = counts or (0, 0, 0)
    before, after = int(group["before"]), int(group["after"])
    return gone + before - after, total + before, number + 1


def _inner(details: Mapping[str, JSON]) -> Iterator[tuple[str, Mapping[str, JSON]]]:
    """Title and report of the passes that one ran in rounds; not of a round that was given up."""
    rounds = details.get("rounds") or ()
    for number, done in enumerate(rounds[: details.get("taken", len(rounds))], 1):
        for inner in done["passes"] if isinstance(done, Mapping) else done:
            title = f"round {number}: {inner['pass']}"
            yield title, inner
            yield from ((f"{title}, {deeper}", more) for deeper, more in _inner(inner))


def _all_skipped(details: Mapping[str, JSON]) -> tuple[str, ...]:
    """What a pass skipped, and those that it ran inside; what each round skips, once."""
    inner = (
        f"{d['pass']}: {line}" for _, d in _inner(details) for line in _skipped(d.get("skipped"))
    )
    return tuple(dict.fromkeys([*_skipped(details.get("skipped")), *inner]))


def _skipped(entries: JSON) -> tuple[str, ...]:
    """A pass's skipped items as sentences, whichever way it lists them."""
    if isinstance(entries, Mapping):
        return tuple(f"{item}: {reason}" for item, reason in entries.items())
    lines = []
    for entry in entries or ():
        if isinstance(entry, Mapping):
            reason = entry.get("reason", "")
            what = next((entry[key] for key in ("id", "group", "name") if entry.get(key)), "")
            lines.append(f"{what}: {reason}" if what else str(reason))
        else:
            lines.append(str(entry))
    return tuple(lines)


def _budget_markdown(title: str, found: BudgetReport) -> list[str]:
    """A run to a budget as a section: its result, the levels, what else came close."""
    facts = _markdown(("", "dense", "result", ""), found.fact_rows(), left=1)
    lines = [f"## To a budget: {title}", "", f"{found.summary}.", "", *facts]
    lines += ["", *_markdown(LEVELS, found.level_rows(), left=1)]
    if candidates := found.candidate_rows():
        lines += ["", *_markdown(CANDIDATES, candidates, left=1)]
    notes = [*found.notes(), *(f"Warning: {w}" for w in found.warnings)]
    return [*lines, "", *(f"- {note}" for note in notes)] if notes else lines


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> list[str]:
    """A table; the first `left` columns to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    ruled = f"|{'|'.join(rule)}|"
    return [_line(header), ruled, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows as columns of equal width: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def count_text(count: int) -> str:
    """A large count with three digits and a unit: 1.38 G, 864 k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a report equals itself after a round trip through JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
