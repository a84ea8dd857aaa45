"""Errors that say what was probably meant."""

from graphprune.suggest import suggest


def test_suggest_says_when_there_is_nothing() -> None:
    assert suggest("x", []) == "there are none"
