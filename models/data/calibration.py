"""Calibration batches from a file: text through the model's own tokenizer, or arrays."""

from __future__ import annotations

import contextlib
import logging
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.errors import GraphPruneError
from graphprune.ir.graph import is_op
from graphprune.ir.program import Program
from graphprune.models.data import wikitext
from graphprune.models.data.tokenize import TOKENS, encoder, tokenizer

_log = logging.getLogger(__name__)

LINES = 1024
BATCH = 32
# For language models: running text in segments, which one line of LINES stands for a part of.
SEGMENTS = 64
SEGMENT = 512
_LINE = SEGMENTS * SEGMENT // LINES
# The columns of a table that hold text, by preference.
COLUMNS = ("text", "sentence", "sentence1", "question")

CalibrationBatches = list[dict[str, Tensor]]


def calibration_batches(
    source: Path,
    inputs: Sequence[str],
    tokenizer_dir: Path | None = None,
    lines: int = LINES,
    *,
    segment: int = 0,
    length: int = TOKENS,
) -> CalibrationBatches:
    """CalibrationBatches for `compile(..., calibration=...)`, of 32 samples.

    1. *.npz: one array an input, its name the input's, the first dimension the samples.
    2. *.tsv: a header line; the column text, sentence, sentence1 or question.
    3. any other file: text, one sentence a line.
    4. a folder: its train.tsv, or all of its .npz files.

    Of more samples than `lines` so many are drawn at random, with a fixed seed: the first ones of a
    file are often all of one kind. Sentences are sorted by length, so that batches need less
    padding.

    A language model reads running text, as it does in use: with `segment`, the text goes to
    `token_batches`, where a line stands for 32 tokens.

    Args:
        source: the file or folder.
        inputs: names of the model's inputs.
        tokenizer_dir: where the tokenizer's files are; for text.
        lines: the most sentences or samples to take.
        segment: tokens of a segment of running text; 0 for a sentence a row.
        length: the most tokens of a sentence; longer ones are cut.

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
    if segment:
        segments = max(1, lines * _LINE // segment)
        return token_batches(files[0], inputs, tokenizer_dir, segments=segments, length=segment)
    sentences = _drawn(_sentences(files[0]), lines)
    return text_batches(sentences, inputs, tokenizer_dir, length)


def check_source(source: Path) -> None:
    """Refuse a file from which no model could be calibrated, before a model is loaded.

    Raises:
        GraphPruneError: the file, and what it lacks, are named.
    """
    for file in _files(source):
        if file.suffix == ".npz":
            with _opened(file) as arrays:
                list(arrays)
        else:
            _sentences(file)


def text_batches(
    sentences: Iterable[str], inputs: Sequence[str], tokenizer_dir: Path, length: int = TOKENS
) -> CalibrationBatches:
    """Sentences as batches of 32, the short ones first, with the inputs that the model takes.

    Raises:
        GraphPruneError: the model takes an input that no tokenizer makes.
    """
    tokenize = tokenizer(tokenizer_dir)
    ordered = sorted(sentences, key=len)
    batches = []
    for start in range(0, len(ordered), BATCH):
        batches.append(_chosen(tokenize(ordered[start : start + BATCH], length), inputs))
    return batches


def token_batches(
    source: Path,
    inputs: Sequence[str],
    tokenizer_dir: Path,
    *,
    segments: int = SEGMENTS,
    length: int = SEGMENT,
    seed: int = 0,
    batch: int = 4,
) -> CalibrationBatches:
    """Segments of running text, [batch, length] tokens, none padded: for language models.

    The text is tokenized whole, with the special tokens that the tokenizer adds by itself, and cut
    into segments that do not overlap, of which some are drawn at random. A file in WikiText's
    tokenized form (`<unk>`, ` @-@ `) is made text again by `graphprune.models.data.wikitext` first;
    of a table (*.tsv) the column of text is read, a row a line.

    Args:
        source: a text file in UTF-8.
        inputs: names of the model's inputs.
        tokenizer_dir: where the tokenizer's files are.
        segments: how many to draw; of a shorter text all are taken, with a warning.
        length: tokens of each.
        seed: for the drawing.
        batch: segments that run together; their logits are held at once.

    Raises:
        GraphPruneError: the file is no text or has not one segment, or the model takes an input
            that no tokenizer makes.
    """
    if min(segments, length, batch) < 1:
        raise GraphPruneError(
            f"segments, length and batch are at least 1, got {segments}, {length} and {batch}"
        )
    text = "\n".join(_rows(source))
    if wikitext.is_tokenized(text):
        text = wikitext.plain_text(text)
    (ids,) = encoder(tokenizer_dir, special=True)([text])
    found = len(ids) // length
    if not found:
        raise GraphPruneError(
            f"{str(source)!r} has {len(ids)} tokens, fewer than one segment of {length}, which is "
            "what a language model is calibrated on: give a longer text"
        )
    if found < segments:
        _log.warning(
            "%s gives %d segments of %d tokens for calibration, not the %d that were asked for",
            source,
            found,
            length,
            segments,
        )
    drawn = sorted(random.Random(seed).sample(range(found), min(segments, found)))
    rows = torch.tensor([ids[i * length : (i + 1) * length] for i in drawn])
    return [_chosen(_unpadded(part), inputs) for part in torch.split(rows, batch)]


def predicts_tokens(program: Program) -> bool:
    """Whether a program's first output is logits [batch, tokens, vocabulary] over its input_ids.

    It is recognized by the width: as many logits as the table that input_ids look up has rows.
    """
    graph = program.forward.graph
    outputs = next(iter(reversed(graph.nodes))).args[0]
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 3:
        return False
    tables = [n.args[0] for n in graph.nodes if is_op(n, "embedding") and _of_ids(n.args[1])]
    return any(
        isinstance(table, fx.Node) and table.meta["val"].shape[0] == value.shape[2]
        for table in tables
    )


def _of_ids(node: object) -> bool:
    """Whether a node is input_ids, perhaps in another shape or type."""
    while isinstance(node, fx.Node) and is_op(node, "view", "reshape", "_to_copy", "clone"):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name == "input_ids"


def count_tokens(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, int]:
    """How much there is: {"samples": rows} and, for text, "tokens" without the padding."""
    samples = sum(len(next(iter(b.values()))) for b in batches)
    if any("input_ids" not in b for b in batches):
        return {"samples": samples}
    tokens = sum(
        int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in batches
    )
    return {"samples": samples, "tokens": tokens}


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def _chosen(made: Mapping[str, Tensor], inputs: Sequence[str]) -> dict[str, Tensor]:
    """Choose the inputs that the model takes from those that a tokenizer made."""
    missing = [name for name in inputs if name not in made]
    if missing:
        raise GraphPruneError(
            f"a tokenizer does not make the inputs {missing} of this model: give an .npz file "
            "with an array for each input"
        )
    return {name: made[name] for name in inputs}


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


def _rows(file: Path) -> list[str]:
    """The lines of a text, or the text column of a table."""
    try:
        rows = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise GraphPruneError(f"{str(file)!r} is no UTF-8 text file") from e
    return _column(file, rows) if file.suffix == ".tsv" else rows


def _sentences(file: Path) -> list[str]:
    """Distinct sentences of a file, in their order."""
    rows = _rows(file)
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


def _arrays(file: Path, inputs: Sequence[str], lines: int) -> CalibrationBatches:
    with _opened(file) as found:
        arrays: Mapping[str, Tensor] = {
            name: torch.from_numpy(found[name]) for name in inputs if name in found
        }
        names = list(found)
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


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of an .npz file, each read when it is asked for."""
    try:
        with np.load(file, allow_pickle=False) as found:
            yield found
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise GraphPruneError(f"{str(file)!r} is no .npz file of plain arrays: {e}") from e
