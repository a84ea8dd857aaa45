"""The recipes that come with graphprune, by name; without torch, so that help can list them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.resources import files

from graphprune.suggest import suggest


def builtin_recipes() -> dict[str, str]:
    """The built-in recipes: name -> the sentence in their first line."""
    folder = files("graphprune") / "recipes"
    found = {}
    for item in folder.iterdir():
        if item.name.endswith(".yaml"):
            first = item.read_text(encoding="utf-8").partition("\n")[0]
            found[item.name.removesuffix(".yaml")] = first.lstrip("# ").strip()
    return dict(sorted(found.items()))


def no_recipe(name: str, passes: Iterable[str] = ()) -> str:
    """The error for a recipe that is neither built in nor a file.

    Args:
        name: what was asked for.
        passes: names of passes, one of which may have been meant.
    """
    known = builtin_recipes()
    near = difflib.get_close_matches(name, (*known, *passes))
    return f"there is no recipe {name!r}, neither built in nor as a file; " + suggest(
        name, near or known
    )
