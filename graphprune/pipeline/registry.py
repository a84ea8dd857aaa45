"""Pass names: which package registered what."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from importlib.metadata import entry_points
from typing import TypeVar

from graphprune.errors import RecipeError
from graphprune.pipeline.base import Pass
from graphprune.suggest import suggest, suggesting

P = TypeVar("P", bound=type[Pass])

ENTRY_POINTS = "graphprune.passes"
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_passes: dict[str, type[Pass]] = {}
_loaded: set[str] = set()


def register(cls: P) -> P:
    """Make a pass known to recipes and the command line under its `name`.

    Raises:
        RecipeError: the name is missing, not kebab case, or taken; or the class is abstract or not
            a frozen dataclass.
    """
    name = getattr(cls, "name", None)
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not isinstance(name, str) or not _KEBAB.fullmatch(name):
        raise RecipeError(
            f"pass {where} needs a kebab-case `name` such as 'prune-heads', not {name!r}"
        )
    if inspect.isabstract(cls):
        missing = sorted(cls.__abstractmethods__)
        raise RecipeError(f"pass {where} is abstract; define {missing}")
    # `params` exists only on dataclasses; slots=True creates another class, so look it up here.
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise RecipeError(f"pass {where} must be a @dataclass(frozen=True, slots=True)")
    held = _passes.get(name)
    if held is not None and held is not cls:
        raise RecipeError(
            f"pass name {name!r} of {where} is taken by {held.__module__}.{held.__qualname__}"
        )
    if held is None:
        # By setattr, because a method is no variable to a type checker.
        setattr(cls, "__init__", suggesting(cls.__init__, f"pass {name!r}"))  # noqa: B010
    _passes[name] = cls
    return cls


def registered() -> dict[str, type[Pass]]:
    """Every known pass by name: the built-in ones, and those of other installed packages."""
    _load()
    return dict(sorted(_passes.items()))


def lookup(name: str) -> type[Pass]:
    """The pass registered under this name.

    Raises:
        RecipeError: there is none; near matches are named.
    """
    _load()
    try:
        return _passes[name]
    except KeyError:
        raise RecipeError(f"there is no pass {name!r}; {suggest(name, _passes)}") from None


def options(cls: type[Pass]) -> tuple[dataclasses.Field[object], ...]:
    """The options of a pass: its dataclass fields, those first that it takes by position too."""
    found = dataclasses.fields(cls)  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda f: bool(f.kw_only)))


def meanings(cls: type[Pass]) -> dict[str, str]:
    """Option -> what it means, from "Attributes" in the docstrings of the pass and its bases.

    The pass's own text takes precedence over that of the option's owner.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    return {option.name: found.get(option.name, "") for option in options(cls)}


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a Google docstring's section "Attributes"."""
    section = doc.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _load() -> None:
    """Import the built-in passes and those of other packages, once.

    A package that cannot be imported is an error that names it: a pass that is missing silently is
    hard to trace.
    """
    if "" not in _loaded:
        importlib.import_module("graphprune.passes")
        _loaded.add("")
    for point in entry_points(group=ENTRY_POINTS):
        if point.value in _loaded:
            continue
        try:
            found = point.load()
        except Exception as e:
            raise RecipeError(
                f"package {point.value!r} offers pass {point.name!r} but cannot be imported: {e}; "
                "repair or uninstall it"
            ) from e
        if inspect.isclass(found) and issubclass(found, Pass):
            register(found)
        _loaded.add(point.value)
