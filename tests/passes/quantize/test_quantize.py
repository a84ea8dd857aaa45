"""The pass: it marks, validates, and keeps what comes after from changing the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.errors import ArtifactError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import KEY, Mark
from graphprune.passes import (
    FoldConstants,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    Quantize,
    RemoveNoOps,
    Repeat,
)
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.pipeline.recipe import dump, loads
from graphprune.storage.program import load, save

Captured = Callable[[str], Program]


def marked(program: Program, **options: Any) -> Program:
    return Pipeline([Quantize("int8-dynamic", **options)]).run(program).program


def test_only_the_mark_changes(captured: Captured) -> None:
    program = captured("tiny-encoder")
    result = marked(program)
    assert program.quantization is None
    assert result.quantization == Mark("int8-dynamic")
    assert result.tensors is program.tensors
    assert result.entries is program.entries


def test_a_second_run_changes_nothing(captured: Captured) -> None:
    program = marked(captured("tiny-mlp"))
    result = Quantize("int8-dynamic").run(program, Context())
    assert (result.modified, result.program) == (False, program)


def test_another_scheme_replaces_the_mark(captured: Captured) -> None:
    program = marked(captured("tiny-mlp"))
    result = Quantize("int4-weights", block_size=16).run(program, Context())
    assert result.program.quantization == Mark("int4-weights", block_size=16)
    assert result.report["replaced"] == Mark("int8-dynamic").to_json()


def test_patterns_become_names(captured: Captured) -> None:
    program = captured("tiny-mlp")
    ignored = marked(program, ignore=("layers.2",))
    assert ignored.quantization == Mark("int8-dynamic", ("layers.2.weight",))
    only = marked(program, targets=("layers.0", "layers.4"))
    assert only.quantization == ignored.quantization


def test_a_mark_survives_saving(captured: Captured, tmp_path: Path) -> None:
    program = marked(captured("tiny-mlp"), ignore=("layers.2",), keep_error=0.01)
    save(program, tmp_path / "p")
    assert load(tmp_path / "p").quantization == program.quantization


def test_recipes_round_trip() -> None:
    passes = [Quantize("int8-static", ignore=("a.*",), keep_error=0.01, reduce_range=True)]
    assert loads(dump(passes)) == passes


@pytest.mark.parametrize(
    "late",
    [
        PruneNeurons(0.5),
        PruneHeads(0.5),
        PruneAxis(0.5, role="qk_dim"),
        PruneNeurons(0.5, score="obs"),
        Repeat((PruneNeurons(0.5),)),
    ],
    ids=lambda p: p.name,
)
def test_pruning_afterwards_is_refused(
    late: Any, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any) -> Any:
        raise AssertionError("work was done before the refusal")

    monkeypatch.setattr("graphprune.passes.structural.base.select", work)
    with pytest.raises(UnsupportedError, match=r"'prune-\w+' comes after 'quantize'.*prune first"):
        Pipeline([late]).run(marked(captured("tiny-encoder")))


def test_what_keeps_the_numbers_may_follow(captured: Captured) -> None:
    program = marked(captured("tiny-encoder"))
    result = Pipeline([RemoveNoOps(), FoldConstants()]).run(program).program
    assert result.quantization == program.quantization


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "fp8"}, "there are .*'int8-dynamic'"),
        ({"scheme": "int8-dynamik"}, "did you mean 'int8-dynamic'"),
        ({"scheme": 8}, "no quantization scheme 8"),
        ({"scheme": "int8-dynamic", "keep_error": 0}, "keep_error"),
        ({"scheme": "int8-dynamic", "keep_error": float("nan")}, "keep_error"),
        ({"scheme": "int8-dynamic", "keep_error": "1%"}, "keep_error"),
        ({"scheme": "int4-weights", "block_size": 48}, "block_size"),
        ({"scheme": "int4-weights", "block_size": True}, "block_size"),
        ({"scheme": "int8-dynamic", "ignore": "a"}, "tuple of name patterns"),
        ({"scheme": "int8-dynamic", "targets": ("re:(",)}, "no regular expression"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(**options)


def test_patterns_that_match_nothing_are_named(captured: Captured) -> None:
    with pytest.raises(RecipeError, match=r"ignore: 'layers.9.*' matches nothing"):
        Quantize("int8-dynamic", ignore=("layers.9.*",)).run(captured("tiny-mlp"), Context())


def test_static_ranges_need_calibration(captured: Captured) -> None:
    step = Quantize("int8-static")
    assert step.needs_calibration
    assert not Quantize("int8-dynamic").needs_calibration
    with pytest.raises(RecipeError, match="calibration batches"):
        step.run(captured("tiny-mlp"), Context())
    given = Context(calibration=[{"x": torch.randn(2, 12)}])
    assert step.run(captured("tiny-mlp"), given).modified


@pytest.mark.parametrize(
    "data", [1, {}, {"scheme": "int8-dynamic"}, {"scheme": "x", "ignored": []}]
)
def test_a_mark_that_is_none(data: Any, captured: Captured, tmp_path: Path) -> None:
    save(captured("tiny-mlp"), tmp_path / "p")
    file = tmp_path / "p" / "program.json"
    saved = json.loads(file.read_text())
    saved["metadata"][KEY] = data
    file.write_text(json.dumps(saved))
    with pytest.raises(ArtifactError, match="the program"):
        load(tmp_path / "p")
