"""Shared by tasks for language models: the log-probability of tokens under a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.tokenize import encoder
from graphprune.models.tasks.base import Progress, Runner, by_length, runner

_PROBE = 8  # tokens that show the width of the logits


@final
@dataclass(frozen=True, slots=True)
class Scored:
    """How likely a model finds the last tokens of a row.

    Attributes:
        log_probability: natural logarithm, summed over these tokens.
        greedy: whether each of them is the likeliest token at its place.
    """

    log_probability: float
    greedy: bool


TokenScorer = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Scored]]


def scorer(model: Any, tokenizer_dir: Path, ids: Iterable[Sequence[int]]) -> TokenScorer:
    """A function from rows of token ids, and where in each to begin, to one `Scored` a row.

    Rows of unlike length are padded on the right, where no causal model looks. The softmax is
    float32, the sum over tokens float64.

    Args:
        model: predicts the next token: its first output is logits [batch, tokens, vocabulary].
        tokenizer_dir: named in the error when model and tokenizer do not fit.
        ids: all rows that will be scored.

    Raises:
        GraphPruneError: the model gives no such logits, or the tokenizer makes ids beyond them;
            later, when called: the logits are NaN.
    """
    run = runner(model)
    width = _vocabulary(run)
    largest = max(max(row) for row in ids)
    if largest >= width:
        raise GraphPruneError(
            f"the tokenizer in {str(tokenizer_dir)!r} does not fit the model: it makes the token "
            f"id {largest}, and the model's logits end at {width - 1}"
        )

    def score(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Scored]:
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = run({"input_ids": padded, "attention_mask": mask})
        return [
            # The logits at one token are about the next.
            _scored(logits[i, start - 1 : len(row) - 1].float(), padded[i, start : len(row)])
            for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        ]

    return score


def _vocabulary(run: Runner) -> int:
    """The width of a model's logits, from a few tokens that every vocabulary has."""
    ids = torch.zeros(1, _PROBE, dtype=torch.int64)
    shape = tuple(run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape)
    if len(shape) != 3 or shape[:2] != (1, _PROBE):
        raise GraphPruneError(
            f"the model's first output has shape {shape} for {_PROBE} tokens; this task is for "
            f"language models, whose logits have the shape (1, {_PROBE}, vocabulary)"
        )
    return int(shape[2])


def _scored(logits: Tensor, wanted: Tensor) -> Scored:
    """From logits [tokens, vocabulary] and the ids [tokens] that came."""
    chosen = logits.log_softmax(dim=-1).gather(1, wanted.unsqueeze(1))
    # One NaN makes its whole row of the softmax NaN.
    if bool(chosen.isnan().any()):
        raise GraphPruneError(
            "the model's logits are NaN for some tokens of the task's data, so there is nothing to "
            "evaluate: look for an overflow (float16) or a broken weight"
        )
    return Scored(float(chosen.double().sum()), bool((logits.argmax(dim=-1) == wanted).all()))


def continuations(
    model: Any,
    tokenizer_dir: Path,
    texts: Sequence[tuple[str, str]],
    *,
    batch: int,
    progress: Progress,
) -> list[Scored]:
    """Score the second of each two texts, after the first.

    As lm-evaluation-harness does it: the two are tokenized together, without special tokens, and
    what comes after the number of tokens that the first has alone is the second's.

    Args:
        model: as for `scorer`.
        tokenizer_dir: where the tokenizer's files are.
        texts: (before, continuation); neither empty.
        batch: rows that run together; the result does not depend on it.
        progress: called with (done, total) batches.

    Raises:
        GraphPruneError: the tokenizer cannot be read, or as `scorer`.
    """
    encode = encoder(tokenizer_dir, special=False)
    rows = encode([before + after for before, after in texts])
    alone = encode([before for before, _ in texts])
    # A tokenizer may join the last letters of one to the other; one token at least is scored.
    starts = [
        max(1, min(len(context), len(row) - 1)) for row, context in zip(rows, alone, strict=True)
    ]
    score = scorer(model, tokenizer_dir, rows)
    return by_length(
        rows,
        lambda part: score([rows[i] for i in part], [starts[i] for i in part]),
        batch,
        progress,
    )


def read_rows(file: Path, columns: Sequence[str], limit: int) -> tuple[list[dict[str, Any]], str]:
    """The first `limit` rows (0: all) of a file with one JSON object a line, and how many in words.

    Raises:
        GraphPruneError: it is no such file, or a line lacks a column; the line is named.
    """
    if limit < 0:
        raise GraphPruneError(f"--limit is a number of examples, or 0 for all, got {limit}")
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise GraphPruneError(f"{str(file)!r} is no UTF-8 text file") from e
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise GraphPruneError(f"{str(file)!r} holds no example")
    taken = numbered[: limit or None]
    rows = []
    for number, line in taken:
        try:
            row = json.loads(line)
        except ValueError as e:
            raise GraphPruneError(f"{str(file)!r}, line {number}: {line[:60]!r} is no JSON") from e
        missing = [c for c in columns if not isinstance(row, dict) or c not in row]
        if missing:
            raise GraphPruneError(f"{str(file)!r}, line {number} lacks {', '.join(missing)}")
        rows.append(row)
    part = "all" if len(taken) == len(numbered) else f"the first {len(taken):,} of"
    return rows, f"{part} {len(numbered):,} examples"


def fraction(right: Sequence[bool]) -> tuple[float, float]:
    """Fraction of True, and its standard error (sample deviation over the root of the count)."""
    count = len(right)
    value = sum(right) / count
    return value, (value * (1 - value) / max(1, count - 1)) ** 0.5
