"""Batches: labeled examples for training, shuffled every time they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema, Table
from graphprune.models.data.tokenize import TOKENS, tokenizer

SIZE = 32
_POOL = 50  # batches whose examples are sorted by length together


@final
class Batches:
    """Examples in batches, for `graphprune.Training`; the last one may be smaller.

    Each reading shuffles by torch's own generator, which training seeds. Examples of like length
    share a batch, cut to its longest: a pool of 50 batches is drawn, sorted, and read in a random
    order. Without shuffling all examples are sorted, the short ones first.

    Attributes:
        inputs: by name, the first dimension the examples; of text [examples, tokens], padded.
        labels: [examples], int64 classes or float32 scores.
        size: examples of a batch.
        shuffle: see above.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        size: int = SIZE,
        *,
        mask: Tensor | None = None,
        shuffle: bool = True,
    ) -> None:
        """`mask` [examples, tokens] is 1 where there is a token; None where nothing is padded."""
        self.inputs, self.labels, self.size, self.shuffle = dict(inputs), labels, size, shuffle
        self._mask = None if mask is None else mask.bool()

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self._order():
            yield {**self._cut(rows), "labels": self.labels[rows]}

    def unlabeled(self, count: int) -> list[dict[str, Tensor]]:
        """Batches of at most so many examples without labels, drawn with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(self.labels), generator=generator)[:count]
        return [self._cut(rows) for rows in torch.split(self._by_length(drawn), self.size)]

    def _order(self) -> Sequence[Tensor]:
        """The rows of each batch."""
        if not self.shuffle:
            return torch.split(self._by_length(torch.arange(len(self.labels))), self.size)
        pools = torch.split(torch.randperm(len(self.labels)), _POOL * self.size)
        batches = [rows for pool in pools for rows in torch.split(self._by_length(pool), self.size)]
        return [batches[i] for i in torch.randperm(len(batches)).tolist()]

    def _by_length(self, rows: Tensor) -> Tensor:
        if self._mask is None:
            return rows
        return rows[self._mask[rows].sum(dim=1).argsort(stable=True)]

    def _cut(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows of the inputs, without the columns in which all of them are padding."""
        if self._mask is None:
            return {name: tensor[rows] for name, tensor in self.inputs.items()}
        kept = self._mask[rows].any(dim=0)
        return {name: tensor[rows][:, kept] for name, tensor in self.inputs.items()}


def table_batches(
    table: Table,
    schema: Schema,
    inputs: Sequence[str],
    tokenizer_dir: Path,
    size: int = SIZE,
    *,
    length: int = TOKENS,
    shuffle: bool = True,
) -> Batches:
    """A table's rows, tokenized once; pairs are joined as two segments.

    Args:
        table: texts and labels.
        schema: what labels stand for.
        inputs: names of the model's inputs.
        tokenizer_dir: where the tokenizer's files are.
        size: rows of a batch.
        length: the most tokens of a row; longer ones are cut.
        shuffle: see `Batches`.

    Raises:
        GraphPruneError: a label is not the head's, or the model takes an input that no tokenizer
            makes.
    """
    kind = torch.float32 if schema.task == "regression" else torch.int64
    labels = torch.tensor(schema.targets(table), dtype=kind)
    made = tokenizer(tokenizer_dir)(_joined(table), length)
    missing = [name for name in inputs if name not in made]
    if missing:
        raise GraphPruneError(
            f"a tokenizer does not make the inputs {missing} of this model: it cannot be trained "
            "or evaluated on a file of text"
        )
    mask = made["attention_mask"]
    return Batches({n: made[n] for n in inputs}, labels, size, mask=mask, shuffle=shuffle)


def _joined(table: Table) -> list[str] | list[tuple[str, str]]:
    if len(table.text) == 1:
        return [texts[0] for texts in table.texts]
    return [(texts[0], texts[1]) for texts in table.texts]
