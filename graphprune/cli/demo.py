"""`graphprune demo`: a model that needs no hub, pruned and measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.app import Json, stdout_console
from graphprune.cli.compile import LINES, Options, run

DEMO_MODEL = "minilm"


def demo_command(
    model: Annotated[str, typer.Argument(help="Which model to show it on.")] = "minilm",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path(
        "demo-out"
    ),
    as_json: Json = False,
) -> None:
    """Prune a real sentence encoder, prove it, export it, and measure what it gained."""
    from graphprune.cli.summary import present
    from graphprune.pipeline.recipe import load

    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        # The sentence encoder is calibrated on text that every Python installation has.
        text = demo_sentences(Path(folder) / "sentences.txt") if model == DEMO_MODEL else None
        recipe = load("half" if text is None else "edge")
        summary = run(model, recipe, out, Options(calibration=text), allow_pickle=False)
    present(summary, as_json)
    if not as_json:
        how = (
            "by the size of weights alone: no data, nothing retrained"
            if text is None
            else "calibrated on sentences of Python's help topics, other ones than those judged; "
            "nothing retrained"
        )
        stdout_console().print(
            f"\nThis is one shot, {how}.\n"
            "what next:\n"
            f"  graphprune inspect {model}\n"
            f"  graphprune bench {out} --batch 8x128 --threads 2\n"
            f"  graphprune compile {model} --neurons 0.75 --heads 0.5 -o out",
            soft_wrap=True,
        )


def demo_sentences(file: Path) -> Path:
    """Write the demo's calibration: Python's help topics, without those that it is evaluated on."""
    from graphprune.models.tasks.neighbors import SENTENCES, python_sentences

    judged = set(python_sentences(SENTENCES))
    found = [s for s in python_sentences(SENTENCES + 2 * LINES) if s not in judged]
    file.write_text("\n".join(found[:LINES]), encoding="utf-8")
    return file
