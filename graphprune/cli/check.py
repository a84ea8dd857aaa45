"""`graphprune check`: what would keep others from loading a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.app import Json, listed, print_json, stdout_console
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphprune.models.hub import Finding


def check_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder with an ONNX model, of any origin."),
    ],
    consumers: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="NAMES",
            help="transformers.js, fastembed, fastembed-rs, light-embed, tei, infinity, optimum, "
            "sentence-transformers, chromadb, langchain4j, spring-ai, vespa, genai, "
            "exported-model, openvino or onnxruntime; several with commas. Default all.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Show what would keep others from loading FOLDER: files, keys, inputs, opsets.

    Nothing of the model is run. The exit code is 1 if a consumer named by --for would fail.
    """
    from graphprune.models.hub import check

    names = listed(consumers)
    if consumers and not names:
        raise GraphPruneError("--for names no consumer; omit it for all of them")
    found = check(folder, names)
    if as_json:
        print_json([finding.to_json() for finding in found])
    else:
        _show(found)
    if names and not all(finding.loads for finding in found):
        raise typer.Exit(1)


def _show(found: Sequence[Finding]) -> None:
    from graphprune.cli.tables import plain_table

    rows = [
        {
            "consumer": f.consumer,
            "loads": "yes" if f.loads else "no",
            "what keeps it from loading, or what to know": "\n".join(f.problems or f.notes),
        }
        for f in found
    ]
    stdout_console().print(plain_table(list(rows[0]), rows))
