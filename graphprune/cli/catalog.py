"""`graphprune passes`, `recipes` and `models`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from graphprune.cli.app import Json, print_json, stdout_console

if TYPE_CHECKING:
    from graphprune.pipeline.base import Pass
    from graphprune.pipeline.events import JSON


def passes_command(as_json: Json = False) -> None:
    """List the passes with their options."""
    from graphprune.cli.tables import plain_table

    described = describe_passes()
    if as_json:
        print_json(described)
        return
    console = stdout_console()
    for item in described:
        console.print(f"[bold]{item['name']}[/]  {item['summary']}")
        if item["options"]:
            console.print(plain_table(["option", "type", "default", "meaning"], item["options"]))


def recipes_command(as_json: Json = False) -> None:
    """List the built-in recipes."""
    from graphprune.cli.tables import plain_table

    found = describe_recipes()
    if as_json:
        print_json({row["recipe"]: row for row in found})
        return
    stdout_console().print(plain_table(["recipe", "needs", "what it does"], found))


def models_command(as_json: Json = False) -> None:
    """List the models that need no hub."""
    from graphprune.models import builtin_names

    if as_json:
        print_json(builtin_names())
    else:
        typer.echo("\n".join(builtin_names()))


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
