"""Overlap: whether evaluation data was used for calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

RUN = 32  # consecutive tokens that two texts hardly share by chance

Batch = Mapping[str, Tensor]


def overlap(calibration: Iterable[Batch], evaluation: Iterable[Batch]) -> int:
    """How many distinct rows of an evaluation occur in calibration batches.

    1. Text (batches with input_ids): without its padding, a row occurs where a row of calibration
       is the same, or has any 32 consecutive tokens of it: segments of one running text need not
       be cut at the same places.
    2. Anything else: where all inputs of a row that both have are the same.

    Args:
        calibration: inputs by name, [rows, ...]; padding is where attention_mask is 0.
        evaluation: likewise, tokenized by the same tokenizer.
    """
    known, evaluated = list(calibration), list(evaluation)
    if not known or not evaluated:
        return 0
    names = sorted(set(known[0]) & set(evaluated[0]))
    seen = {piece for row in _rows(known, names) for piece in _pieces(row, names)}
    rows = {tuple(row) for row in _rows(evaluated, names)}
    return sum(any(piece in seen for piece in _pieces(row, names)) for row in rows)


def _rows(batches: Iterable[Batch], names: Iterable[str]) -> Iterator[tuple[bytes, ...]]:
    """The bytes of each row: of its tokens alone where there are any, else of all inputs named."""
    for batch in batches:
        count = len(next(iter(batch.values())))
        if "input_ids" in names:
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
            yield from ((_bytes(ids[i][mask[i]].int()),) for i in range(count))
        else:
            yield from (tuple(_bytes(batch[name][i]) for name in names) for i in range(count))


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def _pieces(row: tuple[bytes, ...], names: Iterable[str]) -> Iterator[tuple[bytes, ...]]:
    """Pieces of a row to look for: all of it, and its runs of tokens."""
    yield row
    if "input_ids" in names:
        (ids,), width = row, 4 * RUN
        yield from ((ids[i : i + width],) for i in range(0, len(ids) - width + 1, 4))
