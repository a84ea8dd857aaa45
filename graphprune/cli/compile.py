"""`graphprune compile`: prune a model, write the artifact, measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from graphprune.cli.app import (
    Batch,
    Calibration,
    Dynamic,
    Json,
    LabelColumn,
    Model,
    Pickle,
    TextColumn,
    Threads,
    listed,
    parse_ratio,
)
from graphprune.cli.budget import (
    Asked,
    Device,
    Faster,
    MaxDrop,
    Megabytes,
    Milliseconds,
    has_budget,
)
from graphprune.cli.evaluate import NO_COLUMNS, evaluate_subject
from graphprune.cli.sizes import input_names, parse_batch, timed_inputs
from graphprune.cli.subject import Exported, Subject, opened
from graphprune.cli.timing import timing_of
from graphprune.errors import RecipeError

if TYPE_CHECKING:
    from graphprune.cli.summary import Summary
    from graphprune.cli.training import LabeledData
    from graphprune.exporters import Artifact
    from graphprune.pipeline.base import Pass
    from graphprune.pipeline.events import JSON, Observer
    from graphprune.progress import Step

LINES = 1024  # calibration sentences or samples, at most


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How `compiled_and_measured` goes about it; the command line's options."""

    baseline: bool = True
    verify: bool = True
    measure: bool = True
    quality: bool = True
    sizes: tuple[int, ...] = ()
    threads: int = 1
    seed: int = 0
    calibration: Path | None = None
    lines: int = LINES
    cache: bool = False
    labeled: LabeledData | None = None
    dynamic: tuple[str, ...] = ()
    opset: int | None = None
    layout: str = "auto"
    weights: str = "auto"
    target: str = "onnxruntime"
    asked: Asked = field(default_factory=Asked)
    task: str = ""  # that quality is evaluated by, where it is not the model's own
    data: Path | None = None
    bundled: bool = False  # without calibration, text that every Python has


def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    recipe: Annotated[
        str | None, typer.Option(help="A built-in recipe's name or a YAML file.")
    ] = None,
    faster: Faster = None,
    ms: Milliseconds = None,
    mb: Megabytes = None,
    max_drop: MaxDrop = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What --max-drop decides by; nothing of it may calibrate."
        ),
    ] = None,
    device: Device = None,
    heads: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO", parser=parse_ratio, help="Part of the attention heads to remove."
        ),
    ] = None,
    neurons: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO", parser=parse_ratio, help="Part of the hidden neurons to remove."
        ),
    ] = None,
    score: Annotated[
        str, typer.Option(help="For --heads and --neurons; default obs where there are data.")
    ] = "",
    allocation: Annotated[str, typer.Option(help="For --heads and --neurons.")] = "uniform",
    round_to: Annotated[int, typer.Option(help="Kept neurons round up to a multiple of it.")] = 1,
    quantize: Annotated[
        str, typer.Option(metavar="SCHEME", help="After pruning: int8-dynamic and others.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            help="What a head is trained for: classification, regression or digits; or what "
            "--max-drop is a drop on."
        ),
    ] = "",
    train: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labeled examples: TABs and a header line, no quotes."),
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="Others, to judge by after every epoch."),
    ] = None,
    finetune: Annotated[
        int | None, typer.Option(metavar="EPOCHS", help="After pruning: train on the labels.")
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(metavar="EPOCHS", help="After pruning: train towards the dense model too."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Of the dense model before pruning, where its head is new. Default 2."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of all training for which the recipe says none. Default "
            "5e-5, for digits 1e-3."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples of a training batch. Default 32.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write one after every epoch.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from those in there.")] = False,
    text_column: TextColumn = None,
    label_column: LabelColumn = "",
    calibration: Calibration = None,
    calibration_lines: Annotated[
        int,
        typer.Option(
            help="At most so many sentences or samples of it; of running text, 32 tokens each. "
            "Without --calibration they are drawn from the training data."
        ),
    ] = 1024,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Name patterns to leave alone; repeatable.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Write the dense twin too.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove every removal.")
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time dense against pruned.")
    ] = True,
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Judge by the model's own task.")
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache", help="A decoder with its key/value cache, to generate with.")
    ] = False,
    dynamic: Dynamic = "",
    opset: Annotated[
        int | None,
        typer.Option(
            help="23, for ONNX Runtime from 1.23 on; 20, from 1.21 on. Default: 20 where it can be."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="hub (config.json, onnx/model.onnx ...), flat, or auto.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="beside the graph, inside it, or auto: beside above 20 MB.")
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(help="What will run it: onnxruntime, or genai for a decoder with --cache."),
    ] = "onnxruntime",
    batch: Batch = "",
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Everything random comes from it.")] = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL, prove it, write the ONNX artifact, and show before and after."""
    from graphprune.cli.calibration import check_calibration
    from graphprune.cli.summary import present
    from graphprune.cli.training import TrainingOptions, check_training, labeled_data
    from graphprune.exporters.artifact.export import check_forms
    from graphprune.exporters.onnx.convert import check_opset

    asked = Asked(faster, ms, mb, max_drop, task, data, device, tuple(ignore or ()))
    asked.check(threads)
    training = TrainingOptions(
        task="" if max_drop is not None else task,
        train=train,
        eval=eval_file,
        text=tuple(text_column or ()),
        label=label_column,
        epochs=epochs,
        lr=lr,
        batch=batch_size,
        checkpoints=checkpoints,
        resume=resume,
    )
    check_training(training)
    has_data = calibration is not None or train is not None or training.brings_data
    score = score or ("obs" if has_data else "magnitude")
    removal = {"score": score, "allocation": allocation, "ignore": ignore or []}
    flags = {
        "prune-neurons": _flag(ratio=neurons, round_to=round_to, **removal),
        "prune-heads": _flag(ratio=heads, **removal),
        "finetune": _flag(epochs=finetune),
        "distill": _flag(epochs=distill),
        "quantize": _flag(scheme=quantize or None),
    }
    check_opset(opset, cached=cache)
    check_forms(layout, weights, target)
    steps = steps_of(recipe, flags, none=cache or asked.anything, lr=training.own_rate)
    if asked.anything and (recipe is not None or heads is not None or neurons is not None):
        raise RecipeError(
            "a budget chooses what is removed: leave --recipe, --heads and --neurons out, or the "
            "budget"
        )
    labeled = labeled_data(training, steps)
    trains = labeled is not None and labeled.trains
    bundled = asked.anything or has_budget(steps)
    check_calibration([] if bundled else steps, calibration, trains=trains)
    options = Options(
        baseline=baseline,
        verify=verify,
        measure=measure,
        quality=quality,
        sizes=parse_batch(batch),
        threads=threads,
        seed=seed,
        calibration=calibration,
        lines=calibration_lines,
        cache=cache,
        labeled=labeled,
        dynamic=listed(dynamic),
        opset=opset,
        layout=layout,
        weights=weights,
        target=target,
        asked=asked,
        task=task if max_drop is not None else "",
        data=data,
        bundled=bundled,
    )
    present(run(model, steps, out, options, allow_pickle), as_json)


def _flag(**options: Any) -> Mapping[str, Any] | None:
    """A pass's options, or None where the first of them was not given."""
    return None if next(iter(options.values())) is None else options


def steps_of(
    recipe: str | None,
    flags: Mapping[str, Mapping[str, Any] | None],
    *,
    none: bool = False,
    lr: float | None = None,
) -> list[Pass]:
    """The passes that the command line asks for: a recipe, or flags that stand for single passes.

    Args:
        recipe: its name or file.
        flags: options of passes by name; None for those that are not asked for.
        none: whether there may be none, because there is something else to do.
        lr: learning rate of the passes that train and do not say theirs.

    Raises:
        RecipeError: neither or both are given, or one of them is not valid.
    """
    from graphprune.pipeline.pipeline import check_order
    from graphprune.pipeline.recipe import load

    wanted = [{name: options} for name, options in flags.items() if options is not None]
    if recipe is not None and wanted:
        raise RecipeError("give either --recipe or flags such as --heads and --distill, not both")
    if recipe is None and not wanted and not none:
        raise RecipeError(
            "nothing to do: give --recipe NAME|FILE, --heads RATIO or --neurons RATIO; "
            "`graphprune recipes` and `graphprune passes` list what there is"
        )
    steps = load(wanted if recipe is None else recipe, lr)
    check_order(steps)
    return steps


def check_output(path: Path) -> None:
    """Refuse, before any work, a folder that cannot be written or is not ours to replace.

    Raises:
        ExportError: it is a file, holds what graphprune did not write, or is not writable.
    """
    from graphprune.exporters import is_artifact
    from graphprune.storage.folders import check_target

    check_target(path.expanduser(), is_artifact)


def run(
    model: str, steps: Sequence[Pass], out: Path, options: Options, allow_pickle: bool
) -> Summary:
    """Open a model, compile and measure it, with a progress display."""
    check_output(out)
    with opened(model, allow_pickle) as (subject, display):
        return compiled_and_measured(
            subject, steps, out, options, step=display.step, observer=display.observe
        )


def compiled_and_measured(
    subject: Subject,
    passes: Sequence[Pass],
    path: Path,
    options: Options,
    step: Step,
    observer: Observer,
) -> Summary:
    """Capture, prune, export, time, judge; each long step is announced through `step`."""
    from graphprune.api import compile
    from graphprune.cli.budget import as_timed, budget_pass
    from graphprune.cli.calibration import bundled_calibration, calibration
    from graphprune.cli.summary import Summary
    from graphprune.cli.training import calibration_from, trained_first, training_of, with_task_head
    from graphprune.exporters.artifact.export import check_runs
    from graphprune.exporters.artifact.results import add_results
    from graphprune.models.data.calibration import count_tokens
    from graphprune.models.tasks.base import longest
    from graphprune.pipeline.pipeline import check_steps

    labeled = options.labeled
    if labeled is not None:
        subject, labeled = with_task_head(subject, labeled, options.seed)
    with step("capture"):
        start = subject.captured(options.cache, options.dynamic)
        # What the model refuses is refused before the work.
        check_steps(passes, start.program)
        check_runs(options.target, start.program)
        inputs = timed_inputs(start.program, options.sizes) if options.measure else {}
    training = first = None
    if labeled is not None and labeled.trains:
        with step("training data"):
            training = training_of(
                labeled, input_names(start.program), subject.tokenizer_dir, longest(start.program)
            )
        if not subject.trained:
            start, first = trained_first(start, training, labeled.options, options.seed, observer)
    batches = None
    if options.calibration is not None:
        with step("calibration"):
            batches = calibration(subject, start.program, options.calibration, options.lines)
    elif training is None and options.bundled:
        with step("calibration"):
            batches = bundled_calibration(subject, start.program, options.lines)
    elif training is not None and any(p.needs_calibration for p in passes):
        batches = calibration_from(training, options.lines)
    if options.asked.anything:
        chosen = budget_pass(
            options.asked, subject, start.program, batches, options.sizes, options.threads
        )
        passes = [chosen, *passes]
        check_steps(passes, start.program)
    passes = as_timed(passes, start.program, options.sizes, options.threads)
    compiled = compile(
        start,
        passes,
        calibration=batches,
        training=training,
        verify=options.verify,
        seed=options.seed,
        observers=[observer],
    )
    with step("export"):
        artifact = compiled.export(
            path,
            target=options.target,
            baseline=options.baseline,
            opset=options.opset,
            layout=options.layout,
            weights=options.weights,
        )
    timing = None
    if options.measure and artifact.has_baseline:
        with step("measure"):
            timing = timing_of(artifact, start.program, inputs, options.threads, "dense")
    quality: Mapping[str, JSON] = {}
    if options.quality:
        quality = _quality(artifact, subject, options, step)
    results = {"timing": timing, "quality": quality, "dense_training": first}
    if noted := {key: value for key, value in results.items() if value}:
        artifact = add_results(artifact, compiled.report, noted, compiled.described)
    return Summary(
        model=subject.name,
        path=path,
        upload=artifact.upload_bytes / 1e6,
        report=compiled.report,
        megabytes=_megabytes(artifact),
        timing=timing,
        quality=quality,
        calibration=None if batches is None else count_tokens(batches),
        bundled=options.bundled and options.calibration is None and training is None,
        trained=first,
    )


def _quality(artifact: Artifact, subject: Subject, options: Options, step: Step) -> dict[str, JSON]:
    """Evaluate the artifact on labeled data or by the model's own task; nothing without either."""

    from graphprune.models.tasks import TASKS

    task, data, columns = options.task or subject.task, options.data, NO_COLUMNS
    labeled = options.labeled
    if labeled is not None and labeled.evaluates:
        task, data = labeled.options.task, labeled.options.eval
        if labeled.schema is not None:
            columns = (labeled.schema.text, labeled.schema.label)
    if task is None or (TASKS[task].compares and not artifact.has_baseline):
        return {}
    with step(f"task {task}") as advance:
        return evaluate_subject(Exported(artifact), task, data, advance, columns=columns)


def _megabytes(artifact: Artifact) -> dict[str, float]:
    """Size on disk of the ONNX files, weights beside them included."""
    from graphprune.exporters.onnx.files import file_bytes

    sizes = {"pruned": file_bytes(artifact.model_path)}
    if artifact.has_baseline:
        sizes["dense"] = file_bytes(artifact.baseline_path)
    return {which: size / 1e6 for which, size in sizes.items()}
