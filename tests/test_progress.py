"""What is shown of long work: bars in a terminal, lines elsewhere, with the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import graphprune
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneNeurons, PruneRecover, RemoveNoOps, Repeat
from graphprune.pipeline.events import PassFinished, PassProgress, PassStarted
from graphprune.progress import Display, Lines, Stage, duration_text


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_durations_read_like_speech() -> None:
    seconds = (4.23, 9.99, 59.4, 89, 600, 3599, 3900)
    words = [duration_text(s) for s in seconds]
    assert words == ["4.2 s", "10 s", "59 s", "1 min 29 s", "10 min", "1 h 00 min", "1 h 05 min"]


def test_time_left_is_what_the_rest_takes_as_it_went() -> None:
    stage = Stage("train", 0.0)
    stage.count(0, 100, 0.0, "steps")
    assert stage.text(0.0) == "steps 0 of 100"
    stage.count(25, 100, 50.0, "steps", {"loss": 0.25})
    assert stage.text(50.0) == "steps 25 of 100 (about 2 min 30 s left), loss 0.25"
    # A count that begins anew is another one: half a second a step, as of now.
    stage.count(0, 100, 60.0, "steps")
    stage.count(10, 100, 65.0, "steps")
    assert stage.text(65.0) == "steps 10 of 100 (about 45 s left)"
    stage.count(100, 100, 80.0, "steps")
    assert stage.text(80.0) == "steps 100 of 100"
    stage.count(100, 100, 80.0, "steps", {"loss": 0.25}, "epoch 2/2")
    assert stage.text(80.0) == "steps 100 of 100, epoch 2/2, loss 0.25"


def test_a_loop_is_shown_with_what_runs_in_it() -> None:
    stage = Stage("budget", 0.0)
    stage.count(0, 6, 0.0, "budgets")
    stage.count(40, 100, 30.0, "models")
    stage.count(2, 6, 60.0, "budgets")
    assert stage.text(60.0) == "budgets 2 of 6 (about 2 min 00 s left)"
    stage.count(0, 100, 60.0, "models")
    stage.count(50, 100, 70.0, "models")
    assert stage.text(70.0).endswith(", models 50 of 100 (about 10 s left)")
    assert stage.inner is not None
    assert stage.inner.label == "models"
    # Work that does not run in a loop takes the place of what was before it.
    stage.count(1, 8, 80.0, "groups")
    assert "models" not in stage.text(80.0)


def test_lines_come_at_most_every_ten_seconds_and_at_the_end_of_a_stage() -> None:
    clock, written = Clock(), list[str]()
    lines = Lines(written.append, clock)
    stage = Stage("budget", 0.0)
    lines.begin(stage)
    for second in range(100):
        clock.now = float(second)
        stage.count(second, 200, clock.now, "models")
        lines.look()
    assert len(written) == 9
    assert written[0] == "budget: models 10 of 200 (about 3 min 10 s left), 10 s so far"
    clock.now = 100.0
    lines.end(stage, "verified")
    assert written[9:] == ["budget: done in 1 min 40 s, verified"]
    lines.look()
    assert len(written) == 10


def test_lines_come_more_seldom_the_longer_a_stage_runs_and_without_any_count() -> None:
    clock, written = Clock(), list[str]()
    lines = Lines(written.append, clock)
    lines.begin(Stage("export", 0.0))
    for second in range(1200):
        clock.now = float(second)
        lines.look()
    assert written[0] == "export: 10 s so far"
    assert 35 < len(written) < 45


@pytest.mark.parametrize("terminal", [False, True])
def test_passes_are_followed(terminal: bool) -> None:
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=120, legacy_windows=False, _environ={}
    )
    with Display(console) as display:
        with display.step("capture") as advance:
            advance(1, 2)
        display.observe(PassStarted("repeat", 0, 1))
        display.observe(PassProgress("repeat", 1, 3, "repeats"))
        display.observe(PassProgress("finetune", 5, 10, "steps", {"loss": 0.5}))
        display.observe(PassFinished("repeat", 0, 1, True, 1.0, 0.0, {"verification": {}}))
        display.observe(PassStarted("distill", 0, 1))
        display.observe(PassProgress("distill", 10, 10, "steps", {"loss": 0.5}, "epoch 2/2"))
        display.observe(PassFinished("distill", 0, 1, True, 1.0, 0.0, {"metric_after": 0.9}))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert ("━" in text) == terminal
    if not terminal:
        assert text.splitlines() == [
            "capture: done in 0.0 s",
            "repeat: done in 0.0 s, verified",
            "distill: done in 0.0 s, epoch 2/2, loss 0.5",
        ]


def test_what_a_pass_runs_is_named_beside_its_repeats() -> None:
    written = Stage("repeat", 0.0)
    written.count(1, 3, 0.0, "repeats")
    written.count(5, 10, 0.0, "finetune: steps", {"loss": 0.5})
    assert written.text(0.0) == "repeats 1 of 3, finetune: steps 5 of 10, loss 0.5"


def test_compile_shows_its_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = tiny("tiny-mlp")
    graphprune.compile(model, [PruneNeurons(0.5)], example_inputs=inputs, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    capture, neurons = shown.err.splitlines()
    assert capture.startswith("capture: done in ")
    assert neurons.startswith("prune-neurons: done in ")
    assert neurons.endswith(", verified")
    graphprune.compile(model, [PruneNeurons(0.5)], example_inputs=inputs)
    assert capsys.readouterr().err == ""


def test_passes_that_run_others_count_their_repeats() -> None:
    model, inputs = tiny("tiny-mlp")
    seen: list[object] = []
    recipe = [PruneRecover((PruneNeurons(0.5),), rounds=2), Repeat((RemoveNoOps(),), at_most=2)]
    graphprune.compile(model, recipe, example_inputs=inputs, observers=[seen.append])
    repeats = [e for e in seen if isinstance(e, PassProgress) and e.unit == "repeats"]
    assert [(e.name, e.done, e.total) for e in repeats] == [
        ("prune-recover", 0, 2),
        ("prune-recover", 1, 2),
        ("repeat", 0, 2),
    ]
