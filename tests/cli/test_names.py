"""Names that are known without torch, completion of them, and errors before torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


CASES = {
    "compile ./nothere --faster 3 -o x": "no folder './nothere'",
    "compile nothere --faster 3 -o x": "the hub cannot be reached",
    "compile minilmm --faster 3 -o x": "did you mean 'minilm'",
    "compile own.py:make --faster 3 -o x": "no file 'own.py'",
    "compile tiny-mlp -o x": "nothing to do",
    "compile tiny-mlp --faster 3 -o file": "is a file",
    "compile tiny-mlp --faster 3 --heads 0.5 -o x": "a budget chooses",
    "compile tiny-mlp --heads 1 -o x": "below 1",
    "compile tiny-mlp --faster 0.5 -o x": "above 1",
    "compile tiny-mlp --faster 3 --quantize int9 -o x": "'int8-dynamic'",
    "compile tiny-mlp --recipe prune-heads -o x": "is a pass",
    "compile tiny-mlp --recipe prune-haeds -o x": "'prune-heads'",
    "compile tiny-mlp --recipe small --heads .5 -o x": "not both",
    "compile tiny-mlp --heads .5 --layout hbu -o x": "'hub'",
    "compile tiny-mlp --heads .5 --task classification --train x.tsv -o x": "'x.tsv'",
    "compile tiny-mlp --heads .5 --calibration x -o x": "file 'x'",
    "compile tiny-mlp --heads .5 --lr 1 -o x": "needs --task",
    "compile tiny-mlp --max-drop .1 --metric own.py -o x": "FILE.py:FUNCTION",
    "eval tiny-mlp": "give --task",
    "eval tiny-mlp --task stss": "'sts'",
    "eval tiny-mlp --metric own.py:f": "no file 'own.py'",
    "front tiny-mlp --faster 1 -o x": "above 1",
    "inspect tiny-mpl": "'tiny-mlp'",
    "sensitivity tiny-mlp --ratios 2": "below 1",
    "sensitivity tiny-mlp --plot page.pdf": ".html",
    "compare out": "two or more",
}
COMPLETIONS = {
    "graphprune compile tiny-d": "tiny-deit tiny-distilbert",
    "graphprune passes prune-h": "prune-heads",
    "graphprune compile m --recipe edge-": "edge-int8",
    "graphprune compile m --quantize int4": "int4-weights",
    "graphprune compile m --score fl": "fluctuation",
    "graphprune eval m --task per": "perplexity",
}


def test_what_words_alone_show_is_refused_and_completed_without_torch(tmp_path: Path) -> None:
    """All in one process, because starting one takes longer than any of the cases."""
    (tmp_path / "file").write_text("mine")
    code = """
import json, os, sys
from typer.testing import CliRunner
from graphprune.cli.app import app
cases, completions = json.loads(sys.argv[1])
os.chdir(sys.argv[2])
runner, found = CliRunner(), {}
for words in cases:
    result = runner.invoke(app, words.split())
    found[words] = (result.exit_code, result.stderr, 'torch' in sys.modules)
for words in completions:
    env = {'_GRAPHPRUNE_COMPLETE': 'complete_bash', 'COMP_WORDS': words,
           'COMP_CWORD': str(len(words.split()) - 1)}
    result = runner.invoke(app, [], env=env, prog_name='graphprune')
    found[words] = (0, result.stdout, 'torch' in sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([list(CASES), list(COMPLETIONS)]), tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        check=True,
    )
    found = json.loads(done.stdout)
    for words, says in CASES.items():
        code, stderr, torch = found[words]
        assert (code, stderr.count("\n")) == (2, 1), words
        assert says in stderr, words
        assert not torch, words
    for words, names_ in COMPLETIONS.items():
        assert found[words][1].split() == names_.split(), words
        assert not found[words][2], words
