"""Name patterns: which tensors `targets` and `ignore` of every pass mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.pipeline.base import Pass
from graphprune.suggest import suggest

REGEX = "re:"


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern covers a dotted name.

    1. "re:..." is a regular expression that must match from the beginning of the name.
    2. Anything else is a glob for the name, or for a module that holds it: "encoder.layer.0" and
       "*.0" both cover "encoder.layer.0.output.dense.weight", but not "encoder.layer.01.weight".
    """
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def check_patterns(option: str, patterns: object) -> None:
    """Refuse patterns that can only be a mistake.

    Raises:
        RecipeError: not a tuple of strings, or a regular expression that does not compile.
    """
    if isinstance(patterns, str) or not isinstance(patterns, tuple):
        raise RecipeError(f"{option} must be a tuple of name patterns, got {patterns!r}")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise RecipeError(f"{option} must hold name patterns, got {pattern!r}")
        if pattern.startswith(REGEX):
            try:
                re.compile(pattern.removeprefix(REGEX))
            except re.error as e:
                raise RecipeError(f"{option}: {pattern!r} is no regular expression: {e}") from e


class TensorNames:
    """The names under which a program's tensors are known, tied names included."""

    def __init__(self, program: Program) -> None:
        self._of = {name: [name] for name in program.tensors}
        for alias, name in program.aliases.items():
            self._of[name].append(alias)

    def all(self) -> list[str]:
        """Every name."""
        return [name for names in self._of.values() for name in names]

    def match(self, tensor: str, patterns: Sequence[str]) -> bool:
        """Whether a pattern covers one of a tensor's names."""
        names = self._of.get(tensor, [tensor])
        return any(matches(pattern, name) for pattern in patterns for name in names)


def refuse_unmatched(
    option: str,
    patterns: Iterable[str],
    names: Sequence[str],
    match: Callable[[str, str], bool] = matches,
) -> None:
    """Refuse a pattern that matches no name.

    Raises:
        RecipeError: the pattern and near names are named.
    """
    for pattern in patterns:
        if not any(match(pattern, name) for name in names):
            hint = suggest(pattern, names)
            if not hint.startswith("did you mean"):
                hint = f"names look like {sorted(names)[:3]}"
            raise RecipeError(f"{option}: {pattern!r} matches nothing; {hint}")


def check_names(step: Pass, program: Program) -> None:
    """Refuse a pass whose `targets` or `ignore` hold a pattern that matches nothing.

    Raises:
        RecipeError: the pattern and near names are named.
    """
    names = TensorNames(program).all()
    for option in ("targets", "ignore"):
        refuse_unmatched(option, getattr(step, option), names)
