"""The table of costs: what adds up, and how a measurement corrects it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphprune.passes.budget.table import Table


def table() -> Table:
    return Table(
        {"ms": ((0.0, 1.0, 3.0), (0.0, 2.0)), "bytes": ((0.0, 5.0, 9.0), (0.0, 1.0))},
        {"ms": 7.0, "bytes": 20.0},
        7.0,
    )


def test_totals_are_fixed_and_chosen() -> None:
    found = table()
    assert found.fixed("ms") == 2
    assert found.total("ms", (2, 1)) == 7
    assert found.total("ms", (1, 0)) == 3
    assert found.least("bytes") == 10


def test_a_correction_says_what_was_measured_and_leaves_dense_and_bytes() -> None:
    found = table().corrected((1, 0), {"ms": 5.0})
    assert found.total("ms", (1, 0)) == pytest.approx(5)
    assert found.total("ms", (2, 1)) == pytest.approx(7)
    # Half was saved of what was promised, at every level.
    assert found.total("ms", (0, 1)) == pytest.approx(7 - 3 / 2)
    assert found.amounts["bytes"] == table().amounts["bytes"]


def test_bytes_are_corrected_too() -> None:
    found = table().corrected((1, 0), {"bytes": 18.0})
    assert found.total("bytes", (1, 0)) == pytest.approx(18)
    assert found.total("bytes", (2, 1)) == 20
    assert found.amounts["ms"] == table().amounts["ms"]


def test_levels_that_save_nothing_correct_nothing() -> None:
    assert table().corrected((2, 1), {"ms": 6.0}).amounts == table().amounts


def test_items_take_no_more_time_than_the_whole_model() -> None:
    slow = replace(table(), whole={"ms": 4.0, "bytes": 20.0})
    assert slow.fixed("ms") == -1
    found = slow.bounded()
    assert found.fixed("ms") == pytest.approx(0)
    assert found.total("ms", (2, 1)) == pytest.approx(4)
    # A fifth of the items' time is a fifth of the model's, and not less.
    assert found.total("ms", (1, 0)) == pytest.approx(4 / 5)
    assert found.total("ms", (0, 0)) > 0
    assert found.amounts["bytes"] == slow.amounts["bytes"]
    assert table().bounded() == table()
