"""`graphprune passes`, `recipes` and `models`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.app import Json, print_json, stdout_console
from graphprune.cli.names import complete_pass
from graphprune.pipeline.recipe_names import builtin_recipes

if TYPE_CHECKING:
    from rich.console import Console

    from graphprune.pipeline.base import Pass
    from graphprune.pipeline.events import JSON


def passes_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show this pass.", autocompletion=complete_pass),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the passes, or show one: what it does, its options, an example."""
    from graphprune.cli.tables import plain_table

    console = stdout_console()
    if name is not None:
        from graphprune.pipeline.registry import lookup

        shown = describe_pass(lookup(name))
        if as_json:
            print_json(shown)
        else:
            _print_pass(shown, console)
        return
    described = describe_passes()
    if as_json:
        print_json(described)
        return
    rows = [{"pass": p["name"], "what it does": p["summary"]} for p in described]
    console.print(plain_table(["pass", "what it does"], rows))
    console.print("`graphprune passes NAME` shows one, with its options and an example")


def recipes_command(as_json: Json = False) -> None:
    """List the built-in recipes."""
    from graphprune.cli.tables import plain_table

    found = describe_recipes()
    if as_json:
        print_json({row["recipe"]: row for row in found})
        return
    stdout_console().print(plain_table(["recipe", "needs", "what it does"], found))


def models_command(as_json: Json = False) -> None:
    """List the built-in models: what each is, and where it comes from."""
    from graphprune.cli.tables import plain_table
    from graphprune.models.loading.names import BUILT_IN

    rows = [
        {
            "model": model.name,
            "what it is": model.kind,
            "parameters": model.parameters,
            "task": model.task,
            "comes from": model.source_text,
        }
        for model in BUILT_IN.values()
    ]
    if as_json:
        print_json(rows)
        return
    console = stdout_console()
    console.print(plain_table(list(rows[0]), rows))
    console.print(
        "tiny models have random weights, to try things out. Any other model: a folder, a hub id, "
        "or FILE.py:FUNCTION, see `graphprune compile --help`",
        soft_wrap=True,
    )


def describe_recipes() -> list[dict[str, str]]:
    """The built-in recipes: name, what each needs beside the model, what it does."""
    from graphprune.pipeline.recipe import load

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
    """Every pass as `describe_pass` does."""
    from graphprune.pipeline.registry import registered

    return [describe_pass(cls) for cls in registered().values()]


def describe_pass(cls: type[Pass]) -> dict[str, JSON]:
    """A pass: its documentation, what data it needs, its options, an example of both spellings."""
    from graphprune.pipeline.recipe import dump
    from graphprune.pipeline.registry import meanings, options

    document = (inspect.getdoc(cls) or "").partition("Attributes:")[0]
    summary, _, text = document.partition("\n")
    meaning = meanings(cls)
    rows = [
        {
            "option": field.name,
            "type": str(field.type).replace("graphprune.pipeline.base.", ""),
            "default": "required" if field.default is dataclasses.MISSING else _yaml(field.default),
            "meaning": meaning[field.name],
        }
        for field in options(cls)
    ]
    step = example_of(cls)
    return {
        "name": cls.name,
        "summary": summary,
        "text": text.strip(),
        "needs": "" if step is None else needs_of(step),
        "options": rows,
        "recipe": "" if step is None else dump([step]),
        "python": "" if step is None else call_text(step),
    }


def example_of(cls: type[Pass]) -> Pass | None:
    """The pass with usual values where it needs some; None where these are not known."""
    from graphprune.pipeline.recipe import load

    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    needed += _ASKED.get(cls.name, ())
    if not set(needed) <= set(_USUAL):
        return None
    (step,) = load([{cls.name: {name: _USUAL[name] for name in needed}}])
    return step


# Values for examples, by option; and what a pass needs although it has a default.
_USUAL: Mapping[str, JSON] = {
    "ratio": 0.5,
    "sparsity": 0.5,
    "final": 0.8,
    "speedup": 2.0,
    "scheme": "int8-dynamic",
    "role": "neuron",
    "passes": [{"prune-neurons": {"ratio": 0.5}}],
}
_ASKED = {
    "budget": ("speedup",),
    "drop-sublayers": ("ratio",),
    "gradual-magnitude": ("final",),
    "prune-axis": ("role",),
    **dict.fromkeys(("magnitude", "sparsegpt", "sparsellm", "wanda"), ("sparsity",)),
}


def needs_of(step: Pass) -> str:
    """What data a pass needs as it is configured, and what it may need otherwise, in words."""
    if step.needs_training:
        return "labeled data"
    if step.needs_calibration:
        return "calibration data" + (f", unless {step.without_data}" if step.without_data else "")
    if step.without_data:
        return f"no data if {step.without_data}, otherwise calibration data"
    return "no data of its own" if step.inner else "no data"


def call_text(step: Pass) -> str:
    """Lines of Python that compile a model with a pass."""
    data = ", training=training" if step.needs_training else ""
    data += ", calibration=batches" if step.needs_calibration else ""
    call = f"graphprune.compile(model, [{python_text(step)}], example_inputs=inputs{data})"
    names = sorted({type(one).__name__ for one in (step, *step.inner)})
    own = type(step).__module__.startswith("graphprune.")
    imports = f"from graphprune.passes import {', '.join(names)}\n" if own else ""
    return imports + call


def python_text(step: Pass) -> str:
    """A pass as it is written in Python, without the options that have their default."""
    values = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}  # type: ignore[arg-type]
    defaults = {f.name: f.default for f in dataclasses.fields(step)}  # type: ignore[arg-type]
    changed = [
        f"{name}={_python(value)}" for name, value in values.items() if value != defaults[name]
    ]
    return f"{type(step).__name__}({', '.join(changed)})"


def _python(value: object) -> str:
    from graphprune.pipeline.base import Pass

    if isinstance(value, Pass):
        return python_text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_python, value))}]"
    return repr(value)


def _print_pass(shown: Mapping[str, JSON], console: Console) -> None:
    from graphprune.cli.tables import plain_table

    console.print(shown["name"], style="bold", end="  ")
    console.print(shown["summary"], markup=False)
    if shown["text"]:
        console.print(f"\n{shown['text']}", markup=False)
    if shown["needs"]:
        console.print(f"\nneeds: {shown['needs']}", markup=False)
    if shown["options"]:
        console.print(plain_table(["option", "type", "default", "meaning"], shown["options"]))
    if shown["recipe"]:
        recipe = textwrap.indent(shown["recipe"].rstrip(), "  ")
        console.print(f"in a recipe:\n{recipe}", markup=False)
        python = textwrap.indent(shown["python"], "  ")
        console.print(f"in Python:\n{python}", markup=False, soft_wrap=True)


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
