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

from graphprune.errors import GraphPruneError, PassError, VerificationError

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
ArtifactOrModel = Annotated[
    str, typer.Argument(metavar="OUT_OR_MODEL", help="An artifact's folder, or a model.")
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
    typer.Option(metavar="NAME", help="A labeled file's column of text; twice for pairs."),
]
LabelColumn = Annotated[
    str, typer.Option(metavar="NAME", help="Its column of labels; the usual names are recognized.")
]


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one sentence and an exit code: 2 for bad input, 1 for an internal error."""

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


def ratio_of(text: str) -> float:
    """A part of one: "0.5" or "50%".

    Raises:
        ValueError: it is neither.
    """
    number = float(text.removesuffix("%"))
    return number / 100 if text.endswith("%") else number


def parse_ratio(text: str) -> float:
    """`ratio_of` for an option.

    Raises:
        typer.BadParameter: it is no number.
    """
    try:
        return ratio_of(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number: write 0.5, or 50%") from None


def listed(names: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def stdout_console() -> Console:
    """The console of tables.

    A pipe has no width; tables are easier to read and to grep unfolded.
    """
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_json(data: Any) -> None:
    """Print JSON, indented."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
