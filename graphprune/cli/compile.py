"""`graphprune compile`: prune a model, write the artifact, measure it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.app import (
    CALIBRATION,
    LABELED,
    MEASURING,
    OUTPUT,
    PRUNING,
    TRAINING,
    Batch,
    Calibration,
    Dynamic,
    Json,
    LabelColumn,
    Metric,
    Model,
    Pickle,
    Quantization,
    Recipe,
    ReduceRange,
    Seed,
    Target,
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
from graphprune.cli.early import (
    check_artifact_folder,
    check_choice,
    check_ratio,
    check_recipe,
)
from graphprune.cli.evaluate import own_metric
from graphprune.cli.names import (
    ALLOCATIONS,
    LAYOUT_NAMES,
    SCORES,
    TARGETS,
    WEIGHTS,
    complete_task,
    completing,
)
from graphprune.cli.run import Options, run
from graphprune.cli.sizes import parse_batch
from graphprune.cli.training import (
    TrainingOptions,
    check_plan,
    check_training,
    labeled_data,
)
from graphprune.errors import RecipeError

if TYPE_CHECKING:
    from graphprune.pipeline.base import Pass


def compile_command(
    model: Model,
    *,
    faster: Faster = None,
    ms: Milliseconds = None,
    mb: Megabytes = None,
    max_drop: MaxDrop = None,
    device: Device = None,
    recipe: Recipe = None,
    heads: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            parser=parse_ratio,
            help="Fraction of the attention heads to remove.",
            rich_help_panel=PRUNING,
        ),
    ] = None,
    neurons: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            parser=parse_ratio,
            help="Fraction of the hidden neurons to remove.",
            rich_help_panel=PRUNING,
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Which heads and neurons go: obs, fluctuation, activation, taylor, magnitude or "
            "random. Default: obs where there is data, else magnitude.",
            rich_help_panel=PRUNING,
            autocompletion=completing(SCORES),
        ),
    ] = "",
    allocation: Annotated[
        str,
        typer.Option(
            help="uniform: the ratio in every layer; global: over all layers together.",
            rich_help_panel=PRUNING,
            autocompletion=completing(ALLOCATIONS),
        ),
    ] = "uniform",
    round_to: Annotated[
        int,
        typer.Option(
            help="Round the neurons that stay up to a multiple of this.", rich_help_panel=PRUNING
        ),
    ] = 1,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave tensors of this name as they are; repeatable.",
            rich_help_panel=PRUNING,
        ),
    ] = None,
    quantize: Quantization = "",
    reduce_range: ReduceRange = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Verify every removal: it must equal masking.",
            rich_help_panel=PRUNING,
        ),
    ] = True,
    task: Annotated[
        str,
        typer.Option(
            help="Train a head for classification, regression or digits; with --max-drop, the "
            "task that decides.",
            rich_help_panel=TRAINING,
            autocompletion=complete_task,
        ),
    ] = "",
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labeled examples: a table with TABs and a header line, no quotes.",
            rich_help_panel=LABELED,
        ),
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Other labeled examples, to evaluate on after every epoch.",
            rich_help_panel=LABELED,
        ),
    ] = None,
    finetune: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            help="Train on the labels after pruning.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            help="Train on the labels and the dense model's outputs after pruning.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    spans: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Distill on N random spans of each training text too, which the dense model "
            "labels.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Train the dense model for so long before pruning, where its head is new. "
            "Default 2.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of training for which the recipe has none. Default 5e-5, "
            "for digits 1e-3.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Examples of a training batch. Default 32.", rich_help_panel=TRAINING),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a checkpoint after every epoch.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the checkpoints.", rich_help_panel=TRAINING),
    ] = False,
    text_column: TextColumn = None,
    label_column: LabelColumn = "",
    calibration: Calibration = None,
    calibration_lines: Annotated[
        int,
        typer.Option(
            help="At most so many sentences or samples of it; of running text, 32 tokens each. "
            "Without --calibration they are drawn from the training data.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 1024,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write.", rich_help_panel=OUTPUT)
    ],
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Write the dense model too, to compare with.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache",
            help="Write a decoder with its key/value cache, to generate with.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dynamic: Dynamic = "",
    opset: Annotated[
        int | None,
        typer.Option(
            help="23, for ONNX Runtime from 1.23 on; 20, from 1.21 on. Default: 20 if possible.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="hub (config.json, onnx/model.onnx ...), flat, or auto.",
            rich_help_panel=OUTPUT,
            autocompletion=completing(LAYOUT_NAMES),
        ),
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(
            help="beside the graph, inside it, or auto: beside above 20 MB.",
            rich_help_panel=OUTPUT,
            autocompletion=completing(WEIGHTS),
        ),
    ] = "auto",
    target: Target = "onnxruntime",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What --max-drop is evaluated on; nothing of it may calibrate.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    metric: Metric = "",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Time the dense and the pruned model.",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality",
            help="Evaluate both by the model's own task, or --metric.",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    batch: Batch = "",
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL, verify it, write an ONNX artifact, and show before and after."""
    asked = Asked(faster, ms, mb, max_drop, task, metric, data, device, tuple(ignore or ()), target)
    asked.check()
    for name, ratio in (("--heads", heads), ("--neurons", neurons)):
        check_ratio(name, ratio)
    names = (
        ("layout", layout, LAYOUT_NAMES),
        ("place of weights", weights, WEIGHTS),
        ("target", target, TARGETS),
    )
    for what, value, known in names:
        check_choice(what, value, known)
    sizes = parse_batch(batch)
    asks: dict[str, object] = {
        "heads": heads,
        "neurons": neurons,
        "finetune": finetune,
        "distill": distill,
    }
    asks |= {"quantize": quantize or None}
    check_asked(recipe, asks, asked, cache=cache)
    training = TrainingOptions(
        task="" if max_drop is not None else task,
        train=train,
        eval=eval_file,
        text=tuple(text_column or ()),
        label=label_column,
        epochs=epochs,
        lr=lr,
        batch=batch_size,
        spans=spans,
        checkpoints=checkpoints,
        resume=resume,
    )
    check_training(training)
    check_artifact_folder(out)

    # From here on torch is imported.
    from graphprune.cli.calibration import check_calibration
    from graphprune.cli.summary import present
    from graphprune.exporters.artifact.export import check_forms
    from graphprune.exporters.onnx.convert import check_opset

    asked.check_fully(threads)
    check_plan(training)
    has_data = calibration is not None or train is not None or training.brings_data
    score = score or ("obs" if has_data else "magnitude")
    removal = {"score": score, "allocation": allocation, "ignore": ignore or []}
    flags = {
        "prune-neurons": _flag(ratio=neurons, round_to=round_to, **removal),
        "prune-heads": _flag(ratio=heads, **removal),
        "finetune": _flag(epochs=finetune),
        "distill": _flag(epochs=distill),
        "quantize": _flag(scheme=quantize or None, reduce_range=reduce_range),
    }
    check_opset(opset, cached=cache)
    check_forms(layout, weights, target)
    steps = steps_of(recipe, flags, lr=training.own_rate)
    labeled = labeled_data(training, steps)
    trains = labeled is not None and labeled.trains
    bundled = asked.anything or has_budget(steps)
    check_calibration([] if bundled else steps, calibration, trains=trains)
    options = Options(
        baseline=baseline,
        verify=verify,
        measure=measure,
        quality=quality,
        sizes=sizes,
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
        metric=own_metric(metric, per_item=max_drop is not None),
        data=data,
        bundled=bundled,
    )
    present(run(model, steps, out, options, allow_pickle), as_json)


def _flag(**options: Any) -> Mapping[str, Any] | None:
    """A pass's options, or None where the first of them was not given."""
    return None if next(iter(options.values())) is None else options


def check_asked(
    recipe: str | None, flags: Mapping[str, object], asked: Asked, *, cache: bool
) -> None:
    """Refuse a command line that asks for nothing, or for what does not go together.

    Args:
        recipe: its name or file.
        flags: values of the flags that stand for single passes, by name; None where not given.
        asked: the budget, and the target: another one than usual is something to do.
        cache: whether a decoder with its cache is asked for, which is something to do too.

    Raises:
        RecipeError: it is one of these, or there is no such recipe.
    """
    given = [name for name, value in flags.items() if value is not None]
    if asked.anything and (recipe is not None or {"heads", "neurons"} & set(given)):
        raise RecipeError(
            "a budget chooses what is removed: omit --recipe, --heads and --neurons, or the budget"
        )
    if recipe is not None and given:
        raise RecipeError("give either --recipe or flags such as --heads and --distill, not both")
    targeted = asked.target != TARGETS[0]
    if recipe is None and not (given or cache or targeted or asked.anything):
        raise RecipeError(
            "nothing to do: give --faster TIMES, --recipe NAME|FILE, --heads RATIO or --neurons "
            "RATIO; `graphprune recipes` and `graphprune passes` list what there is"
        )
    check_recipe(recipe)


def steps_of(
    recipe: str | None,
    flags: Mapping[str, Mapping[str, Any] | None],
    *,
    lr: float | None = None,
) -> list[Pass]:
    """The passes that the command line asks for: a recipe, or flags that stand for single passes.

    Args:
        recipe: its name or file.
        flags: options of passes by name; None for those that are not asked for.
        lr: learning rate of the passes that train and do not say theirs.

    Raises:
        RecipeError: one of them is not valid.
    """
    from graphprune.pipeline.pipeline import check_order
    from graphprune.pipeline.recipe import load

    wanted = [{name: options} for name, options in flags.items() if options is not None]
    steps = load(wanted if recipe is None else recipe, lr)
    check_order(steps)
    return steps
