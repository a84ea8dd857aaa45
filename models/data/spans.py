"""Spans: random runs of words of labeled texts, to distill on more text than there is."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.batches import SIZE, table_batches
from graphprune.models.data.tables import Schema, Table
from graphprune.models.data.tokenize import TOKENS
from graphprune.training.losses import IGNORED
from graphprune.validate import check_whole

_WORDS = 3  # of a span, at least, where the text has as many


@final
class Spans:
    """Labeled texts in batches, and with each of them random spans of it, for `Training`.

    A span is a run of words, from three of them to the whole text; words are what spaces part. Of a
    pair each text is cut independently. Other spans are drawn at every reading, which tokenizes
    them, from a seed that torch's own generator gives. Their label is -100, which classification
    ignores: a pass that distills learns what its teacher says of them, another one nothing. The
    loss on labels is the mean over the whole texts of a batch, which may be few.

    Attributes:
        table: the texts and their labels.
        whole: the same in batches.
        count: spans of each text.
    """

    def __init__(
        self,
        table: Table,
        schema: Schema,
        inputs: Sequence[str],
        tokenizer_dir: Path,
        count: int,
        size: int = SIZE,
        *,
        length: int = TOKENS,
    ) -> None:
        """Take what `table_batches` takes, and `count`.

        Raises:
            RecipeError: count is below 1.
            GraphPruneError: the labels are scores, or as `table_batches` does.
        """
        check_whole("count", count)
        if schema.task != "classification":
            raise GraphPruneError(
                f"spans of texts are for classification, and the task is {schema.task}: train on "
                "whole texts"
            )
        self._batches = functools.partial(
            table_batches,
            schema=schema,
            inputs=inputs,
            tokenizer_dir=tokenizer_dir,
            size=size,
            length=length,
        )
        self.whole = self._batches(table)
        self.table, self.count = table, count

    def __len__(self) -> int:
        return -(-len(self.whole.labels) * (1 + self.count) // self.whole.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        drawn = random.Random(int(torch.randint(2**31, ())))
        table, times = self.table, 1 + self.count
        spans = [tuple(_span(text, drawn) for text in row) for row in table.texts * self.count]
        both = replace(table, texts=(*table.texts, *spans), labels=table.labels * times)
        batches = self._batches(both)
        batches.labels[len(table.texts) :] = IGNORED
        return iter(batches)

    def unlabeled(self, count: int) -> list[dict[str, Tensor]]:
        """Batches of at most so many whole texts, as of `Batches`."""
        return self.whole.unlabeled(count)


def _span(text: str, drawn: random.Random) -> str:
    """A run of a text's words."""
    words = text.split()
    length = drawn.randint(min(_WORDS, len(words)), len(words))
    first = drawn.randint(0, len(words) - length)
    return " ".join(words[first : first + length])
