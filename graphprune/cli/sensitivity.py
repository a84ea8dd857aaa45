"""`graphprune sensitivity`: what cutting each axis group alone costs and gains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from graphprune.cli.app import (
    CALIBRATION,
    MEASURING,
    OUTPUT,
    PRUNING,
    Batch,
    Calibration,
    Json,
    Model,
    Pickle,
    Threads,
    print_json,
    ratio_of,
    stdout_console,
)
from graphprune.cli.sizes import arguments_of, parse_batch, sized_inputs
from graphprune.cli.subject import Subject, opened
from graphprune.errors import GraphPruneError
from graphprune.storage.folders import check_writable

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.progress import Step
    from graphprune.report.sensitivity import Sensitivity


@final
@dataclass(frozen=True, slots=True)
class Analysis:
    """What is analyzed, and how; the command line's options.

    Attributes:
        ratios: fractions of each group's units to remove.
        score: which units go.
        roles: of the groups; all where empty.
        measure: whether the cuts are timed too.
        sizes: batch, and sequence, of what is timed.
        threads: of ONNX Runtime.
        seed: for a random score.
        calibration: the file whose samples the outputs are compared on.
        lines: sentences or samples of it, at most.
    """

    ratios: Sequence[float]
    score: str
    roles: Sequence[str]
    measure: bool
    sizes: tuple[int, ...]
    threads: int
    seed: int
    calibration: Path | None
    lines: int


def sensitivity_command(
    model: Model,
    ratios: Annotated[
        str,
        typer.Option(help="Fractions of each group's units to remove.", rich_help_panel=PRUNING),
    ] = "0.25,0.5,0.75",
    score: Annotated[
        str,
        typer.Option(
            help="obs, fluctuation, activation, magnitude or random.", rich_help_panel=PRUNING
        ),
    ] = "obs",
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="Which groups: head, kv_group, neuron …; repeatable.", rich_help_panel=PRUNING
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_lines: Annotated[
        int,
        typer.Option(
            help="At most so many sentences or samples of it; of running text, 32 tokens each.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 256,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Write the figures as a page too.", rich_help_panel=OUTPUT
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Write a recipe that cuts what costs least.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Time the cuts too, role by role.",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    batch: Batch = "",
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="For score random.")] = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Show what cutting each axis group alone does to the outputs, and what each role's time is.

    Without --calibration the outputs are compared on the model's example inputs only. Times are
    CPU time of one thread; with --threads above 1, of the wall clock.
    """
    fractions = parse_ratios(ratios)
    sizes = parse_batch(batch)
    check_plot(plot)
    check_recipe(recipe)

    # From here on torch is imported.
    from graphprune.cli.calibration import check_calibration
    from graphprune.cli.tables import sensitivity_tables
    from graphprune.passes.structural.sensitivity import check_options

    check_options(fractions, score, role or [])
    check_calibration([], calibration)
    analysis = Analysis(
        ratios=fractions,
        score=score,
        roles=role or [],
        measure=measure,
        sizes=sizes,
        threads=threads,
        seed=seed,
        calibration=calibration,
        lines=calibration_lines,
    )
    with opened(model, allow_pickle) as (subject, display):
        found = analyzed(subject, analysis, display.step)
    if plot is not None:
        from graphprune.report.page import sensitivity_page

        plot.write_text(sensitivity_page(found, model), encoding="utf-8")
    if recipe is not None:
        recipe.write_text(recipe_text(found, model), encoding="utf-8")
    if as_json:
        print_json({"model": model, **found.to_json(), "conclusion": found.conclusion()})
        return
    console = stdout_console()
    for title, table in sensitivity_tables(found):
        console.print(title)
        console.print(table)
    for group, reason in found.skipped.items():
        console.print(f"  skipped  {group}: {reason}", style="dim", markup=False, soft_wrap=True)
    for line in found.conclusion():
        console.print(line, markup=False, soft_wrap=True)
    if calibration is None:
        console.print("compared on the example inputs only; --calibration FILE says more")
    for path in (plot, recipe):
        if path is not None:
            console.print(f"written to {path}", soft_wrap=True, markup=False)
    if recipe is not None:
        console.print(
            f"graphprune compile {model} --recipe {recipe} -o out"
            + (f" --calibration {calibration}" if calibration is not None else ""),
            soft_wrap=True,
            markup=False,
        )


def recipe_text(found: Sensitivity, model: str) -> str:
    """The recipe that an analysis suggests, with what it is by and the conclusion as comments."""
    from graphprune.report.page import sensitivity_recipe

    lines = [f"By `graphprune sensitivity {model}`, {found.samples:,} samples."]
    lines += [*found.conclusion(), found.recipe()[1]]
    return "".join(f"# {line}\n" for line in lines) + sensitivity_recipe(found)


def parse_ratios(text: str) -> list[float]:
    """Numbers between 0 and 1 from "0.25,0.5" or "25%,50%".

    Raises:
        GraphPruneError: it reads otherwise.
    """
    try:
        found = [ratio_of(part.strip()) for part in text.split(",")]
    except ValueError as e:
        raise GraphPruneError(
            f"--ratios is numbers with commas, such as 0.25,0.5, got {text!r}"
        ) from e
    wrong = [ratio for ratio in found if not 0 < ratio < 1]
    if wrong:
        raise GraphPruneError(f"--ratios are above 0 and below 1, got {wrong[0]:g}")
    return found


def check_plot(path: Path | None) -> None:
    """Refuse, before any work, a page that cannot be written.

    Raises:
        GraphPruneError: the name does not end in .html, the folder is missing or not writable.
    """
    check_file(path, "--plot writes an HTML page", (".html",))


def check_recipe(path: Path | None) -> None:
    """Refuse, before any work, a recipe that cannot be written.

    Raises:
        GraphPruneError: the name is none of YAML, the folder is missing or not writable.
    """
    check_file(path, "--recipe writes a recipe", (".yaml", ".yml"))


def check_file(path: Path | None, what: str, endings: tuple[str, ...]) -> None:
    """Refuse, before any work, a file of another kind or in a place that takes none.

    Raises:
        GraphPruneError: the name has none of the endings, or the folder is missing or not writable.
    """
    if path is None:
        return
    if path.suffix not in endings:
        raise GraphPruneError(f"{what}: give a name in {endings[0]}, not {str(path)!r}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise GraphPruneError(f"{str(path)!r} cannot be written: there is no such folder for it")
    check_writable(path)


def analyzed(subject: Subject, analysis: Analysis, step: Step) -> Sensitivity:
    """A sensitivity analysis on the file's batches, or on the model's example inputs without one.

    Times are of one sample, or of the sizes asked for, each cut and the dense model interleaved.
    """
    from graphprune.cli.calibration import calibration
    from graphprune.passes.structural.sensitivity import sensitivity

    with step("capture"):
        program = subject.captured().program
        inputs = sized_inputs(program, analysis.sizes)
    entry = program.forward
    batches = [arguments_of(program, dict(zip(entry.input_names, entry.example, strict=True)))]
    if analysis.calibration is not None:
        with step("calibration"):
            batches = calibration(subject, program, analysis.calibration, analysis.lines)
    with step("sensitivity") as advance:
        return sensitivity(
            program,
            batches,
            ratios=analysis.ratios,
            score=analysis.score,
            roles=analysis.roles,
            clock=_clock(inputs, analysis.threads) if analysis.measure else None,
            progress=advance,
            seed=analysis.seed,
        )


def _clock(
    inputs: Mapping[str, Any], threads: int
) -> Callable[[Program, Program], tuple[float, float]]:
    """Milliseconds of a program and the dense one, interleaved; the dense one is exported once."""
    from graphprune.exporters import to_onnx
    from graphprune.exporters.onnx.files import save_onnx
    from graphprune.exporters.runtime.session import feeds_of, open_session
    from graphprune.exporters.runtime.timing import compare

    sessions: dict[int, Any] = {}

    def session(program: Program) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_onnx(to_onnx(program), path)
            return open_session(path, threads)

    def clock(program: Program, dense: Program) -> tuple[float, float]:
        if not sessions:
            sessions[0] = session(dense)
        opened = session(program)
        feeds = feeds_of(dict(inputs), [i.name for i in opened.get_inputs()])
        found = compare(
            opened,
            sessions[0],
            feeds,
            threads=threads,
            repeats=10,
        )
        return found.model.ms, found.against.ms

    return clock
