"""The command line: draw, check in parallel, print failures small, and a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.fuzz.check import Failure, Outcome, check
from benchmarks.fuzz.coverage import missing
from benchmarks.fuzz.drawing import draw
from benchmarks.fuzz.minimize import minimized, script

MOST_SHOWN = 10  # failures that are made smaller and printed


@dataclass(slots=True)
class Totals:
    """Sums over graphs."""

    graphs: int = 0
    cuts: int = 0
    plain: int = 0
    unseen: int = 0
    exported: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    not_exported: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, Failure]] = field(default_factory=list)

    def add(self, number: int, outcome: Outcome) -> None:
        """Count one graph."""
        self.graphs += 1
        self.cuts += outcome.cuts
        self.plain += outcome.plain
        self.unseen += outcome.unseen
        self.skipped.update(outcome.skipped)
        self.operators.update(outcome.operators)
        self.failures += [(number, failure) for failure in outcome.failures]
        if outcome.refused:
            self.refused[outcome.refused] += 1
        if outcome.exported == "ok":
            self.exported += 1
        elif outcome.exported:
            self.not_exported[outcome.exported] += 1

    def count(self, kind: str) -> int:
        """Number of failures of a kind."""
        return sum(failure.kind.startswith(kind) for _, failure in self.failures)


def main() -> None:
    """Run, and exit with 1 when something failed."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 160)
    totals, start = Totals(), time.monotonic()
    numbers = range(options.first, options.first + options.graphs)
    with _progress(console) as progress:
        task = progress.add_task("", total=options.graphs, found="")
        for number, outcome in _outcomes(options, numbers, start):
            totals.add(number, outcome)
            found = f"{totals.count('wrong')} wrong, {totals.count('crash')} crashes"
            progress.update(task, advance=1, found=found)
    _show_failures(console, totals, options.failures)
    seconds = time.monotonic() - start
    _show(console, totals, options, seconds)
    sys.exit(1 if totals.failures else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=100, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all of them")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number to begin with")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after this time")
    parser.add_argument("--ort", type=int, default=0, metavar="K", help="run K in ONNX Runtime")
    parser.add_argument("--cuts", type=int, default=2, metavar="C", help="cuts of each graph")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes")
    parser.add_argument(
        "--failures", type=Path, metavar="FOLDER", help="write failures there as modules"
    )
    return parser.parse_args()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("graphs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[found]}"), console=console,
    )  # fmt: skip


def _outcomes(
    options: argparse.Namespace, numbers: range, start: float
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes in order, until the time is up."""
    limit = float("inf") if options.minutes is None else 60 * options.minutes
    jobs = ((options.seed, n, options.cuts, n - options.first < options.ort) for n in numbers)
    if options.workers == 1:
        for job in jobs:
            if time.monotonic() - start > limit:
                return
            yield job[1], _one(job)
        return
    with ProcessPoolExecutor(
        options.workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        while batch := list(islice(jobs, 8 * options.workers)):
            yield from zip((job[1] for job in batch), pool.map(_one, batch), strict=True)
            if time.monotonic() - start > limit:
                return


def _one(job: tuple[int, int, int, bool]) -> Outcome:
    seed, number, cuts, onnx = job
    return check(draw(seed, number), cuts, onnx=onnx)


def _show_failures(console: Console, totals: Totals, folder: Path | None) -> None:
    """The first failure of each kind and a few more, made smaller, as Python."""
    shown: Counter[str] = Counter()
    for number, failure in totals.failures:
        if sum(shown.values()) >= MOST_SHOWN or shown[failure.kind] >= 3:
            console.print(f"graph {number}: {failure.kind}: {failure.detail}", markup=False)
            continue
        shown[failure.kind] += 1
        text = script(minimized(failure))
        console.rule(f"graph {number}: {failure.kind}")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"graph_{number}.py").write_text(text, encoding="utf-8")


def _show(console: Console, totals: Totals, options: argparse.Namespace, seconds: float) -> None:
    table = Table(title="fuzz", title_justify="left", show_header=False)
    first, last = options.first, options.first + totals.graphs - 1
    uncovered, excused = missing(set(totals.operators))
    rows = {
        "graphs": f"{totals.graphs} (seed {options.seed}, numbers {first} to {last})",
        "refused by capture": sum(totals.refused.values()),
        "cuts compared": totals.cuts,
        "also by zeroed weights": totals.plain,
        "cuts skipped": sum(totals.skipped.values()),
        "cuts that moved no output": totals.unseen,
        "in ONNX Runtime": f"{totals.exported}, not written {sum(totals.not_exported.values())}",
        "wrong": totals.count("wrong"),
        "crashes": totals.count("crash"),
        "operators with a rule, seen": len(totals.operators),
        "not seen": f"{len(uncovered)}: {' '.join(uncovered)}",
        "cannot be seen": f"{len(excused)}: {' '.join(excused)}",
        "seconds": f"{seconds:.0f}, {seconds / max(totals.graphs, 1):.2f} a graph",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    for title, counter in (
        ("skipped", totals.skipped), ("refused", totals.refused),
        ("not written", totals.not_exported),
    ):  # fmt: skip
        for reason, count in counter.most_common(12):
            table.add_row(f"{title}: {count}", reason)
    console.print(table)
    rare = [f"{name} {n}" for name, n in reversed(totals.operators.most_common()) if n < 5]
    if rare:
        console.print(f"seen fewer than five times: {', '.join(rare)}", markup=False)


if __name__ == "__main__":
    main()
