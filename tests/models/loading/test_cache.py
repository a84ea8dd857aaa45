"""The cache folder: made once, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphprune.models import load_model
from graphprune.models.loading.cache import cache_dir, cached


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_cached_is_made_once(own_cache: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("x")

    first, second = cached("thing", make), cached("thing", make)
    assert first == second == own_cache / "thing" == cache_dir() / "thing"
    assert (first / "file").read_text() == "x"
    assert len(made) == 1


def test_what_fails_leaves_nothing(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached("thing", fail)
    assert list(own_cache.iterdir()) == []


@pytest.mark.usefixtures("own_cache")
def test_the_digits_model_is_trained_once_and_the_same_for_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(
        "graphprune.models.zoo.digits.train.__defaults__", (1, 3e-3, lambda *_: None)
    )
    first = load_model("digits-vit").module.state_dict()
    again = load_model("digits-vit").module.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
