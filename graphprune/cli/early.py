"""What the words of a command line alone show to be wrong, before torch is imported.

Loading torch and transformers takes seconds; a slip in a name or a missing file is found in a
fraction of one. What needs more than names, numbers and the file system is checked later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graphprune.cli.names import TASKS, pass_names
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.ir.quantization import OVERFLOWING, SCHEMES
from graphprune.pipeline.recipe_names import builtin_recipes, no_recipe
from graphprune.storage.folders import check_target
from graphprune.storage.layout import layout_of
from graphprune.suggest import suggest
from graphprune.validate import check_number


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse what is wrong with the parameters that mean the same in every command.

    Args:
        given: a command's parameters by name.

    Raises:
        GraphPruneError: no such model, scheme, task or file, or --reduce-range without such a
            scheme.
    """
    from graphprune.models.loading.names import check_name

    if given.get("quantize"):
        check_choice("quantization scheme", given["quantize"], SCHEMES)
    if given.get("reduce_range") and given.get("quantize") not in OVERFLOWING:
        raise RecipeError(f"--reduce-range goes with --quantize {' or '.join(OVERFLOWING)}")
    if given.get("task"):
        check_choice("task", given["task"], TASKS)
    model = given.get("model")
    if model is not None and layout_of(Path(model).expanduser()) is None:
        check_name(model, bool(given.get("allow_pickle")))
    source = given.get("calibration")
    if source is not None and not source.exists():
        raise GraphPruneError(f"there is no calibration file {str(source)!r}")


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of those there are.

    Raises:
        RecipeError: near ones are named.
    """
    names = list(known)
    if value not in names:
        raise RecipeError(f"there is no {what} {value!r}; {suggest(value, names)}")


def check_exists(path: Path | None) -> None:
    """Refuse a file or folder that does not exist; None is none.

    Raises:
        GraphPruneError: there is no such file.
    """
    if path is not None and not path.expanduser().exists():
        raise GraphPruneError(f"{str(path)!r} cannot be read: there is no file {str(path)!r}")


def check_metric(metric: str) -> None:
    """Refuse what is no FILE.py:FUNCTION, or a file that does not exist.

    Raises:
        GraphPruneError: one of these.
    """
    from graphprune.models.loading.names import check_own_file, own_source

    source = own_source(metric)
    if source is None:
        raise GraphPruneError(
            f"--metric is FILE.py:FUNCTION, a function from a model to a number, got {metric!r}"
        )
    check_own_file(source[0])


def check_recipe(recipe: str | None) -> None:
    """Refuse a recipe that is neither built in nor a file.

    Raises:
        RecipeError: near ones are named.
    """
    if recipe is None or recipe in builtin_recipes() or Path(recipe).is_file():
        return
    if recipe in pass_names():
        raise RecipeError(
            f"{recipe!r} is a pass: `graphprune passes {recipe}` shows a recipe with it"
        )
    raise RecipeError(no_recipe(recipe, pass_names()))


def check_ratio(name: str, value: float | None) -> None:
    """Refuse what is no fraction to remove.

    Raises:
        RecipeError: it is not in [0, 1).
    """
    if value is not None:
        rule = "a fraction, at least 0 and below 1"
        check_number(name, value, rule, low=0, high=1, open_high=True)


def check_artifact_folder(path: Path) -> None:
    """Refuse a folder that cannot be written, or holds something other than an artifact.

    Raises:
        ExportError: it is a file, holds what graphprune did not write, or is not writable.
    """
    check_target(path.expanduser(), lambda folder: layout_of(folder) is not None)
