"""The typer app, the options that several commands share, how commands print and how they fail."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console

from graphprune.cli.early import check_given
from graphprune.cli.names import (
    TARGETS,
    complete_model,
    complete_recipe,
    complete_scheme,
    complete_task,
    completing,
)
from graphprune.errors import GraphPruneError, PassError, VerificationError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="graphprune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Panels of options, and of commands.
BUDGET, PRUNING, TRAINING, LABELED = "Budget", "Pruning", "Training", "Labeled data"
CALIBRATION, OUTPUT, MEASURING = "Calibration", "Output", "Measuring and quality"
COMPILING, LOOKING, USING, LISTS = (
    "Compile",
    "Before compiling",
    "Measure and use",
    "What there is to choose from",
)

_MODEL_HELP = (
    "A built-in name (`graphprune models`), a folder, an artifact, a hub id, or "
    "FILE.py:FUNCTION, a function that returns a module, or a tuple of a module and example "
    "inputs. The file is run."
)
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, autocompletion=complete_model)
]
ArtifactOrModel = Annotated[
    str,
    typer.Argument(
        metavar="OUT_OR_MODEL",
        help="An artifact's folder, or a model as `graphprune compile` takes it.",
        autocompletion=complete_model,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pickled weights too; reading them can run code."),
]
Threads = Annotated[
    int, typer.Option(min=1, help="Threads of ONNX Runtime.", rich_help_panel=MEASURING)
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A built-in recipe (`graphprune recipes`) or a YAML file.",
        rich_help_panel=PRUNING,
        autocompletion=complete_recipe,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        help="What will run it: onnxruntime; genai for a decoder with --cache; or "
        "onnxruntime+kernels, with graphprune-kernels.",
        rich_help_panel=OUTPUT,
        autocompletion=completing(TARGETS),
    ),
]
Quantization = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        help="Quantize after pruning: int8-dynamic, int8-static, int8-weights or int4-weights.",
        rich_help_panel=PRUNING,
        autocompletion=complete_scheme,
    ),
]
ReduceRange = Annotated[
    bool,
    typer.Option(
        "--reduce-range",
        help="With --quantize int8-dynamic or int8-static: weights of seven bits, which are exact "
        "on CPUs without VNNI too.",
        rich_help_panel=PRUNING,
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        help="Evaluate by this task; default: the model's own.",
        rich_help_panel=MEASURING,
        autocompletion=complete_task,
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="Evaluate by a function of yours, from a model to a number (or one an item); higher "
        "is better. The model is called with a dict of tensors. The file is run.",
        rich_help_panel=MEASURING,
    ),
]
Dynamic = Annotated[
    str,
    typer.Option(
        metavar="SIZES",
        help="Sizes that must be dynamic beside batch and sequence: height,width of images, or "
        "INPUT:DIMENSION.",
        rich_help_panel=OUTPUT,
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        metavar="BxS",
        help="Time this batch, or batch x sequence: 8x128. Default 1 (x128). With a cache: one "
        "token after a past of that length.",
        rich_help_panel=MEASURING,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text, a sentence a line, or running text for a language model; or .tsv, .npz, or a "
        "folder with train.tsv or .npz files.",
        rich_help_panel=CALIBRATION,
    ),
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A labeled file's column of text; twice for pairs.",
        rich_help_panel=LABELED,
    ),
]
LabelColumn = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Its column of labels; the usual names are recognized.",
        rich_help_panel=LABELED,
    ),
]
Seed = Annotated[int, typer.Option(help="The seed of everything random.")]


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one sentence and an exit code: 2 for bad input, 1 for an internal error.

    What the parameters alone show to be wrong is refused first (`early.check_given`).
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            check_given(kwargs)
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
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
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
    """Compile a PyTorch model into a smaller, faster ONNX model, and verify what was removed."""


def ratio_of(text: str) -> float:
    """A part of one: "0.5" or "50%".

    Raises:
        ValueError: it is neither.
    """
    number = float(text.removesuffix("%"))
    return number / 100 if text.endswith("%") else number


def parse_ratio(text: str) -> float:
    """Parse the fraction that an option was given, such as 0.5 or 50%.

    Raises:
        typer.BadParameter: it is not a number.
    """
    try:
        return ratio_of(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number: write 0.5, or 50%") from None


def listed(names: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def stdout_console() -> Console:
    """The console of tables.

    A pipe has no width; tables are easier to read and to grep unfolded.
    """
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)


def print_json(data: Any) -> None:
    """Print JSON, indented."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
