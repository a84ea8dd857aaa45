"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def suggest(wrong: str, known: Iterable[str]) -> str:
    """The end of an error sentence: near matches, or else all there is."""
    known = sorted(known)
    # Users also write the class name: PruneHeads for prune-heads.
    kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", wrong).replace("_", "-").lower()
    close = difflib.get_close_matches(wrong, known) or difflib.get_close_matches(kebab, known)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"there are {known}" if known else "there are none"
