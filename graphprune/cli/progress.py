"""The progress display on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from graphprune.pipeline.events import Event, PassFinished, PassProgress, PassStarted

Advance = Callable[[int, int], None]
Step = Callable[[str], AbstractContextManager[Advance]]


@final
class Display:
    """Progress on stderr: one line a step, with a bar where the step knows how far it is."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("[dim]{task.fields[unit]}[/]"),
            TimeElapsedColumn(),
            console=console,
        )
        self._pass: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a step while inside; call what is yielded with (done, total)."""
        task = self._progress.add_task(title, total=None, unit="")

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total, unit=f"{done}/{total}")

        yield advance
        self._progress.update(task, total=1, completed=1)

    def observe(self, event: Event) -> None:
        """Follow a pipeline (an observer)."""
        if isinstance(event, PassStarted):
            self._pass = self._progress.add_task(event.name, total=None, unit="")
        elif self._pass is not None and isinstance(event, PassProgress):
            self._progress.update(
                self._pass, completed=event.done, total=event.total, unit=_unit(event)
            )
        elif self._pass is not None and isinstance(event, PassFinished):
            # What was trained cannot be compared: its last loss and metric stay.
            if "metric_after" in event.report:
                self._progress.update(self._pass, total=1, completed=1)
                return
            checked = "verified" if "verification" in event.report else ""
            self._progress.update(self._pass, total=1, completed=1, unit=checked)


def _unit(event: PassProgress) -> str:
    """What is counted, and the numbers to watch."""
    return " ".join([event.unit, *(f"{k} {v:.4g}" for k, v in event.values.items())]).strip()
