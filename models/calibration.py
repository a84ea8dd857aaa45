"""Calibration batches from a file: text through the model's own tokenizer, or arrays."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.tokenize import tokenizer

LINES = 1024
BATCH = 32
TOKENS = 128
# The columns of a table that hold text, by preference.
COLUMNS = ("text", "sentence", "sentence1")

Batches = list[dict[str, Tensor]]


def calibration_batches(
    source: Path,
    inputs: Sequence[str],
    tokenizer_dir: Path | None = None,
    lines: int = LINES,
) -> Batches:
    """Batches of 32 for `compile(..., calibration=...)`.

    1. *.npz: one array an input, its name the input's, the first dimension the samples.
    2. *.tsv: a header line; the column text, sentence or sentence1.
    3. any other file: text, one sentence a line.
    4. a folder: its train.tsv, or all of its .npz files.

    Of more samples than `lines` so many are drawn at random, with a fixed seed: the first ones of a
    file are often all of one kind. Sentences are sorted by length, so that batches need less
    padding.

    Args:
        source: the file or folder.
        inputs: names of the model's inputs.
        tokenizer_dir: where the tokenizer's files are; for text.
        lines: the most sentences or samples to take.

    Raises:
        GraphPruneError: nothing usable is there; the file, and what it lacks, are named.
    """
    if lines < 1:
        raise GraphPruneError(f"--calibration-lines must be at least 1, got {lines}")
    files = _files(source)
    if files[0].suffix == ".npz":
        return [batch for file in files for batch in _arrays(file, inputs, lines)]
    if "input_ids" not in inputs:
        raise GraphPruneError(
            f"{str(source)!r} is read as text, but the model takes {list(inputs)}: give an .npz "
            "file with an array for each input"
        )
    if tokenizer_dir is None:
        raise GraphPruneError(
            f"{str(source)!r} is text, and no tokenizer was found beside the model: give an .npz "
            "file with an array for each input"
        )
    sentences = _drawn(_sentences(files[0]), lines)
    return text_batches(sentences, inputs, tokenizer_dir)


def text_batches(sentences: Iterable[str], inputs: Sequence[str], tokenizer_dir: Path) -> Batches:
    """Sentences as batches of 32, the short ones first, with the inputs that the model takes.

    Raises:
        GraphPruneError: the model takes an input that no tokenizer makes.
    """
    tokenize = tokenizer(tokenizer_dir)
    ordered = sorted(sentences, key=len)
    batches = []
    for start in range(0, len(ordered), BATCH):
        made = tokenize(ordered[start : start + BATCH], TOKENS)
        missing = [name for name in inputs if name not in made]
        if missing:
            raise GraphPruneError(
                f"a tokenizer does not make the inputs {missing} of this model: give an .npz file "
                "with an array for each input"
            )
        batches.append({name: made[name] for name in inputs})
    return batches


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise GraphPruneError(f"there is no calibration file {str(source)!r}")
    if (source / "train.tsv").is_file():
        return [source / "train.tsv"]
    found = sorted(source.glob("*.npz"))
    if not found:
        raise GraphPruneError(
            f"the folder {str(source)!r} holds neither train.tsv nor .npz files: name a file"
        )
    return found


def _sentences(file: Path) -> list[str]:
    """Distinct sentences of a file, in their order."""
    try:
        rows = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise GraphPruneError(f"{str(file)!r} is no UTF-8 text file") from e
    if file.suffix == ".tsv":
        rows = _column(file, rows)
    found = list(dict.fromkeys(row.strip() for row in rows if row.strip()))
    if not found:
        raise GraphPruneError(f"{str(file)!r} holds no sentence")
    return found


def _column(file: Path, rows: Sequence[str]) -> list[str]:
    header = rows[0].rstrip("\r").split("\t")
    known = [name for name in COLUMNS if name in header]
    if not known:
        raise GraphPruneError(
            f"{str(file)!r} has the columns {header}, none of them called {', '.join(COLUMNS)}; "
            "rename one, or give a text file with one sentence a line"
        )
    index = header.index(known[0])
    cells = [row.split("\t") for row in rows[1:]]
    return [row[index] for row in cells if len(row) > index]


def _drawn(sentences: list[str], lines: int) -> list[str]:
    if len(sentences) <= lines:
        return sentences
    return random.Random(0).sample(sentences, lines)


def _arrays(file: Path, inputs: Sequence[str], lines: int) -> Batches:
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays: Mapping[str, Tensor] = {
                name: torch.from_numpy(found[name]) for name in inputs if name in found
            }
            names = list(found)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as e:
        raise GraphPruneError(f"{str(file)!r} is no .npz file of plain arrays: {e}") from e
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise GraphPruneError(
            f"{str(file)!r} holds the arrays {names} and lacks {missing}, which the model takes"
        )
    counts = {name: len(a) if a.dim() else 0 for name, a in arrays.items()}
    count = min(counts.values())
    if count == 0 or len(set(counts.values())) > 1:
        raise GraphPruneError(
            f"{str(file)!r}: every array needs the same number of samples, at least one, as its "
            f"first dimension; there are {counts}"
        )
    count = min(count, lines)
    return [
        {name: array[start : min(start + BATCH, count)] for name, array in arrays.items()}
        for start in range(0, count, BATCH)
    ]
