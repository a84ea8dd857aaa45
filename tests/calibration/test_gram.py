"""Gram matrices: sums over rows, whichever way the rows come, and without those of padding."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.calibration.gram import Gram, Remarks


def test_grams_merge_by_adding() -> None:
    rows = torch.randn(50, 6)
    one, two, both = Gram.empty(6), Gram.empty(6), Gram.empty(6)
    one.add(rows[:20])
    two.add(rows[20:])
    both.add(rows)
    merged = one + two
    torch.testing.assert_close(merged.matrix, both.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.mean, rows.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        merged.variance, rows.double().var(0, correction=0), rtol=1e-4, atol=1e-5
    )
    ones = torch.cat([rows.double(), torch.ones(50, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(merged.with_ones(), ones.T @ ones, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_a_gram_is_the_product_of_all_rows_that_count(lengths: list[int], features: int) -> None:
    """Of padded sequences [batch, length, features], the rows that a mask leaves."""
    rows = torch.randn(len(lengths), 9, features, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    gram = Gram.empty(features)
    for sequence, real in zip(rows, mask, strict=True):
        gram.add(sequence[real])
    x = rows[mask]
    assert gram.count == sum(lengths) == len(x)
    torch.testing.assert_close(gram.matrix, x.T @ x)
    torch.testing.assert_close(gram.total, x.sum(0))
    torch.testing.assert_close(gram.norm, x.norm(dim=0))
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(gram.with_ones(), ones.T @ ones)
    # Padding that came along would be seen.
    if len(x) < 9 * len(lengths):
        whole = rows.flatten(0, 1)
        assert not torch.allclose(gram.matrix, whole.T @ whole)


def test_half_precision_is_summed_in_wider_types() -> None:
    gram = Gram.empty(1)
    for _ in range(3):
        gram.add(torch.ones(4097, 1, dtype=torch.float16))  # float16 has 4096 and 4098
    assert (gram.matrix.item(), gram.total.item(), gram.count) == (12291, 12291, 12291)


def test_nothing_seen_has_no_moments() -> None:
    gram = Gram.empty(3)
    for value in (gram.mean, gram.variance, gram.norm):
        assert value.tolist() == [0, 0, 0]
    assert gram.shortage() == ""


def test_fewer_rows_than_features_are_said() -> None:
    gram = Gram.empty(3)
    gram.add(torch.randn(2, 3))
    assert gram.shortage().startswith("2 calibration rows for 3 features")
    gram.add(torch.randn(1, 3))
    assert gram.shortage() == ""


def test_one_remark_of_many_sites_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    remarks = Remarks()
    for name, remark in [("a", "few rows"), ("b", ""), ("c", "few rows"), ("d", "other")]:
        remarks.add(name, remark)
    expected = ["a and 1 more: few rows", "d: other"]
    assert remarks.warn(logging.getLogger("test")) == expected
    assert caplog.messages == expected


def test_sites_with_few_rows_are_one_sentence_of_the_shortest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    remarks = Remarks()
    for name, rows, features in (("a", 2, 3), ("b", 2, 8), ("c", 9, 8)):
        gram = Gram.empty(features)
        gram.add(torch.randn(rows, features))
        remarks.add_shortage(name, gram)
    (sentence,) = remarks.warn(logging.getLogger("graphprune.test"))
    assert sentence.startswith("b and 1 more: 2 calibration rows for 8 features")
