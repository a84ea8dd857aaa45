"""What the command line does, as functions: open, compile and measure, judge, describe."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.cli.training import (
    Lesson,
    calibration_from,
    schema_of,
    taught,
    trained_first,
    training_of,
)
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.pipeline.base import Pass
from graphprune.pipeline.events import JSON, Observer
from graphprune.pipeline.pipeline import check_order, check_steps
from graphprune.report.report import count_text
from graphprune.storage.folders import check_writable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from graphprune.api import Compiled
    from graphprune.exporters import Artifact, Comparison
    from graphprune.ir.program import Program
    from graphprune.models import LoadedModel
    from graphprune.report.report import Report
    from graphprune.report.sensitivity import Sensitivity

Advance = Callable[[int, int], None]
Step = Callable[[str], "AbstractContextManager[Advance]"]

Columns = tuple[tuple[str, ...], str]

NO_COLUMNS: Columns = ((), "")
_SEQUENCE = 128
LINES = 1024  # calibration sentences or samples, at most
SENSITIVITY_LINES = 256


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
    lesson: Lesson | None = None
    dynamic: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """Before and after.

    Attributes:
        model: what the user called it.
        path: the artifact's folder.
        report: what the passes did.
        megabytes: size on disk of "pruned" and, where written, "dense".
        timing: what the benchmark measured, or None.
        quality: task results of "pruned" and "dense", or none.
        calibration: "samples" and, for text, "tokens" of what calibrated it; None without.
        trained: what the training of the dense model reports, where its head was fresh.
    """

    model: str
    path: Path
    report: Report
    megabytes: Mapping[str, float]
    timing: Mapping[str, JSON] | None
    quality: Mapping[str, JSON]
    calibration: Mapping[str, int] | None = None
    trained: Mapping[str, JSON] | None = None

    def to_json(self) -> JSON:
        """Plain data."""
        return {
            "model": self.model,
            "path": str(self.path),
            "report": self.report.to_json(),
            "megabytes": dict(self.megabytes),
            "timing": self.timing,
            "quality": dict(self.quality),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "trained": None if self.trained is None else dict(self.trained),
        }

    def calibrated_on(self) -> str:
        """The calibration in words, such as "64 samples, 32,768 tokens"; empty without."""
        return ", ".join(f"{count:,} {what}" for what, count in (self.calibration or {}).items())

    def trained_first(self) -> str:
        """The dense model's training in words: "2 epochs, accuracy 0.505 -> 0.855"; or nothing."""
        told = self.trained
        if told is None:
            return ""
        epochs = told["epochs"]
        name, figures = told["metric"], [told["metric_before"], told["metric_after"]]
        if told["metric_after"] is None:
            name = "loss"
            figures = [epochs[i]["loss"] for i in sorted({0, len(epochs) - 1})]
        words = " -> ".join(f"{figure:.3f}" for figure in figures)
        return f"{_plural(len(epochs), 'epoch')}, {name} {words}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, pruned, change) for a table."""
        before, after = self.report.before, self.report.after
        rows = [
            (
                "parameters",
                f"{before.parameters:,}",
                f"{after.parameters:,}",
                _percent(before.parameters, after.parameters),
            ),
            (
                "FLOPs on the example inputs",
                count_text(before.flops),
                count_text(after.flops),
                _percent(before.flops, after.flops),
            ),
        ]
        pruned, dense = self.megabytes["pruned"], self.megabytes.get("dense")
        rows.append(
            (
                "MB on disk (ONNX)",
                "" if dense is None else _megabytes_text(dense),
                _megabytes_text(pruned),
                "" if dense is None else _percent(dense, pruned),
            )
        )
        if self.timing is not None:
            rows.append(timing_row(self.timing))
        return rows + _quality_rows(self.quality)


def timing_row(timing: Mapping[str, JSON]) -> tuple[str, str, str, str]:
    """A benchmark as (what, dense, pruned, change)."""
    return (
        f"ms, batch {timing['batch']}, {_plural(timing['threads'], 'thread')}",
        f"{timing['dense_ms']:.2f}",
        f"{timing['pruned_ms']:.2f}",
        f"{timing['speedup']:.2f}x faster",
    )


def _quality_rows(quality: Mapping[str, JSON]) -> list[tuple[str, str, str, str]]:
    pruned, dense = quality.get("pruned"), quality.get("dense")
    if pruned is None:
        return []
    change = "" if dense is None else f"{pruned['value'] - dense['value']:+.3f}"
    left = "" if dense is None else _value_text(dense)
    title = f"{pruned['task']}: {pruned['metric']}"
    if not pruned.get("higher_is_better", True):
        title += ", lower is better"
    return [(title, left, _value_text(pruned), change)]


def _value_text(result: Mapping[str, JSON]) -> str:
    """A task's figure, with one standard error where it has one."""
    error = result.get("standard_error")
    return f"{result['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


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


def parse_batch(text: str) -> tuple[int, ...]:
    """Sizes from "8" (batch) or "8x128" (batch x sequence); empty text gives none.

    Raises:
        GraphPruneError: it reads otherwise.
    """
    if not text:
        return ()
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise GraphPruneError(f"--batch is a number or two, such as 8 or 8x128, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def parse_ratios(text: str) -> list[float]:
    """Numbers between 0 and 1 from "0.25,0.5" or "25%,50%".

    Raises:
        GraphPruneError: it reads otherwise.
    """
    from graphprune.cli import ratio_of

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
    """Refuse, before any work, a page that cannot be written, or that would replace another file.

    Raises:
        GraphPruneError: so it is.
    """
    if path is None:
        return
    if path.suffix != ".html":
        raise GraphPruneError(
            f"--plot writes an HTML page: give a name in .html, not {str(path)!r}"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise GraphPruneError(f"{str(path)!r} cannot be written: there is no such folder for it")
    check_writable(path)


def sized_inputs(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The program's example inputs, repeated or cropped to batch and sequence, without padding.

    Without sizes: one sample; without a length: 128 tokens where the program takes as many.

    Returns:
        Keyword arguments of the program.

    Raises:
        GraphPruneError: the program does not run at these sizes.
    """
    if sizes:
        symbols = {s for dims in program.forward.dynamic.values() for s in dims.values()}
        if len(sizes) == 2 and "sequence" not in symbols:
            raise GraphPruneError(
                f"the model takes no sequence: give --batch {sizes[0]}, not "
                f"{'x'.join(map(str, sizes))}"
            )
        if len(sizes) == 1 and not _problem(program, _resized(program, (sizes[0], _SEQUENCE))):
            sizes = (sizes[0], _SEQUENCE)
        inputs = _resized(program, sizes)
        problem = _problem(program, inputs)
        if problem:
            raise GraphPruneError(
                f"the model does not run at {'x'.join(map(str, sizes))} ({problem}); "
                "give --batch that it takes"
            )
        return inputs
    inputs = _resized(program, (1, _SEQUENCE))
    return _resized(program, (1,)) if _problem(program, inputs) else inputs


def timed_inputs(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What is timed: `sized_inputs`, or for a decoder with a cache one token behind 128 others.

    Args:
        program: its exported form is what is timed.
        sizes: batch, and sequence; with a cache, batch and past.

    Returns:
        Keyword arguments; with a cache ids [batch, 1] and mask [batch, past + 1] are all.

    Raises:
        GraphPruneError: the program does not run at these sizes.
    """
    if program.deployed == "forward":
        return sized_inputs(program, sizes)
    import torch

    from graphprune.capture.decoder import IDS, MASK, past_of_zeros, step

    problem = ""
    for past in sizes[1:2] or (_SEQUENCE, _SEQUENCE // 4):
        batch = sizes[0] if sizes else 1
        ids = torch.zeros(batch, 1, dtype=torch.int64)
        mask = torch.ones(batch, past + 1, dtype=torch.int64)
        try:
            step(program, ids, mask, past_of_zeros(program.entries["decode"], batch, past))
        except Exception as e:
            problem = str(e).strip().split("\n")[0]
        else:
            return {IDS: ids, MASK: mask}
    raise GraphPruneError(
        f"the model cannot take one more token after {past} ({problem}); give --batch BxP with P "
        "tokens of past that it takes"
    )


def _resized(program: Program, sizes: tuple[int, ...]) -> dict[str, Any]:
    import torch

    wanted = dict(zip(("batch", "sequence"), sizes, strict=False))
    entry = program.forward
    flat: dict[str, Tensor] = {}
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        for dim, symbol in entry.dynamic.get(name, {}).items():
            size = wanted.get(symbol, tensor.shape[dim])
            repeats = -(-size // tensor.shape[dim])
            tensor = torch.cat([tensor] * repeats, dim).narrow(dim, 0, size)
        is_mask = not tensor.is_floating_point() and bool(((tensor == 0) | (tensor == 1)).all())
        flat[name] = torch.ones_like(tensor) if is_mask else tensor.contiguous()
    return _arguments(program, flat)


def _arguments(program: Program, flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Flat inputs by name as keyword arguments of the program."""
    import torch.utils._pytree as pytree

    from graphprune.ir.program import Constant

    return {
        argument.name: pytree.tree_unflatten(
            [leaf.value if isinstance(leaf, Constant) else flat[leaf] for leaf in argument.leaves],
            argument.spec,
        )
        for argument in program.forward.arguments
    }


def _problem(program: Program, inputs: Mapping[str, Any]) -> str:
    try:
        program(**inputs)
    except Exception as e:
        return str(e).strip().split("\n")[0]
    return ""


def batch_text(program: Program, inputs: Mapping[str, Any]) -> str:
    """The sizes of inputs as "1x128", or "1" where there is no sequence.

    For a decoder with a cache "1x1 after 128": one token each, behind so many.
    """
    if program.deployed != "forward":
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return f"{len(ids)}x{ids.shape[1]} after {mask.shape[1] - ids.shape[1]}"
    entry = program.forward
    found: dict[str, int] = {}
    for name, tensor in zip(entry.input_names, entry.flatten((), inputs), strict=True):
        for dim, symbol in entry.dynamic.get(name, {}).items():
            found[symbol] = tensor.shape[dim]
    return "x".join(str(found[s]) for s in ("batch", "sequence") if s in found) or "as captured"


def open_subject(name: str, allow_pickle: bool, advance: Advance) -> LoadedModel | Artifact:
    """The artifact in a folder, or the model of a name.

    Raises:
        GraphPruneError: there is neither, or it cannot be loaded.
    """
    # Before hub ids.
    if _is_artifact(name):
        from graphprune.exporters import open_artifact

        return open_artifact(Path(name).expanduser())
    from graphprune.models import load_model

    return load_model(name, allow_pickle=allow_pickle, progress=advance)


def _is_artifact(name: str) -> bool:
    """Whether a folder of this name was exported here: it has a manifest, whole or broken."""
    return (Path(name).expanduser() / "manifest.json").is_file()


def captured(
    subject: LoadedModel | Artifact, cache: bool = False, dynamic: Sequence[str] = ()
) -> Compiled:
    """A subject without further passes: a model captured, an artifact's program read.

    Args:
        subject: what `open_subject` found.
        cache: with a decoder's cached form; an artifact has it or not.
        dynamic: names of sizes that must be dynamic; an artifact's are what they are.

    Raises:
        GraphPruneError: the model cannot be captured, or with a cache or these sizes not.
    """
    from graphprune.api import compile, load
    from graphprune.models import LoadedModel

    if not isinstance(subject, LoadedModel):
        if dynamic:
            raise GraphPruneError(
                "--dynamic is for a model that is captured now, and an artifact's sizes are what "
                "they were at capture; name the model itself"
            )
        loaded = load(subject.path)
        return compile(loaded, [], cache=True) if cache else loaded
    inputs = dict(subject.example_inputs)
    compiled = compile(
        subject.module,
        [],
        example_inputs=inputs,
        dynamic_shapes=tuple(dynamic) or "auto",
        cache=cache,
    )
    compiled.files = subject.files()
    return compiled


def compiled_and_measured(
    subject: LoadedModel | Artifact,
    passes: Sequence[Pass],
    path: Path,
    options: Options,
    step: Step,
    observer: Observer,
) -> Summary:
    """Capture, prune, export, time, judge; each long step is announced through `step`."""
    from graphprune.api import compile
    from graphprune.exporters.artifact.results import add_results
    from graphprune.models import LoadedModel
    from graphprune.models.data.calibration import count_tokens
    from graphprune.models.tasks.base import longest

    lesson = options.lesson
    if lesson is not None:
        subject, lesson = taught(subject, lesson, tokenizer_dir(subject), options.seed)
    with step("capture"):
        start = captured(subject, options.cache, options.dynamic)
        # What the model refuses is refused before the work.
        check_steps(passes, start.program)
        inputs = timed_inputs(start.program, options.sizes) if options.measure else {}
    training = first = None
    if lesson is not None and lesson.trains:
        with step("training data"):
            names, folder = input_names(start.program), tokenizer_dir(subject)
            training = training_of(lesson, names, folder, longest(start.program))
        if isinstance(subject, LoadedModel) and not subject.trained:
            start, first = trained_first(start, training, lesson.wish, options.seed, observer)
    batches = None
    if options.calibration is not None:
        with step("calibration"):
            batches = calibration(subject, start.program, options.calibration, options.lines)
    elif training is not None and any(p.needs_calibration for p in passes):
        batches = calibration_from(training, options.lines)
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
        artifact = compiled.export(path, baseline=options.baseline)
    timing = None
    if options.measure and artifact.has_baseline:
        with step("measure"):
            timing = _timing(artifact, start.program, inputs, options.threads, "dense")
    quality: Mapping[str, JSON] = {}
    if options.quality:
        quality = _quality(artifact, subject, lesson, step)
    results = {"timing": timing, "quality": quality, "dense_training": first}
    if noted := {key: value for key, value in results.items() if value}:
        artifact = add_results(artifact, compiled.report, noted)
    name = subject.name if isinstance(subject, LoadedModel) else str(subject.path)
    calibrated = None if batches is None else count_tokens(batches)
    megabytes = _megabytes(artifact)
    return Summary(name, path, compiled.report, megabytes, timing, quality, calibrated, first)


def _quality(
    artifact: Artifact, subject: LoadedModel | Artifact, lesson: Lesson | None, step: Step
) -> dict[str, JSON]:
    """The artifact judged by the lesson, or by the model's own task; nothing where it has none."""
    from graphprune.models import LoadedModel

    task = subject.task if isinstance(subject, LoadedModel) else None
    data, columns = None, NO_COLUMNS
    if lesson is not None and lesson.judges:
        task, data = lesson.wish.task, lesson.wish.eval
        if lesson.schema is not None:
            columns = (lesson.schema.text, lesson.schema.label)
    if task is None or (task == "neighbours" and not artifact.has_baseline):
        return {}
    with step(f"task {task}") as advance:
        return judged(artifact, task, data, advance, columns=columns)


def demo_sentences(file: Path) -> Path:
    """Write the demo's calibration: Python's help topics, without those that it judges by."""
    from graphprune.models.tasks.neighbours import SENTENCES, python_sentences

    judged = set(python_sentences(SENTENCES))
    found = [s for s in python_sentences(SENTENCES + 2 * LINES) if s not in judged]
    file.write_text("\n".join(found[:LINES]), encoding="utf-8")
    return file


def calibration(
    subject: LoadedModel | Artifact, program: Program, source: Path, lines: int
) -> list[dict[str, Tensor]]:
    """Calibration batches from a file, as `graphprune.models.data.calibration` reads it.

    A language model gets running text, in segments of 512 tokens or as long as it takes.

    Raises:
        GraphPruneError: the file is missing, holds nothing usable, or the model takes no text.
    """
    from graphprune.models.data.calibration import SEGMENT, calibration_batches, predicts_tokens
    from graphprune.models.tasks.base import longest

    names = input_names(program)
    segment = SEGMENT if predicts_tokens(program) else 0
    # A model with learned positions has only so many.
    while segment > 1 and _problem(program, _resized(program, (1, segment))):
        segment //= 2
    return calibration_batches(
        source,
        names,
        tokenizer_dir(subject),
        lines,
        segment=segment,
        length=longest(program),
    )


def input_names(program: Program) -> list[str]:
    """The names of what a program takes as tensors."""
    return [
        argument.name
        for argument in program.forward.arguments
        # What capture baked in (a flag, a None) is no input.
        if any(isinstance(leaf, str) for leaf in argument.leaves)
    ]


def check_calibration(steps: Sequence[Pass], source: Path | None, *, trains: bool = False) -> None:
    """Refuse, before a model is loaded, passes that need data without any, or an unreadable file.

    Args:
        steps: the passes.
        source: the file, or None.
        trains: whether there are training data, which calibrate too.

    Raises:
        GraphPruneError: so it is.
    """
    from graphprune.api import calibration_for
    from graphprune.models.data.calibration import check_source

    if source is None:
        calibration_for([] if trains else steps, None)
    else:
        check_source(source)


def analysed(
    subject: LoadedModel | Artifact,
    ratios: Sequence[float],
    score: str,
    roles: Sequence[str],
    options: Options,
    step: Step,
) -> Sensitivity:
    """A sensitivity analysis on the file's batches, or on the model's example inputs without one.

    Times are of one sample, or of the sizes asked for, each cut beside the dense model in turns.
    """
    from graphprune.passes.structural.sensitivity import sensitivity

    with step("capture"):
        program = captured(subject).program
        inputs = sized_inputs(program, options.sizes)
    entry = program.forward
    batches = [_arguments(program, dict(zip(entry.input_names, entry.example, strict=True)))]
    if options.calibration is not None:
        with step("calibration"):
            batches = calibration(subject, program, options.calibration, options.lines)
    with step("sensitivity") as advance:
        return sensitivity(
            program,
            batches,
            ratios=ratios,
            score=score,
            roles=roles,
            clock=_clock(inputs, options.threads) if options.measure else None,
            progress=advance,
            seed=options.seed,
        )


def _clock(
    inputs: Mapping[str, Any], threads: int
) -> Callable[[Program, Program], tuple[float, float]]:
    """Milliseconds of a program and of the dense one, in turns; the dense one is exported once."""
    from graphprune.exporters import to_onnx
    from graphprune.exporters.onnx.convert import save_onnx
    from graphprune.exporters.runtime.session import compare, feeds_of, open_session

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


def bench(
    subject: LoadedModel | Artifact, sizes: tuple[int, ...], threads: int, against: str
) -> dict[str, JSON]:
    """Time an artifact against its dense twin or another one; or a model as it is.

    Raises:
        GraphPruneError: there is nothing to measure against, or the sizes do not fit.
    """
    from graphprune.exporters import Artifact, export

    if isinstance(subject, Artifact):
        subject.check_opponents(against)
    program = captured(subject).program
    inputs = timed_inputs(program, sizes)
    if isinstance(subject, Artifact):
        return _timing(subject, program, inputs, threads, against)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(program, Path(folder) / "dense", baseline=program)
        timing = _timing(artifact, program, inputs, threads, "dense")
    # A model has no pruned form yet: the two sessions are the same, so one row says it all.
    kept = ("batch", "threads", "clock", "rounds", "dense_ms", "dense_low_ms", "dense_high_ms")
    return {key: timing[key] for key in kept}


def judged(
    subject: LoadedModel | Artifact,
    task: str,
    data: Path | None,
    advance: Advance,
    options: Mapping[str, int] | None = None,
    columns: Columns = NO_COLUMNS,
) -> dict[str, JSON]:
    """Task results by "pruned" and "dense"; a model that is no artifact has only the latter.

    Args:
        subject: what is judged.
        task: a name from TASKS.
        data: the task's file or folder, or None for the usual place.
        advance: told of the progress, anew for each of the two models.
        options: the task's own options.
        columns: a labelled file's columns of text, and of labels; by default those that the subject
            was trained on.

    Raises:
        GraphPruneError: the task needs what the subject does not have.
    """
    from graphprune.models.tasks import LABELLED

    common: dict[str, Any] = {"data": data, "tokenizer_dir": tokenizer_dir(subject)}
    common |= options or {}
    if task in LABELLED:
        schema = schema_of(subject, task)
        text, label = columns
        common["schema"] = replace(schema, text=text or schema.text, label=label or schema.label)
    try:
        return _results(subject, task, common, advance)
    except GraphPruneError:
        raise
    except Exception as e:
        # ONNX Runtime's errors have no common class.
        foreign = type(e).__module__.startswith("onnxruntime")
        if not foreign and not isinstance(e, ValueError | TypeError | RuntimeError | IndexError):
            raise
        raise GraphPruneError(
            f"task {task!r} cannot feed this model: {str(e).partition(chr(10))[0]}; "
            "`graphprune eval --help` says what each task is for"
        ) from e


def _results(
    subject: LoadedModel | Artifact, task: str, common: Mapping[str, Any], advance: Advance
) -> dict[str, JSON]:
    from graphprune.exporters import Artifact
    from graphprune.models.tasks import evaluate

    if not isinstance(subject, Artifact):
        if task == "neighbours":
            raise GraphPruneError(
                "the task 'neighbours' compares an artifact with its dense twin; compile the model "
                "first, and judge the folder"
            )
        result = evaluate(task, subject.module, progress=advance, **common)
        return {"dense": asdict(result)}
    session = subject.session()
    if task == "neighbours":
        dense = subject.baseline_session()
        result = evaluate(task, session, dense=dense, progress=advance, **common)
        # The dense model agrees with itself.
        return {"pruned": asdict(result), "dense": {**asdict(result), "value": 1.0}}
    results = {"pruned": asdict(evaluate(task, session, progress=advance, **common))}
    if subject.has_baseline:
        dense = subject.baseline_session()
        results["dense"] = asdict(evaluate(task, dense, progress=advance, **common))
    return results


def _timing(
    artifact: Artifact, program: Program, inputs: Mapping[str, Any], threads: int, against: str
) -> dict[str, JSON]:
    """A comparison as one flat row; the ratio is above one where the pruned model is faster."""
    found = artifact.benchmark(dict(inputs), against, threads=threads)
    row = _timing_row(program, inputs, threads, against.partition(",")[0], found)
    others = {
        name: _timing_row(program, inputs, threads, name, other)
        for name, other in found.others.items()
    }
    return {**row, "others": others} if others else row


def _timing_row(
    program: Program, inputs: Mapping[str, Any], threads: int, against: str, found: Comparison
) -> dict[str, JSON]:
    return {
        "batch": batch_text(program, inputs),
        "threads": threads,
        "clock": found.clock,
        "rounds": found.rounds,
        "against": against,
        "dense_ms": found.against.ms,
        "dense_low_ms": found.against.low,
        "dense_high_ms": found.against.high,
        "pruned_ms": found.model.ms,
        "pruned_low_ms": found.model.low,
        "pruned_high_ms": found.model.high,
        "speedup": found.ratio,
        "speedup_low": found.ratio_low,
        "speedup_high": found.ratio_high,
    }


def _megabytes(artifact: Artifact) -> dict[str, float]:
    """Size on disk of the ONNX files, weights outside of them included."""
    names = {"pruned": "model", "dense": "baseline"}
    return {
        which: sum(f.stat().st_size for f in artifact.path.glob(f"{stem}.onnx*")) / 1e6
        for which, stem in names.items()
        if (artifact.path / f"{stem}.onnx").is_file()
    }


def tokenizer_dir(subject: LoadedModel | Artifact) -> Path | None:
    """The folder with a subject's tokenizer, or None."""
    from graphprune.models import LoadedModel
    from graphprune.models.loading.loaded import TOKENIZER

    if isinstance(subject, LoadedModel):
        return subject.tokenizer_dir
    folder = subject.path / TOKENIZER
    return folder if folder.is_dir() else None


def check_output(path: Path) -> None:
    """Refuse, before any work, a folder that cannot be written or is not ours to replace.

    Raises:
        ExportError: so it is.
    """
    from graphprune.exporters import is_artifact
    from graphprune.storage.folders import check_target

    check_target(path.expanduser(), is_artifact)


def check_opponents(model: str, against: str) -> None:
    """Refuse, before a model is loaded, to measure against what is not there.

    Raises:
        GraphPruneError: so it is; near matches are named.
    """
    from graphprune.exporters.artifact.artifact import DENSE, check_names

    if not _is_artifact(model) and against != DENSE:
        raise GraphPruneError("--against compares artifacts; compile the model first")
    check_names(against)


def check_task(task: str, data: Path | None, options: Mapping[str, int] | None = None) -> None:
    """Refuse an unknown task, a foreign option or missing data before a model is loaded.

    Raises:
        GraphPruneError: there is no such task or option, or the task's data is missing.
    """
    from graphprune.models.tasks import check, find_data, needs_data

    check(task, options or {})
    if needs_data(task):
        find_data(task, data)


def describe_recipes() -> list[dict[str, str]]:
    """The built-in recipes: name, what each needs beside the model, what it does."""
    from graphprune.pipeline.recipe import builtin_recipes, load

    return [
        {
            "recipe": name,
            "needs": _needs(load(name)),
            "what it does": text,
        }
        for name, text in builtin_recipes().items()
    ]


def _needs(steps: Sequence[Pass]) -> str:
    if any(step.needs_training for step in steps):
        return "--task and --train"
    return "--calibration" if any(step.needs_calibration for step in steps) else ""


def describe_passes() -> list[dict[str, JSON]]:
    """Every pass: name, first line of its docstring, options with type, default, meaning."""
    from graphprune.pipeline.registry import meanings, options, registered

    described: list[dict[str, JSON]] = []
    for name, cls in registered().items():
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        meaning = meanings(cls)
        rows = [
            {
                "option": field.name,
                "type": str(field.type).replace("graphprune.pipeline.base.", ""),
                "default": "required"
                if field.default is dataclasses.MISSING
                else _yaml(field.default),
                "meaning": meaning[field.name],
            }
            for field in options(cls)
        ]
        described.append({"name": name, "summary": summary, "options": rows})
    return described


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _megabytes_text(megabytes: float) -> str:
    return f"{megabytes:.1f}" if megabytes >= 1 else f"{megabytes:.3f}"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
