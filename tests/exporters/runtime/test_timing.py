"""Timings of sessions, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime import timing as module
from graphprune.exporters.runtime.timing import (
    compare,
    compare_all,
    compare_files,
    default_clock,
    interleaved,
)


class Clock:
    """Milliseconds that pass only while sessions run; who ran, in order."""

    def __init__(self) -> None:
        self.now, self.ran = 0, ""

    def __call__(self) -> int:
        return self.now


class Session:
    """Takes the given milliseconds, one after another, after two runs that do not count."""

    def __init__(self, clock: Clock, name: str, times: list[int]) -> None:
        self.clock, self.name, self.times = clock, name, [1000, 1000, *times]

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, outputs: None, feeds: dict[str, Any]) -> None:
        self.clock.ran += self.name
        self.clock.now += self.times.pop(0) * 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "_CLOCKS", {"wall": made, "cpu": made})
    return made


def test_rounds_go_in_turns_and_each_counts_its_fastest_run(clock: Clock) -> None:
    a = Session(clock, "a", [5, 3, 4, 9, 7, 8])
    b = Session(clock, "b", [10, 30, 20, 2, 1, 3])
    assert interleaved([a, b], {}, repeats=2, runs=3) == [[3, 7], [10, 1]]
    assert clock.ran == "aabb" + "aaabbb" * 2


def test_a_comparison_is_the_median_of_the_rounds_ratios(clock: Clock) -> None:
    """Each round is compared with itself: a machine that slows down slows both."""
    a = Session(clock, "a", [1, 2, 4, 8, 16])
    b = Session(clock, "b", [2, 6, 16, 40, 96])
    found = compare(a, b, {"x": np.zeros((2, 3))}, repeats=5, runs=1, threads=2)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (4, 3, 5)
    assert (found.model.ms, found.model.low, found.model.high) == (4, 2, 8)
    assert (found.against.ms, found.rounds, found.runs, found.threads) == (16, 5, 1, 2)
    assert (found.clock, found.shapes, found.others) == ("wall", {"x": (2, 3)}, {})


def test_several_opponents_share_the_rounds(clock: Clock) -> None:
    a, b, c = (Session(clock, n, [t] * 3) for n, t in (("a", 2), ("b", 4), ("c", 1)))
    found = compare_all(a, {"dense": b, "int8": c}, {}, repeats=3, runs=1)
    assert clock.ran == "aabbcc" + "abc" * 3
    assert (found.ratio, found.others["int8"].ratio) == (2, 0.5)
    assert list(found.others) == ["int8"]
    assert found.to_json()["others"]["int8"]["against"] == {"ms": 1.0, "low": 1.0, "high": 1.0}
    assert (default_clock(1), default_clock(2), found.clock) == ("cpu", "wall", "cpu")


# --- files -------------------------------------------------------------------------------------

MODEL, DENSE, OTHER = Path("model.onnx"), Path("dense.onnx"), Path("other.onnx")
FEEDS = {"x": np.zeros((2, 3))}


class Process:
    """Each file takes so many milliseconds, tuned; half as long again with default options."""

    times: Mapping[Path, float] = {MODEL: 2, DENSE: 4, OTHER: 1}
    inputs_of: Mapping[Path, dict[str, Any]] = {}

    def __init__(self, log: list[str], name: str, paths: list[Path]) -> None:
        self.log, self.name, self.paths = log, name, paths
        self.inputs = [self.inputs_of.get(path, {"x": [2, 3]}) for path in paths]

    def warm_up(self, feeds: Any) -> None:
        self.log.append(f"warm {self.name}")

    def round(self, runs: int, clock: str) -> list[float]:
        self.log.append(f"{self.name} {runs} {clock}")
        return [self.times[path] * (1 if self.name == "tuned" else 1.5) for path in self.paths]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the processes did, in order."""
    log: list[str] = []

    @contextmanager
    def child(paths: list[Path], threads: int, config: Mapping[str, str]) -> Iterator[Process]:
        yield Process(log, "tuned" if "session.set_denormal_as_zero" in config else "plain", paths)
        log.append("end")

    monkeypatch.setattr(module, "child", child)
    return log


def test_files_are_timed_with_both_sets_of_options_in_turns(log: list[str]) -> None:
    found = compare_files(MODEL, {"dense": DENSE, "other": OTHER}, FEEDS, repeats=2, runs=4)
    turn = ["tuned 4 cpu", "plain 4 cpu"]
    assert log == ["warm tuned", "warm plain", *turn, *turn, "end", "end"]
    assert (found.model.ms, found.against.ms, found.ratio, found.rounds) == (2, 4, 2, 2)
    assert found.default is not None
    assert (found.default.model.ms, found.default.against.ms, found.default.ratio) == (3, 6, 2)
    assert found.others["other"].against.ms == 1
    assert found.default.others["other"].against.ms == 1.5
    assert found.to_json()["default"]["shapes"] == {"x": (2, 3)}


def test_a_file_with_inputs_of_its_own_is_refused_before_anything_runs(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "inputs_of", {OTHER: {"x": [2, 3], "pixels": [1]}})
    with pytest.raises(GraphPruneError, match=r"'other' takes inputs \['pixels'\] that 'model"):
        compare_files(MODEL, {"dense": DENSE, "other": OTHER}, FEEDS, threads=2)
    assert log == []
