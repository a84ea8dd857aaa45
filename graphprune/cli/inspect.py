"""`graphprune inspect`: the axis groups of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from graphprune.cli.app import Dynamic, Json, Model, Pickle, listed, print_json, stdout_console


def inspect_command(
    model: Model,
    everything: Annotated[
        bool,
        typer.Option("--all", help="A row for each group, not one for all layers."),
    ] = False,
    dynamic: Dynamic = "",
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Show what can be removed from MODEL together, and what is frozen and why."""
    from graphprune.axes import axis_groups
    from graphprune.cli.subject import opened
    from graphprune.cli.tables import groups_footer, groups_table

    with opened(model, allow_pickle) as (subject, display), display.step("capture and analyze"):
        groups = axis_groups(subject.captured(dynamic=listed(dynamic)).program)
    if as_json:
        parameters = groups.program.num_parameters()
        found = [g.to_json() for g in groups]
        limits = groups.program.limit_lines()
        print_json({"model": model, "parameters": parameters, "groups": found, "limits": limits})
        return
    console = stdout_console()
    console.print(groups_table(groups, everything))
    console.print(groups_footer(groups))
    for line in groups.program.limit_lines():
        console.print(line, markup=False)
