"""What the history of a program says of units that are gone."""

from graphprune.ir.history import kept_indices


def test_kept_indices_are_of_the_original() -> None:
    history = [
        {"pass": "a", "steps": [{"removed": {"x": {"of": 6, "kept": [1, 3, 5]}}}]},
        {"removed": {"x": {"of": 3, "kept": [0, 2]}, "y": {"of": 2, "kept": [0]}}},
    ]
    assert kept_indices(history) == {"x": [1, 5], "y": [0]}
