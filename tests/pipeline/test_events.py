from __future__ import annotations

import dataclasses

import pytest

from graphprune.pipeline.events import (
    Event,
    PassFinished,
    PassProgress,
    PassStarted,
    PipelineFinished,
    PipelineStarted,
    emit,
)

EVENTS: list[Event] = [
    PipelineStarted(("a",)),
    PassStarted("a", 0, 1),
    PassProgress("a", 1, 2, "groups"),
    PassFinished("a", 0, 1, True, 0.1, 0.2, {}),
    PipelineFinished(True, 0.3),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_events_are_frozen(event: Event) -> None:
    field = dataclasses.fields(event)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, field, None)


def test_a_failing_observer_stops_neither_the_pipeline_nor_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Event] = []

    def broken(event: Event) -> None:
        raise OSError("the terminal is gone")

    emit([broken, seen.append], EVENTS[0])
    assert seen == [EVENTS[0]]
    assert "the terminal is gone" in caplog.text
