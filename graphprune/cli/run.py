"""Compile and measure: what `graphprune compile`, `front` and `demo` do once options are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.cli.budget import Asked
from graphprune.cli.evaluate import NO_COLUMNS, evaluate_subject
from graphprune.cli.names import KERNELS
from graphprune.cli.sizes import input_names, timed_inputs, timed_sizes
from graphprune.cli.subject import Exported, Subject, opened
from graphprune.cli.timing import opponents_of, timing_of
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.api import Compiled
    from graphprune.cli.summary import Summary
    from graphprune.cli.training import LabeledData
    from graphprune.exporters import Artifact
    from graphprune.ir.program import Program
    from graphprune.models.tasks import Task
    from graphprune.pipeline.base import Pass
    from graphprune.pipeline.events import JSON, Observer
    from graphprune.progress import Step
    from graphprune.training.spec import Training

log = logging.getLogger(__name__)

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
    metric: Task | None = None  # the same, a function of the user's
    data: Path | None = None
    bundled: bool = False  # without calibration, text that every Python has


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
    """Capture, prune, export, time, evaluate; each long step is announced through `step`."""
    from graphprune.api import compile
    from graphprune.cli.budget import as_timed, budget_pass
    from graphprune.cli.summary import Summary
    from graphprune.cli.training import trained_first, training_of, with_task_head
    from graphprune.exporters.artifact.export import check_runs
    from graphprune.exporters.artifact.results import add_results
    from graphprune.models.data.calibration import count_tokens
    from graphprune.models.tasks.base import longest
    from graphprune.pipeline.pipeline import check_steps, mark_of

    labeled = options.labeled
    if labeled is not None:
        subject, labeled = with_task_head(subject, labeled, options.seed)
    with step("capture"):
        start = subject.captured(options.cache, options.dynamic)
        # What the model refuses is refused before the work.
        check_steps(passes, start.program)
        check_runs(options.target, start.program, mark_of(passes, start.program))
        inputs = timed_inputs(start.program, options.sizes) if options.measure else {}
    training = first = None
    if labeled is not None and labeled.trains:
        with step("training data"):
            training = training_of(
                labeled, input_names(start.program), subject.tokenizer_dir, longest(start.program)
            )
        if not subject.trained:
            start, first = trained_first(start, training, labeled.options, options.seed, observer)
    batches = _batches(subject, start.program, passes, options, training, step)
    if options.asked.anything:
        chosen = budget_pass(
            options.asked,
            subject,
            start.program,
            batches,
            options.sizes,
            options.threads,
            options.metric,
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
        artifact = _exported(compiled, path, options)
    timing: Mapping[str, JSON] | None = None
    operators: Mapping[str, JSON] | None = None
    if options.measure and artifact.has_baseline:
        with step("measure"):
            opponents = opponents_of(artifact)
            timing = timing_of(artifact, start.program, inputs, options.threads, opponents)
            operators = artifact.operators(inputs, threads=options.threads)
    quality: Mapping[str, JSON] = {}
    if options.quality:
        quality = _quality(artifact, subject, options, step)
    results = {
        "timing": timing,
        "operators": operators,
        "quality": quality,
        "dense_training": first,
    }
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
        manifest=artifact.manifest,
    )


def _exported(compiled: Compiled, path: Path, options: Options) -> Artifact:
    """Export; where that fails, keep the program, which may have taken hours."""
    try:
        return compiled.export(
            path,
            target=options.target,
            **(_sparse(options, compiled.program) if options.target == KERNELS else {}),
            baseline=options.baseline,
            opset=options.opset,
            layout=options.layout,
            weights=options.weights,
        )
    except Exception:
        _keep(compiled, path.expanduser().resolve())
        raise


def _keep(compiled: Compiled, path: Path) -> None:
    """Write the program beside where the artifact would be, under a free name."""
    names = (f"{path.name}-program{n or ''}" for n in count())
    kept = next(p for name in names if not (p := path.with_name(name)).exists())
    try:
        compiled.save(kept)
    except GraphPruneError as e:
        log.warning("the compiled program could not be kept: %s", e)
        return
    log.warning(
        "the export failed; graphprune.load(%r) reads the compiled program, which has no tokenizer "
        "and no calibration",
        str(kept),
    )


def _sparse(options: Options, program: Program) -> dict[str, Any]:
    """How the forms of sparse products are chosen: at which sizes, for which machine."""
    return {
        "device": options.asked.device,
        "batch": timed_sizes(program, options.sizes),
        "threads": options.threads,
    }


def _batches(
    subject: Subject,
    program: Program,
    passes: Sequence[Pass],
    options: Options,
    training: Training | None,
    step: Step,
) -> list[dict[str, Tensor]] | None:
    """Batches to calibrate on: of the file, of text that is there, or of the training data."""
    from graphprune.cli.calibration import bundled_calibration, calibration
    from graphprune.cli.training import calibration_from

    if options.calibration is not None:
        with step("calibration"):
            return calibration(subject, program, options.calibration, options.lines)
    if training is not None:
        needed = any(p.needs_calibration for p in passes)
        return calibration_from(training, options.lines) if needed else None
    if options.bundled:
        with step("calibration"):
            return bundled_calibration(subject, program, options.lines)
    return None


def _quality(artifact: Artifact, subject: Subject, options: Options, step: Step) -> dict[str, JSON]:
    """Evaluate the artifact on labeled data or by the model's own task; nothing without either."""
    from graphprune.models.tasks import TASKS

    task: str | Task | None = options.task or subject.task
    data, columns = options.data, NO_COLUMNS
    labeled = options.labeled
    if options.metric is not None:
        task = options.metric
    elif labeled is not None and labeled.evaluates:
        task, data = labeled.options.task, labeled.options.eval
        if labeled.schema is not None:
            columns = (labeled.schema.text, labeled.schema.label)
    if task is None:
        return {}
    record = TASKS[task] if isinstance(task, str) else task
    if record.compares and not artifact.has_baseline:
        return {}
    with step(f"task {record.name}") as advance:
        return evaluate_subject(Exported(artifact), record, data, advance, columns=columns)


def _megabytes(artifact: Artifact) -> dict[str, float]:
    """Size on disk of the ONNX files, weights beside them included."""
    from graphprune.exporters.onnx.files import file_bytes

    sizes = {"pruned": file_bytes(artifact.model_path)}
    if artifact.has_baseline:
        sizes["dense"] = file_bytes(artifact.baseline_path)
    return {which: size / 1e6 for which, size in sizes.items()}
