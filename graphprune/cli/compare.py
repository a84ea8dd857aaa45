"""`graphprune compare`: several artifacts side by side, from what they recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.app import Json, print_json, stdout_console
from graphprune.cli.sensitivity import check_file
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.report.compare import Overview


def compare_command(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="Folders of artifacts, two or more.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.html", help="The page to write.")
    ] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Show several artifacts side by side: their speed, size and quality.

    Nothing is measured: the figures are those that `compile` and `bench --note` recorded, and where
    they come from different machines it is said.
    """
    if len(set(artifacts)) < 2:
        raise GraphPruneError("compare takes two or more artifacts: graphprune compare OUT1 OUT2")
    check_file(out, "--out writes an HTML page", (".html",))

    # From here on torch is imported.
    from graphprune.exporters import open_artifact
    from graphprune.report.compare import Overview
    from graphprune.report.measured import Measured
    from graphprune.report.page import compare_page

    opened = [(name, open_artifact(Path(name).expanduser())) for name in dict.fromkeys(artifacts)]
    found = Overview.of([(name, Measured(artifact.manifest)) for name, artifact in opened])
    out.write_text(compare_page(found), encoding="utf-8")
    if as_json:
        print_json({**found.to_json(), "page": str(out)})
        return
    show(found)
    stdout_console().print(f"written to {out}", soft_wrap=True, markup=False)


def show(found: Overview) -> None:
    """Print the table, what its letters stand for, and the notes."""
    from graphprune.cli.tables import texts_table

    console = stdout_console()
    console.print(texts_table(found.header(), found.rows()))
    for where, letter in found.places.items():
        console.print(f"{letter}: {where}", soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(note, style="dim", soft_wrap=True, markup=False)
