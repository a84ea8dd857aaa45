"""Budgets on the command line: their options, and `graphprune front`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from graphprune.cli.app import (
    BUDGET,
    MEASURING,
    Batch,
    Calibration,
    Json,
    Metric,
    Model,
    Pickle,
    Quantization,
    ReduceRange,
    Seed,
    Target,
    TaskName,
    Threads,
    parse_ratio,
    print_json,
    stdout_console,
)
from graphprune.cli.early import (
    check_artifact_folder,
    check_choice,
    check_exists,
    check_metric,
)
from graphprune.cli.names import COMPARING, KERNELS, TARGETS
from graphprune.cli.sizes import parse_batch
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.validate import check_number

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from graphprune.cli.run import Options
    from graphprune.cli.subject import Subject
    from graphprune.cli.summary import Summary
    from graphprune.ir.program import Program
    from graphprune.models.tasks import Task
    from graphprune.passes import Quantize
    from graphprune.pipeline.base import Pass
    from graphprune.report.budget import Front, FrontPoint

Device = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Times of another machine: the JSON of a device kit.",
        rich_help_panel=BUDGET,
    ),
]
Faster = Annotated[
    float | None,
    typer.Option(
        metavar="TIMES",
        help="Make it so many times faster than the dense model.",
        rich_help_panel=BUDGET,
    ),
]
Milliseconds = Annotated[
    float | None,
    typer.Option("--ms", help="Milliseconds that one run may take.", rich_help_panel=BUDGET),
]
Megabytes = Annotated[
    float | None,
    typer.Option("--mb", help="Megabytes that the file may have.", rich_help_panel=BUDGET),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="DROP",
        parser=parse_ratio,
        help="Make it as fast as it can be while it loses at most so much on --task with --data, "
        "or by --metric.",
        rich_help_panel=BUDGET,
    ),
]


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """What the options of a command ask for."""

    faster: float | None = None
    ms: float | None = None
    mb: float | None = None
    max_drop: float | None = None
    task: str = ""
    metric: str = ""
    data: Path | None = None
    device: Path | None = None
    ignore: tuple[str, ...] = ()
    target: str = "onnxruntime"

    @property
    def anything(self) -> bool:
        """Whether there is a budget."""
        return any(v is not None for v in (self.faster, self.ms, self.mb, self.max_drop))

    def check(self) -> None:
        """Refuse, before torch is imported, values that are none and what does not go together.

        Raises:
            GraphPruneError: one of these; the way out is named.
        """
        if self.metric:
            check_metric(self.metric)
        if self.device is not None and not self.anything and self.target != KERNELS:
            raise RecipeError(
                "--device is for a budget, or sparse products: give --faster, --ms or --mb with "
                f"it, or --target {KERNELS}"
            )
        if self.data is not None and self.max_drop is None:
            raise RecipeError("--data is what --max-drop decides by: give --max-drop 0.01 with it")
        if self.faster is not None:
            rule = "how many times faster, above 1"
            check_number("--faster", self.faster, rule, low=1, open_low=True)
        for name in ("ms", "mb", "max_drop"):
            if (value := getattr(self, name)) is not None:
                option = "--" + name.replace("_", "-")
                check_number(option, value, "a number above 0", low=0, open_low=True)
        if self.max_drop is not None:
            self._check_decided()
        check_exists(self.data)
        check_exists(self.device)

    def _check_decided(self) -> None:
        """Refuse a drop that nothing decides, or two things do."""
        if bool(self.task) == bool(self.metric):
            raise RecipeError(
                "--max-drop is a drop on a task: give --task NAME, such as --task sts --data "
                "dev.tsv, or --metric FILE.py:FUNCTION, and not both"
            )
        if self.task in COMPARING:
            raise RecipeError(
                f"the task {self.task!r} compares with the dense model, which has nothing to "
                "lose against itself: give --task of a task with labels"
            )

    def check_fully(self, threads: int) -> None:
        """Refuse what remains to be refused before a model is loaded.

        Raises:
            GraphPruneError: options that exclude each other, a task without data, or a file that is
                no device's.
        """
        from graphprune.exporters import open_device
        from graphprune.models.tasks import TASKS
        from graphprune.passes import Budget

        if self.max_drop is not None and self.task and TASKS[self.task].file:
            TASKS[self.task].find_data(self.data)
        if self.anything:
            # The task itself needs the model's tokenizer.
            Budget(
                self.faster,
                self.ms,
                self.mb,
                max_drop=self.max_drop,
                task=None if self.max_drop is None else self.check,
            )
        if self.device is not None:
            open_device(str(self.device), threads)

    def options(self, program: Program, sizes: tuple[int, ...], threads: int) -> dict[str, Any]:
        """The options of the pass, but for the task."""
        from graphprune.cli.sizes import timed_sizes
        from graphprune.ir.quantization import PATTERNS

        return {
            "speedup": self.faster,
            "ms": self.ms,
            "size_mb": self.mb,
            "max_drop": self.max_drop,
            "batch": timed_sizes(program, sizes),
            "threads": threads,
            "device": "" if self.device is None else str(self.device),
            "blocks": PATTERNS[0] if self.target == KERNELS else "",
            "ignore": self.ignore,
        }


def budget_pass(
    asked: Asked,
    subject: Subject,
    program: Program,
    calibration: Any,
    sizes: tuple[int, ...],
    threads: int,
    metric: Task | None = None,
) -> Pass:
    """The pass that a command's options ask for."""
    from graphprune.models.tasks import TASKS, task_evaluation
    from graphprune.passes import Budget

    task = None
    if asked.max_drop is not None and metric is not None:
        task = task_evaluation(metric)
    elif asked.max_drop is not None:
        schema = {"schema": subject.schema(asked.task)} if TASKS[asked.task].labeled else {}
        task = task_evaluation(
            asked.task, subject.tokenizer_dir, asked.data, calibration=calibration, **schema
        )
    return Budget(task=task, **asked.options(program, sizes, threads))


def has_budget(steps: Sequence[Pass]) -> bool:
    """Whether a recipe has a budget, which can be met on text that every Python has."""
    from graphprune.passes import Budget

    return any(isinstance(step, Budget) for step in steps)


def as_timed(
    steps: Sequence[Pass], program: Program, sizes: tuple[int, ...], threads: int
) -> list[Pass]:
    """The passes, with budgets at the sizes and threads that the command times."""
    from graphprune.cli.sizes import timed_sizes
    from graphprune.passes import Budget

    def timed(budget: Budget) -> Budget:
        if budget.batch:
            return budget
        return replace(budget, batch=timed_sizes(program, sizes), threads=threads)

    found: list[Pass] = []
    for step in steps:
        trained: Any = step  # a pass that trains to a budget has it as an option
        if isinstance(step, Budget):
            found.append(timed(step))
        elif isinstance(getattr(step, "budget", None), Budget):
            found.append(replace(trained, budget=timed(trained.budget)))
        else:
            found.append(step)
    return found


def parse_speedups(text: str) -> list[float]:
    """Numbers above 1 from "1.5,2,3", ascending.

    Raises:
        GraphPruneError: it reads otherwise.
    """
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as e:
        raise GraphPruneError(
            f"--faster is numbers with commas, such as 1.5,2,3, got {text!r}"
        ) from e
    if found[0] <= 1:
        raise GraphPruneError(f"--faster is above 1, got {found[0]:g}")
    return found


def front_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the family.")],
    faster: Annotated[
        str,
        typer.Option(
            metavar="TIMES", help="A model for each speed-up; commas.", rich_help_panel=BUDGET
        ),
    ] = "1.5,2,3,4,6",
    quantize: Quantization = "",
    reduce_range: ReduceRange = False,
    target: Target = TARGETS[0],
    calibration: Calibration = None,
    task: TaskName = "",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What the task is evaluated on.", rich_help_panel=MEASURING
        ),
    ] = None,
    metric: Metric = "",
    batch: Batch = "",
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Compile a family of models, one for each speed-up, and draw speed against quality.

    Writes an artifact for each, and front.html with the dense model and its int8 form beside. Where
    a speed-up cannot be reached, it and those above it are left out.
    """
    speedups = parse_speedups(faster)
    sizes = parse_batch(batch)
    check_choice("target", target, TARGETS)
    if metric:
        check_metric(metric)
        if task:
            raise RecipeError("give either --task or --metric, not both")
    check_exists(data)
    folders = [out / name for name in ("dense-int8", *(f"{s:g}x" for s in speedups))]
    for folder in folders:
        check_artifact_folder(folder)

    # From here on torch is imported.
    from graphprune.cli.calibration import check_calibration
    from graphprune.cli.evaluate import own_metric
    from graphprune.cli.run import Options, check_output
    from graphprune.cli.subject import opened
    from graphprune.models.tasks import TASKS
    from graphprune.passes import Quantize
    from graphprune.report.budget import FRONT
    from graphprune.report.page import front_page

    check_calibration([], calibration)
    if task and TASKS[task].file:
        TASKS[task].find_data(data)
    for folder in folders:
        check_output(folder)
    options = Options(
        sizes=sizes,
        threads=threads,
        seed=seed,
        calibration=calibration,
        bundled=True,
        metric=own_metric(metric),
        target=target,
    )
    with opened(model, allow_pickle) as (subject, display):
        task = task or subject.task or ""
        if not task and not metric:
            raise RecipeError(
                f"{subject.name!r} has no task of its own to evaluate the family by: give --task "
                "NAME, with --data FILE, or --metric FILE.py:FUNCTION"
            )
        after = Quantize(quantize, reduce_range=reduce_range) if quantize else None
        front = _family(subject, speedups, after, out, options, task, data, display)
    page = out / "front.html"
    page.write_text(front_page(front), encoding="utf-8")
    if as_json:
        print_json(front.to_json())
        return
    from rich.table import Table

    table = Table(*FRONT, front.metric)
    for row in front.rows():
        table.add_row(*row)
    console = stdout_console()
    console.print(table)
    console.print(f"on {front.where}", markup=False)
    console.print(f"written to {page}", soft_wrap=True, markup=False)


def _family(
    subject: Subject,
    speedups: list[float],
    last: Quantize | None,
    out: Path,
    options: Options,
    task: str,
    data: Path | None,
    display: Any,
) -> Front:
    from graphprune.cli.run import compiled_and_measured
    from graphprune.passes import Quantize
    from graphprune.report.budget import BudgetReport, Front

    after: list[Pass] = [] if last is None else [last]
    # Of as many bits as the family: eight may be far off where seven were asked for.
    int8: list[Pass] = [Quantize("int8-dynamic", reduce_range=bool(last and last.reduce_range))]
    family: list[FrontPoint] = []
    others: list[FrontPoint] = []
    where = ""

    def run(name: str, asked: Asked, passes: list[Pass]) -> Summary:
        return compiled_and_measured(
            subject,
            passes,
            out / name,
            replace(options, asked=asked, task=task, data=data, target=asked.target),
            step=display.step,
            observer=display.observe,
        )

    out.mkdir(parents=True, exist_ok=True)
    dense = run("dense-int8", Asked(), int8)
    others.append(_point("dense int8", dense, None))
    others.append(_dense_point(dense))
    for i, speedup in enumerate(speedups):
        try:
            summary = run(f"{speedup:g}x", Asked(faster=speedup, target=options.target), after)
        except UnsupportedError as e:
            if not family:
                raise
            more = f", like the {len(speedups) - i - 1} above it" if speedups[i + 1 :] else ""
            log.warning("%gx is left out%s: %s", speedup, more, e)
            break
        found = next(
            (r for p in summary.report.passes if (r := BudgetReport.of(p.details)) is not None),
            None,
        )
        where = where or ("" if found is None else found.where)
        predicted = None if found is None else found.predicted
        family.append(_point(f"{speedup:g}x", summary, predicted))
    quality = dense.quality["pruned"]
    return Front(
        model=subject.name,
        metric=quality["metric"],
        higher_is_better=quality["higher_is_better"],
        where=where,
        family=tuple(family),
        others=tuple(others),
    )


def _point(name: str, summary: Summary, predicted: float | None) -> FrontPoint:
    from graphprune.report.budget import FrontPoint

    timing: Mapping[str, Any] = summary.timing or {}
    return FrontPoint(
        name,
        timing["speedup"],
        predicted,
        timing["pruned_ms"],
        summary.megabytes["pruned"],
        summary.quality["pruned"]["value"],
    )


def _dense_point(summary: Summary) -> FrontPoint:
    from graphprune.report.budget import FrontPoint

    timing: Mapping[str, Any] = summary.timing or {}
    quality = summary.quality.get("dense") or summary.quality["pruned"]
    return FrontPoint(
        "dense", 1.0, None, timing["dense_ms"], summary.megabytes["dense"], quality["value"]
    )
