"""Calibration batches from a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.cli.sizes import input_names, problem_of, resized
from graphprune.cli.subject import Subject
from graphprune.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.ir.program import Program
    from graphprune.pipeline.base import Pass


def check_calibration(steps: Sequence[Pass], source: Path | None, *, trains: bool = False) -> None:
    """Refuse, before a model is loaded, passes that need data without any, or an unreadable file.

    Args:
        steps: the passes.
        source: the file, or None.
        trains: whether there are training data, which calibrate too.

    Raises:
        GraphPruneError: a pass needs data and there are none, or the file cannot be read.
    """
    from graphprune.api import calibration_for
    from graphprune.models.data.calibration import check_source

    if source is None:
        calibration_for([] if trains else steps, None)
    else:
        check_source(source)


def calibration(
    subject: Subject, program: Program, source: Path, lines: int
) -> list[dict[str, Tensor]]:
    """Calibration batches from a file, as `graphprune.models.data.calibration` reads it.

    A language model gets running text, in segments of 512 tokens or as long as it takes.

    Raises:
        GraphPruneError: the file is missing, holds nothing usable, or the model takes no text.
    """
    from graphprune.models.data.calibration import SEGMENT, calibration_batches, predicts_tokens
    from graphprune.models.tasks.base import longest

    names = input_names(program)
    segment = SEGMENT if predicts_tokens(program) else 0
    # A model with learned positions has only so many.
    while segment > 1 and problem_of(program, resized(program, (1, segment))):
        segment //= 2
    return calibration_batches(
        source,
        names,
        subject.tokenizer_dir,
        lines,
        segment=segment,
        length=longest(program),
    )


def bundled_calibration(subject: Subject, program: Program, lines: int) -> list[dict[str, Tensor]]:
    """Calibration batches of text that every Python installation has: its help topics.

    Those sentences are left out that the task "neighbors" is evaluated on.

    Raises:
        RecipeError: the model does not read text.
    """
    if "input_ids" not in input_names(program) or subject.tokenizer_dir is None:
        raise RecipeError(
            f"a budget is met on calibration data, and {subject.name!r} does not read text: give "
            "--calibration FILE, an .npz with an array for each input"
        )
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        file = Path(folder) / "sentences.txt"
        file.write_text("\n".join(python_text(lines)), encoding="utf-8")
        return calibration(subject, program, file, lines)


def python_text(lines: int) -> list[str]:
    """Sentences of Python's help topics, without those that "neighbors" is evaluated on."""
    from graphprune.models.tasks.neighbors import SENTENCES, python_sentences

    evaluated = set(python_sentences(SENTENCES))
    found = [s for s in python_sentences(SENTENCES + 2 * lines) if s not in evaluated]
    return found[:lines]
