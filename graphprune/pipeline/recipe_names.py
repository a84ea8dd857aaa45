"""The recipes that come with graphprune, by name; without torch, so that help can list them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from graphprune.suggest import suggest

# Not by importlib.resources, which takes longer to import than all of this.
FOLDER = Path(__file__).parent.parent / "recipes"


def builtin_recipes() -> dict[str, str]:
    """The built-in recipes: name -> the sentence in their first line."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        found[file.stem] = first.lstrip("# ").strip()
    return found


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
