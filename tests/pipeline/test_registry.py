from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.pipeline import registry
from graphprune.pipeline.base import Context, Pass, PassResult
from graphprune.pipeline.registry import lookup, register, registered


@final
@dataclass(frozen=True, slots=True)
class Foreign(Pass):
    name: ClassVar[str] = "foreign-pass"

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(program, False)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    registered()
    passes, loaded = dict(registry._passes), set(registry._loaded)
    yield
    registry._passes.clear()
    registry._passes.update(passes)
    registry._loaded.clear()
    registry._loaded.update(loaded)


def _pass(**attributes: Any) -> type[Pass]:
    """A pass class made on the spot."""
    run = Foreign.run
    made = type("Made", (Pass,), {"run": run, "__module__": __name__, **attributes})
    return dataclass(frozen=True)(made)


def test_built_in_passes_are_known_by_name() -> None:
    known = registered()
    assert known["prune-heads"] is PruneHeads
    assert known["prune-neurons"] is PruneNeurons
    assert list(known) == sorted(known)
    assert lookup("prune-heads") is PruneHeads


@pytest.mark.parametrize("wrong", ["prune-haeds", "PruneHeads", "prune_heads", "prune heads"])
def test_unknown_names_are_answered_with_near_matches(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*'prune-heads'"):
        lookup(wrong)


def test_a_name_near_nothing_is_answered_with_all_names() -> None:
    with pytest.raises(
        RecipeError, match=r"there are \['budget', 'distill', .*'fold-batch-norm', "
    ):
        lookup("zzzzzz")


@pytest.mark.parametrize("name", ["Bad", "bad_name", "-bad", "bad-", "2bad", "", None])
def test_names_must_be_kebab_case(name: str | None) -> None:
    with pytest.raises(RecipeError, match="kebab-case"):
        register(_pass(name=name))


def test_a_taken_name_is_refused_and_names_both() -> None:
    with pytest.raises(RecipeError, match=r"'prune-heads' of .*Made is taken by .*PruneHeads"):
        register(_pass(name="prune-heads"))


def test_registering_the_same_class_again_is_fine() -> None:
    assert register(PruneHeads) is PruneHeads


def test_an_abstract_pass_is_refused() -> None:
    abstract = type("Abstract", (Pass,), {"name": "abstract", "__module__": __name__})
    with pytest.raises(RecipeError, match=r"abstract; define \['run'\]"):
        register(dataclass(frozen=True)(abstract))


@pytest.mark.parametrize("frozen", [False, None])
def test_a_pass_that_is_no_frozen_dataclass_is_refused(frozen: bool | None) -> None:
    made = type("Made", (Pass,), {"run": Foreign.run, "name": "made", "__module__": __name__})
    if frozen is not None:
        made = dataclasses.make_dataclass("Made", [], bases=(made,), frozen=frozen)
    with pytest.raises(RecipeError, match="frozen=True"):
        register(made)


class _Point:
    """Looks like an entry point of an installed package."""

    name = "foreign-pass"
    value = "other.package:Foreign"

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def _offer(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    def entry_points(*, group: str) -> list[_Point]:
        assert group == "graphprune.passes"
        return [_Point(loaded)]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_other_packages_add_passes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, Foreign)
    assert lookup("foreign-pass") is Foreign


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, ImportError("no module named tensorflow"))
    with pytest.raises(RecipeError, match=r"'other.package:Foreign' .* no module named tensorflow"):
        registered()
