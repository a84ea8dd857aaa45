"""`graphprune demo`: a model that needs no hub, pruned and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.app import Json, stdout_console
from graphprune.cli.budget import Asked
from graphprune.cli.early import check_artifact_folder
from graphprune.cli.names import complete_model
from graphprune.cli.run import Options, run

DEMO_MODEL = "minilm"
FASTER = 3.0


def demo_command(
    model: Annotated[
        str, typer.Argument(help="Which model to show it on.", autocompletion=complete_model)
    ] = DEMO_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path(
        "demo-out"
    ),
    as_json: Json = False,
) -> None:
    """Make a real sentence encoder three times faster, and measure what it gained and lost."""
    check_artifact_folder(out)

    # From here on torch is imported.
    from graphprune.cli.summary import present
    from graphprune.pipeline.recipe import load

    reads_text = model == DEMO_MODEL
    options = Options(asked=Asked(faster=FASTER), bundled=True) if reads_text else Options()
    steps = [] if reads_text else load("half")
    summary = run(model, steps, out, options, allow_pickle=False)
    present(summary, as_json)
    if not as_json:
        how = (
            "by the size of weights alone: no data, nothing retrained"
            if not reads_text
            else "calibrated on sentences of Python's help topics, not those it is evaluated on; "
            "nothing retrained"
        )
        stdout_console().print(
            f"\nThis is one shot, {how}.\n"
            "what next:\n"
            f"  graphprune inspect {model}\n"
            f"  graphprune bench {out} --batch 8x128 --threads 2\n"
            f"  graphprune compile {model} --faster 2 --quantize int8-dynamic -o out",
            soft_wrap=True,
        )
