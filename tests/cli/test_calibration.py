"""Calibration without a file: text that every Python has, other than what a task evaluates on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graphprune.cli.calibration import bundled_calibration, python_text
from graphprune.cli.summary import Summary
from graphprune.ir.program import Program
from graphprune.models.tasks.neighbors import SENTENCES, python_sentences
from tests.cli.test_generate import tokenizer_json


def test_the_text_is_none_that_neighbors_is_evaluated_on() -> None:
    found = python_text(200)
    assert len(found) == 200
    assert not set(found) & set(python_sentences(SENTENCES))


def test_a_text_model_calibrates_on_it(captured: Callable[[str], Program], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(99))
    subject: Any = SimpleNamespace(name="tiny-bert", tokenizer_dir=tmp_path)
    batches = bundled_calibration(subject, captured("tiny-bert"), 48)
    assert sum(len(batch["input_ids"]) for batch in batches) == 48
    assert all(int(batch["input_ids"].max()) < 99 for batch in batches)


def test_the_summary_says_so() -> None:
    given: Any = {"model": "m", "path": Path(), "upload": 0.0, "report": None}
    rest: Any = {"megabytes": {}, "timing": None, "quality": {}}
    found = Summary(**given, **rest, calibration={"samples": 1024}, bundled=True)
    assert found.calibrated_on() == (
        "1,024 samples of Python's help topics: --calibration FILE of your own text does better"
    )
