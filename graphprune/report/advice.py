"""What to try next, as commands, by what an artifact's report says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from graphprune.report.measured import GOOD, Measured
from graphprune.report.report import Report

PLACES = (
    "OUT is this folder and OUT2 a new one, MODEL what was compiled, FILE text or labeled data "
    "of yours."
)
_MOST = 5
# Tasks that a model can be trained on, with what their data are given by.
_TRAINABLE = {"classification": "--train FILE ", "regression": "--train FILE ", "digits": ""}
_BY_AGREEMENT = "neighbors"


class Advice(NamedTuple):
    """Something to try: why, and the command."""

    why: str
    command: str


def next_steps(report: Report, found: Measured) -> list[Advice]:
    """What is worth trying after this result, the most pressing first."""
    return [*_quality(report, found), *_speed(report, found), *_size(found)][:_MOST]


def _quality(report: Report, found: Measured) -> Iterator[Advice]:
    """What keeps more of the quality, or says how much is kept."""
    pruned = found.quality.get("pruned")
    if pruned is None:
        yield Advice(
            "Nothing says yet what the model is worth: evaluate it beside the dense one.",
            "graphprune eval OUT --task TASK --data FILE",
        )
        return
    task = str(pruned["task"])
    data = _TRAINABLE.get(task, "--train FILE ")
    if found.guessing():
        yield Advice(
            "Train the dense model longer, or at another rate, before anything is cut.",
            f"graphprune compile MODEL -o OUT2 --task {task} {data}--epochs 5",
        )
        return
    if found.tiles()[2].color == GOOD:
        return
    if _by_weights_alone(report):
        yield Advice(
            "Units were chosen by their weights alone: calibration data find those that matter "
            "less, and let the others compensate.",
            "graphprune compile MODEL -o OUT2 --heads 0.25 --neurons 0.25 --calibration FILE",
        )
    if task in _TRAINABLE:
        yield Advice(
            "Training toward the dense model recovers much of what a cut loses.",
            f"graphprune compile MODEL -o OUT2 --heads 0.25 --neurons 0.25 --task {task} "
            f"{data}--distill 3",
        )
    elif task != _BY_AGREEMENT:
        yield Advice(
            "Ask for the fastest model that loses little, instead of for a speed or a size.",
            f"graphprune compile MODEL -o OUT2 --max-drop 0.01 --task {task} --data FILE",
        )
    yield Advice(
        "See which layers are sensitive, and get a recipe that spares them.",
        "graphprune sensitivity MODEL --calibration FILE --recipe spared.yaml",
    )


def _speed(report: Report, found: Measured) -> Iterator[Advice]:
    """How to get, or measure, more speed."""
    if any("sites" in details for _, details in report.steps()) and not any(
        p.resized for p in report.passes
    ):
        yield Advice(
            "Zeros in weights are multiplied like all others: to gain time, remove whole units.",
            "graphprune compile MODEL -o OUT2 --faster 2",
        )
    times = found.times()
    if not times or found.is_glance:
        yield Advice("Measure the speed on this machine.", f"{found.command} --note")
    elif found.tiles()[2].color == GOOD:
        more = max(1.5, math.ceil(2 * times[0].ratio + 1) / 2)
        yield Advice(
            "The quality held: ask for more speed.",
            f"graphprune compile MODEL -o OUT2 --faster {more:g}",
        )


def _size(found: Measured) -> Iterator[Advice]:
    """What int8 would give, of the pruned model and of the dense one."""
    if not found.quantized:
        yield Advice(
            "Eight-bit weights make the file about four times smaller.",
            "graphprune compile OUT -o OUT2 --quantize int8-dynamic",
        )
    times = found.times()
    if found.dense_bytes is not None and (not times or not times[0].others):
        yield Advice(
            "The dense model in int8 is what pruning competes with: measure it beside.",
            "graphprune bench OUT --against dense,int8 --note",
        )
    yield Advice(
        "With several results, see which are worth their cost.", "graphprune compare OUT OUT2"
    )


def _by_weights_alone(report: Report) -> bool:
    """Whether units were removed, and no pass that did so looked at data."""
    scores = [
        options.get("score", "magnitude")
        for p in report.passes
        if p.resized and isinstance(p.step, dict)
        for options in p.step.values()
        if isinstance(options, dict) and "ratio" in options
    ]
    return bool(scores) and set(scores) == {"magnitude"}
