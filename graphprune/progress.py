"""Progress of long work, for the command line and for `graphprune.compile(progress=True)`.

A terminal or a notebook shows a bar for each stage. Anything else, such as a log, gets plain lines:
one when a stage ends, and while one runs at most one every ten seconds:

    capture: done in 4.2 s
    budget: models 31 of 100 (about 2 min 09 s left), 58 s so far
    finetune: steps 341 of 513 (about 3 min 02 s left), epoch 2/3, loss 0.41, 6 min 01 s so far
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, final

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

# Units of passes that run other work in each of them, whose counts are shown beside the loop's.
_LOOPS = ("repeats", "budgets")
# Seconds between two plain lines: a tenth of the time so far, within these.
_OFTENEST, _SELDOMEST = 10.0, 60.0
_LOOK = 2.0  # seconds between two looks whether a line is due


@final
@dataclass(slots=True)
class Count:
    """How far one kind of work is: `done` of `total`, and since when it is counted."""

    label: str
    done: int
    total: int
    start: float
    first: int

    def text(self, now: float) -> str:
        """Such as "models 31 of 100 (about 2 min 09 s left)"."""
        said = f"{self.label} {self.done:,} of {self.total:,}".strip()
        left = self.seconds_left(now)
        return said if left is None else f"{said} (about {duration_text(left)} left)"

    def seconds_left(self, now: float) -> float | None:
        """What is left if it goes on as it went; None while that cannot be said."""
        counted, spent = self.done - self.first, now - self.start
        if counted < 1 or spent < 1 or self.done >= self.total:
            return None
        return spent * (self.total - self.done) / counted


@final
@dataclass(slots=True)
class Stage:
    """A step or a pass that runs, and how far it is."""

    title: str
    start: float
    counts: dict[str, Count] = field(default_factory=dict)
    note: str = ""

    def count(
        self,
        done: int,
        total: int,
        now: float,
        label: str = "",
        values: Mapping[str, float] | None = None,
        where: str = "",
    ) -> None:
        """Take down how far it is; a count that begins again is estimated again."""
        held = self.counts.get(label)
        if held is None or done < held.done or total != held.total:
            held = Count(label, done, total, now, done)
        held.done = done
        around = {
            key: count
            for key, count in self.counts.items()
            if key != label and key.endswith(_LOOPS) and count.done < count.total
        }
        # Another thread may be reading: a new dict, whole.
        self.counts = {**around, label: held}
        numbers = [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        self.note = ", ".join([where, *numbers] if where else numbers)

    def text(self, now: float) -> str:
        """How far it is, in words; empty where it does not say."""
        counted = [count.text(now) for count in self.counts.values()]
        return ", ".join([*counted, self.note] if self.note else counted)

    @property
    def inner(self) -> Count | None:
        """The count that moves fastest."""
        return next(reversed(self.counts.values()), None)


def duration_text(seconds: float) -> str:
    """Such as 4.2 s, 58 s, 1 min 20 s, 12 min or 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class _Shown(Protocol):
    """What shows stages: bars or lines."""

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """Show nothing any more."""

    def begin(self, stage: Stage) -> None:
        """A stage has begun."""

    def update(self, stage: Stage) -> None:
        """A stage says how far it is."""

    def end(self, stage: Stage, note: str) -> None:
        """A stage is done."""


@final
class _Bars:
    """A bar for each stage."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tasks: dict[int, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", style="dim", markup=False),
            TimeElapsedColumn(),
            console=console,
            # What a notebook shows of the bars would go through them again.
            redirect_stdout=not console.is_jupyter,
            redirect_stderr=not console.is_jupyter,
        )

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def begin(self, stage: Stage) -> None:
        self._tasks[id(stage)] = self._progress.add_task(stage.title, total=None, text="")

    def update(self, stage: Stage) -> None:
        inner = stage.inner
        if inner is not None:
            self._progress.update(
                self._tasks[id(stage)],
                completed=inner.done,
                total=inner.total,
                text=stage.text(self._clock()),
            )

    def end(self, stage: Stage, note: str) -> None:
        self._progress.update(self._tasks.pop(id(stage)), total=1, completed=1, text=note)


@final
class Lines:
    """Plain lines, for what is no terminal."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._stages: list[Stage] = []
        self._last = clock()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        # A stage that counts nothing gives no other moment to write a line in.
        self._thread = threading.Thread(target=self._watch, name="graphprune-progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def begin(self, stage: Stage) -> None:
        with self._lock:
            self._stages.append(stage)

    def update(self, stage: Stage) -> None:
        """Nothing: the line that is due next says it."""

    def end(self, stage: Stage, note: str) -> None:
        with self._lock:
            self._stages.remove(stage)
            now = self._clock()
            took = f"{stage.title}: done in {duration_text(now - stage.start)}"
            self._say(f"{took}, {note}" if note else took, now)

    def look(self) -> None:
        """Write a line about the stage that runs, where one is due."""
        with self._lock:
            now = self._clock()
            if not self._stages:
                return
            stage = self._stages[-1]
            spent = now - stage.start
            if now - self._last >= min(max(spent / 10, _OFTENEST), _SELDOMEST):
                parts = [stage.text(now), f"{duration_text(spent)} so far"]
                self._say(f"{stage.title}: {', '.join(filter(None, parts))}", now)

    def _say(self, line: str, now: float) -> None:
        self._last = now
        self._write(line)

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK):
            self.look()


@final
class Display:
    """Progress of stages on a console; a context manager that shows it while inside."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown: _Shown = (
            _Bars(console, clock) if _draws(console) else Lines(_line_writer(console), clock)
        )
        self._pass: Stage | None = None

    def __enter__(self) -> Display:
        self._shown.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._shown.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[Advance]:
        """Show a step while inside; call what is yielded with (done, total)."""
        stage = self._begun(title)

        def advance(done: int, total: int) -> None:
            stage.count(done, total, self._clock())
            self._shown.update(stage)

        yield advance
        self._shown.end(stage, "")

    def observe(self, event: Event) -> None:
        """Follow a pipeline (an observer)."""
        if isinstance(event, PassStarted):
            self._pass = self._begun(event.name)
        elif self._pass is not None and isinstance(event, PassProgress):
            own = event.name == self._pass.title
            label = event.unit if own else f"{event.name}: {event.unit}"
            now = self._clock()
            self._pass.count(event.done, event.total, now, label, event.values, event.where)
            self._shown.update(self._pass)
        elif self._pass is not None and isinstance(event, PassFinished):
            self._shown.end(self._pass, _outcome(event, self._pass))
            self._pass = None

    def _begun(self, title: str) -> Stage:
        stage = Stage(title, self._clock())
        self._shown.begin(stage)
        return stage


def shown(wanted: bool) -> AbstractContextManager[Display | None]:
    """A display on stderr or in the notebook, or none."""
    return Display(Console(stderr=True, emoji=False)) if wanted else nullcontext()


def _outcome(event: PassFinished, stage: Stage) -> str:
    """What is said of a pass that is done."""
    # What was trained cannot be compared: its last loss and metric stay.
    if "metric_after" in event.report:
        return stage.note
    return "verified" if "verification" in event.report else ""


def _draws(console: Console) -> bool:
    """Whether bars can be drawn; rich needs ipywidgets for that in a notebook."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _line_writer(console: Console) -> Callable[[str], None]:
    # A notebook's console makes a block of HTML of each line.
    plain = (
        Console(stderr=True, force_jupyter=False, emoji=False) if console.is_jupyter else console
    )

    def write(line: str) -> None:
        plain.print(line, soft_wrap=True, markup=False, highlight=False)

    return write
