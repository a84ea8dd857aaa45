"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from graphprune.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


def suggest(wrong: str, known: Iterable[str]) -> str:
    """The end of an error sentence: near matches, or else all there is."""
    known = sorted(known)
    # Users also write the class name: PruneHeads for prune-heads.
    kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", wrong).replace("_", "-").lower()
    close = difflib.get_close_matches(wrong, known) or difflib.get_close_matches(kebab, known)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"there are {known}" if known else "there are none"


def suggesting(function: Callable[P, R], what: str) -> Callable[P, R]:
    """The function, with a near match named where a keyword argument does not exist.

    Args:
        function: takes no **keywords.
        what: what the error calls it.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise OptionError(f"{what} has no option {name!r}; {suggest(name, known)}")
        return function(*args, **kwargs)

    return checked
