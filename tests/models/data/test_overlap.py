"""Overlap of evaluation and calibration: padding, places and batches do not hide it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune.models.data.overlap import RUN, overlap


def text(*rows: list[int], left: bool = False, mask: bool = True) -> dict[str, Tensor]:
    """A batch of rows, padded with 0 to the longest."""
    width = max(map(len, rows))
    ids, ones = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[i, place], ones[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": ones} if mask else {"input_ids": ids}


def test_rows_are_the_same_whatever_their_padding_and_type() -> None:
    calibration = [text([5, 6], [7, 8, 9]), text([4])]
    evaluation = [text([7, 8, 9], [5, 6, 6], [4], [1, 2, 3, 4, 5], left=True)]
    assert overlap(calibration, evaluation) == 2
    narrow = [{name: tensor.int() for name, tensor in batch.items()} for batch in evaluation]
    assert overlap(calibration, narrow) == 2
    assert overlap([text([7, 8], mask=False)], [text([7, 8], [7, 8, 9])]) == 1


def test_a_row_counts_once_and_part_of_a_row_is_not_the_row() -> None:
    assert overlap([text([5, 6, 7])], [text([5, 6, 7], [5, 6, 7], [5, 6])]) == 1
    # 1 and 256 are the same bytes, one apart.
    assert overlap([text([256] * 2 * RUN)], [text([1] * 2 * RUN)]) == 0


@pytest.mark.parametrize(("shared", "found"), [(RUN, 1), (RUN - 1, 0)])
def test_segments_of_one_text_overlap_wherever_they_are_cut(shared: int, found: int) -> None:
    running = list(range(1, 201))
    calibration = [text(running[:100])]
    evaluation = [text(running[100 - shared : 150], running[150:])]
    assert overlap(calibration, evaluation) == found


def test_images_are_compared_by_all_inputs_that_both_have() -> None:
    images = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    calibration = [{"pixel_values": images[:2]}, {"pixel_values": images[2:3]}]
    evaluation = [{"pixel_values": images[1:], "other": torch.zeros(3)}]
    assert overlap(calibration, evaluation) == 2
    sizes = [{**batch, "size": torch.ones(len(batch["pixel_values"]))} for batch in calibration]
    evaluation = [{"pixel_values": images[1:], "size": torch.tensor([1.0, 2.0, 1.0])}]
    assert overlap(sizes, evaluation) == 1
    assert overlap(calibration, []) == overlap([], evaluation) == 0
