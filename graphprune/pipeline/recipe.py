"""Recipes: a list of passes as YAML, as plain data, or by the name of a built-in one.

    passes:
      - fold-batch-norm
      - prune-heads: {ratio: 0.33}
      - prune-neurons: {ratio: 0.5, round_to: 8, ignore: ["encoder.layer.0.*"]}

Keys are the fields of the pass; `load(dump(passes)) == passes` for every list of passes.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from graphprune.errors import RecipeError, first_line
from graphprune.pipeline.base import Pass
from graphprune.pipeline.recipe_names import FOLDER, no_recipe
from graphprune.pipeline.recipe_names import builtin_recipes as builtin_recipes
from graphprune.pipeline.registry import lookup, options, registered
from graphprune.suggest import suggest

Recipe = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]


def load(recipe: Recipe, lr: float | None = None) -> list[Pass]:
    """Passes from a list of passes, plain data, a YAML file, or the name of a built-in recipe.

    Args:
        recipe: one of these.
        lr: learning rate of the passes that train and for which the recipe gives none; None leaves
            them their own.

    Raises:
        RecipeError: no such recipe, pass or option, or a value of the wrong type; near matches are
            named.
    """
    if isinstance(recipe, str | os.PathLike):
        text, where = _read(recipe)
        return _from_data(_parse(text, where), where, lr)
    return _from_data(recipe, "recipe", lr)


def loads(text: str) -> list[Pass]:
    """Passes from YAML text."""
    return _from_data(_parse(text, "recipe"), "recipe")


def dump(passes: Sequence[Pass]) -> str:
    """The passes as YAML text that `loads` reads back to equal ones."""
    return yaml.safe_dump({"passes": to_data(passes)}, sort_keys=False, default_flow_style=None)


def to_data(passes: Sequence[Pass]) -> list[Any]:
    """The passes as plain data: names, and {name: options} where an option is not its default."""
    return [_plain_pass(step) for step in passes]


def _plain_pass(step: Pass) -> str | dict[str, Any]:
    changed = {}
    for option in options(type(step)):
        value = getattr(step, option.name)
        if option.default is dataclasses.MISSING or value != option.default:
            changed[option.name] = _plain(value)
    return {step.name: changed} if changed else step.name


def _plain(value: Any) -> Any:
    if isinstance(value, Pass):
        return _plain_pass(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if callable(value):  # such as the task of a budget, which no recipe can hold
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return value


def _read(recipe: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a built-in recipe or of a file, and how to call it in errors."""
    known = builtin_recipes()
    if isinstance(recipe, str) and recipe in known:
        text = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8")
        return text, f"recipe {recipe!r}"
    path = Path(recipe)
    if not path.is_file():
        passes = registered()
        if str(recipe) in passes:
            raise RecipeError(
                f"{str(recipe)!r} is a pass: give [{str(recipe)!r}], a list of passes"
            )
        raise RecipeError(no_recipe(str(recipe), passes))
    try:
        return path.read_text(encoding="utf-8"), f"recipe {str(path)!r}"
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {e}") from e


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise RecipeError(f"{where} is not valid YAML: {_problem(e)}") from e


def _problem(error: yaml.YAMLError) -> str:
    """Where and what, without the name that the parser gives a text: <unicode string>."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return first_line(error)


def _from_data(data: Any, where: str, lr: float | None = None) -> list[Pass]:
    if isinstance(data, Pass):
        return [data]
    if isinstance(data, Mapping):
        for key in data:
            if key != "passes":
                raise RecipeError(
                    f"{where} has no key {key!r}; a recipe is 'passes:' and a list under it"
                )
        data = data.get("passes")
    if isinstance(data, str) or not isinstance(data, Sequence):
        raise RecipeError(f"{where} needs 'passes:' with a list of passes, got {data!r}")
    return [_step(item, f"{where}, pass {i + 1}", lr) for i, item in enumerate(data)]


def _step(item: Any, where: str, lr: float | None) -> Pass:
    """One item of a recipe: a pass, its name, or {name: options}."""
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return _build(item, {}, where, lr)
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, given),) = item.items()
        if not isinstance(name, str):
            raise RecipeError(f"{where}: a pass name is a string, got {name!r}")
        if not isinstance(given, Mapping | None):
            raise RecipeError(
                f"{where}: {name!r} takes options such as {{ratio: 0.5}}, got {given!r}"
            )
        return _build(name, given or {}, where, lr)
    raise RecipeError(f"{where} must be a pass name or {{name: options}}, got {item!r}")


def _build(name: str, given: Mapping[Any, Any], where: str, lr: float | None) -> Pass:
    try:
        cls = lookup(name)
    except RecipeError as e:
        raise RecipeError(f"{where}: {e}") from e
    fields = {option.name: option for option in options(cls)}
    for key in given:
        if key not in fields:
            raise RecipeError(
                f"{where}: pass {name!r} has no option {key!r}; {suggest(str(key), fields)} "
                f"It takes {sorted(fields)}"
            )
    missing = [
        option.name
        for option in fields.values()
        if option.name not in given
        and option.default is dataclasses.MISSING
        and option.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where}: pass {name!r} needs a value for {missing}")
    hints = typing.get_type_hints(cls)
    values = {
        key: _convert(value, hints[key], f"{where}: option {key!r} of pass {name!r}", lr)
        for key, value in given.items()
    }
    try:
        built = cls(**values)
        if lr is None or "lr" not in fields or "lr" in given or not built.needs_training:
            return built
        return cls(**(values | {"lr": lr}))
    except RecipeError as e:
        raise RecipeError(f"{where}: {e}") from e


def _convert(value: Any, hint: Any, where: str, lr: float | None) -> Any:
    """A value from YAML as the type that the field is annotated with.

    1. A union: the first member that takes the value; a Pass, where one is a Pass.
    2. tuple[X, ...] takes a list; a lone string for tuple[str, ...] is refused: a likely mistake.
    3. float takes an int; nothing else is converted, and a bool is no number.
    4. A Pass takes what a recipe's list takes, and a certain one its options alone.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            try:
                return _convert(value, member, where, lr)
            except RecipeError:
                if _is_pass(member) and value is not None:
                    raise
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{where} must be one of {sorted(arguments)}, got {value!r}")
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(v, arguments[0], where, lr) for v in value)
    elif _is_pass(hint):
        if hint is not Pass and isinstance(value, Mapping) and hint.name not in value:
            return _build(hint.name, value, where, lr)
        return _step(value, where, lr)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is type(None):
        if value is None:
            return None
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint)):
        return value
    raise RecipeError(f"{where} must be {_words(hint)}, got {value!r}{_written(value, hint)}")


def _written(value: Any, hint: Any) -> str:
    """How a number is written that YAML reads as text, such as 50%, "8" or 1e-4; else nothing."""
    kinds = (hint, *typing.get_args(hint))
    if not isinstance(value, str) or not (float in kinds or int in kinds):
        return ""
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        return ""
    number = number / 100 if value.endswith("%") else number
    if float not in kinds:
        return f": write {int(number)}" if number.is_integer() else ""
    # To YAML, 1.0e-4 is a number, and 1e-4 is text.
    return f": write {yaml.safe_dump(number).split()[0]}"


def _is_pass(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Pass)


_PLAIN_WORDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
}


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(member) for member in arguments)
    if origin is tuple:
        return f"a list, each item {_words(arguments[0])}"
    return _PLAIN_WORDS.get(hint, getattr(hint, "__name__", str(hint)))
