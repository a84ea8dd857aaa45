"""Names that are known without torch, completion of them, and errors before torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphprune.cli import names
from graphprune.exporters.artifact.export import TARGETS
from graphprune.exporters.onnx.files import WEIGHTS
from graphprune.models import tasks
from graphprune.passes.structural.allocation import ALLOCATIONS
from graphprune.passes.structural.scores import SCORES
from graphprune.pipeline.registry import registered


def test_the_lists_of_names_are_true() -> None:
    built_in = [n for n, c in registered().items() if c.__module__.startswith("graphprune.passes.")]
    assert names.pass_names() == built_in
    assert list(names.TASKS) == list(tasks.TASKS)
    assert names.TRAINABLE == tasks.TRAINABLE
    found = {n for n, task in tasks.TASKS.items() if task.compares}
    assert set(names.COMPARING) == found
    found = {n for n, task in tasks.TASKS.items() if task.examples is not None}
    assert set(names.BRINGS_DATA) == found
    assert set(names.SCORES) == {"random", *SCORES} - {"largest-reader"}  # that of an example
    assert set(names.ALLOCATIONS) == set(ALLOCATIONS)
    assert names.WEIGHTS == WEIGHTS
    assert tuple(TARGETS) == names.TARGETS


def _started(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose stderr ends with whether torch came in."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from graphprune.cli import main\n"
        "sys.argv[0] = 'graphprune'\n"
        "main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **more},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compile", "./nothere", "--faster", "3", "-o", "x"), "no folder './nothere'"),
        (("compile", "nothere", "--faster", "3", "-o", "x"), "the hub cannot be reached"),
        (("compile", "minilmm", "--faster", "3", "-o", "x"), "did you mean 'minilm'"),
        (("compile", "own.py:make", "--faster", "3", "-o", "x"), "no file 'own.py'"),
        (("compile", "tiny-mlp", "-o", "x"), "nothing to do"),
        (("compile", "tiny-mlp", "--faster", "3", "-o", "file"), "is a file"),
        (("compile", "tiny-mlp", "--faster", "3", "--heads", "1", "-o", "x"), "below 1"),
        (("compile", "tiny-mlp", "--faster", "0.5", "-o", "x"), "above 1"),
        (("compile", "tiny-mlp", "--faster", "3", "--quantize", "int9", "-o", "x"), "'int8-dy"),
        (("compile", "tiny-mlp", "--recipe", "prune-heads", "-o", "x"), "is a pass"),
        (("compile", "tiny-mlp", "--recipe", "prune-haeds", "-o", "x"), "'prune-heads'"),
        (("compile", "tiny-mlp", "--recipe", "small", "--heads", ".5", "-o", "x"), "not both"),
        (("compile", "tiny-mlp", "--heads", ".5", "--layout", "hbu", "-o", "x"), "'hub'"),
        (("compile", "tiny-mlp", "--heads", ".5", "--train", "x.tsv", "-o", "x"), "'x.tsv'"),
        (("compile", "tiny-mlp", "--heads", ".5", "--calibration", "x", "-o", "x"), "file 'x'"),
        (("compile", "tiny-mlp", "--heads", ".5", "--lr", "1", "-o", "x"), "needs --task"),
        (("eval", "tiny-mlp"), "give --task"),
        (("eval", "tiny-mlp", "--task", "stss"), "'sts'"),
        (("eval", "tiny-mlp", "--metric", "own.py"), "FILE.py:FUNCTION"),
        (("eval", "tiny-mlp", "--metric", "own.py:f"), "no file 'own.py'"),
        (("front", "tiny-mlp", "--faster", "1", "-o", "x"), "above 1"),
        (("inspect", "tiny-mpl"), "'tiny-mlp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_words_alone_show_is_refused_without_torch(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "file").write_text("mine")
    done = _started(tmp_path, *arguments, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 2
    sentence, torch = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert says in sentence
    assert torch == "False"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("graphprune compile tiny-d", "tiny-deit tiny-distilbert"),
        ("graphprune passes prune-h", "prune-heads"),
        ("graphprune compile m --recipe edge-", "edge-int8"),
        ("graphprune compile m --quantize int4", "int4-weights"),
        ("graphprune compile m --score fl", "fluctuation"),
        ("graphprune eval m --task per", "perplexity"),
    ],
)
def test_names_are_completed_without_torch(tmp_path: Path, words: str, expected: str) -> None:
    done = _started(
        tmp_path,
        _GRAPHPRUNE_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert done.stdout.split() == expected.split()
    assert done.stderr.endswith("False\n")
