"""The command line: arguments in, progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console

from graphprune.errors import GraphPruneError, PassError, VerificationError

if TYPE_CHECKING:
    from graphprune.cli.console import Display
    from graphprune.cli.workflow import Options, Summary

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="graphprune",
    help="Compile a PyTorch model into a smaller, faster ONNX model: captured, pruned, proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A built-in name (`graphprune models`), a folder, an artifact, or a hub id.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pickled weights too; reading them can run code."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")]
Dynamic = Annotated[
    str,
    typer.Option(
        metavar="SIZES",
        help="Sizes that must be dynamic beside batch and sequence: height,width of images, or "
        "INPUT:DIMENSION.",
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        metavar="BxS",
        help="Batch, or batch x sequence, to time: 8x128. Default 1 (x128). With a cache, one "
        "token after a past of that length.",
    ),
]

Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text, a sentence a line, or running text for a language model; or .tsv, .npz, or a "
        "folder with train.tsv or .npz files.",
    ),
]

TextColumn = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A labelled file's column of text; twice for pairs."),
]
LabelColumn = Annotated[
    str, typer.Option(metavar="NAME", help="Its column of labels; the usual names are recognised.")
]

DEMO_MODEL = "minilm"


def ratio_of(text: str) -> float:
    """A part of one: "0.5" or "50%".

    Raises:
        ValueError: it is neither.
    """
    number = float(text.removesuffix("%"))
    return number / 100 if text.endswith("%") else number


def _ratio(text: str) -> float:
    try:
        return ratio_of(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number: write 0.5, or 50%") from None


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    app()


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one sentence and an exit code: 2 for bad input, 1 for a fault of ours."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; nothing half-written remains", 130)
        except BrokenPipeError:
            # The reader of a pipe, `head` for instance, has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except GraphPruneError as e:
            _debug()
            _fail(str(e), 1 if isinstance(e, PassError | VerificationError) else 2)
        except Exception as e:
            _debug()
            _fail(
                f"internal error, {type(e).__name__}: {e} "
                "(GRAPHPRUNE_DEBUG=1 shows the traceback; please report it)",
                1,
            )

    return run


def _debug() -> None:
    if os.environ.get("GRAPHPRUNE_DEBUG"):
        traceback.print_exc()


def _fail(sentence: str, code: int) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    # Some messages quote another library's, which may have lines of its own.
    console.print(" ".join(sentence.split()), style="red", markup=False)
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from graphprune import __version__

        typer.echo(f"graphprune {__version__}")
        raise typer.Exit(0)


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compile a PyTorch model into a smaller, faster ONNX model: captured, pruned, proven."""


@app.command("inspect")
@guarded
def inspect_command(
    model: Model,
    everything: Annotated[
        bool, typer.Option("--all", help="One row a group, also for like ones of many layers.")
    ] = False,
    dynamic: Dynamic = "",
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Show what could be removed from MODEL together, and what is frozen and why."""
    from graphprune.axes import axis_groups
    from graphprune.cli.console import groups_footer, groups_table
    from graphprune.cli.workflow import captured, open_subject

    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        with display.step("capture and analyse"):
            groups = axis_groups(captured(subject, dynamic=_listed(dynamic)).program)
    if as_json:
        parameters = groups.program.num_parameters()
        found = [g.to_json() for g in groups]
        limits = groups.program.limit_lines()
        _print_json({"model": model, "parameters": parameters, "groups": found, "limits": limits})
        return
    console = _console()
    console.print(groups_table(groups, everything))
    console.print(groups_footer(groups))
    for line in groups.program.limit_lines():
        console.print(line, markup=False)


@app.command("compile")
@guarded
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    recipe: Annotated[
        str | None, typer.Option(help="A built-in recipe's name or a YAML file.")
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option(metavar="RATIO", parser=_ratio, help="Part of the attention heads to remove."),
    ] = None,
    neurons: Annotated[
        float | None,
        typer.Option(metavar="RATIO", parser=_ratio, help="Part of the hidden neurons to remove."),
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
        typer.Option(help="What a head is trained for: classification, regression or digits."),
    ] = "",
    train: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled examples: TABs and a header line, no quotes."),
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
    batch: Batch = "",
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Everything random comes from it.")] = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL, prove it, write the ONNX artifact, and show before and after."""
    from graphprune.cli.training import DIGITS, Wish, check_wish, lesson_of
    from graphprune.cli.workflow import Options, check_calibration, parse_batch, steps_of

    wish = Wish(
        task,
        train,
        eval_file,
        tuple(text_column or ()),
        label_column,
        epochs,
        lr,
        batch_size,
        checkpoints,
        resume,
    )
    check_wish(wish)
    has_data = calibration is not None or train is not None or task == DIGITS
    score = score or ("obs" if has_data else "magnitude")
    common = {"score": score, "allocation": allocation, "ignore": ignore or []}
    steps = steps_of(
        recipe,
        {
            "prune-neurons": _flag(neurons, common, round_to=round_to),
            "prune-heads": _flag(heads, common),
            "finetune": None if finetune is None else {"epochs": finetune},
            "distill": None if distill is None else {"epochs": distill},
            "quantize": {"scheme": quantize} if quantize else None,
        },
        none=cache,
        lr=wish.own_rate,
    )
    lesson = lesson_of(wish, steps)
    check_calibration(steps, calibration, trains=lesson is not None and lesson.trains)
    options = Options(
        baseline,
        verify,
        measure,
        quality,
        parse_batch(batch),
        threads,
        seed,
        calibration,
        calibration_lines,
        cache,
        lesson,
        _listed(dynamic),
    )
    summary = _run(model, steps, out, options, allow_pickle)
    _present(summary, as_json)


@app.command("bench")
@guarded
def bench_command(
    model: Annotated[
        str, typer.Argument(metavar="OUT_OR_MODEL", help="An artifact's folder, or a model.")
    ],
    against: Annotated[
        str,
        typer.Option(
            help="dense (its own twin), int8 (the twin quantised), or another artifact's folder; "
            "several with commas."
        ),
    ] = "dense",
    batch: Batch = "",
    threads: Threads = 1,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure on ONNX Runtime: interleaved repeats, pinned threads, median and spread.

    Times are CPU time of one thread; with --threads above 1, of the wall clock.
    """
    from graphprune.cli.console import timing_table
    from graphprune.cli.workflow import bench, check_opponents, open_subject, parse_batch

    sizes = parse_batch(batch)
    check_opponents(model, against)
    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        with display.step("measure"):
            timing = bench(subject, sizes, threads, against)
    if as_json:
        _print_json({"model": model, **timing})
    else:
        _console().print(timing_table(timing))


@app.command("generate")
@guarded
def generate_command(
    model: Annotated[
        str, typer.Argument(metavar="OUT_OR_MODEL", help="An artifact's folder, or a model.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, above 0 one is drawn.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 for all.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn of a conversation.")
    ] = False,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Continue a text with a decoder that was compiled with --cache, on ONNX Runtime."""
    from graphprune.cli.generation import Sampling, generated
    from graphprune.cli.workflow import open_subject

    sampling = Sampling(max_new_tokens, temperature, top_k, seed, chat)
    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        with display.step("open"):
            found = generated(subject, prompt, sampling, threads)
    for piece in found:
        if not as_json:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    if as_json:
        _print_json({"model": model, **found.to_json()})
        return
    typer.echo()
    Console(stderr=True, highlight=False).print(found.speed(), style="dim")


@app.command("eval")
@guarded
def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="OUT_OR_MODEL", help="An artifact's folder, or a model.")
    ],
    task: Annotated[
        str,
        typer.Option(
            help="sts, neighbours, digits, perplexity, piqa, lambada, classification or regression."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="The task's file or folder; default: the one under $GRAPHPRUNE_DATA."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="perplexity: tokens of a window. Default 512.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="perplexity: so many, from the start. Default all.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="piqa, lambada: so many examples from the start. Default all."),
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "",
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Judge a model by a task; an artifact is judged beside its dense twin."""
    from graphprune.cli.console import quality_table
    from graphprune.cli.workflow import check_task, judged, open_subject

    given = {"window": window, "windows": windows, "limit": limit}
    options = {name: number for name, number in given.items() if number is not None}
    check_task(task, data, options)
    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        with display.step(f"task {task}") as advance:
            columns = (tuple(text_column or ()), label_column)
            results = judged(subject, task, data, advance, options, columns)
    if as_json:
        _print_json({"model": model, **results})
    else:
        _console().print(quality_table(results))


@app.command("sensitivity")
@guarded
def sensitivity_command(
    model: Model,
    ratios: Annotated[
        str, typer.Option(help="Parts of each group's units to remove.")
    ] = "0.25,0.5,0.75",
    score: Annotated[
        str, typer.Option(help="obs, fluctuation, activation, magnitude or random.")
    ] = "obs",
    role: Annotated[
        list[str] | None, typer.Option(help="Which groups: head, kv_group, neuron …; repeatable.")
    ] = None,
    calibration: Calibration = None,
    calibration_lines: Annotated[
        int,
        typer.Option(
            help="At most so many sentences or samples of it; of running text, 32 tokens each."
        ),
    ] = 256,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time the cuts too, role by role.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the figures as a page too.")
    ] = None,
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
    from graphprune.cli.console import sensitivity_tables
    from graphprune.cli.workflow import (
        Options,
        analysed,
        check_calibration,
        check_plot,
        open_subject,
        parse_batch,
        parse_ratios,
    )
    from graphprune.passes.structural.sensitivity import check_options

    parts = parse_ratios(ratios)
    check_options(parts, score, role or [])
    check_calibration([], calibration)
    check_plot(plot)
    options = Options(
        measure=measure,
        sizes=parse_batch(batch),
        threads=threads,
        seed=seed,
        calibration=calibration,
        lines=calibration_lines,
    )
    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        found = analysed(subject, parts, score, role or [], options, display.step)
    if plot is not None:
        from graphprune.report.page import sensitivity_page

        plot.write_text(sensitivity_page(found, model), encoding="utf-8")
    if as_json:
        _print_json({"model": model, **found.to_json()})
        return
    console = _console()
    for title, table in sensitivity_tables(found):
        console.print(title)
        console.print(table)
    for group, reason in found.skipped.items():
        console.print(f"  skipped  {group}: {reason}", style="dim", markup=False, soft_wrap=True)
    if calibration is None:
        console.print("compared on the example inputs only; --calibration FILE says more")
    if plot is not None:
        console.print(f"written to {plot}", soft_wrap=True, markup=False)


@app.command("passes")
@guarded
def passes_command(as_json: Json = False) -> None:
    """List the passes with their options."""
    from graphprune.cli.console import plain_table
    from graphprune.cli.workflow import describe_passes

    described = describe_passes()
    if as_json:
        _print_json(described)
        return
    console = _console()
    for item in described:
        console.print(f"[bold]{item['name']}[/]  {item['summary']}")
        if item["options"]:
            console.print(plain_table(["option", "type", "default", "meaning"], item["options"]))


@app.command("recipes")
@guarded
def recipes_command(as_json: Json = False) -> None:
    """List the built-in recipes."""
    from graphprune.cli.console import plain_table
    from graphprune.cli.workflow import describe_recipes

    found = describe_recipes()
    if as_json:
        _print_json({row["recipe"]: row for row in found})
        return
    _console().print(plain_table(["recipe", "needs", "what it does"], found))


@app.command("models")
@guarded
def models_command(as_json: Json = False) -> None:
    """List the models that need no hub."""
    from graphprune.models import builtin_names

    if as_json:
        _print_json(builtin_names())
    else:
        typer.echo("\n".join(builtin_names()))


@app.command("demo")
@guarded
def demo_command(
    model: Annotated[str, typer.Argument(help="Which model to show it on.")] = "minilm",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path(
        "demo-out"
    ),
    as_json: Json = False,
) -> None:
    """Prune a real sentence encoder, prove it, export it, and measure what it gained."""
    from graphprune.cli.workflow import Options, demo_sentences
    from graphprune.pipeline.recipe import load

    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        # The sentence encoder is calibrated on text that every Python installation has.
        text = demo_sentences(Path(folder) / "sentences.txt") if model == DEMO_MODEL else None
        recipe = load("half" if text is None else "edge")
        summary = _run(model, recipe, out, Options(calibration=text), allow_pickle=False)
    _present(summary, as_json)
    if not as_json:
        how = (
            "by the size of weights alone: no data, nothing retrained"
            if text is None
            else "calibrated on sentences of Python's help topics, other ones than those judged; "
            "nothing retrained"
        )
        _console().print(
            f"\nThis is one shot, {how}.\n"
            "what next:\n"
            f"  graphprune inspect {model}\n"
            f"  graphprune bench {out} --batch 8x128 --threads 2\n"
            f"  graphprune compile {model} --neurons 0.75 --heads 0.5 -o out",
            soft_wrap=True,
        )


def _run(model: str, steps: list[Any], out: Path, options: Options, allow_pickle: bool) -> Summary:
    from graphprune.cli.workflow import check_output, compiled_and_measured, open_subject

    check_output(out)
    with _display() as display:
        with display.step(f"load {model}") as advance:
            subject = open_subject(model, allow_pickle, advance)
        return compiled_and_measured(
            subject, steps, out, options, step=display.step, observer=display.observe
        )


def _listed(names: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _flag(ratio: float | None, common: Mapping[str, Any], **more: Any) -> Mapping[str, Any] | None:
    return None if ratio is None else {"ratio": ratio, **common, **more}


def _present(summary: Summary, as_json: bool) -> None:
    from graphprune.cli.console import comparison_table, passes_table

    if as_json:
        _print_json(summary.to_json())
        return
    console = _console()
    if summary.trained_first():
        console.print(f"dense model trained first: {summary.trained_first()}", markup=False)
    if summary.report.passes:
        console.print(passes_table(summary.report))
    for line in summary.report.skipped_lines():
        console.print(f"  skipped  {line}", style="dim", markup=False, soft_wrap=True)
    console.print(comparison_table(summary.rows()))
    if summary.calibrated_on():
        console.print(f"calibrated on {summary.calibrated_on()}")
    console.print(f"written to {summary.path}/", soft_wrap=True, markup=False)


def _console() -> Console:
    # A pipe has no width; tables are easier to read and to grep unfolded.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _display() -> Display:
    from graphprune.cli.console import Display

    return Display(Console(stderr=True))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
